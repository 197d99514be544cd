"""Efficient-LVSM: a two-stream transformer that renders new views of a scene in one forward pass.

The input encoder sees each context view alone; the target decoder sees each target view alone and, in layer l,
cross-attends to what the encoder's layer l made of all context views (co-refinement). Paper: arXiv 2602.06478.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame, pluecker_rays
from elvsm_nerfstudio.nn.key_values import KeysValues, KeyValueStore
from elvsm_nerfstudio.nn.layers import ContextBlock, PatchHead, PatchTokenizer, TargetBlock, layer_norm
from elvsm_nerfstudio.nn.memory import SceneMemory, check_ids
from elvsm_nerfstudio.nn.weights import WeightsWatch, fingerprint
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
        chunk_tokens: without gradients, context views go through the encoder in groups of about as many tokens (at
            least a view at a time), so that encoding needs no more memory for more views. It changes no result.
    """

    def __init__(
        self,
        config: EfficientLVSMConfig,
        autocast_dtype: Optional[torch.dtype] = None,
        chunk_tokens: int = 8192,
    ):
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"width {config.width} is not a multiple of head_dim {config.head_dim}")
        self.config = config
        self.autocast_dtype = autocast_dtype
        self.chunk_tokens = chunk_tokens
        self._weights = WeightsWatch()
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

    @property
    def architecture(self) -> str:
        """What the network computes with its weights, in words."""
        c = self.config
        sizes = (
            f"width {c.width}, {c.num_layers} layers, head_dim {c.head_dim}, patch {c.patch_size}, mlp {c.mlp_ratio}"
        )
        return f"{type(self).__name__} ({sizes})"

    def fingerprint(self) -> str:
        """A hash of architecture and weights: equal where the same views give the same memory. Reads all weights."""
        return fingerprint(self, self.architecture)

    def weights_token(self) -> object:
        """The same object for as long as the weights stay as they are; memories carry it."""
        return self._weights.token(self)

    def encode(
        self, context: Views, frame: Optional[CanonicalFrame] = None, ids: Optional[Sequence[int]] = None
    ) -> SceneMemory:
        """Remembers context views, each on its own.

        With gradients all views are encoded at once; without, in groups straight into the memory's storage.

        Args:
            context: views with rgb; height and width must be multiples of the patch size.
            frame: canonical frame to encode in; estimated from the context's cameras if absent.
            ids: of the views, 0, 1, ... if absent.

        Raises:
            NotEnoughMemoryError: with the bytes that the memory needs and those available, before any computation.
        """
        self._check_context(context)
        ids = check_ids(range(context.num_views) if ids is None else ids, context.num_views)
        frame = CanonicalFrame.estimate(context.camera_to_world) if frame is None else frame
        device, tokens = context.directions.device, self._tokens_per_view(context)
        with self._autocast(device):
            if self._needs_gradients(context):
                layers: list[KeysValues] = []
                self._keys_values(context, frame, lambda _, keys_values: layers.append(keys_values))
                store = KeyValueStore.of(layers)
            else:
                heads, head_dim = self.config.width // self.config.head_dim, self.config.head_dim
                shape = (context.num_scenes, context.num_views * tokens, heads, head_dim)
                dtype = self.autocast_dtype or self.context_tokenizer.weight.dtype
                store = KeyValueStore.allocate(self.config.num_layers, shape, dtype, device)
                for chunk in self._chunks(context):
                    start = store.take(chunk.num_views * tokens)
                    self._keys_values(chunk, frame, partial(store.write, start))
        cameras = context.camera_to_world, context.intrinsics
        return SceneMemory.of(store, ids, (tokens,) * context.num_views, *cameras, frame, self.weights_token())

    def append(self, memory: SceneMemory, views: Views, ids: Optional[Sequence[int]] = None) -> SceneMemory:
        """Encodes more views in a memory's frame, at the cost of those views; any size of image.

        The same as ``memory.append(network.encode(views, memory.frame), ids)``, without holding all new views twice.

        Args:
            ids: of the new views; by default they are numbered on from the last.
        """
        self._check_memory(memory, views)
        self._check_context(views)
        ids = None if ids is None else check_ids(ids, views.num_views)
        if self._needs_gradients(views):
            return memory.append(self.encode(views, memory.frame), ids)
        memory = memory.reserve(views.num_views * self._tokens_per_view(views))
        first = 0
        for chunk in self._chunks(views):
            chunk_ids = None if ids is None else ids[first : first + chunk.num_views]
            memory = memory.append(self.encode(chunk, memory.frame), chunk_ids)
            first += chunk.num_views
        return memory

    def rebase(
        self, memory: SceneMemory, views: Views | Sequence[Views], frame: Optional[CanonicalFrame] = None
    ) -> SceneMemory:
        """Encodes a memory's views again in another canonical frame; their ids stay.

        Args:
            memory: may be of other weights.
            views: the memory's views in its order, with rgb (a memory keeps no images); of several sizes: in several
                parts.
            frame: estimated from the memory's cameras if absent.
        """
        parts = [views] if isinstance(views, Views) else list(views)
        own = memory.camera_to_world
        cameras = torch.cat([own[:, :0], *(part.camera_to_world.to(own) for part in parts)], dim=1)
        if cameras.shape != own.shape or not torch.allclose(cameras, own):
            raise ValueError(
                f"rebase: found {cameras.shape[1]} views; expected those of the memory, {list(memory.ids)}, in this "
                "order and with the same cameras"
            )
        frame = CanonicalFrame.estimate(own) if frame is None else frame
        rebased, first = None, 0
        for part in parts:
            ids = memory.ids[first : first + part.num_views]
            rebased = self.encode(part, frame, ids) if rebased is None else self.append(rebased, part, ids)
            first += part.num_views
        return replace(rebased, next_id=memory.next_id)

    def decode(
        self, memory: SceneMemory, target: Views, nearest_views: Optional[int] = None
    ) -> Float[Tensor, "scene view height width 3"]:
        """Renders target views from memory, each on its own; colours in [0, 1].

        Args:
            memory: encoded by the weights as they are now.
            target: cameras; height and width must be multiples of the patch size.
            nearest_views: each target attends only to that many views, those placed best for it (see
                ``nn.nearest``), so that its cost does not grow with the memory; all if absent.
        """
        self._check_memory(memory, target)
        if nearest_views is None or nearest_views >= memory.num_views:
            return self._decode(memory, target)
        chosen = memory.nearest(target.camera_to_world, nearest_views)
        return torch.cat([self._decode_chosen(memory, target, scene, ids) for scene, ids in enumerate(chosen)])

    def _decode(self, memory: SceneMemory, target: Views) -> Float[Tensor, "scene view height width 3"]:
        rays = self._rays(target, memory.frame)
        with self._autocast(rays.device):
            tokens = self.target_tokenizer(rays)
            for layer, block in enumerate(self.target_blocks):
                tokens = block(tokens, *memory.keys_values(layer))
            return self.head(tokens, target.height, target.width)

    def _decode_chosen(
        self, memory: SceneMemory, target: Views, scene: int, chosen: list[tuple[int, ...]]
    ) -> Float[Tensor, "1 view height width 3"]:
        """Renders one scene's targets, each from the views chosen for it; those with the same views together."""
        memory = memory.scene(scene)
        images: dict[int, Tensor] = {}
        for ids in dict.fromkeys(chosen):
            same = [index for index, other in enumerate(chosen) if other == ids]
            cameras = (
                x[scene : scene + 1, same] for x in (target.camera_to_world, target.directions, target.intrinsics)
            )
            images.update(zip(same, self._decode(memory.select(ids), Views(*cameras))[0]))
        return torch.stack([images[index] for index in range(len(chosen))])[None]

    def forward(
        self, context: Views, target: Views, frame: Optional[CanonicalFrame] = None
    ) -> Float[Tensor, "scene view height width 3"]:
        return self.decode(self.encode(context, frame), target)

    def _keys_values(self, context: Views, frame: CanonicalFrame, keep: Callable[[int, KeysValues], None]) -> None:
        """Makes keys and values of context views for each layer of the decoder, tokens view after view."""
        tokens = self.context_tokenizer(torch.cat([context.rgb * 2 - 1, self._rays(context, frame)], dim=-1))
        tokens = tokens.flatten(0, 1)
        for layer, (context_block, target_block) in enumerate(zip(self.context_blocks, self.target_blocks)):
            tokens = context_block(tokens)
            source = layer_norm(tokens).unflatten(0, (context.num_scenes, -1)).flatten(1, 2)
            keep(layer, target_block.cross_attention.keys_values(source))

    def _chunks(self, views: Views) -> Iterator[Views]:
        count = max(1, self.chunk_tokens // (views.num_scenes * self._tokens_per_view(views)))
        for first in range(0, views.num_views, count):
            yield views.select(slice(first, first + count))

    def _tokens_per_view(self, views: Views) -> int:
        return views.height * views.width // self.config.patch_size**2

    def _needs_gradients(self, context: Views) -> bool:
        inputs = (context.rgb, context.camera_to_world, context.directions)
        return torch.is_grad_enabled() and any(x.requires_grad for x in chain(inputs, self.parameters()))

    def _check_context(self, views: Views) -> None:
        if views.rgb is None or views.num_views == 0:
            raise ValueError(f"encode: context views need rgb and at least one view; found {views.num_views} views")
        self._check_size(views)

    def _check_memory(self, memory: SceneMemory, views: Views) -> None:
        if memory.weights is not self.weights_token():
            raise ValueError(
                "the memory was encoded by other weights (another network, or this one before its weights changed); "
                "encode its views again"
            )
        if memory.num_scenes != views.num_scenes:
            raise ValueError(f"the memory is of {memory.num_scenes} scenes, the views are of {views.num_scenes}")

    def _check_size(self, views: Views) -> None:
        patch = self.config.patch_size
        if views.height % patch or views.width % patch:
            raise ValueError(
                f"views are {views.height}x{views.width}; expected multiples of the patch size {patch} "
                "(pad the ray grid and crop the result)"
            )

    def _rays(self, views: Views, frame: CanonicalFrame) -> Float[Tensor, "scene view height width 6"]:
        self._check_size(views)
        with torch.autocast(views.directions.device.type, enabled=False):
            return pluecker_rays(frame.apply(views.camera_to_world), views.directions.float())

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=enabled)
