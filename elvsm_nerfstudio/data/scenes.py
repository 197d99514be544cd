"""Scenes, one or thousands, each read through a nerfstudio dataparser when it is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Optional, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from torch import Tensor

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras
from elvsm_nerfstudio.data.camera_checks import NO_PARALLAX, checked
from elvsm_nerfstudio.data.chunks import SPLITS, is_chunk_folder, read_keys
from elvsm_nerfstudio.data.images import (
    DataError,
    ImageSpec,
    Window,
    decode_image,
    downscaled_copy,
    duplicates,
    fit_image,
    is_cut_out,
    reductions,
)
from elvsm_nerfstudio.data.names import check_file, check_name, natural_order
from elvsm_nerfstudio.data.notices import say_once
from elvsm_nerfstudio.data.posed_frames import FRAME_NUMBERS, PosedFramesDataParserConfig
from elvsm_nerfstudio.data.posed_json_dataparser import LIST_NAME, PosedJsonDataParserConfig, read_list
from elvsm_nerfstudio.data.realestate10k_dataparser import ENCODED_IMAGES, RealEstate10KDataParserConfig
from elvsm_nerfstudio.geometry import resize_and_crop_intrinsics

Split = Literal["train", "val", "test"]
AnyImage = TypeVar("AnyImage", np.ndarray, Image.Image)

SCENE_MARKERS = ("transforms.json", "transforms_train.json", "colmap", "sparse")
"""A folder that holds one of these is a scene."""
MAX_PARSED_FRAMES = 20_000
"""Frames (their cameras and file names, 0.7 kB each) of parsed scenes that a process keeps."""
MAX_KEPT_BYTES = 128 * 2**20
"""Decoded images of a single capture that a process keeps: 680 of 256 x 256."""
MAX_VAL_SCENES = 64
"""Scenes that are taken out of the train split for validation where a data set has none."""

COLMAP_FOLDERS = ("colmap/sparse/0", "sparse/0", "colmap/sparse", "sparse")
"""Where a COLMAP reconstruction is looked for, unless --colmap-path names one that is there."""


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
    """All frames, in natural order of their file names (2 before 10); of chunks and posed JSONs in their own order."""
    train_frames: tuple[int, ...]
    """Frames to train on, and to take context views from."""
    eval_frames: tuple[int, ...]
    """Frames held out as evaluation targets; all frames where the scene itself is held out."""
    val_frames: Optional[tuple[int, ...]] = None
    """Frames that a training is validated on instead, where the dataparser has such."""
    _packed_cameras: dict[ImageSpec, Float[Tensor, "frame 25"]] = field(default_factory=dict, repr=False)
    _reductions: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _kept: KeptImages = field(default_factory=lambda: KeptImages(0), repr=False)

    @property
    def cameras(self) -> Cameras:
        return self.outputs.cameras

    @cached_property
    def train_poses(self) -> Float[Tensor, "frame 3 4"]:
        """Camera-to-world of the train frames, OpenGL axes."""
        return self.cameras.camera_to_worlds[list(self.train_frames)]

    @property
    def num_frames(self) -> int:
        return len(self.outputs.image_filenames)

    @cached_property
    def frame_names(self) -> list[str]:
        """What to call the frames: the names of their files, with their number where folders have the same ones."""
        stems = [file.stem for file in self.outputs.image_filenames]
        if not duplicates(stems):
            return stems
        return [f"{frame:05d}_{stem}" for frame, stem in enumerate(stems)]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        return [tuple(size) for size in torch.cat([self.cameras.height, self.cameras.width], dim=-1).tolist()]

    @cached_property
    def intrinsics(self) -> Float[Tensor, "frame 4"]:
        """fx, fy, cx, cy in pixels of the images as they are on disk."""
        cameras = self.cameras
        return torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)

    @cached_property
    def is_cut_out(self) -> bool:
        """Whether the images (the first stands for all) show something before a transparent background."""
        file, content = self._file(0)
        reduction = self._reduction(0, 0.0)
        return is_cut_out(file if reduction == 1 else downscaled_copy(file, reduction), content, self._mask(0))

    def packed_cameras(self, spec: ImageSpec) -> Float[Tensor, "frame 25"]:
        """Cameras of every frame, of the images that ``read_images`` gives, packed (``pack_cameras``); made once."""
        if spec not in self._packed_cameras:
            resized = torch.tensor([spec.resized(size) for size in self.sizes])
            cropped = resize_and_crop_intrinsics(self.intrinsics, torch.tensor(self.sizes), resized, spec.size)
            (fx, fy, cx, cy), (height, width) = cropped[..., None].unbind(-2), spec.size
            cameras = dataclasses.replace(self.cameras, fx=fx, fy=fy, cx=cx, cy=cy, height=height, width=width)
            self._packed_cameras[spec] = pack_cameras(cameras)
        return self._packed_cameras[spec]

    def cropped_cameras(self, frames: Sequence[int], spec: ImageSpec) -> Cameras:
        """Cameras [frame] of the images that ``read_images`` gives."""
        cameras = unpack_cameras(self.packed_cameras(spec)[list(frames)])
        if self.cameras.distortion_params is None:
            cameras.distortion_params = None
        return cameras

    def read_images(
        self,
        frames: Sequence[int],
        spec: ImageSpec,
        out: Optional[UInt8[Tensor, "frame height width 3"]] = None,
        windows: Optional[Sequence[Window]] = None,
    ) -> UInt8[Tensor, "frame height width 3"]:
        """Images of some frames, resized and cropped; a frame that comes twice is decoded once.

        Args:
            out: where to put them; new memory if absent.
            windows: the part of each frame to show, in place of the middle.

        Raises:
            DataError: naming an image that cannot be used.
        """
        images = torch.empty(len(frames), *spec.size, 3, dtype=torch.uint8) if out is None else out
        pixels, first = images.numpy(), {}
        for i, frame in enumerate(frames):
            if frame in first and windows is None:
                pixels[i] = pixels[first[frame]]
                continue
            pixels[i] = self._view(frame, spec, None if windows is None else windows[i])
            first[frame] = i
        return images

    def _view(self, frame: int, spec: ImageSpec, window: Optional[Window]) -> UInt8[np.ndarray, "height width 3"]:
        size = self.sizes[frame]
        if window is None:
            resized = spec.resized(size)
            ratio = max(resized[0] / size[0], resized[1] / size[1])
            return self._kept.get((frame, spec), lambda: fit_image(self._picture(frame, spec, ratio), size, spec))
        ratio = max(spec.size[0] / (window.bottom - window.top), spec.size[1] / (window.right - window.left))
        picture = self._kept.get(
            (frame, spec.background, self._reduction(frame, ratio)), lambda: self._picture(frame, spec, ratio)
        )
        return fit_image(picture, size, spec, window)

    def _picture(self, frame: int, spec: ImageSpec, ratio: float) -> Image.Image:
        file, content = self._file(frame)
        reduction = self._reduction(frame, ratio)
        file = file if reduction == 1 else downscaled_copy(file, reduction)
        return decode_image(file, self.sizes[frame], spec.background, content, self._mask(frame), reduction)

    def _reduction(self, frame: int, ratio: float) -> int:
        """Of the copy to read where an image is resized by some ratio: the smallest that need not be enlarged."""
        if frame not in self._reductions:
            file, content = self._file(frame)
            self._reductions[frame] = (1,) if content is not None else reductions(file, self.sizes[frame])
        there = self._reductions[frame]
        return max((reduction for reduction in there if reduction * ratio <= 1), default=there[0])

    def _mask(self, frame: int) -> Optional[Path]:
        masks = self.outputs.mask_filenames
        return None if masks is None else masks[frame]

    def _file(self, frame: int) -> tuple[Path, Optional[bytes]]:
        """A frame's image file, and its content where it is no file of its own."""
        encoded = self.outputs.metadata.get(ENCODED_IMAGES)
        file = self.outputs.image_filenames[frame]
        try:
            return file, None if encoded is None else encoded[frame]
        except OSError as error:
            raise DataError(f"image {file} cannot be read ({error})") from error


