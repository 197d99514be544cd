"""Where Gaussians begin: points from a plane sweep over the context views, at random, or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.splatting.lens import undistort
from elvsm_nerfstudio.splatting.plane_sweep import PosedImages, surface_points, visible_range

Initialization = Literal["plane-sweep", "random", "points"]

MIN_POINTS = 200
"""A plane sweep that finds fewer is filled up with random points. Ours."""
DRAWS = 20
"""Random points are chosen from so many times as many. Ours."""
RANGE_WITHOUT_OVERLAP = (0.25, 2.0)
"""Depths for random points where no two views see the same, in units of the cameras' extent. Ours."""


@dataclass(frozen=True)
class InitialPoints:
    """Coloured points in the scene's world, and where they come from."""

    xyz: Float[Tensor, "point 3"]
    rgb: Float[Tensor, "point 3"]
    """0 to 255, as nerfstudio hands seed points over."""
    record: dict[str, Any]


def initial_points(
    kind: Initialization,
    cameras: Cameras,
    images: Float[Tensor, "view height width 3"],
    count: int,
    generator: torch.Generator,
) -> InitialPoints:
    """Points from context views.

    Args:
        kind: 'plane-sweep', or 'random': at random depths, even in inverse depth, of random pixels, with their colours,
            where most of the views look.
        cameras: [view], with the sizes of the images.
        count: at most so many, drawn from all that a plane sweep finds.
    """
    posed = _posed_images(cameras, images)
    xyz = rgb = posed.rgb.new_zeros(0, 3)
    if kind == "plane-sweep":
        xyz, rgb = surface_points(posed)
        kept = torch.randperm(len(xyz), generator=generator)[:count]
        xyz, rgb = xyz[kept], rgb[kept]
    found = len(xyz)
    missing = count if kind == "random" else max(0, min(MIN_POINTS, count) - found)
    if missing:
        if kind == "plane-sweep":
            CONSOLE.print(
                f"[bold yellow]The plane sweep finds {found} points that context views agree on; {missing} random ones "
                "are added"
            )
        more = _random_points(posed, missing, generator)
        xyz, rgb = torch.cat([xyz, more[0]]), torch.cat([rgb, more[1]])
    record = {"kind": kind, "points": len(xyz), "of_plane_sweep": found, "at_random": missing}
    return InitialPoints(xyz, rgb * 255, record)


def points_from_file(path: Path, outputs: DataparserOutputs, count: int, generator: torch.Generator) -> InitialPoints:
    """Points of a file that open3d reads (.ply, .pcd, .xyz, ...), in the coordinates of the capture's own cameras.

    Raises:
        DataError: for a file without points.
    """
    import open3d

    if not path.is_file():
        raise DataError(f"--pipeline.datamanager.points-file {path} does not exist")
    cloud = open3d.io.read_point_cloud(str(path))
    xyz = torch.from_numpy(np.asarray(cloud.points, dtype=np.float32).copy())
    if len(xyz) < 4:
        raise DataError(f"--pipeline.datamanager.points-file {path}: found {len(xyz)} points; expected at least 4")
    rgb = torch.full_like(xyz, 127.5)
    if cloud.has_colors():
        rgb = torch.from_numpy(np.asarray(cloud.colors, dtype=np.float32) * 255)
    transform = outputs.dataparser_transform
    xyz = (xyz @ transform[:, :3].T + transform[:, 3]) * outputs.dataparser_scale
    kept = torch.randperm(len(xyz), generator=generator)[:count]
    return InitialPoints(xyz[kept], rgb[kept], {"kind": "points", "points": len(kept), "file": str(path)})


def _posed_images(cameras: Cameras, images: Float[Tensor, "view height width 3"]) -> PosedImages:
    pictures = [undistort(cameras[i : i + 1], images[i]) for i in range(len(images))]
    rgb, known = (torch.stack(parts) for parts in zip(*pictures))
    poses = torch.eye(4).to(images).repeat(len(images), 1, 1)
    poses[:, :3] = opengl_to_opencv(cameras.camera_to_worlds.to(images))
    intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)
    return PosedImages(rgb, known, poses, intrinsics.to(images))


def _random_points(posed: PosedImages, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on rays of random pixels, where most of the views look, and the pixels' colours."""
    depth_range = visible_range(posed)
    if depth_range is None:
        centres = posed.camera_to_world[:, :3, 3]
        extent = float((centres - centres.mean(dim=0)).norm(dim=-1).max()) or 1.0
        depth_range = tuple(extent * bound for bound in RANGE_WITHOUT_OVERLAP)
    drawn = count * DRAWS
    pixel = posed.known.flatten().nonzero()[:, 0]
    pixel = pixel[torch.randint(len(pixel), (drawn,), generator=generator)]
    near, far = depth_range
    inverse = 1 / far + torch.rand(drawn, 1, generator=generator) * (1 / near - 1 / far)
    view = pixel // posed.known[0].numel()
    xyz = posed.camera_to_world[view, :3, 3] + posed.rays().reshape(-1, 3)[pixel] / inverse.to(posed.rgb)
    views = range(len(posed.rgb))
    looking = torch.stack([posed.inside(*posed.project(other, xyz)) for other in views]).float().mean(dim=0)
    kept = looking.argsort(descending=True, stable=True)[:count]
    return xyz[kept], posed.rgb.reshape(-1, 3)[pixel[kept]]
