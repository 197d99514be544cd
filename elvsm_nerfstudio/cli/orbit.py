"""Writes a camera path that circles what a run's context views look at, for ``ns-render camera-path``.

elvsm orbit --load-config RUN/config.yml --output orbit.json
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.runs import read_config


@dataclass
class OrbitOptions:
    """A circle around the scene's centre at the context views' mean distance and height, looking at the centre."""

    load_config: Path
    """The run's config.yml; the path is for the scene that this run shows."""
    output: Path
    """JSON to write."""
    seconds: float = 4.0
    """Duration of the video."""
    fps: int = 24
    """Frames per second."""
    size: Optional[tuple[int, int]] = None
    """Height and width of the frames; those of the context views if absent."""


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(OrbitOptions, "orbit", __doc__, args)
    config = read_config(options.load_config, "--load-config")
    config.pipeline.datamanager.find_data(options.load_config)
    cameras = config.pipeline.datamanager.setup(test_mode="inference").train_dataset.cameras
    height, width = options.size or (int(cameras.height[0]), int(cameras.width[0]))
    fov = 2 * math.degrees(math.atan(float(cameras.height[0]) / (2 * float(cameras.fy[0]))))
    frames = round(options.seconds * options.fps)
    poses = orbit(cameras.camera_to_worlds, frames)
    write_json(
        options.output,
        {
            "camera_type": "perspective",
            "render_height": height,
            "render_width": width,
            "seconds": options.seconds,
            "fps": options.fps,
            "is_cycle": True,
            "smoothness_value": 0.0,
            "camera_path": [
                {"camera_to_world": pose.flatten().tolist(), "fov": fov, "aspect": width / height} for pose in poses
            ],
        },
    )
    print(f"{frames} cameras: {options.output}")


def orbit(context: Float[Tensor, "view 3 4"], count: int) -> Float[Tensor, "count 4 4"]:
    """OpenGL camera-to-world on a circle about the vertical through the point that the context looks at.

    The point is the one nearest to all optical axes (least squares); +Z is up, as nerfstudio orients scenes.
    """
    centres, axes = context[:, :, 3], context[:, :, 2]
    # Squared distance to an optical axis is a quadratic form with the projection across it.
    across = torch.eye(3) - axes[:, :, None] * axes[:, None, :]
    right_side = (across @ centres[:, :, None]).sum(dim=0)
    target = torch.linalg.lstsq(across.sum(dim=0), right_side).solution[:, 0]
    offset = centres - target
    radius, height = offset[:, :2].norm(dim=-1).mean(), offset[:, 2].mean()
    start = torch.atan2(offset[0, 1], offset[0, 0])
    angle = start + torch.arange(count) * (2 * math.pi / count)
    position = torch.stack([radius * angle.cos(), radius * angle.sin(), height.expand(count)], dim=-1)
    backward = torch.nn.functional.normalize(position, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand(count, 3)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, backward), dim=-1)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, :3] = torch.stack([right, torch.linalg.cross(backward, right), backward, position + target], dim=-1)
    return pose
