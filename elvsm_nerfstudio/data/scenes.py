"""Scenes, one or thousands, each read through a nerfstudio dataparser when it is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.data.camera_checks import NO_PARALLAX, checked
from elvsm_nerfstudio.data.chunks import SPLITS, is_chunk_folder, read_keys
from elvsm_nerfstudio.data.images import DataError, duplicates
from elvsm_nerfstudio.data.names import check_file, check_name, natural_order
from elvsm_nerfstudio.data.parsing import (
    all_frames,
    by_split,
    identities,
    other_dataparser,
    reason,
    refusal,
    splits_evenly,
)
from elvsm_nerfstudio.data.posed_frames import FRAME_NUMBERS, PosedFramesDataParserConfig
from elvsm_nerfstudio.data.posed_json_dataparser import LIST_NAME, PosedJsonDataParserConfig, read_list
from elvsm_nerfstudio.data.realestate10k_dataparser import RealEstate10KDataParserConfig
from elvsm_nerfstudio.data.scene import KeptImages, Scene
from elvsm_nerfstudio.notices import warn_once

Split = Literal["train", "val", "test"]

SCENE_MARKERS = ("transforms.json", "transforms_train.json", "colmap", "sparse")
"""A folder that holds one of these is a scene."""
MAX_PARSED_FRAMES = 20_000
"""Frames (their cameras and file names, 0.7 kB each) of parsed scenes that a process keeps."""
MAX_KEPT_BYTES = 128 * 2**20
"""Decoded images of a single capture that a process keeps: 680 of 256 x 256."""
MAX_VAL_SCENES = 64
"""Scenes that are taken out of the train split for validation where a data set has none."""


@dataclass(frozen=True)
class SceneEntry:
    """A scene of a collection, not yet opened."""

    name: str
    path: Path
    split: Split


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
        self._held_out: dict[str, frozenset[int]] = {}
        self._parsed: OrderedDict[str, Scene] = OrderedDict()
        self._parsed_frames = 0

    @staticmethod
    def open(data: Path, dataparser: DataParserConfig) -> SceneCollection:
        """Opens what ``--data`` names; no scene's own files are read yet.

        Args:
            data: a scene (its folder or a transforms*.json), a ``scenes.json`` or the folder that holds it, a data set
                in chunks (a folder with train/ and test/, or DIR/SPLIT/KEY for one scene), a text file that lists
                posed-JSON scenes or a folder with train/full_list.txt and test/full_list.txt, or a folder of scenes.
                Where a data set has no val split, a tenth of its train scenes (at least 1, at most 64), the first in
                hash order of their names, are val. Scenes without splits are split in the same order: a tenth (at
                least one) test, as many val, the rest train.
        """
        if data.name == "scenes.json" or (data / "scenes.json").exists():
            file = data if data.name == "scenes.json" else data / "scenes.json"
            return SceneCollection(file.parent, _read_entries(file), dataparser, whole_scenes=True)
        if is_chunk_folder(data.parent) and not data.exists():
            own = isinstance(dataparser, RealEstate10KDataParserConfig)
            parser = dataparser if own else RealEstate10KDataParserConfig()
            return _single_scene(data.parent, data.name, data, parser)
        if not data.exists():
            raise DataError(f"--data {data} does not exist")
        for matches, scenes_of, kind in _PACKED_FORMATS:
            parser = dataparser if isinstance(dataparser, kind) else kind()
            splits = {split: scenes_of(data / split) for split in SPLITS if matches(data / split)}
            if splits:
                return SceneCollection(data, _with_val(splits), parser, whole_scenes=True)
            if matches(data):
                return SceneCollection(data, _split_by_hash(scenes_of(data)), parser, whole_scenes=True)
        if data.is_file() or _is_scene(data):
            folder = data.parent if data.is_file() else data
            return _single_scene(folder, folder.resolve().name, data, dataparser)
        unreadable = None
        if not isinstance(dataparser, (NerfstudioDataParserConfig, PosedFramesDataParserConfig)):
            unreadable = refusal(dataparser, data)
            if unreadable is None:
                return _single_scene(data, data.resolve().name, data, dataparser)
        inside = sorted((folder for folder in data.iterdir() if folder.is_dir()), key=natural_order)
        folders = [folder for folder in inside if _is_scene(folder)]
        if unreadable is not None and len(folders) < 3 and inside and refusal(dataparser, inside[0]) is None:
            folders = inside
        if len(folders) < 3:
            raise DataError(
                f"--data {data}: found {len(folders)} scenes in it; expected a scene (a folder with one of "
                f"{', '.join(SCENE_MARKERS)}), a scenes.json, chunks (train/index.json and test/index.json), lists of "
                f"scenes (train/{LIST_NAME}, test/{LIST_NAME}), or a folder of at least 3 scenes (train, val and test)"
                + (f". {type(dataparser).__name__.removesuffix('Config')} says: {unreadable}" if unreadable else "")
            )
        entries = _split_by_hash([(folder.name, folder) for folder in folders])
        return SceneCollection(data, entries, dataparser, whole_scenes=True)

    def split(self, split: Split) -> list[SceneEntry]:
        """The scenes of a split, in their fixed order."""
        return [entry for entry in self.entries if entry.split == split]

    def hold_out(self, frames: Mapping[str, Collection[int]]) -> None:
        """Takes frames out of those that a capture is trained on: targets that an index names, by scene."""
        self._held_out = {name: frozenset(held_out) for name, held_out in frames.items()}
        self._parsed.clear()
        self._parsed_frames = 0

    def load(self, entry: SceneEntry) -> Scene:
        """The scene, parsed and checked; kept for the next time within bounds.

        Raises:
            DataError: naming the scene and what is wrong with it.
        """
        if entry.name in self._parsed:
            self._parsed.move_to_end(entry.name)
        else:
            scene = self._parsed[entry.name] = self._parse(entry)
            self._parsed_frames += scene.num_frames
            while self._parsed_frames > MAX_PARSED_FRAMES and len(self._parsed) > 1:
                _, oldest = self._parsed.popitem(last=False)
                self._parsed_frames -= oldest.num_frames
        scene = self._parsed[entry.name]
        if entry.split == "val" and scene.val_frames is not None:
            return dataclasses.replace(scene, eval_frames=scene.val_frames)
        return scene

    def _parse(self, entry: SceneEntry) -> Scene:
        try:
            if self.whole_scenes:
                outputs = all_frames(self.dataparser, entry.path)
                frames = tuple(range(len(outputs.image_filenames)))
                scene = Scene(entry.name, outputs, frames, frames)
            else:
                scene = self._parse_split_frames(entry)
            single_precision = not isinstance(self.dataparser, PosedFramesDataParserConfig)
            return dataclasses.replace(scene, outputs=checked(entry.name, scene.outputs, single_precision))
        except ZeroDivisionError as error:  # a dataparser that scales the cameras to size 1
            raise DataError(f"scene {entry.name} ({entry.path}) cannot be used: {NO_PARALLAX}") from error
        except Exception as error:  # dataparsers raise anything from KeyError to AssertionError
            hint = other_dataparser(self.dataparser, entry.path)
            raise DataError(f"scene {entry.name} ({entry.path}) cannot be used: {reason(error)}{hint}") from error

    def _parse_split_frames(self, entry: SceneEntry) -> Scene:
        splits = by_split(self.dataparser, entry.path)
        outputs = all_frames(self.dataparser, entry.path)
        position = {frame: i for i, frame in enumerate(identities(outputs))}
        held_out = self._held_out.get(entry.name, frozenset()) & set(range(len(outputs.image_filenames)))
        frames = {
            split: set(part.metadata.get(FRAME_NUMBERS) or (position[frame] for frame in identities(part)))
            for split, part in splits.items()
        }
        train = frames["train"]
        test = frames.get("test", frames.get("val", set())) | held_out
        val = frames.get("val", set()) | held_out
        if "val" not in frames and not splits_evenly(self.dataparser, entry.path):
            warn_once("no val", f"Scene {entry.name} has no val split: a training is validated on its test frames.")
        return Scene(
            entry.name,
            outputs,
            train_frames=tuple(sorted(train - held_out)),
            eval_frames=tuple(sorted(test)),
            val_frames=None if "val" not in frames or val == test else tuple(sorted(val)),
            _kept=KeptImages(MAX_KEPT_BYTES),
        )


def _read_entries(file: Path) -> list[SceneEntry]:
    """The scenes that a ``scenes.json`` lists: name, path relative to the file, split."""
    try:
        listed = json.loads(file.read_text("utf8"))["scenes"]
        entries = [SceneEntry(scene["name"], file.parent / scene["path"], scene["split"]) for scene in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a scene list ({type(error).__name__}: {error}); expected "
            '{"scenes": [{"name": ..., "path": ..., "split": "train" | "val" | "test"}, ...]}'
        ) from error
    _check_names(file, entries)
    return entries


def _check_names(where: Path, entries: Sequence[SceneEntry]) -> None:
    for entry in entries:
        check_file(str(entry.path), check_name(entry.name, str(where)))
        if entry.split not in SPLITS:
            raise DataError(f"{where}, scene {entry.name}: split {entry.split!r}; expected one of {', '.join(SPLITS)}")
    twice = duplicates(entry.name for entry in entries)
    if not entries or twice:
        raise DataError(f"{where} lists " + (f"scenes twice: {', '.join(twice[:5])}" if twice else "no scenes"))


def _in_chunks(folder: Path) -> list[tuple[str, Path]]:
    return [(key, folder / key) for key in read_keys(folder)]


def _is_list(data: Path) -> bool:
    return data.suffix == ".txt" or (data / LIST_NAME).is_file()


def _in_list(data: Path) -> list[tuple[str, Path]]:
    return [(scene.stem, scene) for scene in read_list(data if data.is_file() else data / LIST_NAME)]


_PACKED_FORMATS = (
    (is_chunk_folder, _in_chunks, RealEstate10KDataParserConfig),
    (_is_list, _in_list, PosedJsonDataParserConfig),
)
"""Whether a folder is one split of a format, names and paths of the scenes in it, and the dataparser for them."""


def _with_val(scenes: Mapping[str, Sequence[tuple[str, Path]]]) -> list[SceneEntry]:
    """Entries of a data set's splits (name and path of each scene); without a val split some of train become it."""
    entries = [SceneEntry(name, path, split) for split, listed in scenes.items() for name, path in listed]
    _check_names(entries[0].path.parent.parent, entries)
    if "val" in scenes:
        return entries
    train = sorted((entry for entry in entries if entry.split == "train"), key=lambda entry: _hash(entry.name))
    val = {entry.name for entry in train[: min(MAX_VAL_SCENES, max(1, len(train) // 10))]}
    return [dataclasses.replace(entry, split="val") if entry.name in val else entry for entry in entries]


def _split_by_hash(scenes: Sequence[tuple[str, Path]]) -> list[SceneEntry]:
    """Entries of scenes (name and path) without splits, in the order given."""
    ranked = sorted((name for name, _ in scenes), key=_hash)
    held_out = max(1, len(scenes) // 10)
    split = {n: "test" if i < held_out else "val" if i < 2 * held_out else "train" for i, n in enumerate(ranked)}
    entries = [SceneEntry(name, path, split[name]) for name, path in scenes]
    _check_names(entries[0].path.parent, entries)
    return entries


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _single_scene(root: Path, name: str, data: Path, dataparser: DataParserConfig) -> SceneCollection:
    entries = [SceneEntry(name, data, split) for split in SPLITS]
    return SceneCollection(root, entries, dataparser, whole_scenes=False)


def _is_scene(folder: Path) -> bool:
    return any((folder / marker).exists() for marker in SCENE_MARKERS)
