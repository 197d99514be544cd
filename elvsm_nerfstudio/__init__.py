"""Efficient-LVSM, feed-forward novel view synthesis, for nerfstudio.

Kept free of imports: nerfstudio loads this package while its own modules are half imported.
"""

__version__ = "0.2.0"
