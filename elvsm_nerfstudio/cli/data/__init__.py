"""Data sets that are rendered here: furniture, rooms, scanned things."""

from __future__ import annotations

import sys

from elvsm_nerfstudio.cli import Verbs, dispatch

VERBS: Verbs = {
    "objects": ("objects", "820 pieces of furniture, each seen from all around"),
    "rooms": ("rooms", "walks through furnished rooms, a stand-in for RealEstate10K"),
    "scanned": ("scanned", "18 scanned things with photo textures, to evaluate with"),
}
EXAMPLES = """
examples:
  elvsm data objects --output data/objects64 --resolution 64
  elvsm data rooms --output data/rooms --resolution 144 256 --chunks data/rooms_re10k
  elvsm data scanned --output data/scanned64
"""
EXTRA = ("moderngl", "trimesh", "embreex")
"""Packages of the extra ``objects``."""


def main(args: list[str]) -> None:
    """Command line."""
    try:
        dispatch("elvsm data", __name__, VERBS, args, "Renders synthetic data sets.", EXAMPLES)
    except ImportError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(
            f"error: the Python package {error.name} is missing. Install it: pip install 'elvsm-nerfstudio[objects]'"
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. The finished scenes are kept: start the same command again to go on.")
