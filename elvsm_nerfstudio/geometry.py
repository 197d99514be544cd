"""Cameras, rays and the canonical frame, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


def opengl_to_opencv(camera_to_world: Float[Tensor, "*batch rows 4"]) -> Float[Tensor, "*batch rows 4"]:
    """Turns camera-to-world matrices from OpenGL axes (+Y up, -Z forward) to OpenCV's (+Y down, +Z forward).

    Negates the second and third column; its own inverse. Takes 3x4 and 4x4 matrices.
    """
    return camera_to_world * camera_to_world.new_tensor([1.0, -1.0, -1.0, 1.0])


def pad_to_multiple(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``size``."""
    return -(-size // multiple) * multiple


def resize_and_crop_intrinsics(
    intrinsics: Float[Tensor, "*batch 4"],
    size: Num[Tensor, "*batch 2"],
    resized: Num[Tensor, "*batch 2"],
    crop: tuple[int, int],
) -> Float[Tensor, "*batch 4"]:
    """Intrinsics (fx, fy, cx, cy in pixels) after images are resized and then centre-cropped.

    With pixel centres at +0.5 a resize scales focal lengths and principal point alike by the true ratio of the
    (integer) sizes, and a crop shifts the principal point by whole pixels.

    Args:
        size, resized: height and width of each image before and after the resize.
        crop: (height, width) of all images after the crop.
    """
    scale = (resized / size).flip(-1)
    offset = torch.div(resized - intrinsics.new_tensor(crop), 2, rounding_mode="floor").flip(-1)
    focal, centre = intrinsics[..., :2] * scale, intrinsics[..., 2:] * scale - offset
    return torch.cat([focal, centre], dim=-1)


def cover_size(size: tuple[int, int], crop: tuple[int, int], width_multiple: int = 1) -> tuple[int, int]:
    """(height, width) to which an image is resized so that it just covers the crop, its aspect kept to the pixel.

    Args:
        width_multiple: the width is rounded to a multiple of this instead, as the official preprocessing does with
            the patch size.
    """
    scale = max(crop[0] / size[0], crop[1] / size[1])
    width = round(size[1] * scale / width_multiple) * width_multiple
    return max(crop[0], round(size[0] * scale)), max(crop[1], width)


def crop_offset(resized: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of the centre crop."""
    return (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2


def pinhole_directions(
    intrinsics: Float[Tensor, "*batch 4"], height: int, width: int
) -> Float[Tensor, "*batch height width 3"]:
    """Unit ray directions of pixel centres (+0.5) in the OpenCV camera frame.

    Args:
        intrinsics: fx, fy, cx, cy in pixels.
    """
    y, x = torch.meshgrid(
        torch.arange(height, device=intrinsics.device) + 0.5,
        torch.arange(width, device=intrinsics.device) + 0.5,
        indexing="ij",
    )
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)
    u, v = (x - cx) / fx, (y - cy) / fy
    return torch.nn.functional.normalize(torch.stack([u, v, torch.ones_like(u)], dim=-1), dim=-1)


def pluecker_rays(
    camera_to_world: Float[Tensor, "*batch 4 4"], directions: Float[Tensor, "*batch height width 3"]
) -> Float[Tensor, "*batch height width 6"]:
    """Plücker coordinates of rays: moment o x d, then unit direction d (upstream's order).

    Args:
        camera_to_world: OpenCV, in the frame in which the rays are wanted.
        directions: unit, in the camera frame.
    """
    world = torch.einsum("...ij,...hwj->...hwi", camera_to_world[..., :3, :3], directions)
    origin = camera_to_world[..., None, None, :3, 3].expand_as(world)
    return torch.cat([torch.linalg.cross(origin, world), world], dim=-1)


def outlying(centres: Float[Tensor, "*batch view 3"]) -> Bool[Tensor, "*batch view"]:
    """Which camera centres are so far out that they would set the measure of all the others.

    Those more than 5 times as far from the median as nine tenths of the centres are: at most a tenth of the views, or
    one where there are fewer than ten, and none where there are fewer than five.
    """
    num_views = centres.shape[-2]
    if num_views < 5:
        return torch.zeros_like(centres[..., 0], dtype=torch.bool)
    median = centres.sort(dim=-2).values[..., (num_views - 1) // 2, :]
    distance = (centres - median[..., None, :]).norm(dim=-1)
    rank = int(0.9 * (num_views - 1))
    ordinary = distance.sort(dim=-1).values[..., rank : rank + 1]
    return distance > 5 * ordinary + 1e-6 * centres.norm(dim=-1)


def _mean_of_others(
    centres: Float[Tensor, "*batch view 3"], out: Bool[Tensor, "*batch view"]
) -> Float[Tensor, "*batch 3"]:
    """The mean of the centres that do not lie out."""
    kept = (~out)[..., None].to(centres)
    # Without any outliers to the last bit the mean.
    return torch.where(
        out.any(dim=-1, keepdim=True), (centres * kept).sum(dim=-2) / kept.sum(dim=-2), centres.mean(dim=-2)
    )


def view_distance(
    context: Float[Tensor, "*batch view rows 4"], target: Float[Tensor, "*batch target rows 4"]
) -> Float[Tensor, "*batch target view"]:
    """How far context cameras are from target cameras, in place and in direction.

    The distance of the centres, in units of the context's extent (the largest distance of its centres from their
    mean, outliers apart), plus 1 - cos of the angle between the viewing axes. The same in any world frame, whatever its
    scale. Where all context centres coincide there is no extent to be seen, and the world's own unit is kept.

    Args:
        context, target: camera-to-world, both OpenCV or both OpenGL.
    """
    centres = context[..., :3, 3]
    out = outlying(centres)
    centre = _mean_of_others(centres, out)
    extent = ((centres - centre[..., None, :]).norm(dim=-1) * ~out).amax(dim=-1)
    extent = torch.where(extent > 1e-5 * centre.norm(dim=-1) + 1e-8, extent, torch.ones_like(extent))
    offset = (target[..., :, None, :3, 3] - centres[..., None, :, :]).norm(dim=-1)
    axes = (torch.nn.functional.normalize(poses[..., :3, 2], dim=-1) for poses in (target, context))
    return offset / extent[..., None, None] + 1 - torch.einsum("...tc,...vc->...tv", *axes)


def nearest_views(
    context: Float[Tensor, "*batch view rows 4"], target: Float[Tensor, "*batch target rows 4"], count: int
) -> Int[Tensor, "*batch target count"]:
    """Positions of the ``count`` context views nearest to every target (``view_distance``); of equals, the first.

    Args:
        context, target: camera-to-world, both OpenCV or both OpenGL.
    """
    if not 1 <= count <= context.shape[-3]:
        raise ValueError(f"nearest_views: count is {count}; expected 1 to {context.shape[-3]}, the number of views")
    return view_distance(context, target).argsort(dim=-1, stable=True)[..., :count]


def nearest_others(views: Float[Tensor, "*batch view rows 4"]) -> Int[Tensor, "*batch view other"]:
    """For every view the positions of all the others, the nearest (``view_distance``) first; of equals, the first."""
    distance = view_distance(views, views)
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distance.argsort(dim=-1, stable=True)[..., :-1]


@dataclass(frozen=True)
class CanonicalFrame:
    """A similarity transform from the world of each scene to the frame in which the network sees its cameras.

    Estimated once from a set of cameras and then kept: views may come and go without moving it. Being fixed by the
    cameras alone, it cancels any rotation, translation or scale of the world.
    """

    axes: Float[Tensor, "scene 3 3"]
    """Right, down and forward of the frame as columns, in world coordinates."""
    centre: Float[Tensor, "scene 3"]
    """Origin of the frame in world coordinates."""
    scale: Float[Tensor, " scene"]
    """World units per canonical unit."""

    MARGIN = 1.35
    """The farthest camera coordinate lies at 1 / 1.35 (upstream's data/dataset_scene.py)."""

    @staticmethod
    def estimate(camera_to_world: Float[Tensor, "scene view 4 4"]) -> CanonicalFrame:
        """The mean camera as the frame, the largest absolute coordinate of the centres as its scale.

        Origin: mean of the centres. Axes: the mean forward axis, and the mean down axis made orthogonal to it
        (upstream fact, checked against its recorded tensors). Outliers (``outlying``) have no part in origin and
        scale. Where the means cancel or run parallel, as for
        cameras evenly around an object, the axes are those of the camera nearest the mean centre. Where all centres
        coincide, as for a single view, there is no scale to be seen and the world's own unit is kept.
        """
        poses = camera_to_world.float()
        centres = poses[:, :, :3, 3]
        out = outlying(centres)
        centre = _mean_of_others(centres, out)
        down, forward = poses[:, :, :3, 1].mean(dim=1), poses[:, :, :3, 2].mean(dim=1)

        nearest = (centres - centre[:, None]).norm(dim=-1).argmin(dim=1)
        fallback = poses[torch.arange(len(poses), device=poses.device), nearest, :3, :3]
        right = torch.linalg.cross(down, forward)
        degenerate = right.norm(dim=-1, keepdim=True) < 1e-3
        down = torch.where(degenerate, fallback[:, :, 1], down)
        forward = torch.nn.functional.normalize(torch.where(degenerate, fallback[:, :, 2], forward), dim=-1)
        right = torch.nn.functional.normalize(torch.linalg.cross(down, forward), dim=-1)
        axes = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)

        local = torch.einsum("sji,svj->svi", axes, centres - centre[:, None])
        extent = (local.abs() * ~out[..., None]).amax(dim=(1, 2))
        rounding = 1e-5 * centre.norm(dim=-1) + 1e-8
        scale = torch.where(extent > rounding, CanonicalFrame.MARGIN * extent, torch.ones_like(extent))
        return CanonicalFrame(axes, centre, scale)

    def apply(self, camera_to_world: Float[Tensor, "scene view 4 4"]) -> Float[Tensor, "scene view 4 4"]:
        """Camera-to-world matrices expressed in this frame (camera-to-canonical)."""
        poses = camera_to_world.float()
        rotation = torch.einsum("sji,svjk->svik", self.axes, poses[:, :, :3, :3])
        offset = poses[:, :, :3, 3] - self.centre[:, None]
        translation = torch.einsum("sji,svj->svi", self.axes, offset) / self.scale[:, None, None]
        out = torch.zeros_like(poses)
        out[:, :, :3, :3], out[:, :, :3, 3], out[:, :, 3, 3] = rotation, translation, 1.0
        return out

    def to(self, device: torch.device | str) -> CanonicalFrame:
        return CanonicalFrame(self.axes.to(device), self.centre.to(device), self.scale.to(device))
