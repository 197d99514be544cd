"""Views ordered and picked by where their cameras are and look."""

from __future__ import annotations

from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.geometry import outlying

MIN_MEAN_UP = 0.1
"""Length of the mean up vector below which the cameras have no up in common."""


def farthest_point_views(
    camera_to_world: Float[Tensor, "view 3 4"], count: int, first: Optional[int] = None
) -> list[int]:
    """Positions of ``count`` views that are spread out, over camera centres and viewing directions alike.

    Greedy farthest-point sampling on (centre / extent of the centres, viewing axis), from ``first``, or else from
    the view farthest from the mean: it depends on the cameras only, whatever the order, rotation or scale. Fewer
    views are the beginning of more. Outliers (``outlying``) come last. Takes OpenGL or OpenCV poses.
    """
    out = outlying(camera_to_world[:, :3, 3])
    centres = camera_to_world[:, :3, 3] - camera_to_world[~out, :3, 3].mean(dim=0)
    extent = centres[~out].norm(dim=-1).max().clamp(min=1e-8)
    features = torch.cat([centres / extent, camera_to_world[:, :3, 2]], dim=-1).double()
    if first is None:
        first = int((features - features[~out].mean(dim=0)).norm(dim=-1).masked_fill(out, -1.0).argmax())
    chosen = [first]
    distance = (features - features[first]).norm(dim=-1)
    while len(chosen) < min(count, len(features)):
        distance[chosen] = -1.0
        left = ~out if (distance[~out] >= 0).any() else out
        chosen.append(int(distance.masked_fill(~left, -1.0).argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).norm(dim=-1))
    return chosen


def azimuth_order(camera_to_world: Float[Tensor, "view 3 4"]) -> list[int]:
    """Positions of all views in order of azimuth, anticlockwise seen from above, from view 0 on.

    The azimuth is that of the camera centre about an axis through the mean of the centres. The axis is the mean up
    vector, or, where the ups cancel, the direction in which the centres vary least, so turned that view 1 comes in
    the half turn after view 0. The order is independent of the world's rotation, translation and scale. Takes OpenGL
    poses.
    """
    views = camera_to_world.double()
    centres = views[:, :3, 3] - views[:, :3, 3].mean(dim=0)
    axis = views[:, :3, 1].mean(dim=0)
    if axis.norm() < MIN_MEAN_UP:
        axis = torch.linalg.eigh(centres.T @ centres).eigenvectors[:, 0]
        if len(centres) > 1 and axis @ torch.linalg.cross(centres[0], centres[1]) < 0:
            axis = -axis
    axis = axis / axis.norm()
    # Any two directions across the axis serve: they move all azimuths alike, and the order begins at view 0.
    across = torch.linalg.cross(axis, torch.eye(3, dtype=axis.dtype, device=axis.device)[axis.abs().argmin()])
    azimuth = torch.atan2(centres @ torch.linalg.cross(axis, across), centres @ across)
    order = azimuth.argsort(stable=True).tolist()
    start = order.index(0)
    return order[start:] + order[:start]
