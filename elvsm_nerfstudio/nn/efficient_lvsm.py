"""Efficient-LVSM: a two-stream transformer that renders new views of a scene in one forward pass.

The input encoder sees each context view alone; the target decoder sees each target view alone and, in layer l,
cross-attends to what the encoder's layer l made of all context views (co-refinement). Paper: arXiv 2602.06478.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.key_values import KeysValues, KeyValueStore
from elvsm_nerfstudio.nn.layers import ContextBlock, Observer, PatchHead, PatchTokenizer, TargetBlock, layer_norm
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.views import Views


@dataclass
class EfficientLVSMConfig(NetworkConfig):
    """Sizes of the network. The defaults are the paper's: 199 M parameters."""

    num_layers: int = 12
    """Layers of the encoder and of the decoder, paired one to one."""
    context_init: Literal["depth-scaled", "torch"] = "depth-scaled"
    """Initialisation of the encoder's blocks: like the decoder's, or PyTorch's default, which is what the official
    code leaves them at."""

    def build(self) -> EfficientLVSM:
        return EfficientLVSM(self)


class EfficientLVSM(SceneNetwork):
    """Keeps the decoder's keys and values of every context view, so that a view is encoded once."""

    config: EfficientLVSMConfig
    store_type = KeyValueStore

    def __init__(
        self,
        config: EfficientLVSMConfig,
        autocast_dtype: Optional[torch.dtype] = None,
        chunk_tokens: int = 8192,
    ):
        super().__init__(config, autocast_dtype, chunk_tokens)
        sizes = (config.width, config.head_dim, config.mlp_ratio)
        self.context_tokenizer = PatchTokenizer(9, config.patch_size, config.width)
        self.target_tokenizer = PatchTokenizer(6, config.patch_size, config.width)
        self.context_blocks = nn.ModuleList(ContextBlock(*sizes) for _ in range(config.num_layers))
        self.target_blocks = nn.ModuleList(TargetBlock(*sizes) for _ in range(config.num_layers))
        self.head = PatchHead(config.width, config.patch_size)
        self._initialise(self.context_tokenizer.weight, self.target_tokenizer.weight, self.head.weight)
        self._initialise_blocks(self.target_blocks)
        if config.context_init == "depth-scaled":
            self._initialise_blocks(self.context_blocks)

    @property
    def memory_layout(self) -> tuple[int, int, int]:
        return self.config.num_layers, self.config.width // self.config.head_dim, self.config.head_dim

    def decode(
        self,
        memory: SceneMemory,
        target: Views,
        nearest_views: Optional[int] = None,
        observe: Optional[Observer] = None,
    ) -> Float[Tensor, "scene view height width 3"]:
        """As every network does.

        Args:
            observe: shown each layer's cross-attention; targets then attend to all views.
        """
        if observe is None:
            return super().decode(memory, target, nearest_views)
        self._check_memory(memory, target)
        return self._decode(memory, target, observe)

    def _decode(
        self, memory: SceneMemory, target: Views, observe: Optional[Observer] = None
    ) -> Float[Tensor, "scene view height width 3"]:
        rays = self._rays(target, memory.frame)
        with self._autocast(rays.device):
            tokens = self.target_tokenizer(rays)
            for layer, block in enumerate(self.target_blocks):
                tokens = block(tokens, *memory.read(layer), observe)
            return self.head(tokens, target.height, target.width)

    def _remember(self, context: Views, frame: CanonicalFrame, keep: Callable[[int, KeysValues], None]) -> None:
        tokens = self._context_tokens(context, frame).flatten(0, 1)
        for layer, (context_block, target_block) in enumerate(zip(self.context_blocks, self.target_blocks)):
            tokens = context_block(tokens)
            source = layer_norm(tokens).unflatten(0, (context.num_scenes, -1)).flatten(1, 2)
            keep(layer, target_block.cross_attention.keys_values(source))
