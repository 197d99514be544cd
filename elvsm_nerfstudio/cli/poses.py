"""Finds the cameras of photos or of a video, and writes a capture that every method of nerfstudio takes as --data.

    elvsm poses PHOTOS --output CAPTURE                       # a folder of photos
    elvsm poses VIDEO.mp4 --output CAPTURE --num-frames 80    # sharp frames at even spacing

COLMAP runs on the CPU, by the package pycolmap (`pip install elvsm-nerfstudio[poses]`); the program COLMAP is not
needed. Called again after an interruption it goes on. Beside transforms.json are poses.json, the report, and poses.png,
a picture of cameras and points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.poses.capture import PICTURE, REPORT, PoseOptions, PoseReport, make_capture


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
    columns = TextColumn("[green]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console()
    with Progress(*columns, console=console) as progress:
        report = make_capture(options.source, options.output, options.poses, progress)
    print(describe(report))
    print(f"Capture: {options.output}, report: {options.output / REPORT}, picture: {options.output / PICTURE}")
    print(f"Next: elvsm show {options.output}")


def describe(report: PoseReport) -> str:
    """The report in sentences."""
    text = (
        f"{report.registered} of {report.photos} photos have a camera; mean reprojection error "
        f"{report.reprojection_error:.2f} pixels, {report.points} points."
    )
    if report.missing:
        text += f"\nWithout one, and not in the capture: {', '.join(report.missing)}"
    return text
