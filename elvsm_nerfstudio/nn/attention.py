"""Attention itself, by the kernel that is fastest where it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
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
    normal keys). As in the fused kernel, nothing that grows with queries times keys is kept for the gradients.
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _InBlocks.apply(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values)


def prefix_attention(
    queries: Float[Tensor, "batch head query d"],
    keys: Float[Tensor, "batch head source d"],
    values: Float[Tensor, "batch head source d"],
    prefixes: Sequence[int],
) -> Float[Tensor, "batch head query d"]:
    """``attention`` of equal parts of the queries, each to the first so many keys alone.

    Parts with equal prefixes are one call. A mask over all keys would cost the whole of them for every part, and
    PyTorch's fastest kernels.

    Args:
        prefixes: number of keys, for each part.
    """
    parts = queries.chunk(len(prefixes), dim=2)
    found: dict[int, Tensor] = {}
    for prefix in set(prefixes):
        same = [index for index, other in enumerate(prefixes) if other == prefix]
        together = torch.cat([parts[index] for index in same], dim=2)
        out = attention(together, keys[:, :, :prefix], values[:, :, :prefix])
        found.update(zip(same, out.chunk(len(same), dim=2)))
    return torch.cat([found[index] for index in range(len(parts))], dim=2)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        # Batch and heads are made one dimension here and not by each of the products.
        heads, (queries, keys, values) = queries.shape[:2], (x.flatten(0, 1) for x in (queries, keys, values))
        scaled = (keys * queries.shape[-1] ** -0.5).mT
        blocks = (torch.softmax(block @ scaled, dim=-1) @ values for block in queries.split(BLOCK, dim=1))
        return torch.cat(list(blocks), dim=1).unflatten(0, heads)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, (queries, keys, values) = gradient.shape[:2], (x.flatten(0, 1) for x in ctx.saved_tensors)
        scale = queries.shape[-1] ** -0.5
        scaled, of_queries = keys * scale, []
        # Sums over blocks, of which there may be many, are in fp32.
        of_keys, of_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for block, of_block in zip(queries.split(BLOCK, dim=1), gradient.flatten(0, 1).split(BLOCK, dim=1)):
            weights = torch.softmax(block @ scaled.mT, dim=-1)
            of_values += weights.mT @ of_block
            of_scores = torch.ops.aten._softmax_backward_data(of_block @ values.mT, weights, -1, weights.dtype)
            of_queries.append(of_scores @ scaled)
            of_keys += of_scores.mT @ block
        gradients = torch.cat(of_queries, dim=1), (of_keys * scale).to(keys.dtype), of_values.to(values.dtype)
        return tuple(x.unflatten(0, heads) for x in gradients)
