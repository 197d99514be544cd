"""Lens augmentation: training views through many lenses, cut from pictures that were taken through one.

A network that was trained through one lens takes each patch's ray for the patch's number, and fails on every other
focal length, principal point or aspect. Here each view of a training scene is a window of its picture, resized to the
size that the network gets; the intrinsics of a window are exact.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.data.images import ImageSpec, Window
from elvsm_nerfstudio.data.view_samplers import mix_seed

SCENE_SHARE = 0.75
"""Share of the scenes that are seen through other lenses; the others are resized and centre-cropped."""
ZOOM = (0.7, 1.6)
"""Smallest and largest zoom of a scene, relative to its whole picture; below 1 only where a picture has background
beyond its border."""
VIEW_ZOOM = 1.15
"""Largest factor between the zoom of a view and that of its scene."""
OWN_ZOOM_SHARE = 0.2
"""Share of these scenes in which each view has a zoom of its own: captures of mixed focal lengths."""
SHIFT = 0.15
"""Largest offset of a window's centre, as a share of its sides; the principal point is off by as much."""
ASPECTS = (4 / 3, 16 / 9)
"""Aspects, upright and lying, of the steps whose images are of another size than asked for."""
ASPECT_SHARE = 0.4
"""Share of those steps."""
SIDE_MULTIPLE = 8
"""Sides of other aspects are multiples of this, which a network's patch size has to divide."""


def step_spec(spec: ImageSpec, seed: int, step: int) -> ImageSpec:
    """The images of a training step: of the size asked for, or of another aspect and at most as many pixels."""
    generator = torch.Generator().manual_seed(mix_seed(seed, 6, step))
    which, share = torch.rand(2, generator=generator).tolist()
    if share >= ASPECT_SHARE:
        return spec
    sizes = other_aspects(spec.size)
    return replace(spec, size=sizes[int(which * len(sizes))])


def other_aspects(size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of pictures in other aspects with at most as many pixels as ``size``."""
    area, sizes = size[0] * size[1], []
    for aspect in ASPECTS:
        short = max(1, round(math.sqrt(area / aspect) / SIDE_MULTIPLE)) * SIDE_MULTIPLE
        long = area // short // SIDE_MULTIPLE * SIDE_MULTIPLE
        sizes += [(short, long), (long, short)]
    return sizes


class Lens(NamedTuple):
    """How a view is seen: its zoom, and the offset of its window to the right and down in shares of the window."""

    zoom: float
    shift: tuple[float, float]


def draw_lenses(num_views: int, generator: torch.Generator) -> Optional[list[Lens]]:
    """Lenses of a scene's views; None for a scene that is seen as it was taken."""
    share, own, scene = torch.rand(3, generator=generator).tolist()
    views = torch.rand(num_views, 4, generator=generator).tolist()
    if share >= SCENE_SHARE:
        return None
    lenses = []
    for of_view, factor, right, down in views:
        position = of_view if own < OWN_ZOOM_SHARE else scene
        zoom = ZOOM[0] * (ZOOM[1] / ZOOM[0]) ** position * VIEW_ZOOM ** (2 * factor - 1)
        lenses.append(Lens(zoom, (SHIFT * (2 * right - 1), SHIFT * (2 * down - 1))))
    return lenses


def window_of(lens: Lens, picture: tuple[int, int], size: tuple[int, int], cut_out: bool) -> Window:
    """The part of a picture that a lens shows.

    Args:
        picture: (height, width) of the picture.
        size: (height, width) to which the window will be resized; it has the same aspect.
        cut_out: whether there is background beyond the picture's border. If not, the window lies within it.
    """
    # Pixels of the picture for one of the window's.
    scale = math.sqrt(picture[0] * picture[1] / (size[0] * size[1])) / lens.zoom
    if not cut_out:
        scale = min(scale, picture[0] / size[0], picture[1] / size[1])
    height, width = size[0] * scale, size[1] * scale
    left = (picture[1] - width) / 2 + lens.shift[0] * width
    top = (picture[0] - height) / 2 + lens.shift[1] * height
    if not cut_out:
        left = min(max(left, 0.0), picture[1] - width)
        top = min(max(top, 0.0), picture[0] - height)
    return Window(left, top, left + width, top + height)


def window_intrinsics(
    intrinsics: Float[Tensor, "view 4"], windows: list[Window], size: tuple[int, int]
) -> Float[Tensor, "view 4"]:
    """fx, fy, cx, cy in pixels of windows that were resized to (height, width), from those of the whole pictures."""
    edges = intrinsics.new_tensor(windows)
    corner, extent = edges[:, :2], edges[:, 2:] - edges[:, :2]
    scale = intrinsics.new_tensor([size[1], size[0]]) / extent
    return torch.cat([intrinsics[:, :2] * scale, (intrinsics[:, 2:] - corner) * scale], dim=-1)
