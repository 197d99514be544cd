"""From photos or a video to a capture: a folder with transforms.json that nerfstudio reads."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.poses.mapping import CameraModel, Mapping, Matching, load_pycolmap, pairs_to_match
from elvsm_nerfstudio.poses.photos import Photo, check_source, copy_photos, find_photos, is_video
from elvsm_nerfstudio.poses.picture import write_picture
from elvsm_nerfstudio.poses.video import extract_sharp_frames
from elvsm_nerfstudio.stages import Stages

if TYPE_CHECKING:
    import pycolmap

MIN_PHOTOS = 3
"""Fewer with a camera are no capture: two show no scale that a third could check."""
MIN_SHARE = 0.25
"""Of the photos; cameras of fewer are more likely a chance fit than a part of the scene."""
WORK, REPORT, PICTURE = "colmap", "poses.json", "poses.png"

WHAT_HELPS = """What helps:
- more photos, each showing at least half of what the one before shows, from places a step apart (turning on the spot
  shows no depth); 20 to 80 are usual. A slow video around the scene is the simplest: elvsm poses VIDEO.mp4
- sharp photos in even light, at one zoom, of things that do not move; surfaces with texture rather than bare walls,
  glass or mirrors (a newspaper under the object helps)
- cameras of another program that needs fewer photos, in COLMAP's format: elvsm show DIR, with its model in DIR/sparse
  and the photos in DIR/images"""


@dataclass(frozen=True)
class PoseOptions:
    """How cameras are found."""

    num_frames: int = 60
    """Frames to take from a video."""
    camera_model: CameraModel = "SIMPLE_RADIAL"
    """Lens of the photos: one focal length and one distortion parameter; OPENCV has four of distortion, OPENCV_FISHEYE
    is for very wide lenses, PINHOLE for photos that have been undistorted."""
    matching: Matching = "auto"
    """Which pairs of photos are compared: all of them, or photos near each other in order of their names, as in a
    video. 'auto': all, but for videos of more than 150 frames."""


@dataclass(frozen=True)
class PoseReport:
    """What came out, as it stands in poses.json beside transforms.json."""

    photos: int
    registered: int
    missing: list[str]
    """Photos whose cameras were not found."""
    reprojection_error: float
    """Mean reprojection error, in pixels."""
    points: int
    cameras: list[dict[str, Any]]
    """Each camera's model, size, parameters as COLMAP orders them, and whether its focal length began at EXIF's."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each stage took."""

    def describe(self) -> str:
        """What a user wants to know, in sentences."""
        text = (
            f"{self.registered} of {self.photos} photos have a camera; mean reprojection error "
            f"{self.reprojection_error:.2f} pixels, {self.points} points."
        )
        if self.missing:
            text += f"\nWithout one, and not in the capture: {', '.join(self.missing)}"
        return text


def make_capture(source: Path, output: Path, options: PoseOptions, stages: Stages) -> PoseReport:
    """Finds the cameras of photos (a folder) or of a video, and writes a capture.

    ``output`` gets ``images``, ``transforms.json``, ``sparse_pc.ply``, ``poses.json``, ``poses.png`` and, in
    ``colmap``, the database and the model. Called again after an interruption it goes on; after success it returns
    the same report. Other photos or options begin anew.

    Args:
        stages: gets a bar for each stage.

    Raises:
        DataError: where the photos cannot be read, the folder is of something else, or too few photos have cameras;
            then no capture is written.
        ValueError: where pycolmap is missing.
    """
    load_pycolmap()
    check_source(source)
    from_video = is_video(source)
    files = [source] if from_video else find_photos(source)
    if not from_video and len(files) < MIN_PHOTOS:
        raise DataError(f"{source}: found {len(files)} photos; expected at least {MIN_PHOTOS}\n{WHAT_HELPS}")
    work = _Work(output, files, options)
    if work.is_done():
        return PoseReport(**json.loads((output / REPORT).read_text("utf8")))
    work.begin()
    images = output / "images"
    if from_video:
        files = work.frames()
        if files is None:
            with stages.stage("Frames of the video", 100) as stage:
                files = extract_sharp_frames(
                    source, images, options.num_frames, lambda share: stage.reach(int(100 * share))
                )
            work.remember_frames(files)
    with stages.stage("Photos", len(files)) as stage:
        photos = copy_photos(files, images, stage.advance)
    names = [photo.name for photo in photos]
    mapping = Mapping(images, output / WORK, options.camera_model)
    with stages.stage("Features", len(photos)) as stage:
        mapping.extract(photos, stage.advance)
    pairs = pairs_to_match(names, options.matching, from_video)
    with stages.stage("Pairs of photos", len(pairs)) as stage:
        mapping.match(pairs, stage.advance)
    with stages.stage("Cameras", len(photos)) as stage:
        model = mapping.reconstruct(stage.reach)

    report = _report(model, photos, dict(stages.seconds))
    _check_usable(source, report)
    with stages.stage("Capture", 2) as stage:
        write_picture(output / PICTURE, model)
        stage.advance()
        _write_capture(output)
        stage.advance()
    write_json(output / REPORT, asdict(report))
    work.end()
    return report


