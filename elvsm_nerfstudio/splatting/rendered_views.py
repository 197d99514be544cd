"""Views of a scene that a network of this package renders from its context views, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from elvsm_nerfstudio.cameras import in_pixels, views_from_cameras
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.metrics import mean_over_areas, psnr
from elvsm_nerfstudio.nn.network import SceneNetwork
from elvsm_nerfstudio.views import Views

VIEWS_AT_ONCE = 8
"""Views that are rendered together."""
MAX_LEFT_OUT = 8
"""Renders from parts of the context to judge a network by; beyond, several views are left out together."""
MAX_COMPARED = 4
"""Renders of a view from parts of the context to judge its pixels by."""
DOUBT = 0.075
"""Standard error of colours at which a rendered pixel counts half. Ours."""


@dataclass(frozen=True)
class RenderedViews:
    """Rendered views of a scene."""

    cameras: Cameras
    """[view]"""
    images: Float[Tensor, "view height width 3"]
    confidence: Float[Tensor, "view height width 1"]
    """From 0 to 1: where renders from parts of the context agree."""

    def in_at_most(self, size: tuple[int, int]) -> RenderedViews:
        """The same in pixels no finer than those of pictures of ``size`` (height, width): means over areas."""
        height, width = self.images.shape[1:3]
        scale = max(size[0] / height, size[1] / width)
        if scale >= 1:
            return self
        reduced = (round(height * scale), round(width * scale))
        images, confidence = (mean_over_areas(x, reduced) for x in (self.images, self.confidence))
        return RenderedViews(in_pixels(self.cameras, *reduced), images, confidence)


@dataclass(frozen=True)
class LeftOut:
    """Each context view in turn, predicted from the others: mean PSNR in dB."""

    network: float
    mean: float
    """Of the mean of the other views' pictures."""
    nearest: float
    """Of the nearest other view's picture."""
    colour: float
    """Of nothing but the mean colour of the other views."""

    def gain(self, num_views: int) -> float:
        """What the network is ahead of what needs no learning, in dB, where each of so many views was left out.

        That is something between one colour and a copy, the nearer to the copy the more views there are: from two, the
        copy is of the only other view, and an object may look alike from opposite sides.
        """
        copied = (num_views - 2) / num_views
        return self.network - copied * max(self.mean, self.nearest) - (1 - copied) * self.colour


@torch.no_grad()
def leave_out(
    network: Callable[[Views, Views], Float[Tensor, "1 target height width 3"]], context: Views
) -> Optional[LeftOut]:
    """How well a network predicts context views that it is not given; None for a single one.

    Args:
        network: pictures of target views, its second argument, from context views, its first; a SceneNetwork is one.
        context: of one scene.
    """
    if context.num_views < 2:
        return None
    predictors = {
        "network": network,
        "mean": BASELINES["mean_of_context"],
        "nearest": BASELINES["copy_nearest"],
        "colour": lambda others, left_out: others.rgb.mean(dim=(1, 2, 3), keepdim=True).expand_as(left_out.rgb),
    }
    scores: dict[str, list[float]] = {name: [] for name in predictors}
    for others, left_out in _parts(context, MAX_LEFT_OUT):
        for name, predict in predictors.items():
            predicted = predict(others, left_out)[0]
            scores[name] += [float(psnr(*pair)) for pair in zip(predicted, left_out.rgb[0])]
    return LeftOut(**{name: sum(values) / len(values) for name, values in scores.items()})


def render_views(network: SceneNetwork, context: Views, cameras: Cameras) -> RenderedViews:
    """Renders cameras [view] of one size from context views.

    A pixel's confidence falls with the standard error of its colour, by the jackknife: from renders that leave out some
    of the context views each. Where they disagree, the network makes up what it shows. One view leaves nothing to
    compare with, and all pixels count the same.
    """
    images = _render(network, context, cameras)
    confidence = torch.ones_like(images[..., :1])
    if context.num_views > 1:
        # Each part is encoded by itself, in its own canonical frame, as leave_out judges the network. Dropping views
        # from one memory would keep the frame of all: with the package's weights that moved confidences by 0.02 to 0.06
        # on average and by up to 0.8. Encoding a few views costs little beside rendering dozens.
        renders = torch.stack([_render(network, others, cameras) for others, _ in _parts(context, MAX_COMPARED)])
        doubt = renders.std(dim=0).mean(dim=-1, keepdim=True) * (len(renders) - 1) / math.sqrt(len(renders))
        confidence = 1 / (1 + (doubt / DOUBT).square())
    return RenderedViews(cameras, images, confidence)


@torch.no_grad()
def _render(network: SceneNetwork, context: Views, cameras: Cameras) -> Float[Tensor, "view height width 3"]:
    memory = network.encode(context)
    height, width = int(cameras.height[0]), int(cameras.width[0])
    pictures = []
    for first in range(0, len(cameras), VIEWS_AT_ONCE):
        targets = views_from_cameras(cameras[first : first + VIEWS_AT_ONCE], network.config.patch_size)
        pictures.append(network.decode(memory, targets)[0, :, :height, :width])
    return torch.cat(pictures).float()


def _parts(context: Views, at_most: int) -> Iterator[tuple[Views, Views]]:
    """The context in so many parts, each view left out in one of them: the others, and those left out."""
    count = context.num_views
    parts = min(count, at_most)
    for part in range(parts):
        left_out = range(part, count, parts)
        yield context.select([view for view in range(count) if view not in left_out]), context.select(left_out)
