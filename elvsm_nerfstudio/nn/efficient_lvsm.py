"""Efficient-LVSM: a two-stream transformer that renders new views of a scene in one forward pass.

The input encoder sees each context view alone; the target decoder sees each target view alone and, in layer l,
cross-attends to what the encoder's layer l made of all context views (co-refinement). Paper: arXiv 2602.06478.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame, pluecker_rays
from elvsm_nerfstudio.nn.layers import ContextBlock, PatchHead, PatchTokenizer, TargetBlock, layer_norm
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.views import Views


@dataclass
class EfficientLVSMConfig:
    """Sizes of the network. The defaults are the paper's: 199 M parameters."""

    width: int = 768
    """Channels of a token."""
    num_layers: int = 12
    """Layers of the encoder and of the decoder, paired one to one."""
    head_dim: int = 64
    """Channels of an attention head."""
    patch_size: int = 8
    """Side of the square of pixels that makes a token."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP, as a multiple of the width."""
    init_std: float = 0.02
    """Weights start from N(0, init_std), those of block l (from 0) from N(0, init_std / sqrt(2 (l + 1))). For a
    narrower network the same activations need a larger value: 0.02 sqrt(768 / width)."""
    context_init: Literal["depth-scaled", "torch"] = "depth-scaled"
    """Initialisation of the encoder's blocks: like the decoder's, or PyTorch's default, which is what the official
    code leaves them at."""


class EfficientLVSM(nn.Module):
    """``forward = decode(encode(context), target)``.

    Args:
        config: sizes.
        autocast_dtype: precision of the transformer, e.g. torch.bfloat16; None keeps the parameters' own. Rays,
            normalisation of cameras and the output colours are fp32 in any case.
    """

    def __init__(self, config: EfficientLVSMConfig, autocast_dtype: Optional[torch.dtype] = None):
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"width {config.width} is not a multiple of head_dim {config.head_dim}")
        self.config = config
        self.autocast_dtype = autocast_dtype
        sizes = (config.width, config.head_dim, config.mlp_ratio)
        self.context_tokenizer = PatchTokenizer(9, config.patch_size, config.width)
        self.target_tokenizer = PatchTokenizer(6, config.patch_size, config.width)
        self.context_blocks = nn.ModuleList(ContextBlock(*sizes) for _ in range(config.num_layers))
        self.target_blocks = nn.ModuleList(TargetBlock(*sizes) for _ in range(config.num_layers))
        self.head = PatchHead(config.width, config.patch_size)
        self._initialise()

    def _initialise(self) -> None:
        for module in (self.context_tokenizer, self.target_tokenizer, self.head):
            nn.init.normal_(module.weight, std=self.config.init_std)
        streams = [self.target_blocks] + ([self.context_blocks] if self.config.context_init == "depth-scaled" else [])
        for blocks in streams:
            for layer, block in enumerate(blocks):
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        nn.init.normal_(module.weight, std=self.config.init_std / math.sqrt(2 * (layer + 1)))

    def encode(self, context: Views, frame: Optional[CanonicalFrame] = None) -> SceneMemory:
        """Remembers context views, each on its own.

        Args:
            context: views with rgb; height and width must be multiples of the patch size.
            frame: canonical frame to encode in; estimated from the context's cameras if absent. To add views to a
                memory, pass that memory's frame.
        """
        if context.rgb is None or context.num_views == 0:
            raise ValueError(f"encode: context views need rgb and at least one view; found {context.num_views} views")
        frame = CanonicalFrame.estimate(context.camera_to_world) if frame is None else frame
        rays = self._rays(context, frame)
        keys, values = [], []
        with self._autocast(rays.device):
            tokens = self.context_tokenizer(torch.cat([context.rgb * 2 - 1, rays], dim=-1)).flatten(0, 1)
            for context_block, target_block in zip(self.context_blocks, self.target_blocks):
                tokens = context_block(tokens)
                source = layer_norm(tokens).unflatten(0, (context.num_scenes, -1)).flatten(1, 2)
                k, v = target_block.cross_attention.keys_values(source)
                keys.append(k)
                values.append(v)
        tokens_per_view = (tokens.shape[1],) * context.num_views
        return SceneMemory(tuple(keys), tuple(values), tokens_per_view, frame)

    def decode(self, memory: SceneMemory, target: Views) -> Float[Tensor, "scene view height width 3"]:
        """Renders target views from memory, each on its own; colours in [0, 1].

        Args:
            target: cameras; height and width must be multiples of the patch size.
        """
        rays = self._rays(target, memory.frame)
        with self._autocast(rays.device):
            tokens = self.target_tokenizer(rays)
            for block, keys, values in zip(self.target_blocks, memory.keys, memory.values):
                tokens = block(tokens, keys, values)
            return self.head(tokens, target.height, target.width)

    def forward(
        self, context: Views, target: Views, frame: Optional[CanonicalFrame] = None
    ) -> Float[Tensor, "scene view height width 3"]:
        return self.decode(self.encode(context, frame), target)

    def _rays(self, views: Views, frame: CanonicalFrame) -> Float[Tensor, "scene view height width 6"]:
        patch = self.config.patch_size
        if views.height % patch or views.width % patch:
            raise ValueError(
                f"views are {views.height}x{views.width}; expected multiples of the patch size {patch} "
                "(pad the ray grid and crop the result)"
            )
        with torch.autocast(views.directions.device.type, enabled=False):
            return pluecker_rays(frame.apply(views.camera_to_world), views.directions.float())

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=enabled)
