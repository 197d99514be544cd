"""Building blocks: patch tokenizer and its inverse, QK-normalised attention, MLP.

Every linear layer is without bias. LayerNorms are without learned parameters in Efficient-LVSM and have a learned gain,
but no bias, in LVSM, as in the official models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.nn.camera_encoding import CameraEncoding
from elvsm_nerfstudio.nn.compiled import Block, compilable
from elvsm_nerfstudio.nn.kernels import EPS, attention, layer_norm, prefix_attention, recomputed, rms_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels without bias, in its input's precision.

    Args:
        gain: whether there is a learned one.
    """

    def __init__(self, width: int, gain: bool):
        super().__init__(width, eps=EPS, elementwise_affine=gain, bias=False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return layer_norm(x, self.weight)


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

    def __init__(self, width: int):
        super().__init__(width, eps=EPS)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return rms_norm(x, self.weight)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMSNorm (learned gain) on queries and keys."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(
        self, x: Float[Tensor, "batch token d"], encoding: Optional[CameraEncoding] = None
    ) -> Float[Tensor, "batch token d"]:
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b n h d", three=3, d=self.head_dim)
        # Heads come outside after the norm, which is faster on tokens as they lie in memory.
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if encoding is not None:
            q, k = encoding.within_view(q), encoding.within_view(k)
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
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

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

    def queries(
        self, x: Float[Tensor, "batch token d"], encoding: Optional[CameraEncoding] = None
    ) -> Float[Tensor, "batch head token head_dim"]:
        """Normalised queries, transformed by the cameras of the views of these tokens."""
        q = self.q_norm(self.to_q(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return q if encoding is None else encoding.queries(q)

    def forward(
        self,
        x: Float[Tensor, "batch token d"],
        keys: Float[Tensor, "batch head source head_dim"],
        values: Float[Tensor, "batch head source head_dim"],
        encoding: Optional[CameraEncoding] = None,
        prefixes: Optional[Sequence[int]] = None,
    ) -> Float[Tensor, "batch token d"]:
        """Attends to keys and values.

        Args:
            encoding: of the views of x.
            prefixes: how many of the keys, from the first on, each of as many equal parts of x attends to; all if
                absent.
        """
        q = self.queries(x, encoding)
        out = attention(q, keys, values) if prefixes is None else prefix_attention(q, keys, values, prefixes)
        if encoding is not None:
            out = encoding.outputs(out)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class MLP(nn.Sequential):
    """Linear, GELU, Linear. Of the hidden channels only those before the GELU are kept for the gradients."""

    def __init__(self, width: int, ratio: int):
        wide, narrow = nn.Linear(width, ratio * width, bias=False), nn.Linear(ratio * width, width, bias=False)
        super().__init__(wide, nn.GELU(), narrow)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if torch.compiler.is_compiling():  # which keeps no more either
            return super().forward(x)
        return recomputed(lambda hidden: self[2](self[1](hidden)), self[0](x))


class ContextBlock(Block):
    """Self-attention and MLP, pre-norm: one layer of Efficient-LVSM's encoder, where each view is a sequence of its
    own, and of LVSM, where several views are one sequence."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int, norm_gain: bool = False):
        super().__init__()
        self.norm1 = LayerNorm(width, norm_gain)
        self.attention = SelfAttention(width, head_dim)
        self.norm2 = LayerNorm(width, norm_gain)
        self.mlp = MLP(width, mlp_ratio)

    @compilable("context token channel")
    def forward(
        self, x: Float[Tensor, "sequence token d"], encoding: Optional[CameraEncoding] = None
    ) -> Float[Tensor, "sequence token d"]:
        x = x + self.attention(self.norm1(x), encoding)
        return x + self.mlp(self.norm2(x))


class TargetBlock(Block):
    """Intra-view attention, cross-attention to the same layer's context features, MLP: one layer of the decoder."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.self_attention = SelfAttention(width, head_dim)
        self.cross_attention = CrossAttention(width, head_dim)
        self.mlp = MLP(width, mlp_ratio)

    @compilable("scene context channel")
    def keys_values(
        self, context: Float[Tensor, "scene source d"], encoding: Optional[CameraEncoding] = None
    ) -> tuple[Float[Tensor, "scene head source head_dim"], Float[Tensor, "scene head source head_dim"]]:
        """What the layer needs of context tokens that the encoder's same layer put out.

        Args:
            encoding: of the context views.
        """
        return self.cross_attention.keys_values(layer_norm(context), encoding)

    @compilable("scene view token channel", "scene head context channel", "scene head context channel")
    def forward(
        self,
        x: Float[Tensor, "scene view token d"],
        keys: Float[Tensor, "scene head source head_dim"],
        values: Float[Tensor, "scene head source head_dim"],
        encoding: Optional[CameraEncoding] = None,
        prefixes: Optional[Sequence[int]] = None,
    ) -> Float[Tensor, "scene view token d"]:
        """Through the layer.

        Args:
            encoding: of the target views.
            prefixes: how many of the keys, from the first on, each view attends to; all if absent.
        """
        scenes, views = x.shape[:2]
        within = self.self_attention(layer_norm(x).flatten(0, 1), encoding)
        x = x + within.unflatten(0, (scenes, views))
        # Target views do not see each other, so all of a scene's queries share one call over its keys.
        gathered = self.cross_attention(layer_norm(x).flatten(1, 2), keys, values, encoding, prefixes)
        x = x + gathered.unflatten(1, (views, -1))
        return x + self.mlp(layer_norm(x))
