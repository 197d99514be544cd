"""Data sets that are rendered here: all of ``elvsm data``. Needs the extra ``objects``."""
