"""What training varies at random in a scene's cameras."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from elvsm_nerfstudio.geometry import CanonicalFrame


def scaled_at_random(frame: CanonicalFrame, bounds: tuple[float, float], generator: torch.Generator) -> CanonicalFrame:
    """The frame in which each scene is larger or smaller by a random factor: so are its camera centres.

    The factor's logarithm is uniform, so that large is as likely as small. The canonical frame cancels any scale,
    rotation and translation of the world itself, which need no augmentation; so the scale is varied in here, after it.
    A rotation after it would show the network cameras that no render has.

    Args:
        bounds: smallest and largest factor.
    """
    low, high = map(math.log, bounds)
    factors = torch.empty(frame.scale.shape).uniform_(low, high, generator=generator).exp()
    return replace(frame, scale=frame.scale / factors.to(frame.scale.device))
