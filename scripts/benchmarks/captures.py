"""The captures that are measured on, beside the objects."""

CAPTURES = {"mary_rose": None, "fox": None, "chair": "blender-data"}
"""Names, and the dataparsers that read them where it is not nerfstudio's."""
