"""The error of what neighbouring pixels differ by: where patches of a render do not fit together, it is large."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def edge_errors(difference: Float[Tensor, "*image height width 3"]) -> Float[Tensor, "*image"]:
    """Mean squared differences between horizontal neighbours, plus those between vertical ones.

    It is a square, as the error of the pixels is, so that the image expected from what is known has the least of both;
    they weigh its imperfections differently. Ours.

    Args:
        difference: of the rendered images to the true ones, colours in [0, 1].
    """
    rows, columns = difference.diff(dim=-3), difference.diff(dim=-2)
    return rows.square().mean((-3, -2, -1)) + columns.square().mean((-3, -2, -1))
