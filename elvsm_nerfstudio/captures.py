"""Views for networks, from captures on disk or from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from numpy.typing import ArrayLike
from torch import Tensor

from elvsm_nerfstudio.cameras import views_from_cameras, without_scale
from elvsm_nerfstudio.data.images import Background, DataError, ImageSpec
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.views import Views


def views_from_capture(
    path: Path | str,
    size: tuple[int, int],
    frames: Optional[Sequence[int]] = None,
    background: Background = "white",
    dataparser: Optional[DataParserConfig] = None,
) -> Views:
    """Photos of a capture as views [1, view, ...] of one scene, in the world of its dataparser.

    Args:
        path: anything that ``ns-train --data`` takes; of a collection the first scene of its test split,
            or of all where it has none.
        size: height and width to which the photos are resized and centre-cropped; multiples of the patch size.
        frames: their numbers in order of the file names; all of them if absent.
        background: colour behind transparent pixels.
        dataparser: how the capture is read; nerfstudio's own format if absent.

    Raises:
        DataError: (a ValueError) naming the file that cannot be used, or the frames that are not there.
    """
    collection = SceneCollection.open(Path(path), dataparser or NerfstudioDataParserConfig())
    scene = collection.load((collection.split("test") or collection.entries)[0])
    frames = range(scene.num_frames) if frames is None else frames
    missing = [frame for frame in frames if not 0 <= frame < scene.num_frames]
    if missing or not len(frames):
        listed = ", ".join(map(str, missing))
        raise DataError(f"{path}: found no frames {listed}; expected some of 0 to {scene.num_frames - 1}")
    spec = ImageSpec(size, background)
    rgb = scene.read_images(list(frames), spec).float() / 255
    return views_from_cameras(scene.cropped_cameras(frames, spec), patch_size=1, rgb=rgb)


def views_from_arrays(
    camera_to_world: ArrayLike | Tensor,
    intrinsics: ArrayLike | Tensor,
    images: Optional[ArrayLike | Tensor] = None,
    size: Optional[tuple[int, int]] = None,
) -> Views:
    """Pinhole views [1, view, ...] of one scene.

    Args:
        camera_to_world: [view, 4, 4] or [view, 3, 4], OpenCV: +X right, +Y down, +Z forward.
        intrinsics: [view, 4], fx, fy, cx, cy in pixels, or [view, 3, 3].
        images: [view, height, width, 3], uint8, or floating point in [0, 1]; absent for views that are only rendered.
        size: height and width of views without images.

    Raises:
        ValueError: for arrays of other shapes, and cameras with impossible numbers.
    """
    poses, intrinsics = _numbers(camera_to_world), _numbers(intrinsics)
    if intrinsics.shape[-2:] == (3, 3):
        intrinsics = torch.stack([intrinsics[:, i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))], dim=-1)
    count = len(poses)
    if poses.shape not in ((count, 4, 4), (count, 3, 4)) or intrinsics.shape != (count, 4) or not count:
        raise ValueError(
            f"camera_to_world is {tuple(poses.shape)}, expected [view, 4, 4] or [view, 3, 4]; intrinsics are "
            f"{tuple(intrinsics.shape)}, expected [view, 4] (fx, fy, cx, cy) or [view, 3, 3], as many"
        )
    rgb = None
    if images is not None:
        whole = torch.as_tensor(images).dtype == torch.uint8
        rgb = _numbers(images) / 255 if whole else _numbers(images)
        if rgb.shape != (count, *rgb.shape[1:3], 3) or size not in (None, tuple(rgb.shape[1:3])):
            raise ValueError(f"images are {tuple(rgb.shape)}; expected [{count}, height, width, 3], of the size given")
        if not (rgb >= 0).all() or not (rgb <= 1).all():
            raise ValueError(f"images hold {rgb.min():g} to {rgb.max():g}; expected uint8, or colours from 0 to 1")
        size = tuple(rgb.shape[1:3])
    if size is None:
        raise ValueError("views without images need a size: height and width in pixels")
    if poses.isfinite().all():  # else said better below
        poses[:, :3, :3], _ = without_scale(poses[:, :3, :3])
    fx, fy, cx, cy = intrinsics[..., None].unbind(1)
    cameras = Cameras(
        camera_to_worlds=opengl_to_opencv(poses[:, :3]),  # its own inverse
        fx=fx, fy=fy, cx=cx, cy=cy, height=size[0], width=size[1], camera_type=CameraType.PERSPECTIVE,
    )  # fmt: skip
    return views_from_cameras(cameras, patch_size=1, rgb=rgb)


def _numbers(array: ArrayLike | Tensor) -> Tensor:
    return torch.as_tensor(array if isinstance(array, Tensor) else np.asarray(array)).detach().cpu().float().clone()
