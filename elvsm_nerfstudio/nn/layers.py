"""Building blocks: patch tokenizer and its inverse, QK-normalised attention, MLP.

Every linear layer is without bias. LayerNorms are without learned parameters in Efficient-LVSM and have a learned gain,
but no bias, in LVSM, as in the official models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from elvsm_nerfstudio.nn.attention import attention, prefix_attention
from elvsm_nerfstudio.nn.camera_encoding import CameraEncoding, PatchRotation
from elvsm_nerfstudio.nn.lean import gelu_linear, rms_norm

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
    """RMSNorm with a learned gain, in its input's precision."""

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMSNorm (learned gain) on queries and keys."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=EPS)
        self.k_norm = RMSNorm(head_dim, eps=EPS)

    def forward(
        self, x: Float[Tensor, "batch token d"], rotation: Optional[PatchRotation] = None
    ) -> Float[Tensor, "batch token d"]:
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b n h d", three=3, d=self.head_dim)
        # Heads come outside after the norm, which is faster on tokens as they lie in memory.
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if rotation is not None:
            q, k = rotation.within_view(q), rotation.within_view(k)
        out = attention(q, k, v)
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
        self, source: Float[Tensor, "batch source d"], encoding: Optional[CameraEncoding] = None
    ) -> tuple[Float[Tensor, "batch head source head_dim"], Float[Tensor, "batch head source head_dim"]]:
        """Normalised keys, and values, of the tokens to be attended to, transformed by their own cameras.

        Args:
            encoding: of the views of these tokens.
        """
        k, v = rearrange(self.to_kv(source), "b n (two h d) -> two b n h d", two=2, d=self.head_dim)
        k, v = self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return (k, v) if encoding is None else (encoding.keys(k), encoding.keys(v))

    def forward(
        self,
        x: Float[Tensor, "batch token d"],
        keys: Float[Tensor, "batch head source head_dim"],
        values: Float[Tensor, "batch head source head_dim"],
        observe: Optional[Observer] = None,
        encoding: Optional[CameraEncoding] = None,
        prefixes: Optional[Sequence[int]] = None,
    ) -> Float[Tensor, "batch token d"]:
        """Attends to keys and values.

        Args:
            prefixes: how many of the keys, from the first on, each of as many equal parts of x attends to; all if
                absent.
        """
        q = self.q_norm(self.to_q(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        if encoding is not None:
            q = encoding.queries(q)
        if observe is not None:
            observe(q, keys)
        out = attention(q, keys, values) if prefixes is None else prefix_attention(q, keys, values, prefixes)
        if encoding is not None:
            out = encoding.outputs(out)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class MLP(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, ratio: int):
        wide, narrow = nn.Linear(width, ratio * width, bias=False), nn.Linear(ratio * width, width, bias=False)
        super().__init__(wide, nn.GELU(), narrow)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return gelu_linear(self[0](x), self[2].weight)


class ContextBlock(nn.Module):
    """Self-attention and MLP, pre-norm: one layer of Efficient-LVSM's encoder, where each view is a sequence of its
    own, and of LVSM, where several views are one sequence."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int, norm_gain: bool = False):
        super().__init__()
        self.norm1 = LayerNorm(width, norm_gain)
        self.attention = SelfAttention(width, head_dim)
        self.norm2 = LayerNorm(width, norm_gain)
        self.mlp = MLP(width, mlp_ratio)

    def forward(
        self, x: Float[Tensor, "sequence token d"], rotation: Optional[PatchRotation] = None
    ) -> Float[Tensor, "sequence token d"]:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class TargetBlock(nn.Module):
    """Intra-view attention, cross-attention to the same layer's context features, MLP: one layer of the decoder."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.self_attention = SelfAttention(width, head_dim)
        self.cross_attention = CrossAttention(width, head_dim)
        self.mlp = MLP(width, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "scene view token d"],
        keys: Float[Tensor, "scene head source head_dim"],
        values: Float[Tensor, "scene head source head_dim"],
        observe: Optional[Observer] = None,
        encoding: Optional[CameraEncoding] = None,
        prefixes: Optional[Sequence[int]] = None,
    ) -> Float[Tensor, "scene view token d"]:
        """Through the layer.

        Args:
            prefixes: how many of the keys, from the first on, each view attends to; all if absent.
        """
        scenes, views = x.shape[:2]
        rotation = None if encoding is None else encoding.rotation
        within = self.self_attention(layer_norm(x).flatten(0, 1), rotation)
        x = x + within.unflatten(0, (scenes, views))
        # Target views do not see each other, so all of a scene's queries share one call over its keys.
        gathered = self.cross_attention(layer_norm(x).flatten(1, 2), keys, values, observe, encoding, prefixes)
        x = x + gathered.unflatten(1, (views, -1))
        return x + self.mlp(layer_norm(x))
