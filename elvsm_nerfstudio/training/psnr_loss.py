"""A loss that grows with the logarithm of an image's error, as PSNR falls with it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

TYPICAL_ERROR = 0.02
"""Where the gradient is that of the mean squared error, nearly (17 dB): so clipping and other losses' weights mean the
same. Ours."""
SMALLEST_ERROR = 0.001
"""Far below it (30 dB), an image counts as in the mean squared error: else one that is hardly wrong, such as a plain
background, would count more than all others. Ours."""


def psnr_loss(errors: Float[Tensor, "*image"]) -> Float[Tensor, ""]:
    """Mean of log(1 + error / SMALLEST_ERROR), scaled.

    Each image counts by how much of its error goes, not by how large the error is; so does PSNR, when it is averaged
    over images (as in NAFNet, arXiv 2204.04676).

    Args:
        errors: mean squared error of each image, colours in [0, 1].
    """
    return TYPICAL_ERROR * (errors / SMALLEST_ERROR).log1p().mean()