class KeptImages:
    """Decoded images in memory, within a bound: what a capture is trained on comes again at every step."""

    def __init__(self, max_bytes: int):
        self.left = max_bytes
        self._images: dict[Hashable, np.ndarray | Image.Image] = {}

    def get(self, key: Hashable, make: Callable[[], AnyImage]) -> AnyImage:
        """A kept image, or a new one, which is kept as long as there is room."""
        if key in self._images:
            return self._images[key]
        image = make()
        num_bytes = image.nbytes if isinstance(image, np.ndarray) else 3 * image.width * image.height
        if num_bytes <= self.left:
            self._images[key] = image
            self.left -= num_bytes
        return image


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
        refusal = None
        if not isinstance(dataparser, (NerfstudioDataParserConfig, PosedFramesDataParserConfig)):
            refusal = _refusal(dataparser, data)
            if refusal is None:
                return _single_scene(data, data.resolve().name, data, dataparser)
        inside = sorted((folder for folder in data.iterdir() if folder.is_dir()), key=natural_order)
        folders = [folder for folder in inside if _is_scene(folder)]
        if refusal is not None and len(folders) < 3 and inside and _refusal(dataparser, inside[0]) is None:
            folders = inside
        if len(folders) < 3:
            raise DataError(
                f"--data {data}: found {len(folders)} scenes in it; expected a scene (a folder with one of "
                f"{', '.join(SCENE_MARKERS)}), a scenes.json, chunks (train/index.json and test/index.json), lists of "
                f"scenes (train/{LIST_NAME}, test/{LIST_NAME}), or a folder of at least 3 scenes (train, val and test)"
                + (f". {type(dataparser).__name__.removesuffix('Config')} says: {refusal}" if refusal else "")
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
                outputs = _all_frames(self.dataparser, entry.path)
                frames = tuple(range(len(outputs.image_filenames)))
                scene = Scene(entry.name, outputs, frames, frames)
            else:
                scene = self._parse_split_frames(entry)
            single_precision = not isinstance(self.dataparser, PosedFramesDataParserConfig)
            return dataclasses.replace(scene, outputs=checked(entry.name, scene.outputs, single_precision))
        except ZeroDivisionError as error:  # a dataparser that scales the cameras to size 1
            raise DataError(f"scene {entry.name} ({entry.path}) cannot be used: {NO_PARALLAX}") from error
        except Exception as error:  # dataparsers raise anything from KeyError to AssertionError
            raise DataError(f"scene {entry.name} ({entry.path}) cannot be used: {_reason(error)}") from error

    def _parse_split_frames(self, entry: SceneEntry) -> Scene:
        splits = _by_split(self.dataparser, entry.path)
        outputs = _all_frames(self.dataparser, entry.path)
        position = {file: i for i, file in enumerate(outputs.image_filenames)}
        held_out = self._held_out.get(entry.name, frozenset()) & set(range(len(outputs.image_filenames)))
        frames = {
            split: set(part.metadata.get(FRAME_NUMBERS) or (position[file] for file in part.image_filenames))
            for split, part in splits.items()
        }
        train = frames["train"]
        test = frames.get("test", frames.get("val", set())) | held_out
        val = frames.get("val", set()) | held_out
        if "val" not in frames and not _splits_evenly(self.dataparser, entry.path):
            say_once("no val", f"Scene {entry.name} has no val split: a training is validated on its test frames.")
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


def _refusal(config: DataParserConfig, path: Path) -> Optional[str]:
    """Why a dataparser cannot read a folder as one scene; None if it can."""
    try:
        _parser_config(config, path).setup().get_dataparser_outputs("train")
    except Exception as error:  # dataparsers raise anything from KeyError to AssertionError
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if "K4/K5/K6" in str(error):
        return (
            "its COLMAP camera model has a fourth radial coefficient, which nerfstudio's colmap dataparser refuses; "
            "convert it with `ns-process-data images --skip-colmap`, whose transforms.json may have one"
        )
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _parser_config(config: DataParserConfig, path: Path, **options) -> DataParserConfig:
    """A dataparser's config for a scene, without what nothing here looks at.

    Args:
        options: where the dataparser has them.
    """
    wanted = {"extract_images": False, "load_3D_points": False, **options}
    if getattr(config, "downscale_factor", 1) is None:
        wanted["downscale_factor"] = 1  # downscaled copies are found when images are read
    if isinstance(config, ColmapDataParserConfig):
        folders = [Path(folder) for folder in (config.colmap_path, *COLMAP_FOLDERS)]
        kinds = ("cameras.txt", "cameras.bin")
        there = (folder for folder in folders if any((path / folder / kind).exists() for kind in kinds))
        wanted["colmap_path"] = next(there, config.colmap_path)
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, data=path, **{k: v for k, v in wanted.items() if k in known})


