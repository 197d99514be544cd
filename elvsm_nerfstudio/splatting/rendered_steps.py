"""How many training steps take rendered views, and which: one rule for any number of context views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

SHARE = 0.4
"""Of steps that take a rendered view, where the network is trusted. Ours, as all numbers here."""
NO_TRUST = -0.25
"""Gain in dB at which a network is not trusted at all: it predicts photos no better than a copy of another one. Below
zero, as it is given one photo less than it will render from."""
FULL_TRUST = 0.75


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


def trust(gain: Optional[float]) -> float:
    """From 0 to 1, how far a network may be followed on a scene.

    Args:
        gain: by how many dB it predicts left-out context views better than what needs no learning; None where there was
            nothing to leave out, and the network is all that there is to go by.
    """
    if gain is None:
        return 1.0
    return min(1.0, max(0.0, (gain - NO_TRUST) / (FULL_TRUST - NO_TRUST)))