class _Work:
    """What a capture is being made from, so that it can be gone on with."""

    def __init__(self, output: Path, files: list[Path], options: PoseOptions):
        self.output, self.file = output, output / WORK / "source.json"
        listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self.source = json.loads(json.dumps({"files": listed, "options": asdict(options)}))

    def _state(self) -> dict[str, Any]:
        try:
            return json.loads(self.file.read_text("utf8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return {}

    def is_done(self) -> bool:
        """Whether the capture of these photos is there."""
        state = self._state()
        complete = all((self.output / name).is_file() for name in ("transforms.json", REPORT))
        return complete and state.get("done", False) and state.get("source") == self.source

    def begin(self) -> None:
        """Takes the folder; what was found of other photos is removed from it.

        Raises:
            DataError: for a folder with a capture that is not of ours.
        """
        state = self._state()
        if not state and (self.output / "transforms.json").exists():
            raise DataError(f"{self.output} holds a capture already (transforms.json); choose another --output")
        if not state and (self.output / WORK).exists():
            raise DataError(f"{self.output / WORK} exists and is not of this program; choose another --output")
        if state.get("source") == self.source:
            return
        if state:
            (self.output / "transforms.json").unlink(missing_ok=True)
            shutil.rmtree(self.output / WORK)
        write_json(self.file, {"source": self.source})

    def frames(self) -> Optional[list[Path]]:
        """The frames that were taken from the video, where that has been done."""
        names = self._state().get("frames")
        files = [self.output / "images" / name for name in names or ()]
        return files if names and all(file.is_file() for file in files) else None

    def remember_frames(self, files: list[Path]) -> None:
        write_json(self.file, {**self._state(), "frames": [file.name for file in files]})

    def end(self) -> None:
        write_json(self.file, {**self._state(), "done": True})


def _report(model: Optional[pycolmap.Reconstruction], photos: list[Photo], seconds: dict[str, float]) -> PoseReport:
    names = [photo.name for photo in photos]
    if model is None:
        return PoseReport(len(names), 0, names, 0.0, 0, [], seconds)
    found = {model.image(id).name for id in model.reg_image_ids()}
    cameras = [
        {
            "model": camera.model_name,
            "width": camera.width,
            "height": camera.height,
            "parameters": camera.params.tolist(),
            "focal_length_from_exif": camera.has_prior_focal_length,
        }
        for camera in model.cameras.values()
    ]
    return PoseReport(
        photos=len(names),
        registered=len(found),
        missing=[name for name in names if name not in found],
        reprojection_error=round(model.compute_mean_reprojection_error(), 3),
        points=model.num_points3D(),
        cameras=cameras,
        seconds=seconds,
    )


def _check_usable(source: Path, report: PoseReport) -> None:
    if report.registered >= max(MIN_PHOTOS, MIN_SHARE * report.photos):
        return
    raise DataError(
        f"{source}: the cameras of {report.registered} of {report.photos} photos were found, too few for a capture; "
        f"not of {', '.join(report.missing[:20])}{', ...' if len(report.missing) > 20 else ''}\n{WHAT_HELPS}"
    )


def _write_capture(output: Path) -> None:
    """transforms.json and sparse_pc.ply, by nerfstudio, from the model."""
    from nerfstudio.process_data.colmap_utils import colmap_to_json

    partial = output / WORK / "partial"
    partial.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints all cameras where there are several
        colmap_to_json(output / WORK / "sparse" / "0", partial)
    for name in ("sparse_pc.ply", "transforms.json"):
        os.replace(partial / name, output / name)
    partial.rmdir()
