"""LVSM's two networks: one stream of tokens with full self-attention. Paper: arXiv 2410.17242.

Each target view makes a sequence of its own with what is known of the scene: the context views' tokens themselves
(decoder-only), or latent tokens into which an encoder has read them (encoder-decoder). Unlike in Efficient-LVSM, what
is known goes through the decoder again with every target, and latents have seen all context views: another view means
encoding all of them again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.layers import ContextBlock, LayerNorm, PatchHead, PatchTokenizer
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.nn.token_store import Tokens, TokenStore
from elvsm_nerfstudio.views import Views


@dataclass
class LVSMDecoderOnlyConfig(NetworkConfig):
    """Sizes of the decoder-only network. The defaults are the paper's: 171 M parameters."""

    num_layers: int = 24
    """Layers, all of which are gone through for every target."""

    def build(self) -> LVSMDecoderOnly:
        return LVSMDecoderOnly(self)


@dataclass
class LVSMEncoderDecoderConfig(NetworkConfig):
    """Sizes of the encoder-decoder network. The defaults are the paper's: 173 M parameters."""

    num_layers: int = 12
    """Layers of the encoder, and as many of the decoder."""
    num_latents: int = 3072
    """Latent tokens, which are all that the decoder knows of a scene."""

    def build(self) -> LVSMEncoderDecoder:
        return LVSMEncoderDecoder(self)


class LVSM(SceneNetwork):
    """Keeps the context views' tokens, as they come from the tokenizer."""

    store_type = TokenStore

    @torch.inference_mode(False)  # in which weights would not count their changes
    def __init__(self, config: NetworkConfig, autocast_dtype: Optional[torch.dtype] = None, chunk_tokens: int = 4096):
        super().__init__(config, autocast_dtype, chunk_tokens)
        self.context_tokenizer = PatchTokenizer(9, config.patch_size, config.width)
        self.target_tokenizer = PatchTokenizer(6, config.patch_size, config.width)
        self.input_norm = LayerNorm(config.width, gain=True)
        self.decoder_blocks = self._make_blocks()
        self.head = PatchHead(config.width, config.patch_size, norm_gain=True)
        self._initialise(self.context_tokenizer.weight, self.target_tokenizer.weight, self.head.weight)
        self._initialise_blocks(self.decoder_blocks)

    def _make_blocks(self) -> nn.ModuleList:
        sizes = (self.config.width, self.config.head_dim, self.config.mlp_ratio)
        return nn.ModuleList(ContextBlock(*sizes, norm_gain=True) for _ in range(self.config.num_layers))

    @property
    def memory_layout(self) -> tuple[int, int, int]:
        return 1, 1, self.config.width

    @property
    def streams(self) -> dict[str, nn.ModuleList]:
        return {"target": self.decoder_blocks}

    def _encode(self, context: Views, frame: CanonicalFrame) -> Iterator[Tokens]:
        yield (self._context_tokens(context, frame).flatten(1, 2)[:, None],)

    @abstractmethod
    def _known(self, memory: SceneMemory) -> Float[Tensor, "scene known d"]:
        """What the decoder gets to see of a scene."""

    def _decode(self, memory: SceneMemory, target: Views) -> Float[Tensor, "scene view height width 3"]:
        known = self._known(memory)
        with self._autocast(known.device):
            tokens = self._target_tokens(target, memory.frame)
            known = known.to(tokens.dtype)[:, None].expand(-1, target.num_views, -1, -1)
            joint = torch.cat([tokens, known], dim=2).flatten(0, 1)
            joint = self.input_norm(joint)
            for block in self.decoder_blocks:
                joint = self._block(block, joint)
            tokens = joint[:, : tokens.shape[2]].unflatten(0, tokens.shape[:2])
            return self.head(tokens, target.height, target.width)


class LVSMDecoderOnly(LVSM):
    """Encoding only cuts context views into tokens; all the work is done for each target."""

    config: LVSMDecoderOnlyConfig

    def _known(self, memory: SceneMemory) -> Float[Tensor, "scene known d"]:
        (context,) = memory.read(0)
        return context[:, 0]


class LVSMEncoderDecoder(LVSM):
    """An encoder reads all context views into latent tokens, once for all targets."""

    config: LVSMEncoderDecoderConfig

    @torch.inference_mode(False)
    def __init__(
        self, config: LVSMEncoderDecoderConfig, autocast_dtype: Optional[torch.dtype] = None, chunk_tokens: int = 4096
    ):
        super().__init__(config, autocast_dtype, chunk_tokens)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.width))
        self.encoder_blocks = self._make_blocks()
        self._initialise(self.latents)
        self._initialise_blocks(self.encoder_blocks)

    def _complete(self, memory: SceneMemory) -> SceneMemory:
        memory.derived["latents"] = self._encode_latents(memory, torch.is_grad_enabled())
        return memory

    def _known(self, memory: SceneMemory) -> Float[Tensor, "scene known d"]:
        """The scene's latents, made once for each memory; gradients flow through them if through the memory."""
        latents, gradients = memory.derived.get("latents"), memory.store.carries_gradients
        if latents is None or (gradients and not latents.requires_grad):
            latents = memory.derived["latents"] = self._encode_latents(memory, gradients)
        return latents

    def _encode_latents(self, memory: SceneMemory, gradients: bool) -> Float[Tensor, "scene known d"]:
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), self._autocast(memory.device):
            (context,) = memory.read(0)
            latents = self.latents.to(context.dtype).expand(memory.num_scenes, -1, -1)
            joint = torch.cat([latents, context[:, 0]], dim=1)
            for block in self.encoder_blocks:
                joint = self._block(block, joint)
            return joint[:, : self.config.num_latents].clone()  # a slice would keep all of it in memory
