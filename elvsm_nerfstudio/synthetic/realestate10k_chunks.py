"""Writes scenes as RealEstate10K chunks, in pixelSplat's layout."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from elvsm_nerfstudio.files import whole

JPEG_QUALITY = 92


@dataclass(frozen=True)
class SequenceOfFrames:
    """One scene: pictures and their cameras."""

    key: str
    image_files: list[Path]
    poses: np.ndarray
    """[frames, 4, 4] camera-to-world, OpenGL axes."""
    intrinsics: tuple[float, float, float, float]
    """fx, fy, cx, cy, normalised by width and height."""


def camera_rows(poses: np.ndarray, intrinsics: tuple[float, float, float, float]) -> np.ndarray:
    """[frames, 18] float32: fx, fy, cx, cy, two unused, 3x4 world-to-camera (OpenCV), row major."""
    world_to_camera = np.linalg.inv(poses @ np.diag([1.0, -1.0, -1.0, 1.0]))
    rows = np.zeros((len(poses), 18), np.float32)
    rows[:, :4] = intrinsics
    rows[:, 6:] = world_to_camera[:, :3].reshape(len(poses), 12)
    return rows


def write_chunks(folder: Path, scenes: Iterable[SequenceOfFrames], scenes_per_chunk: int) -> None:
    """Writes a split: 000000.torch, ... and then index.json, each under a temporary name first."""
    import torch  # 1.7 s that rendering alone does not need

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    chunk: list[dict] = []

    def flush() -> None:
        name = f"{len(set(index.values())):06d}.torch"
        with whole(folder / name) as partial:
            torch.save(chunk, partial)
        index.update({scene["key"]: name for scene in chunk})
        chunk.clear()

    for scene in scenes:
        images = []
        for file in scene.image_files:
            encoded = io.BytesIO()
            with Image.open(file) as picture:
                picture.convert("RGB").save(encoded, format="JPEG", quality=JPEG_QUALITY)
            images.append(torch.from_numpy(np.frombuffer(encoded.getvalue(), np.uint8).copy()))
        chunk.append(
            {
                "key": scene.key,
                "url": "",
                "timestamps": torch.arange(len(images)) * 33_333,
                "cameras": torch.from_numpy(camera_rows(scene.poses, scene.intrinsics)),
                "images": images,
            }
        )
        if len(chunk) == scenes_per_chunk:
            flush()
    if chunk:
        flush()
    with whole(folder / "index.json") as partial:
        partial.write_text(json.dumps(index, indent=0) + "\n")
