"""Scenes packed many to a file, as pixelSplat distributes RealEstate10K, ACID and DL3DV: read in place.

A split is a folder of ``NNNNNN.torch`` files and an ``index.json`` (scene key -> file name). Each file is a
``torch.save`` of a list of ``{"key", "url", "timestamps": int64 [V], "cameras": float32 [V, 18], "images": list of
uint8 [n]}``, the images being JPEG files. A ``torch.save`` is an uncompressed zip archive, so every image lies in one
piece somewhere in the file. Where it lies is found out once per file and kept; after that an image is one read, and no
chunk is ever held in memory. Nothing that a chunk holds is executed: its table of contents is read by an unpickler
that knows lists, dictionaries and tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.data.images import DataError, duplicates
from elvsm_nerfstudio.data.names import check_name
from elvsm_nerfstudio.files import whole

CAMERA_ROW = 18
"""fx, fy, cx, cy (normalised by width and height), two unused, 3x4 world-to-camera (OpenCV), row major."""
MAX_CHUNK_INDICES = 64
"""Offset indices (about 0.2 MB each) that a process keeps."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ChunkScene:
    """One scene: its cameras, and where its images lie."""

    chunk: Path
    key: str
    cameras: Float[Tensor, "frame 18"]
    image_places: tuple[tuple[int, int], ...]
    """Offset and length in bytes of each frame's JPEG file within the chunk."""

    def image(self, frame: int) -> bytes:
        """The JPEG file of a frame."""
        offset, length = self.image_places[frame]
        with self.chunk.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def is_chunk_folder(folder: Path) -> bool:
    """Whether a folder is a split of chunks."""
    return (folder / "index.json").is_file() and next(folder.glob("*.torch"), None) is not None


@lru_cache(maxsize=8)
def read_keys(folder: Path) -> Mapping[str, str]:
    """The ``index.json`` of a split: scene key -> file name of its chunk, in the file's order.

    Raises:
        DataError: for a file that is no such index, or names a key twice.
    """
    path = folder / "index.json"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = duplicates(key for key, _ in pairs)
        if twice:
            raise DataError(f"{path} names scenes twice: {', '.join(twice[:5])}")
        return dict(pairs)

    try:
        keys = json.loads(path.read_text("utf8"), object_pairs_hook=unique)
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(keys, dict) or not keys or not all(isinstance(chunk, str) for chunk in keys.values()):
        raise DataError(f'{path} is not an index of chunks; expected {{"scene key": "000000.torch", ...}}')
    for name in {*keys, *keys.values()}:
        check_name(name, str(path))
    return keys


def read_scene(folder: Path, key: str) -> ChunkScene:
    """A scene of a split, without its images.

    Raises:
        DataError: for a key or chunk that is missing, a chunk that cannot be read, or cameras of another layout.
    """
    keys = read_keys(folder)
    if key not in keys:
        raise DataError(f"{folder / 'index.json'} has no scene {key}; it has {', '.join(list(keys)[:3])}, ...")
    chunk = folder / keys[key]
    index = _chunk_index(chunk)
    (positions,) = np.nonzero(index["keys"] == key)
    if len(positions) == 0:
        raise DataError(f"{chunk} has no scene {key}, though {folder / 'index.json'} says so; make the index anew")
    position = positions[0]
    num_frames, row = index["camera_shape"][position].tolist()
    first, last = index["first_image"][position : position + 2].tolist()
    if row != CAMERA_ROW:
        raise DataError(f"{chunk}, scene {key}: camera rows of {row} numbers; expected {CAMERA_ROW}")
    if last - first != num_frames:
        raise DataError(f"{chunk}, scene {key}: {last - first} images but {num_frames} cameras")
    with chunk.open("rb") as file:
        file.seek(int(index["camera_offset"][position]))
        data = file.read(4 * CAMERA_ROW * num_frames)
    cameras = torch.frombuffer(bytearray(data), dtype=torch.float32).view(num_frames, CAMERA_ROW)
    places = zip(index["image_offset"][first:last].tolist(), index["image_length"][first:last].tolist())
    return ChunkScene(chunk, key, cameras, tuple(places))


