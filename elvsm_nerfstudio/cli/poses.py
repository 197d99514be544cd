"""Finds the cameras of photos or of a video, and writes a capture that every method of nerfstudio takes as --data.

    elvsm poses PHOTOS --output CAPTURE                       # a folder of photos
    elvsm poses VIDEO.mp4 --output CAPTURE --num-frames 80    # sharp frames at even spacing

COLMAP runs on the CPU, by the package pycolmap (`pip install 'elvsm-nerfstudio[poses]'`); the program COLMAP is not
needed. Called again after an interruption it goes on. Beside transforms.json are poses.json, the report, and poses.png,
a picture of cameras and points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.poses.capture import PICTURE, REPORT, PoseOptions, make_capture
from elvsm_nerfstudio.stages import Stages


@dataclass
class Options:
    """Options."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PHOTOS_OR_VIDEO")]
    """Folder of photos, or a video."""
    output: Path
    """Folder to write; photos are copied into it."""
    poses: Annotated[PoseOptions, tyro.conf.arg(name="")] = field(default_factory=PoseOptions)


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(Options, "poses", __doc__, args)
    with Stages() as stages:
        report = make_capture(options.source, options.output, options.poses, stages)
    print(report.describe())
    print(f"Capture: {options.output}, report: {options.output / REPORT}, picture: {options.output / PICTURE}")
    print(f"Next: elvsm show {options.output}")
