"""Where Gaussians begin: points from a plane sweep over the context views, at random, or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from elvsm_nerfstudio.data.images import Background, DataError
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.splatting.lens import undistort
from elvsm_nerfstudio.splatting.photo_hull import hull_points
from elvsm_nerfstudio.splatting.plane_sweep import PosedImages, surface_points, visible_range

Initialization = Literal["plane-sweep", "random", "points"]

EMPTY = 2 / 255
"""Pixels show nothing if none of their colours differs by more from the background's. Ours."""
MIN_POINTS = 4
"""splatfacto takes the distance to the third neighbour for the size of a Gaussian."""
NEARLY_EMPTY = 0.06
"""The same for rendered views, whose backgrounds are not exact. Ours."""
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

    @property
    def summary(self) -> str:
        """The record in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.record.items())


def initial_points(
    kind: Initialization,
    cameras: Cameras,
    images: Float[Tensor, "view height width 3"],
    background: Background,
    count: int,
    generator: torch.Generator,
    rendered: Optional[tuple[Cameras, Float[Tensor, "rendered height width 3"]]] = None,
) -> InitialPoints:
    """Points from context views, and from views that are rendered from these.

    Few views leave most surfaces to one of them, and thin or uniform ones to none that a plane sweep could match. What
    has no Gaussian near it gets none within a short training; so random points make up the number. They are, and this
    is what counts, only where no view sees the background: those in the air before it would take its colour, and hide
    what they stand before from all other views. Rendered views leave less to chance: with them, the number is made up
    on the hull of what all views show.

    Args:
        kind: 'plane-sweep', or 'random': at random depths, even in inverse depth, of random pixels, with their colours,
            where most of the views look.
        cameras: [view], with the sizes of the images.
        background: what the images are composited on, and what is rendered behind everything.
        count: so many; drawn from all that a plane sweep finds, made up with random ones. Fewer where random draws do
            not find enough places.
        rendered: cameras [rendered] and images, of the same size, of rendered views; with 'plane-sweep'.

    Raises:
        DataError: where there is no place for points.
    """
    posed = _posed_images(cameras, images, background)
    xyz = rgb = posed.rgb.new_zeros(0, 3)
    if kind == "plane-sweep":
        xyz, rgb = surface_points(posed)
        kept = torch.randperm(len(xyz), generator=generator)[:count]
        xyz, rgb = xyz[kept], rgb[kept]
    found = {"of_plane_sweep": len(xyz)}
    if kind == "plane-sweep" and rendered is not None and len(xyz) < count:
        renders = _posed_images(*rendered, background, NEARLY_EMPTY)
        more = hull_points(posed, renders, count - len(xyz), generator)
        found["on_hull"] = len(more[0])
        xyz, rgb = torch.cat([xyz, more[0]]), torch.cat([rgb, more[1]])
    if len(xyz) < count:
        more = _random_points(posed, count - len(xyz), generator)
        xyz, rgb = torch.cat([xyz, more[0]]), torch.cat([rgb, more[1]])
    if len(xyz) < MIN_POINTS:
        raise DataError(
            f"--pipeline.datamanager.initial-points {kind}: found {len(xyz)} places for points; expected at least "
            f"{MIN_POINTS}. The context views show nothing but the {background} background, or their cameras do not "
            "see the same thing; choose other frames, or the background that the images have"
        )
    record = {"kind": kind, "points": len(xyz), **found, "at_random": len(xyz) - sum(found.values())}
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
    if len(xyz) < MIN_POINTS:
        raise DataError(
            f"--pipeline.datamanager.points-file {path}: found {len(xyz)} points; expected at least {MIN_POINTS}"
        )
    rgb = torch.full_like(xyz, 127.5)
    if cloud.has_colors():
        rgb = torch.from_numpy(np.asarray(cloud.colors, dtype=np.float32) * 255)
    transform = outputs.dataparser_transform
    xyz = (xyz @ transform[:, :3].T + transform[:, 3]) * outputs.dataparser_scale
    kept = torch.randperm(len(xyz), generator=generator)[:count]
    return InitialPoints(xyz[kept], rgb[kept], {"kind": "points", "points": len(kept), "file": str(path)})


def _posed_images(
    cameras: Cameras, images: Float[Tensor, "view height width 3"], background: Background, nothing: float = EMPTY
) -> PosedImages:
    pictures = [undistort(cameras[i : i + 1], images[i]) for i in range(len(images))]
    rgb, known = (torch.stack(parts) for parts in zip(*pictures))
    poses = torch.eye(4).to(images).repeat(len(images), 1, 1)
    poses[:, :3] = opengl_to_opencv(cameras.camera_to_worlds.to(images))
    intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)
    behind = {"white": 1.0, "black": 0.0}[background]
    empty = known & ((rgb - behind).abs().amax(dim=-1) < nothing)
    return PosedImages(rgb, known, empty, poses, intrinsics.to(images))


def _random_points(posed: PosedImages, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on rays of random pixels, where something can be and most of the views look, and the pixels' colours."""
    pixel = (posed.known & ~posed.empty).flatten().nonzero()[:, 0]
    if len(pixel) == 0:
        return posed.rgb.new_zeros(0, 3), posed.rgb.new_zeros(0, 3)
    depth_range = visible_range(posed)
    if depth_range is None:
        centres = posed.camera_to_world[:, :3, 3]
        extent = float((centres - centres.mean(dim=0)).norm(dim=-1).max()) or 1.0
        depth_range = tuple(extent * bound for bound in RANGE_WITHOUT_OVERLAP)
    drawn = count * DRAWS
    pixel = pixel[torch.randint(len(pixel), (drawn,), generator=generator)]
    near, far = depth_range
    inverse = 1 / far + torch.rand(drawn, 1, generator=generator) * (1 / near - 1 / far)
    view = pixel // posed.known[0].numel()
    xyz = posed.camera_to_world[view, :3, 3] + posed.rays().reshape(-1, 3)[pixel] / inverse.to(posed.rgb)
    possible = posed.possible(xyz)
    xyz, pixel = xyz[possible], pixel[possible]
    views = range(len(posed.rgb))
    looking = torch.stack([posed.inside(*posed.project(other, xyz)) for other in views]).float().mean(dim=0)
    kept = looking.argsort(descending=True, stable=True)[:count]
    return xyz[kept], posed.rgb.reshape(-1, 3)[pixel[kept]]
