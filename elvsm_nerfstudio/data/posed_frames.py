"""What this package's dataparsers share: frames with OpenCV world-to-camera matrices, for any nerfstudio method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.camera_utils import auto_orient_and_center_poses
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.utils.dataparsers_utils import get_train_eval_split_all, get_train_eval_split_interval
from torch import Tensor

from elvsm_nerfstudio.cameras import without_scale
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.notices import warn_once

SCALED_ROTATIONS = (
    "The rotations of the cameras of {file} are all scaled by {scale:.4g}; divided out. If the scene looks wrong, "
    "write poses with rotations alone."
)

FRAME_NUMBERS = "frame_numbers"
"""Where the metadata say which frames of the scene those of a split are: their files' names may occur twice."""


@dataclass
class PosedFramesDataParserConfig(DataParserConfig):
    """How a scene's frames are split and its world is laid."""

    eval_mode: Literal["interval", "all"] = "interval"
    """Frames held out for evaluation: every eval_interval-th, or none (all frames are in every split)."""
    eval_interval: int = 8
    """Distance of held-out frames: with 8, every eighth frame is held out."""
    orientation_method: Literal["up", "none"] = "up"
    """Turns the world so that the cameras' mean up axis is +Z."""
    center_method: Literal["poses", "none"] = "poses"
    """Moves the world so that the cameras' centre is the origin."""
    auto_scale_poses: bool = True
    """Scales the world so that the cameras lie within a cube of side 2."""


def dataparser_outputs(
    config: PosedFramesDataParserConfig,
    split: str,
    names: Sequence[Path],
    world_to_camera: Float[Tensor, "frame rows 4"],
    intrinsics: Float[Tensor, "frame 4"],
    size: tuple[int, int] | Int[Tensor, "frame 2"],
    metadata: Optional[dict[str, Any]] = None,
) -> DataparserOutputs:
    """nerfstudio's view of a scene, or of the part of it that is in a split.

    Args:
        names: image files.
        world_to_camera: OpenCV, rows 3 or 4.
        intrinsics: fx, fy, cx, cy in pixels.
        size: (height, width) of all images, or of each.

    Raises:
        ValueError: for matrices that are no rigid transforms, naming the frame.
    """
    rotation, scale = without_scale(world_to_camera[:, :3, :3].double(), names)
    if scale != 1:
        warn_once("scaled rotations", SCALED_ROTATIONS.format(file=names[0], scale=scale))
    poses = torch.eye(4, dtype=torch.float64).repeat(len(rotation), 1, 1)
    poses[:, :3, :3] = rotation.transpose(1, 2)
    # Not by the transpose: what a rotation lacks of being one counts as often as its centre is far away.
    poses[:, :3, 3] = -torch.linalg.solve(rotation, world_to_camera[:, :3, 3].double() / scale)
    # Georeferenced coordinates have more digits than fp32.
    offset = poses[:, :3, 3].mean(dim=0) if config.center_method == "poses" else torch.zeros(3, dtype=torch.float64)
    poses[:, :3, 3] -= offset
    poses, transform = auto_orient_and_center_poses(
        opengl_to_opencv(poses).float(), method=config.orientation_method, center_method=config.center_method
    )
    transform[:, 3] -= transform[:, :3] @ offset.float()
    extent = float(poses[:, :3, 3].abs().max())
    scale = 1.0 / extent if config.auto_scale_poses and extent > 0 else 1.0
    poses[:, :3, 3] *= scale

    if config.eval_mode == "all":
        train, held_out = get_train_eval_split_all(list(names))
    else:
        train, held_out = get_train_eval_split_interval(list(names), config.eval_interval)
    frames = torch.as_tensor(train if split == "train" else held_out)
    sizes = torch.as_tensor(size).expand(len(poses), 2)[frames]
    fx, fy, cx, cy = intrinsics[frames].float()[..., None].unbind(1)
    return DataparserOutputs(
        image_filenames=[names[frame] for frame in frames.tolist()],
        cameras=Cameras(
            camera_to_worlds=poses[frames, :3, :4],
            fx=fx,
            fy=fy,
            cx=cx,
            cy=cy,
            height=sizes[:, :1].long(),
            width=sizes[:, 1:].long(),
            camera_type=CameraType.PERSPECTIVE,
        ),
        dataparser_transform=transform,
        dataparser_scale=scale,
        metadata={**(metadata or {}), FRAME_NUMBERS: frames.tolist()},
    )
