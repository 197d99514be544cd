"""Which context views are placed best for a target."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from elvsm_nerfstudio.geometry import view_distance


def nearest_views(
    context: Float[Tensor, "scene view 4 4"], target: Float[Tensor, "scene target 4 4"], count: int
) -> Int[Tensor, "scene target count"]:
    """Positions of the ``count`` nearest context views of every target, nearest first; of equals, the first.

    Args:
        context, target: OpenCV camera-to-world.
    """
    if not 1 <= count <= context.shape[1]:
        raise ValueError(f"nearest_views: count is {count}; expected 1 to {context.shape[1]}, the number of views")
    return view_distance(context.float(), target.float()).argsort(dim=-1, stable=True)[..., :count]
