"""Weights of losses, metrics and teachers, from where they can be had: all of ``elvsm fetch``."""
