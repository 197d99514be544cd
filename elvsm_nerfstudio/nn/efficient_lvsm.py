"""Efficient-LVSM: a two-stream transformer that renders new views of a scene in one forward pass.

The input encoder sees each context view alone; the target decoder sees each target view alone and, in layer l,
cross-attends to what the encoder's layer l made of all context views (co-refinement). Paper: arXiv 2602.06478.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.camera_encoding import CameraEncoding, PatchRotation
from elvsm_nerfstudio.nn.layers import ContextBlock, PatchHead, PatchTokenizer, TargetBlock
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork, exactly
from elvsm_nerfstudio.nn.token_store import KeysValues, KeyValueStore
from elvsm_nerfstudio.views import Views


@dataclass
class EfficientLVSMConfig(NetworkConfig):
    """Sizes of the network. The defaults are the paper's: 199 M parameters."""

    num_layers: int = 12
    """Layers of the encoder and of the decoder, paired one to one."""
    context_init: Literal["depth-scaled", "torch"] = "depth-scaled"
    """Initialisation of the encoder's blocks: like the decoder's, or PyTorch's default, which is what the official
    code leaves them at."""
    camera_encoding: Literal["none", "prope"] = "none"
    """How attention knows of cameras and patches besides the rays in the tokens: not at all, as in the paper, or
    relative to one another (nn/camera_encoding.py). It has no weights."""
    ray_frame: Literal["canonical", "camera"] = "canonical"
    """Frame of the rays in the tokens: the memory's, as in the paper, or each camera's own, which leaves all that is
    known of poses to camera_encoding."""

    def build(self) -> EfficientLVSM:
        return EfficientLVSM(self)


class EfficientLVSM(SceneNetwork):
    """Keeps the decoder's keys and values of every context view, so that a view is encoded once."""

    config: EfficientLVSMConfig
    store_type = KeyValueStore
    has_prefixes = True

    @torch.inference_mode(False)  # in which weights would not count their changes
    def __init__(
        self,
        config: EfficientLVSMConfig,
        autocast_dtype: Optional[torch.dtype] = None,
        chunk_tokens: int = 4096,
    ):
        super().__init__(config, autocast_dtype, chunk_tokens)
        if config.camera_encoding == "prope" and config.head_dim % 8:
            raise ValueError(f"head_dim {config.head_dim}: camera_encoding 'prope' needs a multiple of 8")
        if config.camera_encoding == "none" and config.ray_frame == "camera":
            raise ValueError("ray_frame 'camera' without camera_encoding hides all poses; set camera_encoding 'prope'")
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

    @property
    def streams(self) -> dict[str, nn.ModuleList]:
        return {"context": self.context_blocks, "target": self.target_blocks}

    def _encode(self, context: Views, frame: CanonicalFrame) -> Iterator[KeysValues]:
        """The input encoder, in which each view sees itself alone; and of each of its layers the keys and values of
        the decoder's same layer."""
        encoding = self._camera_encoding(context, frame)
        tokens = self._context_tokens(context, frame).flatten(0, 1)
        for context_block, target_block in zip(self.context_blocks, self.target_blocks):
            tokens = self._block(context_block, tokens, encoding)
            scenes = tokens.unflatten(0, (context.num_scenes, -1)).flatten(1, 2)
            yield self._block(target_block.keys_values, scenes, encoding)

    def _decode(
        self, memory: SceneMemory, target: Views, prefixes: Optional[Sequence[int]] = None
    ) -> Float[Tensor, "scene view height width 3"]:
        """The target decoder, in which each view sees itself and, in each layer, the context's keys and values.

        Args:
            prefixes: how many of the memory's tokens, from the first on, each view sees; all if absent.
        """
        with self._autocast(target.directions.device):
            encoding = self._camera_encoding(target, memory.frame)
            tokens = self._target_tokens(target, memory.frame)
            for layer, block in enumerate(self.target_blocks):
                tokens = self._block(block, tokens, *memory.read(layer), encoding, prefixes)
            return self.head(tokens, target.height, target.width)

    def forward(
        self,
        context: Views,
        target: Views,
        frame: Optional[CanonicalFrame] = None,
        prefixes: Optional[Sequence[int]] = None,
    ) -> Float[Tensor, "scene view height width 3"]:
        if prefixes is None:
            return super().forward(context, target, frame)
        if len(prefixes) != target.num_views or not all(1 <= n <= context.num_views for n in prefixes):
            raise ValueError(
                f"prefixes {list(prefixes)}: expected one of 1 to {context.num_views} context views for each of "
                f"{target.num_views} targets"
            )
        # In a new memory, views lie in order and all have as many tokens.
        memory, tokens = self.encode(context, frame), self._tokens_per_view(context)
        return self._decode(memory, target, [n * tokens for n in prefixes])

    def _ray_poses(self, views: Views, frame: CanonicalFrame) -> Float[Tensor, "scene view 4 4"]:
        if self.config.ray_frame == "canonical":
            return super()._ray_poses(views, frame)
        return torch.eye(4, device=views.directions.device).expand_as(views.camera_to_world)

    def _camera_encoding(self, views: Views, frame: CanonicalFrame) -> Optional[CameraEncoding]:
        if self.config.camera_encoding == "none":
            return None
        device, patch = views.directions.device, self.config.patch_size
        dtype = self.autocast_dtype or self.target_tokenizer.weight.dtype
        with exactly(device):
            grid = views.height // patch, views.width // patch
            rotation = PatchRotation.of(grid, self.config.head_dim, device, dtype)
            poses = frame.apply(views.camera_to_world)
            return CameraEncoding.of(poses, views.intrinsics, rotation)
