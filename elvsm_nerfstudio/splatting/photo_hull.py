"""Points on a scene's surfaces from photos and rendered views together, by space carving along random rays.

A ray of a pixel meets a surface at the first depth at which nothing speaks against one: no view sees the background
there, and the views beside it show the pixel's colour (Kutulakos and Seitz, "A Theory of Shape by Space Carving",
2000). Renders that are too blurred for a plane sweep to match still tell where a scene is not. All thresholds here are
ours.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from elvsm_nerfstudio.splatting.plane_sweep import MAX_DIFFERENCE, PosedImages, sources_of, visible_range

RAYS_FOR_A_POINT = 2
DEPTHS = 64
"""Depths on a ray, even in inverse depth and each jittered."""
WINDOW = 3
"""Pixels a side over which colours are compared."""
AS_GOOD = 0.02
"""A depth is the surface's if its cost is within so much of the best on the ray."""
OUTVOTED = 0.1
"""Share of the renders that may show the background where there is something: their outlines are not exact."""
SHOWN_BACKGROUND = 0.05
"""Share of the photos' pixels that show the background, at the least: without outlines there is no hull, and a blurred
render agrees with any depth before it."""
VIEWS_FOR_RANGE = 8
"""Views, evenly among all, whose common range of depths is looked at."""


@torch.no_grad()
def hull_points(
    photos: PosedImages, renders: PosedImages, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "point 3"], Float[Tensor, "point 3"]]:
    """World points where rays of random pixels meet the scene, and the pixels' colours in [0, 1].

    Two passes: over the depths that the views have in common, and over those of the surfaces that the first one finds,
    widened by a fifth at both ends.

    Args:
        photos: what they show is certain.
        renders: of the same size.
        count: at most so many points.

    Returns:
        Nothing where the photos show no background, and so no outlines.
    """
    images = photos.with_others(renders)
    nothing = images.rgb.new_zeros(0, 3)
    if photos.empty.float().mean() < SHOWN_BACKGROUND:
        return nothing, nothing
    pixels = (images.known & ~images.empty).flatten().nonzero()[:, 0]
    evenly = range(0, len(images.rgb), math.ceil(len(images.rgb) / VIEWS_FOR_RANGE))
    depth_range = visible_range(images.select(evenly))
    if len(pixels) == 0 or depth_range is None:
        return nothing, nothing
    drawn = torch.randint(len(pixels), (RAYS_FOR_A_POINT * count,), generator=generator)
    pixels = pixels[drawn.to(pixels.device)].sort().values  # by view
    view = pixels // images.known[0].numel()
    centre, ray = images.camera_to_world[view, :3, 3], images.rays().reshape(-1, 3)[pixels]
    for _ in range(2):
        near, far = depth_range
        steps = (torch.arange(DEPTHS) + torch.rand(len(pixels), DEPTHS, generator=generator)) / DEPTHS
        depths = 1 / (1 / near + steps.to(images.rgb) * (1 / far - 1 / near))
        points = centre[:, None] + ray[:, None] * depths[..., None]
        first, met = _first_surface(_costs(images, points, view, pixels), _possible(photos, renders, points))
        depth = depths.gather(1, first[:, None])[:, 0]
        if not met.any():
            return nothing, nothing
        low, high = depth[met].quantile(depth.new_tensor([0.01, 0.99])).tolist()
        depth_range = max(low / 1.2, near), min(high * 1.2, far)
    kept = met.nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept), generator=generator).to(kept.device)[:count]]
    return (centre + ray * depth[:, None])[kept], images.rgb.reshape(-1, 3)[pixels][kept]


def _first_surface(
    cost: Float[Tensor, "ray depth"], possible: Bool[Tensor, "ray depth"]
) -> tuple[Tensor, Bool[Tensor, " ray"]]:
    """Numbers of the depths at which rays meet a surface, and whether they meet one at all."""
    cost = cost.masked_fill(~possible, torch.inf)
    best = cost.amin(dim=1)
    return (cost <= best[:, None] + AS_GOOD).int().argmax(dim=1), best < MAX_DIFFERENCE / 2


def _possible(
    photos: PosedImages, renders: PosedImages, points: Float[Tensor, "ray depth 3"]
) -> Bool[Tensor, "ray depth"]:
    flat = points.flatten(0, 1)
    inside, empty = renders.seen(flat)
    return (photos.possible(flat) & (empty <= OUTVOTED * inside)).unflatten(0, points.shape[:2])


def _costs(
    images: PosedImages, points: Float[Tensor, "ray depth 3"], view: Tensor, pixels: Tensor
) -> Float[Tensor, "ray depth"]:
    """How the colours of rays' pixels differ from those of points on them in the views beside; rays lie by view."""
    smooth = avg_pool2d(images.rgb.permute(0, 3, 1, 2), WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)
    colours = smooth.permute(0, 2, 3, 1).reshape(-1, 3)[pixels]
    numbers, rays = (part.tolist() for part in view.unique_consecutive(return_counts=True))
    costs = []
    for number, on_rays, of_rays in zip(numbers, points.split(rays), colours.split(rays)):
        sources = sources_of(images, number)
        differences = []
        for source in sources:
            place, depth = images.project(source, on_rays)
            there = images.look_up(smooth[source], place)
            difference = (there - of_rays.T[:, :, None]).abs().mean(dim=0).clamp(max=MAX_DIFFERENCE)
            differences.append(torch.where(images.inside(place, depth), difference, MAX_DIFFERENCE))
        # The better half of the sources: the others may not see the point.
        ranked = torch.stack(differences).sort(dim=0).values
        costs.append(ranked[: math.ceil(len(sources) / 2)].mean(dim=0))
    return torch.cat(costs)
