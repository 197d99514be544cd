"""Points on a scene's surfaces from a few posed pictures alone: a plane sweep.

Each view's depth is the one at which the other views agree best, out of planes evenly spaced in inverse depth (Collins,
"A Space-Sweep Approach to True Multi-Image Matching", 1996; matching costs are smoothed along the picture's edges as by
Rhemann et al., "Fast Cost-Volume Filtering", 2011). Kept are depths that stand out among the planes and that another
view confirms, where no view sees the background through them. The range of depths is first all that two cameras can
see, then that of the surfaces found in it: nothing is known of the scene but its context views. All thresholds here are
ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from elvsm_nerfstudio.geometry import nearest_others

MAX_SOURCES = 4
"""Other views that a view is compared with, the nearest."""
WINDOW = 9
"""Pixels a side over which costs are smoothed."""
EDGE_VARIANCE = 1e-3
"""Variance of grey values above which smoothing stops at an edge."""
MAX_DIFFERENCE = 0.2
"""Colour differences count up to this; beyond, or outside a source, nothing agrees."""
STANDS_OUT = 0.95
"""The best cost is below this share of that of any other local minimum."""
NOISE = 0.004
"""Differences of less than a grey level tell nothing."""
AGREEMENT = 1.5
"""Pixels by which a depth and its confirmation may differ, seen from the confirming view."""
SEEN_SHARE = 0.1
"""A depth is visible if so many of a view's pixels lie in another view there."""
MAX_DEPTH_RATIO = 2.5
"""Between a point's depths in two views that see the same of it; what is close before one camera is too small to be
told apart in the other."""
MIN_SHIFT = 0.5
"""Pixels: depths from which no view moves by more, as against infinity, cannot be told apart."""


@dataclass(frozen=True)
class PosedImages:
    """Pinhole pictures of one scene."""

    rgb: Float[Tensor, "view height width 3"]
    known: Bool[Tensor, "view height width"]
    """Pixels that hold a picture."""
    empty: Bool[Tensor, "view height width"]
    """Where it shows the background that is behind everything, and so nothing on the way to it."""
    camera_to_world: Float[Tensor, "view 4 4"]
    """OpenCV."""
    intrinsics: Float[Tensor, "view 4"]
    """fx, fy, cx, cy in pixels."""

    def rays(self) -> Float[Tensor, "view height width 3"]:
        """From the camera's centre to depth 1, in world axes."""
        height, width = self.rgb.shape[1:3]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        fx, fy, cx, cy = self.intrinsics[:, :, None, None].unbind(1)
        x, y = x.to(self.rgb), y.to(self.rgb)
        local = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x).expand(len(fx), -1, -1)], dim=-1)
        return torch.einsum("vij,vhwj->vhwi", self.camera_to_world[:, :3, :3], local)

    def points(self, view: int, depth: Float[Tensor, "*plane height width"]) -> Float[Tensor, "*plane height width 3"]:
        """World points at depths of one view's pixels."""
        return self.camera_to_world[view, :3, 3] + depth[..., None] * self.rays()[view]

    def project(self, view: int, points: Float[Tensor, "*point 3"]) -> tuple[Tensor, Tensor]:
        """Pixels [*point, 2] and depths [*point] of world points in one view; depths in front are positive."""
        pose = self.camera_to_world[view]
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        depth = local[..., 2]
        focal, centre = self.intrinsics[view].split(2)
        return local[..., :2] / depth[..., None].clamp(min=1e-9) * focal + centre, depth

    def inside(self, pixels: Float[Tensor, "*point 2"], depth: Float[Tensor, "*point"]) -> Bool[Tensor, "*point"]:
        """Whether projected points lie within the picture and in front of the camera."""
        size = pixels.new_tensor([self.rgb.shape[2], self.rgb.shape[1]])
        return ((pixels > 0) & (pixels < size)).all(dim=-1) & (depth > 1e-6)

    def seen(self, points: Float[Tensor, "point 3"]) -> tuple[Int[Tensor, " point"], Int[Tensor, " point"]]:
        """In how many views world points lie, and in how many of those on the background."""
        size = torch.tensor([self.rgb.shape[2], self.rgb.shape[1]], device=points.device)
        inside, empty = torch.zeros(2, len(points), dtype=torch.int, device=points.device)
        for view, shows_nothing in enumerate(self.empty):
            pixels, depth = self.project(view, points)
            x, y = torch.minimum(pixels.clamp(min=0).long(), size - 1).unbind(-1)
            within = self.inside(pixels, depth)
            inside += within
            empty += within & shows_nothing[y, x]
        return inside, empty

    def possible(self, points: Float[Tensor, "point 3"]) -> Bool[Tensor, " point"]:
        """Whether something can be at world points: no view sees the background there."""
        return self.seen(points)[1] == 0

    def select(self, views: Sequence[int]) -> PosedImages:
        """Some of the views."""
        return PosedImages(*(getattr(self, part.name)[list(views)] for part in fields(self)))

    def with_others(self, others: PosedImages) -> PosedImages:
        """These views and then others of the same size."""
        return PosedImages(*(torch.cat([getattr(it, part.name) for it in (self, others)]) for part in fields(self)))

    def look_up(self, maps: Float[Tensor, "channel height width"], pixels: Float[Tensor, "rows columns 2"]) -> Tensor:
        """Values [channel, rows, columns] of a view's maps at pixels, bilinearly."""
        size = pixels.new_tensor([self.rgb.shape[2], self.rgb.shape[1]])
        return grid_sample(maps[None], (pixels / size * 2 - 1)[None], align_corners=False, padding_mode="border")[0]


