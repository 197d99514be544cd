"""Which context views the decoder looks at, patch by patch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM
from elvsm_nerfstudio.nn.layers import CrossAttention
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.views import Views

QUERIES_AT_ONCE = 256
"""Attention scores are written out for so many target tokens at a time."""


def decode_with_attention(
    network: EfficientLVSM, memory: SceneMemory, target: Views
) -> tuple[Float[Tensor, "scene target height width 3"], Float[Tensor, "scene target row column context"]]:
    """``network.decode``, and the share of each patch's cross-attention that goes to each context view.

    Shares are means over layers and heads, sum to one over the context, and come in the order of ``memory.ids``.
    """
    stored = sorted(range(memory.num_views), key=lambda position: memory.views[position].start)
    tokens = [memory.views[position].tokens for position in stored]
    layers: list[Tensor] = []

    def watch(attention: CrossAttention, inputs: tuple, output: Tensor) -> None:
        x, keys, _, encoding, *_ = inputs
        layers.append(attention_to_views(attention.queries(x, encoding), keys, tokens))

    attentions = (module for module in network.target_blocks.modules() if isinstance(module, CrossAttention))
    hooks = [attention.register_forward_hook(watch) for attention in attentions]
    try:
        rgb = network.decode(memory, target)
    finally:
        for hook in hooks:
            hook.remove()
    shares = torch.stack(layers).mean(dim=0)[..., torch.tensor(stored, device=rgb.device).argsort()]
    patch = network.config.patch_size
    return rgb, shares.unflatten(1, (target.num_views, target.height // patch, target.width // patch))


def attention_to_views(
    queries: Float[Tensor, "scene head token head_dim"],
    keys: Float[Tensor, "scene head source head_dim"],
    tokens_per_view: list[int],
) -> Float[Tensor, "scene token view"]:
    """The softmax's mass on each view's keys, mean over heads, in fp32; views lie one after another."""
    with torch.autocast(queries.device.type, enabled=False):
        keys = keys.float().transpose(-1, -2) / math.sqrt(queries.shape[-1])
        parts = []
        for chunk in queries.float().split(QUERIES_AT_ONCE, dim=2):
            scores = (chunk @ keys).split(tokens_per_view, dim=-1)
            parts.append(torch.stack([s.logsumexp(dim=-1) for s in scores], dim=-1).softmax(dim=-1).mean(dim=1))
        return torch.cat(parts, dim=1)


def evenness(shares: Float[Tensor, "*batch view"]) -> Float[Tensor, "*batch"]:
    """How evenly attention is spread over the views: entropy from 0 (one view alone) to 1 (all the same)."""
    if shares.shape[-1] == 1:
        return torch.zeros_like(shares[..., 0])
    return torch.special.entr(shares).sum(dim=-1) / math.log(shares.shape[-1])
