"""How many training steps take rendered views, and which: one rule for any number of context views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

SHARE = 0.6
"""Of the first steps that take a rendered view, where the network is trusted. Ours, as all numbers here."""
RATES = {"means": 10.0, "scales": 2.0, "quats": 5.0, "opacities": 0.25}
"""Learning rates over those of splatfacto in a training of SHORT steps. Splatfacto's are for LONG ones, and leave
Gaussians about where they begin in a short training; photos alone would not tell them where else to go, renders do."""
SHORT, LONG = 500, 30_000
VIEWS_TO_END_WITH = 8
"""Context views from which the share reaches zero just at the end; from half as many it has fallen by half there."""
NO_TRUST = -0.5
"""Gain in dB at which a network is not trusted at all, from two context views. With each doubling of them a decibel
more is asked for: Gaussians gain more by photos than a network does."""
FULL_TRUST = 1.0
"""Above that in dB, from where a network is trusted fully."""


@dataclass(frozen=True)
class RenderedSteps:
    """Training steps that take a rendered view: a share of them that may fall linearly, evenly among the others."""

    first_share: float
    """At the first step."""
    end: float = math.inf
    """The step at which the share reaches zero."""

    def before(self, step: int) -> int:
        """So many of the first steps take a rendered view."""
        reached = min(step, self.end)
        return math.floor(self.first_share * reached * (1 - reached / (2 * self.end)))


def rates_for(steps: int) -> dict[str, float]:
    """Learning rates over those of splatfacto in a training of so many steps: RATES in a short one, 1 in a long one."""
    share = min(1.0, max(0.0, math.log(LONG / max(1, steps)) / math.log(LONG / SHORT)))
    return {name: rate**share for name, rate in RATES.items()}


def falls_until(num_views: int) -> float:
    """Where the share of rendered views reaches zero, as a share of the training: the more photos, the sooner."""
    return VIEWS_TO_END_WITH / num_views


def trust(gain: Optional[float], num_views: int) -> float:
    """From 0 to 1, how far a network may be followed on a scene.

    Args:
        gain: by how many dB it predicts left-out context views better than what needs no learning; None where there was
            nothing to leave out, and the network is all that there is to go by.
        num_views: context views.
    """
    if gain is None:
        return 1.0
    return min(1.0, max(0.0, (gain - NO_TRUST - math.log2(num_views / 2)) / FULL_TRUST))
