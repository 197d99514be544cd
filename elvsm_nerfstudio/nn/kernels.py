"""Attention and norms, by the kernel that is fastest where it runs, and what the way back computes again.

Results and gradients are those of PyTorch's plain operations to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

EPS = 1e-5
"""Added to the variance in all norms."""

BLOCK = 256
"""Queries that a CPU without AMX handles at once in bf16."""
SCORES = 2**22
"""Scores of a block, of as many heads as a CPU handles at once: 8 MiB stay in its cache. 50 MiB do not, and blocks
would lose their lead over PyTorch's kernel, with gradients more than that (docs/benchmarks.md)."""

# Not in every version of torch; asked once, as torch.compile cannot trace it.
HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether this CPU has AMX, units for matrix products in bf16."""

AttentionName = Literal["auto", "cudnn", "fa3", "fa4"]
_PACKAGES = {
    "fa3": "FlashAttention-3: python setup.py install in hopper/ of https://github.com/Dao-AILab/flash-attention",
    "fa4": "FlashAttention-4: pip install flash-attn-4",
}
_order: list[SDPBackend] = []
"""Kernels as GPUs are to try them; none leaves that to PyTorch."""


def use_attention(name: AttentionName, device: torch.device) -> Optional[str]:
    """Chooses the kernel of ``attention`` on GPUs, for the whole process, as PyTorch has FlashAttention-3 and 4 for all
    or none. On other devices nothing changes.

    What a kernel cannot do, such as fp32, goes to the next one of PyTorch's.

    Returns:
        Where FlashAttention-3 or 4 cannot be had: why, and what is to be installed. PyTorch's own kernels then stay.
    """
    if device.type != "cuda":
        return None
    kernels = torch.nn.attention
    if hasattr(kernels, "current_flash_attention_impl") and kernels.current_flash_attention_impl() is not None:
        kernels.restore_flash_attention_impl()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    _order[:] = [SDPBackend.CUDNN_ATTENTION, *others] if name == "cudnn" else []
    if name not in _PACKAGES:
        return None
    try:
        kernels.activate_flash_attention_impl(name.upper())
    except Exception as error:  # torch too old, no such package, or whatever a package raises on another GPU
        return f"found {type(error).__name__}: {error}; expected {_PACKAGES[name]}"
    _order[:] = others
    return None


def attention(
    queries: Float[Tensor, "batch head query d"],
    keys: Float[Tensor, "batch head source d"],
    values: Float[Tensor, "batch head source d"],
) -> Float[Tensor, "batch head query d"]:
    """softmax(queries keys^T / sqrt(d)) values.

    PyTorch's fused kernel, but for bf16 on a CPU without AMX: there it is as slow as in fp32, while plain matrix
    products use the processor's bf16 instructions. They take half the time (docs/benchmarks.md); scores are then
    rounded to bf16, so that the error of that precision doubles (root mean square 2e-4 against 1e-4 for 1,024 normal
    keys). As in the fused kernel, nothing that grows with queries times keys is kept for the gradients.
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and not HAS_AMX:
        return _InBlocks.apply(queries, keys, values)
    if not _order or queries.device.type != "cuda":
        return F.scaled_dot_product_attention(queries, keys, values)
    # Here, not around the network: what is computed again for the gradients must be computed by the same kernel.
    with sdpa_kernel(_order, set_priority=True):
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


def layer_norm(x: Float[Tensor, "*batch d"], gain: Optional[Float[Tensor, " d"]] = None) -> Float[Tensor, "*batch d"]:
    """LayerNorm over channels without bias, in x's precision and computed in fp32 at least."""
    if x.device.type == "cpu":  # whose autocast leaves it alone, and which takes a gain in fp32
        return F.layer_norm(x, x.shape[-1:], gain, eps=EPS)
    with torch.autocast(x.device.type, enabled=False):  # under which the result would be in fp32, and be kept so
        return F.layer_norm(x, x.shape[-1:], None if gain is None else gain.to(x.dtype), eps=EPS)


def rms_norm(x: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"], eps: float = EPS) -> Float[Tensor, "*batch d"]:
    """``x / sqrt(mean(x^2) + eps) * gain`` over channels, in x's precision and computed in fp32 at least.

    PyTorch's own is one kernel on a GPU; on a CPU it is a chain of operations whose results autograd keeps.
    """
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, gain, eps)
    with torch.autocast(x.device.type, enabled=False):  # under which the result would be in fp32, and be kept so
        return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of which only the inputs are kept for the gradients, and the rest is computed again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        found = []
        for group_queries, group_keys, group_values in _groups(queries, keys, values):
            scaled = (group_keys * queries.shape[-1] ** -0.5).mT
            blocks = (
                torch.softmax(block @ scaled, dim=-1) @ group_values for block in group_queries.split(BLOCK, dim=1)
            )
            found.append(torch.cat(list(blocks), dim=1))
        return torch.cat(found).unflatten(0, queries.shape[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = zip(*(_gradients(*group) for group in _groups(*ctx.saved_tensors, gradient)))
        of_queries, of_keys, of_values = (torch.cat(parts).unflatten(0, gradient.shape[:2]) for parts in found)
        return of_queries, of_keys, of_values


def _groups(queries: Tensor, keys: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batch and heads as one dimension, in parts of which a block's scores stay in the cache."""
    scores = min(BLOCK, queries.shape[2]) * keys.shape[2]
    # Made one dimension here and not by each of the products.
    return zip(*(x.flatten(0, 1).split(max(1, SCORES // scores)) for x in (queries, keys, *others)))


def _gradients(queries: Tensor, keys: Tensor, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = queries.shape[-1] ** -0.5
    scaled, of_queries = keys * scale, []
    # Sums over blocks, of which there may be many, are in fp32.
    of_keys, of_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
    for block, of_block in zip(queries.split(BLOCK, dim=1), gradient.split(BLOCK, dim=1)):
        weights = torch.softmax(block @ scaled.mT, dim=-1)
        of_values += weights.mT @ of_block
        of_scores = torch.ops.aten._softmax_backward_data(of_block @ values.mT, weights, -1, weights.dtype)
        of_queries.append(of_scores @ scaled)
        of_keys += of_scores.mT @ block
    return torch.cat(of_queries, dim=1), (of_keys * scale).to(keys.dtype), of_values.to(values.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        exact = _exact(x)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (exact * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        normed, gradient = _exact(x) * scale, _exact(gradient)
        of_gain = (gradient * normed).flatten(0, -2)
        along = (of_gain @ gain.to(scale.dtype)).div_(-x.shape[-1]).view(scale.shape)
        of_x = (gradient * gain).addcmul_(normed, along).mul_(scale)
        return of_x.to(x.dtype), of_gain.sum(0).to(gain.dtype), None


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