def _by_split(config: DataParserConfig, path: Path) -> dict[str, DataparserOutputs]:
    """A scene's frames by split, of those splits that it has; train is always among them."""
    parser = _parser_config(config, path).setup()
    outputs = {"train": parser.get_dataparser_outputs("train")}
    for split in ("test",) if _splits_evenly(config, path) else ("test", "val"):
        try:
            outputs[split] = parser.get_dataparser_outputs(split)
        except RuntimeError as error:  # a transforms.json that lists files of other splits
            if "is missing" not in str(error):
                raise
        except FileNotFoundError as error:  # a split that is a file of its own
            if error.filename is None or split not in Path(error.filename).stem:
                raise
    if len(outputs) == 1:
        raise DataError("it has a train split but neither val nor test")
    return outputs


def _all_frames(config: DataParserConfig, path: Path) -> DataparserOutputs:
    """All frames of a scene, of whatever split."""
    if isinstance(config, PosedFramesDataParserConfig):
        return _parser_config(config, path, eval_mode="all").setup().get_dataparser_outputs()
    if _splits_evenly(config, path):
        options = {"eval_mode": "fraction", "train_split_fraction": 1.0}
        return _by_name([_parser_config(config, path, **options).setup().get_dataparser_outputs()])
    return _by_name(list(_by_split(config, path).values()))