# ---------------------------------------------------------------------------------------------------------------------
# Where things lie in a chunk
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=MAX_CHUNK_INDICES)
def _chunk_index(chunk: Path) -> Mapping[str, np.ndarray]:
    try:
        status = chunk.stat()
    except FileNotFoundError:
        raise DataError(f"{chunk} does not exist, though the index.json beside it names it") from None
    state = np.array([status.st_size, status.st_mtime_ns])
    candidates = _index_files(chunk)
    for path in candidates:
        try:
            with np.load(path, allow_pickle=False) as file:
                kept = dict(file)
            if np.array_equal(kept["state"], state):
                return kept
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # absent, cut off, of an older version, or of another file: made anew below
    index = {"state": state, **_find_places(chunk)}
    for path in candidates:
        try:
            with whole(path) as partial, partial.open("wb") as file:
                np.savez(file, **index)
            break
        except OSError:
            continue  # a read-only data folder: the cache folder is next
    return index


def _index_files(chunk: Path) -> tuple[Path, Path]:
    """Where a chunk's offset index is kept: beside the data, or where that cannot be written, in the user's cache."""
    digest = hashlib.sha256(str(chunk.resolve()).encode()).hexdigest()[:16]
    beside = chunk.parent / ".offsets" / f"{chunk.stem}.npz"
    return beside, user_cache("chunk_offsets") / f"{chunk.stem}-{digest}.npz"


def user_cache(name: str) -> Path:
    """A folder of ours in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elvsm-nerfstudio" / name


class _StoredTensor(NamedTuple):
    storage: str
    dtype: str
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ContentsUnpickler(pickle.Unpickler):
    """Reads which tensors there are, and where, without reading them; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, stride, *_: _StoredTensor(*storage, first, tuple(shape), tuple(stride))
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"holds {module}.{name}; expected tensors, lists and dictionaries only")

    def persistent_load(self, pid: tuple) -> tuple[str, str]:
        kind, storage_type, storage, _location, _length = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"holds a {kind}; expected tensors only")
        return storage, storage_type


def _find_places(chunk: Path) -> dict[str, np.ndarray]:
    """Keys of a chunk's scenes, and where their cameras and images lie."""
    try:
        with zipfile.ZipFile(chunk) as archive, chunk.open("rb") as file:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            with archive.open(entries["data.pkl"]) as contents:
                scenes = _ContentsUnpickler(contents).load()

            def place(tensor: _StoredTensor, dtype: str, item: int) -> int:
                info = entries[f"data/{tensor.storage}"]
                if info.compress_type != zipfile.ZIP_STORED or tensor.dtype != dtype or not _is_contiguous(tensor):
                    raise ValueError(f"a {tensor.dtype} of shape {tensor.shape}; expected a contiguous {dtype}")
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name_length + extra_length
                return start + item * tensor.first

            keys = np.array([scene["key"] for scene in scenes])
            counts = [len(scene["images"]) for scene in scenes]
            images = [image for scene in scenes for image in scene["images"]]
            return {
                "keys": keys,
                "camera_offset": np.array([place(scene["cameras"], "FloatStorage", 4) for scene in scenes]),
                "camera_shape": np.array([scene["cameras"].shape for scene in scenes]),
                "first_image": np.cumsum([0, *counts]),
                "image_offset": np.array([place(image, "ByteStorage", 1) for image in images], dtype=np.int64),
                "image_length": np.array([image.shape[0] for image in images], dtype=np.int64),
            }
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, struct.error, ValueError, KeyError,
            IndexError, TypeError, AttributeError) as error:  # fmt: skip
        raise DataError(
            f"{chunk} cannot be read ({type(error).__name__}: {error}); expected a torch.save of a list of scenes with "
            "key, cameras and images. Fetch the file again, or take its scenes out of index.json"
        ) from error


def _is_contiguous(tensor: _StoredTensor) -> bool:
    expected, stride = [], 1
    for size in reversed(tensor.shape):
        expected.append(stride)
        stride *= size
    return tensor.stride == tuple(reversed(expected))
