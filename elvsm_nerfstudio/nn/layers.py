"""Building blocks: patch tokenizer and its inverse, QK-normalised attention, MLP.

Every linear layer is without bias. LayerNorms are without learned parameters in Efficient-LVSM and have a learned gain,
but no bias, in LVSM, as in the official models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5

Observer = Callable[[Float[Tensor, "batch head token head_dim"], Float[Tensor, "batch head source head_dim"]], None]
"""Shown the queries and keys of a cross-attention."""


def layer_norm(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """LayerNorm over channels without gain and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels without bias.

    Args:
        gain: whether there is a learned one.
    """

    def __init__(self, width: int, gain: bool):
        super().__init__(width, eps=EPS, elementwise_affine=gain, bias=False)


class PatchTokenizer(nn.Linear):
    """Cuts maps into patches and projects each to a token.

    Inside a patch values are ordered row, column, channel, channel fastest.
    """

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__(channels * patch_size**2, width, bias=False)
        self.patch_size = patch_size

    def forward(self, maps: Float[Tensor, "*batch height width c"]) -> Float[Tensor, "*batch token d"]:
        p = self.patch_size
        return super().forward(rearrange(maps, "... (h p) (w q) c -> ... (h w) (p q c)", p=p, q=p))


class PatchHead(nn.Linear):
    """The inverse of the tokenizer: LayerNorm, projection, sigmoid, patches back to an image."""

    def __init__(self, width: int, patch_size: int, channels: int = 3, norm_gain: bool = False):
        super().__init__(width, channels * patch_size**2, bias=False)
        self.patch_size = patch_size
        self.norm = LayerNorm(width, norm_gain)

    def forward(
        self, tokens: Float[Tensor, "*batch token d"], height: int, width: int
    ) -> Float[Tensor, "*batch height width c"]:
        p = self.patch_size
        values = super().forward(self.norm(tokens)).float().sigmoid()
        return rearrange(values, "... (h w) (p q c) -> ... (h p) (w q) c", h=height // p, w=width // p, p=p, q=p)


class RMSNorm(nn.RMSNorm):
    """RMSNorm with a learned gain that takes its input's precision, so that autocast keeps one fused kernel."""

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMSNorm (learned gain) on queries and keys."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=EPS)
        self.k_norm = RMSNorm(head_dim, eps=EPS)

    def forward(self, x: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch token d"]:
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, d=self.head_dim)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head cross-attention whose keys and values are made apart from the queries, so that they can be kept."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=EPS)
        self.k_norm = RMSNorm(head_dim, eps=EPS)

    def keys_values(
        self, source: Float[Tensor, "batch source d"]
    ) -> tuple[Float[Tensor, "batch head source head_dim"], Float[Tensor, "batch head source head_dim"]]:
        """Normalised keys, and values, of the tokens to be attended to."""
        k, v = rearrange(self.to_kv(source), "b n (two h d) -> two b h n d", two=2, d=self.head_dim)
        return self.k_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "batch token d"],
        keys: Float[Tensor, "batch head source head_dim"],
        values: Float[Tensor, "batch head source head_dim"],
        observe: Optional[Observer] = None,
    ) -> Float[Tensor, "batch token d"]:
        q = self.q_norm(rearrange(self.to_q(x), "b n (h d) -> b h n d", d=self.head_dim))
        if observe is not None:
            observe(q, keys)
        out = F.scaled_dot_product_attention(q, keys, values)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


def mlp(width: int, ratio: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(
        nn.Linear(width, ratio * width, bias=False), nn.GELU(), nn.Linear(ratio * width, width, bias=False)
    )


class ContextBlock(nn.Module):
    """Self-attention and MLP, pre-norm: one layer of Efficient-LVSM's encoder, where each view is a sequence of its
    own, and of LVSM, where several views are one sequence.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: int, norm_gain: bool = False):
        super().__init__()
        self.norm1 = LayerNorm(width, norm_gain)
        self.attention = SelfAttention(width, head_dim)
        self.norm2 = LayerNorm(width, norm_gain)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, x: Float[Tensor, "sequence token d"]) -> Float[Tensor, "sequence token d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TargetBlock(nn.Module):
    """Intra-view attention, cross-attention to the same layer's context features, MLP: one layer of the decoder."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.self_attention = SelfAttention(width, head_dim)
        self.cross_attention = CrossAttention(width, head_dim)
        self.mlp = mlp(width, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "scene view token d"],
        keys: Float[Tensor, "scene head source head_dim"],
        values: Float[Tensor, "scene head source head_dim"],
        observe: Optional[Observer] = None,
    ) -> Float[Tensor, "scene view token d"]:
        scenes, views = x.shape[:2]
        x = x + self.self_attention(layer_norm(x).flatten(0, 1)).unflatten(0, (scenes, views))
        # Target views do not see each other, so all of a scene's queries share one call over its keys.
        x = x + self.cross_attention(layer_norm(x).flatten(1, 2), keys, values, observe).unflatten(1, (views, -1))
        return x + self.mlp(layer_norm(x))
