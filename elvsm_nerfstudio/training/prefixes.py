"""Training on every number of context views at once: one encoding, targets rendered from random prefixes of it.

Context views are encoded without seeing one another, so that the first n of them are the encoding of those n views, for
every n, at no cost. RayDer (arXiv 2605.31535) trains so, with a loss for every prefix; here each target has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elvsm_nerfstudio.views import ViewSet


@dataclass(frozen=True)
class Prefixes:
    """From which context views a step renders its targets, the same for all scenes of the batch."""

    order: tuple[int, ...]
    """Positions of the context views. A random order, as some samplers sort: a prefix shall be any subset."""
    lengths: tuple[int, ...]
    """For each target, how many views it is rendered from, the first ones in that order."""

    @staticmethod
    def draw(num_views: int, num_targets: int, generator: torch.Generator) -> Prefixes:
        """Lengths are uniform over 1 to ``num_views``, independently for each target."""
        order = torch.randperm(num_views, generator=generator)
        lengths = torch.randint(1, num_views + 1, (num_targets,), generator=generator)
        return Prefixes(tuple(order.tolist()), tuple(lengths.tolist()))

    def ordered(self, views: ViewSet) -> ViewSet:
        """The views with the context in this order."""
        return ViewSet(views.context.select(self.order), views.target)

    def of_frame(self, views: ViewSet) -> ViewSet:
        """The views that fix the canonical frame: the first target's prefix.

        One encoding is in one frame, while renders from n views have the frame of those n. Taken from all context views
        in every step, the frames of few, a single one above all, would never have been trained on. (Ours.)

        Args:
            views: ordered.
        """
        return ViewSet(views.context.select(slice(0, self.lengths[0])), views.target)
