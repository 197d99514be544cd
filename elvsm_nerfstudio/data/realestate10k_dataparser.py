"""RealEstate10K, ACID or DL3DV as pixelSplat's chunks, for any nerfstudio method: one scene at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs

from elvsm_nerfstudio.data.chunks import SPLITS, ChunkScene, is_chunk_folder, read_keys, read_scene, user_cache
from elvsm_nerfstudio.data.images import DataError, open_image
from elvsm_nerfstudio.data.posed_frames import FRAME_NUMBERS, PosedFramesDataParserConfig, dataparser_outputs
from elvsm_nerfstudio.files import whole

ENCODED_IMAGES = "encoded_images"
"""Metadata entry: a sequence of the frames' image files, as bytes, of scenes whose images are no files of their own."""


@dataclass
class RealEstate10KDataParserConfig(PosedFramesDataParserConfig):
    """One scene of a data set in chunks."""

    _target: type = field(default_factory=lambda: RealEstate10K)
    """target class to instantiate"""
    data: Path = Path()
    """DIR/test/KEY: the scene KEY of DIR's test split. Or DIR/test, or DIR itself: the first scene there."""
    extract_images: bool = True
    """Writes the scene's JPEG files, as they are, to extracted_images, for methods that read files. The methods of
    this package read the chunks instead."""
    extracted_images: Optional[Path] = None
    """Folder for them; a folder in the user's cache if absent."""


class EncodedImages(Sequence[bytes]):
    """The image files of some frames of a chunk's scene, read when asked for."""

    def __init__(self, scene: ChunkScene, frames: Sequence[int]):
        self.scene, self.frames = scene, tuple(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> bytes:
        return self.scene.image(self.frames[index])


class RealEstate10K(DataParser):
    """Frames are named by their number within the scene, as index files count them."""

    config: RealEstate10KDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        folder, key = find_scene(self.config.data)
        scene = read_scene(folder, key)
        if len(scene.image_places) == 0:
            raise DataError(f"{scene.chunk}, scene {key}, has no frames")
        names = [folder / key / f"{frame:06d}.jpg" for frame in range(len(scene.image_places))]
        with open_image(names[0], scene.image(0)) as image:
            width, height = image.size
        if self.config.extract_images:
            names = self._extract(scene, names)
        outputs = dataparser_outputs(
            self.config,
            split,
            names,
            scene.cameras[:, 6:].unflatten(1, (3, 4)),
            scene.cameras[:, :4] * scene.cameras.new_tensor([width, height, width, height]),
            (height, width),
        )
        if not self.config.extract_images:
            outputs.metadata[ENCODED_IMAGES] = EncodedImages(scene, outputs.metadata[FRAME_NUMBERS])
        return outputs

    def _extract(self, scene: ChunkScene, names: Sequence[Path]) -> list[Path]:
        # Keys are no names: other data sets, or the same one in another size, have the same.
        status = scene.chunk.stat()
        origin = hashlib.sha256(f"{scene.chunk.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
        folder = (self.config.extracted_images or user_cache("extracted_images")) / f"{scene.key}-{origin[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name.name for name in names]
        for frame, file in enumerate(files):
            if not file.exists():
                with whole(file) as partial:
                    partial.write_bytes(scene.image(frame))
        return files


def find_scene(data: Path) -> tuple[Path, str]:
    """The split folder and the key that ``--data`` names: DIR/SPLIT/KEY, or the first scene of DIR/SPLIT or DIR.

    Raises:
        DataError: if there are no chunks there.
    """
    if is_chunk_folder(data.parent) and not data.exists():
        return data.parent, data.name
    for folder in (data, *(data / split for split in SPLITS)):
        if is_chunk_folder(folder):
            return folder, next(iter(read_keys(folder)))
    raise DataError(
        f"--data {data}: found no chunks; expected DIR, DIR/SPLIT or DIR/SPLIT/KEY, where DIR/SPLIT holds index.json "
        "and 000000.torch, ..."
    )
