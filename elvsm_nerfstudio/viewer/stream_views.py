"""Views that come one by one: a scene replayed, or a folder that grows while it is watched."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from torch import Tensor

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.views import Views

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class View:
    """A view that has arrived, as the network gets it."""

    name: str
    camera: Cameras
    """[1], of the cropped image, on the CPU."""
    rgb: Float[Tensor, "height width 3"]

    @staticmethod
    def read(scene: Scene, frame: int, spec: ImageSpec, device: torch.device) -> View:
        rgb = scene.read_images([frame], spec)[0].to(device).float() / 255
        return View(scene.frame_names[frame], scene.cropped_cameras([frame], spec), rgb)

    def as_context(self) -> Views:
        return views_from_cameras(self.camera, patch_size=1, rgb=self.rgb[None])


def replayed(scene: Scene, frames: Sequence[int], spec: ImageSpec, device: torch.device) -> Iterator[View]:
    """Frames of a scene, one after another.

    Raises:
        DataError: naming an image that cannot be read.
    """
    for frame in frames:
        yield View.read(scene, frame, spec, device)


class WatchedFolder:
    """A capture that grows: frames are appended to its transforms.json while we look.

    Cameras are taken as they are written, neither turned, centred nor scaled: that would depend on frames to come.
    """

    def __init__(self, folder: Path, spec: ImageSpec, device: torch.device, idle_seconds: float):
        self.folder, self.spec, self.device, self.idle_seconds = folder, spec, device, idle_seconds
        self.unreadable: dict[str, str] = {}
        """Listed frames that cannot be read yet, and why."""

    def views(self) -> Iterator[View]:
        """Frames in the order in which they arrive, until none has for ``idle_seconds``."""
        seen: set[str] = set()
        last_news = time.monotonic()
        while time.monotonic() - last_news < self.idle_seconds:
            for frame, meta in self._listed():
                name = str(frame.get("file_path"))
                if name in seen:
                    continue
                try:
                    view = View.read(self._scene(frame, meta), 0, self.spec, self.device)
                except DataError as error:
                    self.unreadable[name] = str(error)
                    continue
                seen.add(name)
                self.unreadable.pop(name, None)
                yield view
                last_news = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _listed(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Frames in the file as it is now, each with what the file says of all; none while it is being written."""
        try:
            meta = json.loads((self.folder / "transforms.json").read_text("utf8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return []
        # Lists of frames by split, point clouds and the world's orientation concern whole captures.
        whole = ("frames", "ply_file_path", "orientation_override")
        shared = {k: v for k, v in meta.items() if k not in whole and not k.endswith("_filenames")}
        return [(frame, shared) for frame in meta.get("frames", [])]

    def _scene(self, frame: dict[str, Any], meta: dict[str, Any]) -> Scene:
        """The scene of one frame, through nerfstudio's dataparser.

        Raises:
            DataError: where the frame has no camera that the dataparser understands.
        """
        with tempfile.TemporaryDirectory() as name:
            try:
                frame = {k: v for k, v in frame.items() if k not in ("mask_path", "depth_file_path")}
                frame["file_path"] = str((self.folder / frame["file_path"]).resolve())
                file = Path(name) / "transforms.json"
                file.write_text(json.dumps({**meta, "frames": [frame]}))
                parser = NerfstudioDataParserConfig(
                    data=file,
                    orientation_method="none",
                    center_method="none",
                    auto_scale_poses=False,
                    downscale_factor=1,
                    eval_mode="fraction",
                    train_split_fraction=1.0,
                )
                outputs = parser.setup().get_dataparser_outputs("train")
            except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
                raise DataError(
                    f"frame {frame.get('file_path')} of {self.folder}/transforms.json cannot be used "
                    f"({type(error).__name__}: {error})"
                ) from error
        return Scene(self.folder.name, outputs, train_frames=(0,), eval_frames=(0,))
