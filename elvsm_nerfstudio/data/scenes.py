"""Scenes, one or thousands, each read through a nerfstudio dataparser when it is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from torch import Tensor

from elvsm_nerfstudio.cameras import check_cameras, resize_and_crop_cameras
from elvsm_nerfstudio.data.images import Background, DataError, read_image
from elvsm_nerfstudio.geometry import cover_size

Split = Literal["train", "val", "test"]

SCENE_MARKERS = ("transforms.json", "transforms_train.json", "colmap", "sparse")
"""A folder that holds one of these is a scene."""
MAX_PARSED_SCENES = 512
"""Parsed scenes (cameras and file names, a few kB each) that a process keeps."""


@dataclass(frozen=True)
class SceneEntry:
    """A scene of a collection, not yet opened."""

    name: str
    path: Path
    split: Split


@dataclass(frozen=True)
class Scene:
    """Posed images of one scene: cameras at the original image size, images still on disk."""

    name: str
    outputs: DataparserOutputs
    """All frames, in order of their file names."""
    train_frames: tuple[int, ...]
    """Frames to train on, and to take context views from."""
    eval_frames: tuple[int, ...]
    """Frames held out as evaluation targets; all frames where the scene itself is held out."""

    @property
    def cameras(self) -> Cameras:
        return self.outputs.cameras

    @property
    def num_frames(self) -> int:
        return len(self.outputs.image_filenames)

    def frame_name(self, frame: int) -> str:
        return self.outputs.image_filenames[frame].stem

    def cropped_cameras(self, frames: Sequence[int], size: tuple[int, int]) -> Cameras:
        """Cameras [frame] of the images that ``read_images`` gives."""
        cameras = self.cameras[torch.tensor(list(frames))]
        sizes = torch.cat([cameras.height, cameras.width], dim=-1).tolist()
        resized = torch.tensor([cover_size((height, width), size) for height, width in sizes])
        return resize_and_crop_cameras(cameras, resized, size)

    def read_images(
        self, frames: Sequence[int], size: tuple[int, int], background: Background
    ) -> UInt8[Tensor, "frame height width 3"]:
        """Images of some frames, resized and cropped to (height, width)."""
        images = []
        for frame in frames:
            camera_size = int(self.cameras.height[frame]), int(self.cameras.width[frame])
            images.append(read_image(self.outputs.image_filenames[frame], camera_size, size, background))
        return torch.stack(images)


class SceneCollection:
    """Scenes by split. A single capture is a collection of one, whose frames are split instead.

    Args:
        entries: scenes, in a fixed order.
        dataparser: config of the dataparser that every scene goes through.
        whole_scenes: scenes belong to one split as a whole, so all their frames may be used in it; if not, the
            dataparser splits the frames of each.
    """

    def __init__(self, root: Path, entries: Sequence[SceneEntry], dataparser: DataParserConfig, whole_scenes: bool):
        self.root = root
        self.entries = list(entries)
        self.dataparser = dataparser
        self.whole_scenes = whole_scenes
        self._parsed: OrderedDict[str, Scene] = OrderedDict()

    @staticmethod
    def open(data: Path, dataparser: DataParserConfig) -> SceneCollection:
        """Opens what ``--data`` names; no scene's own files are read yet.

        Args:
            data: a scene (its folder or a transforms*.json), a ``scenes.json`` or the folder that holds it, or a
                folder of scenes. A folder of scenes without ``scenes.json`` is split by the hash order of the
                names: a tenth (at least one) test, as many val, the rest train.
        """
        if not data.exists():
            raise DataError(f"--data {data} does not exist")
        if data.name == "scenes.json" or (data / "scenes.json").exists():
            file = data if data.is_file() else data / "scenes.json"
            return SceneCollection(file.parent, _read_entries(file), dataparser, whole_scenes=True)
        if data.is_file() or any((data / marker).exists() for marker in SCENE_MARKERS):
            folder = data.parent if data.is_file() else data
            entries = [SceneEntry(folder.resolve().name, data, split) for split in ("train", "val", "test")]
            return SceneCollection(folder, entries, dataparser, whole_scenes=False)
        folders = [f for f in sorted(data.iterdir()) if any((f / marker).exists() for marker in SCENE_MARKERS)]
        if len(folders) < 3:
            raise DataError(
                f"--data {data}: found {len(folders)} scenes in it; expected a scene (a folder with one of "
                f"{', '.join(SCENE_MARKERS)}), a scenes.json, or a folder of at least 3 scenes (train, val and test)"
            )
        return SceneCollection(data, _split_by_hash(folders), dataparser, whole_scenes=True)

    def split(self, split: Split) -> list[SceneEntry]:
        """The scenes of a split, in their fixed order."""
        return [entry for entry in self.entries if entry.split == split]

    def load(self, entry: SceneEntry) -> Scene:
        """The scene, parsed and checked; kept for the next time within bounds.

        Raises:
            DataError: naming the scene and what is wrong with it.
        """
        if entry.name not in self._parsed:
            self._parsed[entry.name] = self._parse(entry)
            if len(self._parsed) > MAX_PARSED_SCENES:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(entry.name)
        return self._parsed[entry.name]

    def _parse(self, entry: SceneEntry) -> Scene:
        try:
            if self.whole_scenes:
                outputs = _parser_config_for_whole_scene(self.dataparser, entry.path).setup().get_dataparser_outputs()
                frames = tuple(range(len(outputs.image_filenames)))
                scene = Scene(entry.name, outputs, frames, frames)
            else:
                scene = self._parse_split_frames(entry)
            if scene.num_frames == 0:
                raise DataError("it has no frames")
            check_cameras(scene.cameras)
        except Exception as error:  # dataparsers raise anything from KeyError to AssertionError
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            raise DataError(f"scene {entry.name} ({entry.path}) cannot be used: {reason}") from error
        return scene

    def _parse_split_frames(self, entry: SceneEntry) -> Scene:
        parser = dataclasses.replace(self.dataparser, data=entry.path).setup()
        train, test = parser.get_dataparser_outputs("train"), parser.get_dataparser_outputs("test")
        files = [*train.image_filenames, *test.image_filenames]
        first = {file: i for i, file in reversed(list(enumerate(files)))}
        ordered = sorted(first)
        cameras = _concatenate([train.cameras, test.cameras])[torch.tensor([first[file] for file in ordered])]
        position = {file: i for i, file in enumerate(ordered)}
        return Scene(
            entry.name,
            dataclasses.replace(train, image_filenames=ordered, cameras=cameras),
            train_frames=tuple(position[file] for file in train.image_filenames),
            eval_frames=tuple(position[file] for file in test.image_filenames),
        )


def _read_entries(file: Path) -> list[SceneEntry]:
    """The scenes that a ``scenes.json`` lists: name, path relative to the file, split."""
    try:
        listed = json.loads(file.read_text("utf8"))["scenes"]
        entries = [SceneEntry(scene["name"], file.parent / scene["path"], scene["split"]) for scene in listed]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a scene list ({type(error).__name__}: {error}); expected "
            '{"scenes": [{"name": ..., "path": ..., "split": "train" | "val" | "test"}, ...]}'
        ) from error
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not entries or twice:
        raise DataError(f"{file} lists " + (f"scenes twice: {', '.join(twice)}" if twice else "no scenes"))
    return entries


def _split_by_hash(folders: Sequence[Path]) -> list[SceneEntry]:
    ranked = sorted(folders, key=lambda folder: hashlib.sha256(folder.name.encode()).hexdigest())
    held_out = max(1, len(folders) // 10)
    split = {f: "test" if i < held_out else "val" if i < 2 * held_out else "train" for i, f in enumerate(ranked)}
    return [SceneEntry(folder.name, folder, split[folder]) for folder in folders]


def _parser_config_for_whole_scene(config: DataParserConfig, path: Path) -> DataParserConfig:
    """A dataparser's config that puts all frames into its train split and never looks for downscaled copies."""
    wanted = {"eval_mode": "fraction", "train_split_fraction": 1.0}
    if getattr(config, "downscale_factor", 1) is None:
        wanted["downscale_factor"] = 1
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, data=path, **{k: v for k, v in wanted.items() if k in known})


def _concatenate(parts: Sequence[Cameras]) -> Cameras:
    def column(name: str):
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")
    return Cameras(**{name: column(name) for name in names})
