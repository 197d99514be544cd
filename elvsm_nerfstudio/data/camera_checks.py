"""What is checked of the cameras of every scene, whatever dataparser they come from."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from elvsm_nerfstudio.cameras import camera_name, check_cameras, without_scale
from elvsm_nerfstudio.data.images import DataError, duplicates
from elvsm_nerfstudio.data.names import check_file
from elvsm_nerfstudio.data.posed_frames import SCALED_ROTATIONS
from elvsm_nerfstudio.geometry import opengl_to_opencv, outlying
from elvsm_nerfstudio.notices import warn_once

MIN_FOCAL_SHARE = 0.05
"""Focal length, in widths of the image, below which it is in other units than pixels: 169 degrees of view."""
MIN_RELATIVE_SPREAD = 6e-5
"""Camera centres whose spread is below this share of their distance from the world's origin have lost more than a
thousandth of it to the rounding of fp32, in which dataparsers work."""
MIN_SPREAD = 1e-6
"""The same for centres that are equal but for rounding."""
FAR_FROM_ORIGIN = 1e4
"""Distance in the units of the file from which on cameras that seem equal may have been rounded so."""
MAX_FOCAL_RATIO = 1.3
"""Ratio of the fields of view of one scene above which networks that were trained on one lens lose quality."""

NO_PARALLAX = (
    "all its camera centres are equal; expected cameras that move, or there is no depth to be seen. A camera that only "
    "turns is of no use here"
)


def checked(name: str, outputs: DataparserOutputs, single_precision: bool = True) -> DataparserOutputs:
    """A scene's frames once its cameras are known to be usable; says once, by kind, what is doubtful about them.

    Args:
        single_precision: whether the dataparser moved the cameras to the middle in fp32, as nerfstudio's do.

    Raises:
        ValueError: naming the frame, and what is wrong with it.
    """
    files = [check_file(str(file), f"frame {i}") for i, file in enumerate(outputs.image_filenames)]
    if not files:
        raise DataError("it has no frames")
    cameras = outputs.cameras
    check_cameras(cameras, files)
    _check_intrinsics(cameras, files)
    rotations, scale = without_scale(cameras.camera_to_worlds[:, :, :3], files)
    if scale != 1:
        warn_once("scaled rotations", SCALED_ROTATIONS.format(file=f"scene {name}", scale=scale))
        poses = torch.cat([rotations, cameras.camera_to_worlds[:, :, 3:]], dim=-1)
        cameras = dataclasses.replace(cameras, camera_to_worlds=poses)
        outputs = dataclasses.replace(outputs, cameras=cameras)
    poses = _poses_of_file(outputs)
    _check_places(poses, single_precision)
    for kind, doubt in _doubts(poses, cameras, files):
        warn_once(kind, f"Scene {name}: {doubt}")
    return outputs


def _check_intrinsics(cameras: Cameras, files: list[str]) -> None:
    width, height = cameras.width[:, 0], cameras.height[:, 0]
    focal = torch.minimum(cameras.fx[:, 0] / width, cameras.fy[:, 0] / height)
    fractions = (focal < MIN_FOCAL_SHARE) | (
        # A principal point in the first pixel of a picture.
        (cameras.cx[:, 0].abs() <= 1) & (cameras.cy[:, 0].abs() <= 1) & (torch.minimum(width, height) > 8)
    )
    if fractions.any():
        i = int(fractions.nonzero()[0])
        numbers = ", ".join(
            f"{key} {float(getattr(cameras, key)[i, 0]):.4g}" for key in ("fx", "fy", "cx", "cy", "width", "height")
        )
        raise DataError(
            f"{camera_name(i, files)} has {numbers}; expected focal lengths and principal point in pixels of the "
            "image, not as fractions of its size"
        )


def _poses_of_file(outputs: DataparserOutputs) -> Float[Tensor, "frame 4 4"]:
    """Camera-to-world before the dataparser turned, moved and scaled the world; OpenGL axes."""
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3] = torch.as_tensor(outputs.dataparser_transform)[:3].double()
    poses = torch.eye(4, dtype=torch.float64).repeat(len(outputs.image_filenames), 1, 1)
    poses[:, :3] = outputs.cameras.camera_to_worlds.double()
    poses[:, :3, 3] /= outputs.dataparser_scale
    return torch.linalg.inv(transform) @ poses


def _check_places(poses: Float[Tensor, "frame 4 4"], single_precision: bool) -> None:
    """Refuses cameras in one place, and coordinates that leave fp32 no digits for what is between the cameras."""
    if len(poses) == 1:
        return
    centres = poses[:, :3, 3]
    mean = centres.mean(dim=0)
    distance = centres.norm(dim=-1).max()
    spread = (centres - mean).norm(dim=-1).max()
    if spread <= MIN_SPREAD * min(distance, FAR_FROM_ORIGIN):
        raise DataError(NO_PARALLAX)
    if spread > MIN_RELATIVE_SPREAD * distance or not single_precision:
        return
    place = ", ".join(f"{coordinate:.7g}" for coordinate in mean.tolist())
    raise DataError(
        f"its cameras are {float(spread):.3g} apart but {float(distance):.3g} away from the origin of their world, so "
        "that single precision rounds away what is between them. Subtract the same offset, such as their mean "
        f"({place}), from the translations of all poses"
    )


def _doubts(poses: Float[Tensor, "frame 4 4"], cameras: Cameras, files: list[str]) -> list[tuple[str, str]]:
    """Kind and text of what may be wrong or costs quality."""
    doubts = []
    for file in duplicates(files)[:1]:
        frames = ", ".join(str(i) for i, other in enumerate(files) if other == file)
        doubts.append((
            "images named twice",
            f"frames {frames} have the same image, {file}; each is kept with its own camera. If that is not meant, "
            "take all but one out of the file: scores of a target whose image is context too say nothing",
        ))  # fmt: skip
    out = outlying(poses[:, :3, 3])
    for i in out.nonzero()[:1].flatten().tolist():
        doubts.append((
            "outliers",
            f"{camera_name(i, files)} stands out{f', like {int(out.sum()) - 1} more' if out.sum() > 1 else ''}: it is "
            "more than five times as far from the others as they are from one another. If its pose is wrong, take it "
            "out of the file; it is chosen as context after all others",
        ))  # fmt: skip
    inside = poses[~out]
    if len(inside) > 2:
        if _look_away(inside).double().mean() > 0.95:
            doubts.append((
                "axes",
                "its cameras look away from one another. That is right for views from one place outwards; else the "
                "poses have OpenCV axes (+Y down, +Z forward) where nerfstudio expects OpenGL's (+Y up, -Z forward): "
                "negate the second and third column of each transform_matrix",
            ))  # fmt: skip
        elif _is_inverse(inside):
            doubts.append((
                "inverse",
                "its poses look like world-to-camera matrices: inverted, all their axes meet in front of the cameras, "
                "and as they are they do not. nerfstudio expects camera-to-world: invert each transform_matrix",
            ))  # fmt: skip
    share = cameras.fx[:, 0] / cameras.width[:, 0]
    share = share[(cameras.camera_type[:, 0] == CameraType.PERSPECTIVE.value) & (cameras.width[:, 0] > 0)]
    if len(share) and share.max() > MAX_FOCAL_RATIO * share.min():
        doubts.append((
            "lenses",
            f"its focal lengths differ by a factor of {float(share.max() / share.min()):.2f} ({float(share.min()):.2f} "
            f"to {float(share.max()):.2f} widths of the image). From context views of mixed lenses renders are worse",
        ))  # fmt: skip
    return doubts


def _look_away(poses: Float[Tensor, "frame 4 4"]) -> Bool[Tensor, " frame"]:
    """Whether cameras look away from the centre of the others, and clearly so as a whole. OpenGL axes."""
    centres, forward = poses[:, :3, 3], -poses[:, :3, 2]
    others = (centres.sum(dim=0) - centres) / (len(centres) - 1)
    cosine = torch.nn.functional.cosine_similarity(forward, others - centres, dim=-1)
    return (cosine < 0) & (cosine.mean() < -0.25)


def _is_inverse(poses: Float[Tensor, "frame 4 4"]) -> bool:
    """Whether the inverse matrices have axes that meet, all in front or all behind, and these do not."""
    inverse = torch.linalg.inv(poses)
    return not _meeting(poses) and (_meeting(inverse) or _meeting(opengl_to_opencv(inverse)))


def _meeting(poses: Float[Tensor, "frame 4 4"]) -> bool:
    """Whether the viewing axes pass near one point in front of all cameras. OpenGL axes."""
    centres, forward = poses[:, :3, 3], -torch.nn.functional.normalize(poses[:, :3, 2], dim=-1)
    across = torch.eye(3, dtype=poses.dtype) - forward[:, :, None] * forward[:, None]
    point = torch.linalg.lstsq(across.sum(dim=0), (across @ centres[..., None]).sum(dim=0)).solution[:, 0]
    ahead = ((point - centres) * forward).sum(dim=-1)
    miss = (across @ (point - centres)[..., None])[..., 0].norm(dim=-1) / (point - centres).norm(dim=-1)
    return bool((ahead > 0).all() and miss.mean() < 0.3)
