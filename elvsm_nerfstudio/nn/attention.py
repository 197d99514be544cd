"""Attention itself, by the kernel that is fastest where it runs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Queries that a CPU handles at once in bf16: their scores stay in its cache."""


def attention(
    queries: Float[Tensor, "batch head query d"],
    keys: Float[Tensor, "batch head source d"],
    values: Float[Tensor, "batch head source d"],
) -> Float[Tensor, "batch head query d"]:
    """softmax(queries keys^T / sqrt(d)) values.

    PyTorch's fused kernel, but for bf16 on a CPU: there it is as slow as in fp32, while plain matrix products use the
    processor's bf16 units. They take half the time, and less with gradients (docs/benchmarks.md); scores
    are then rounded to bf16, so that the error of that precision doubles (root mean square 2e-4 against 1e-4 for 1,024
    normal keys).
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _in_blocks(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values)


def _in_blocks(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scaled = (keys * queries.shape[-1] ** -0.5).transpose(-1, -2)
    blocks = (torch.softmax(block @ scaled, dim=-1) @ values for block in queries.split(BLOCK, dim=-2))
    return torch.cat(list(blocks), dim=-2)
