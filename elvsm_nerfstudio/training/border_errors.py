"""The error of what pixels on both sides of a patch's border differ by: large where patches do not fit together."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def border_errors(difference: Float[Tensor, "*image height width 3"], patch_size: int) -> Float[Tensor, "*image"]:
    """Mean squared differences across the borders between rows of patches, plus those between columns of patches.

    A patch that is too bright as a whole costs little in the error of the pixels, and shows. This is a square, as that
    error is, so the image expected from what is known has the least of both. Ours.

    Args:
        difference: of the rendered images to the true ones, colours in [0, 1].
        patch_size: pixels; an image that is a single patch in height and width has no border, and gives 0.
    """
    between_rows = difference.diff(dim=-3)[..., patch_size - 1 :: patch_size, :, :]
    between_columns = difference.diff(dim=-2)[..., patch_size - 1 :: patch_size, :]
    return _mean_square(between_rows) + _mean_square(between_columns)


def _mean_square(steps: Float[Tensor, "*image rows columns 3"]) -> Float[Tensor, "*image"]:
    """Over each image; 0 for none."""
    return steps.square().sum((-3, -2, -1)) / max(math.prod(steps.shape[-3:]), 1)
