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
from torch.nn.functional import normalize

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.runs import read_config

MIN_SPREAD = 30
"""Degrees between an optical axis of the context and the mean of them, in an orbit that is worth looking at."""
INSTEAD = (
    "Go from photo to photo instead: ns-render interpolate --load-config CONFIG --pose-source train, or around one: "
    "ns-render spiral"
)


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

    The point is the one nearest to all optical axes (least squares); up is that of the cameras, so that the world may
    be turned in any way.

    Raises:
        ValueError: for cameras that do not look at a common point from several sides.
    """
    centres, axes = context[:, :, 3], context[:, :, 2]
    mean_axis = normalize(axes.mean(dim=0), dim=0)
    spread = math.degrees(float((axes @ mean_axis).clamp(-1, 1).acos().max()))
    if spread < MIN_SPREAD:
        raise ValueError(
            f"all {len(axes)} context cameras look the same way, within {spread:.0f} degrees (an orbit wants "
            f"{MIN_SPREAD}): it would look at the scene from where no photo was taken. {INSTEAD}"
        )
    # Squared distance to an optical axis is a quadratic form with the projection across it.
    across = torch.eye(3) - axes[:, :, None] * axes[:, None, :]
    right_side = (across @ centres[:, :, None]).sum(dim=0)
    target = torch.linalg.lstsq(across.sum(dim=0), right_side).solution[:, 0]
    offset = centres - target
    behind = int(((offset * axes).sum(dim=-1) <= 0).sum())
    if behind > len(axes) / 4:
        raise ValueError(
            f"the context cameras look at no common point: the one nearest to their optical axes lies behind {behind} "
            f"of the {len(axes)}. {INSTEAD}"
        )
    up = _up(context)
    height = (offset @ up).mean()
    flat = offset - (offset @ up)[:, None] * up
    radius, ahead = flat.norm(dim=-1).mean(), normalize(flat[0], dim=0)
    angle = (torch.arange(count) * (2 * math.pi / count))[:, None]
    position = radius * (angle.cos() * ahead + angle.sin() * torch.linalg.cross(up, ahead)) + height * up
    backward = normalize(position, dim=-1)
    right = normalize(torch.linalg.cross(up.expand(count, 3), backward), dim=-1)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, :3] = torch.stack([right, torch.linalg.cross(backward, right), backward, position + target], dim=-1)
    return pose


def _up(context: Float[Tensor, "view 3 4"]) -> Float[Tensor, 3]:
    """The direction across which all pictures are level: it does not tilt, as the mean of their ups does where cameras
    look down from one side. That mean where all are level about one line."""
    mean = normalize(context[:, :, 1].mean(dim=0), dim=0)
    right = context[:, :, 0]
    shares, directions = torch.linalg.eigh(right.T @ right / len(right))
    level = directions[:, 0]
    return mean if shares[1] < 0.05 else level * (level @ mean).sign()