def visible_range(images: PosedImages) -> tuple[float, float] | None:
    """Nearest and farthest depth at which a view's pixels are seen, and seen to move, by another; None where the views
    have nothing in common."""
    centres = images.camera_to_world[:, :3, 3]
    extent = float((centres - centres.mean(dim=0)).norm(dim=-1).max())
    if extent == 0:
        return None
    depths = torch.logspace(-2, 4, 121).to(centres) * extent
    visible = torch.zeros(len(depths), dtype=torch.bool, device=centres.device)
    step = max(1, min(images.rgb.shape[1:3]) // 12)
    for view in range(len(centres)):
        rays = images.rays()[view, ::step, ::step].reshape(-1, 3)
        seen = torch.zeros(len(depths), len(rays), dtype=torch.bool, device=centres.device)
        for other in range(len(centres)):
            if other != view:
                pixels, depth = images.project(other, centres[view] + depths[:, None, None] * rays)
                at_infinity, _ = images.project(other, centres[other] + 1e6 * extent * rays)
                ratio = depth / depths[:, None]
                alike = (ratio < MAX_DEPTH_RATIO) & (ratio > 1 / MAX_DEPTH_RATIO)
                moves = (pixels - at_infinity).norm(dim=-1) > MIN_SHIFT
                seen |= images.inside(pixels, depth) & alike & moves
        visible |= seen.float().mean(dim=-1) >= SEEN_SHARE
    if not visible.any():
        return None
    found = depths[visible]
    return float(found[0]), float(found[-1])


@torch.no_grad()
def surface_points(images: PosedImages, num_planes: int = 128) -> tuple[Float[Tensor, "point 3"], Tensor]:
    """World points of all pixels whose depth the views agree on, and their colours [point, 3] in [0, 1].

    Two sweeps: over the depths that are visible at all, and over those of the surfaces that the first one finds,
    widened by a fifth at both ends.
    """
    depth_range = visible_range(images)
    nothing = images.rgb.new_zeros(0, 3)
    for _ in range(2):
        if depth_range is None:
            return nothing, nothing
        depths, agreed = _agreed_depths(images, depth_range, num_planes)
        found = depths[agreed].sort().values
        if len(found) == 0:
            return nothing, nothing
        widest = depth_range
        low, high = (float(found[round(share * (len(found) - 1))]) for share in (0.01, 0.99))
        depth_range = max(low / 1.2, widest[0]), min(high * 1.2, widest[1])
    points = torch.stack([images.points(view, depths[view]) for view in range(len(depths))])[agreed]
    kept = images.possible(points)
    return points[kept], images.rgb[agreed][kept]


def _agreed_depths(
    images: PosedImages, depth_range: tuple[float, float], num_planes: int
) -> tuple[Float[Tensor, "view height width"], Bool[Tensor, "view height width"]]:
    """Depths of all views, and where another view confirms them."""
    near, far = depth_range
    planes = 1 / torch.linspace(1 / near, 1 / far, num_planes).to(images.rgb)
    swept = [_sweep(images, view, sources_of(images, view), planes) for view in range(len(images.rgb))]
    depths, clear = (torch.stack(parts) for parts in zip(*swept))
    return depths, torch.stack([clear[view] & _confirmed(images, view, depths, clear) for view in range(len(depths))])


def sources_of(images: PosedImages, view: int) -> list[int]:
    """The other views that a view is compared with."""
    return nearest_others(images.camera_to_world)[view, :MAX_SOURCES].tolist()


def _sweep(
    images: PosedImages, view: int, sources: list[int], planes: Float[Tensor, " plane"]
) -> tuple[Float[Tensor, "height width"], Bool[Tensor, "height width"]]:
    """A view's best depths, and where they stand out."""
    height, width = images.rgb.shape[1:3]
    reference = images.rgb[view].permute(2, 0, 1)
    smooth = EdgeAwareMean(reference.mean(dim=0))
    costs = []
    for plane in planes:
        points = images.points(view, plane.expand(height, width))
        of_sources = []
        for source in sources:
            pixels, depth = images.project(source, points)
            maps = torch.cat([images.rgb[source].permute(2, 0, 1), images.known[source][None].float()])
            looked_up = images.look_up(maps, pixels)
            difference = (looked_up[:3] - reference).abs().mean(dim=0).clamp(max=MAX_DIFFERENCE)
            usable = images.inside(pixels, depth) & (looked_up[3] > 0.99)
            of_sources.append(torch.where(usable, difference, MAX_DIFFERENCE))
        # The better half of the sources: the others may not see the point.
        ranked = torch.stack(of_sources).sort(dim=0).values
        costs.append(smooth(ranked[: math.ceil(len(sources) / 2)].mean(dim=0)))
    cost = torch.stack(costs)
    best, index = cost.min(dim=0)
    # Rivals are the other local minima: along a faint gradient costs change slowly, and the best is still the only one.
    padded = torch.cat([torch.full_like(cost[:1], torch.inf), cost, torch.full_like(cost[:1], torch.inf)])
    minimum = (cost <= padded[:-2]) & (cost <= padded[2:])
    numbers = torch.arange(len(planes), device=cost.device)[:, None, None]
    rivals = torch.where(minimum & ((numbers - index).abs() > 1), cost, torch.inf).amin(dim=0)
    shown = images.known[view] & ~images.empty[view]
    clear = (best + NOISE < STANDS_OUT * rivals) & (best < MAX_DIFFERENCE / 2) & shown
    # The minimum between planes, of a parabola through the best and its neighbours.
    inner = index.clamp(1, len(planes) - 2)
    before, at, after = (cost.gather(0, (inner + k)[None])[0] for k in (-1, 0, 1))
    shift = ((before - after) / (2 * (before - 2 * at + after)).clamp(min=1e-9)).clamp(-0.5, 0.5)
    position = torch.where(inner == index, inner + shift, index.to(cost))
    inverse = 1 / planes
    return 1 / (inverse[0] + position * (inverse[1] - inverse[0])), clear


def _confirmed(images: PosedImages, view: int, depths: Tensor, clear: Tensor) -> Bool[Tensor, "height width"]:
    """Where another view puts the surface at the same place, to the pixel."""
    points = images.points(view, depths[view])
    confirmed = torch.zeros_like(clear[view])
    for other in sources_of(images, view):
        pixels, depth = images.project(other, points)
        found = images.look_up(torch.stack([depths[other], clear[other].float()]), pixels)
        theirs = images.camera_to_world[other, :3, 3] + found[0][..., None] * (
            (points - images.camera_to_world[other, :3, 3]) / depth[..., None].clamp(min=1e-9)
        )
        back, back_depth = images.project(view, theirs)
        own, _ = images.project(view, points)
        near = (back - own).norm(dim=-1) < AGREEMENT
        confirmed |= images.inside(pixels, depth) & (found[1] > 0.5) & near & (back_depth > 0)
    return confirmed


class EdgeAwareMean:
    """Local means that do not cross the edges of a guide (He et al., "Guided Image Filtering", 2010)."""

    def __init__(self, guide: Float[Tensor, "height width"]):
        self.guide, self.mean = guide, _box(guide)
        self.variance = _box(guide * guide) - self.mean.square()

    def __call__(self, values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
        mean = _box(values)
        slope = (_box(self.guide * values) - self.mean * mean) / (self.variance + EDGE_VARIANCE)
        return _box(slope) * self.guide + _box(mean - slope * self.mean)


def _box(values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    return avg_pool2d(values[None, None], WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)[0, 0]
