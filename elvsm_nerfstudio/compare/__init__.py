"""Methods compared on the same photos: all of ``elvsm compare``."""
