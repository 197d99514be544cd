"""LVSM's two networks from this package's blocks, as far as a benchmark needs them: sizes and cost, random weights.

LVSM (arXiv 2410.17242): full self-attention over the tokens of all views; tokens are normalised at the entrance; each
target is a sequence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame, pluecker_rays
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.layers import ContextBlock, PatchHead, PatchTokenizer, layer_norm
from elvsm_nerfstudio.views import Views


@dataclass(frozen=True)
class Tokens:
    """What an LVSM network knows of a scene: context tokens (decoder-only), or latents and what made them."""

    context: Float[Tensor, "scene token d"]
    frame: CanonicalFrame
    latents: Optional[Float[Tensor, "scene latent d"]] = None

    @property
    def seen(self) -> Float[Tensor, "scene token d"]:
        return self.context if self.latents is None else self.latents


class LVSM(nn.Module):
    """``num_latents`` = 0: decoder-only, all blocks for each target. Else half of them encode into latents."""

    def __init__(self, config: EfficientLVSMConfig, num_latents: int, autocast_dtype: Optional[torch.dtype] = None):
        super().__init__()
        self.autocast_dtype = autocast_dtype
        self.context_tokenizer = PatchTokenizer(9, config.patch_size, config.width)
        self.target_tokenizer = PatchTokenizer(6, config.patch_size, config.width)
        blocks = [ContextBlock(config.width, config.head_dim, config.mlp_ratio) for _ in range(2 * config.num_layers)]
        split = config.num_layers if num_latents else 0
        self.encoder, self.decoder = nn.ModuleList(blocks[:split]), nn.ModuleList(blocks[split:])
        self.latents = nn.Parameter(0.02 * torch.randn(num_latents, config.width)) if num_latents else None
        self.head = PatchHead(config.width, config.patch_size)

    def encode(self, context: Views, frame: CanonicalFrame) -> Tokens:
        rays = pluecker_rays(frame.apply(context.camera_to_world), context.directions)
        with self._autocast(rays.device):
            tokens = self.context_tokenizer(torch.cat([context.rgb * 2 - 1, rays], dim=-1))
            return self._encoded(layer_norm(tokens).flatten(1, 2), frame)

    def append(self, memory: Tokens, views: Views) -> Tokens:
        """Decoder-only: more tokens. With latents, all views are encoded again: they have seen one another."""
        rays = pluecker_rays(memory.frame.apply(views.camera_to_world), views.directions)
        with self._autocast(rays.device):
            tokens = layer_norm(self.context_tokenizer(torch.cat([views.rgb * 2 - 1, rays], dim=-1))).flatten(1, 2)
            return self._encoded(torch.cat([memory.context, tokens], dim=1), memory.frame)

    def decode(self, memory: Tokens, target: Views) -> Float[Tensor, "scene view height width 3"]:
        rays = pluecker_rays(memory.frame.apply(target.camera_to_world), target.directions)
        with self._autocast(rays.device):
            tokens = layer_norm(self.target_tokenizer(rays)).flatten(0, 1)
            seen = memory.seen.repeat_interleave(target.num_views, dim=0)
            joint = torch.cat([seen, tokens], dim=1)
            for block in self.decoder:
                joint = block(joint)
            tokens = joint[:, seen.shape[1] :].unflatten(0, (target.num_scenes, -1))
            return self.head(tokens, target.height, target.width)

    def _encoded(self, context: Tensor, frame: CanonicalFrame) -> Tokens:
        if self.latents is None:
            return Tokens(context, frame)
        joint = torch.cat([self.latents.to(context.dtype).expand(len(context), -1, -1), context], dim=1)
        for block in self.encoder:
            joint = block(joint)
        return Tokens(context, frame, joint[:, : len(self.latents)])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)