def _splits_evenly(config: DataParserConfig, path: Path) -> bool:
    """Whether a dataparser holds frames out by their number, the same for val and test: where it can, unless the scene
    says itself which frames are in which split, in its transforms.json or beside a COLMAP model."""
    if isinstance(config, PosedFramesDataParserConfig):
        return True
    file = path / "transforms.json" if path.is_dir() else path
    listed = file.suffix == ".json" and file.is_file() and b'_filenames"' in file.read_bytes()
    listed |= any((path / f"{split}_list.txt").exists() for split in SPLITS)
    return hasattr(config, "train_split_fraction") and not listed


def _by_name(parts: Sequence[DataparserOutputs]) -> DataparserOutputs:
    """Each frame of some splits once, in order of file names: COLMAP numbers images as its threads come to them."""
    files = [file for part in parts for file in part.image_filenames]
    first = {file: i for i, file in reversed(list(enumerate(files)))}
    ordered = sorted(first, key=natural_order)
    index = [first[file] for file in ordered]
    masks = [mask for part in parts for mask in part.mask_filenames or ()]
    return dataclasses.replace(
        parts[0],
        image_filenames=ordered,
        cameras=_concatenate([part.cameras for part in parts])[torch.tensor(index, dtype=torch.long)],
        mask_filenames=[masks[i] for i in index] if len(masks) == len(files) else None,
    )


def _concatenate(parts: Sequence[Cameras]) -> Cameras:
    def column(name: str):
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")
    return Cameras(**{name: column(name) for name in names})
