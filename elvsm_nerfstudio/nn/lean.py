"""Operations whose gradients are written by hand: they keep less for the backward pass than autograd does, and a CPU
goes over its memory fewer times. Results are those of the plain operations to rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


def rms_norm(x: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """``x / sqrt(mean(x^2) + eps) * gain`` over channels, in x's precision and computed in fp32 at least.

    PyTorch's own is one kernel on a GPU; on a CPU it is a chain of operations whose results autograd keeps.
    """
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, gain, eps)
    with torch.autocast(x.device.type, enabled=False):  # under which the result would be in fp32, and be kept so
        return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


def gelu_linear(x: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "d hidden"]) -> Float[Tensor, "*batch d"]:
    """``gelu(x) weight^T`` in x's precision. Only x is kept: the GELU is computed again on the way back."""
    return _GeluLinear.apply(x, weight.to(x.dtype))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        exact = _exact(x)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (exact * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        normed, gradient = _exact(x) * scale, _exact(gradient)
        of_gain = (gradient * normed).flatten(0, -2)
        along = (of_gain @ gain.to(scale.dtype)).div_(-x.shape[-1]).view(scale.shape)
        of_x = (gradient * gain).addcmul_(normed, along).mul_(scale)
        return of_x.to(x.dtype), of_gain.sum(0).to(gain.dtype), None


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t() @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), of_weight
