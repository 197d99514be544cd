"""Ways to render from views that are compared with one another: what is kept between calls, and what is done again.

All of them answer the same four calls, each with N context views known before:

    encode  take in N views
    render  render one view from N
    append  take in one view more and render 8
    path    from N views as images, render 120 frames, each handed out when it is there
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elvsm_nerfstudio.geometry import CanonicalFrame, pinhole_directions, pluecker_rays
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.nn.token_store import KeysValues
from elvsm_nerfstudio.views import Views

CALLS = ("encode", "render", "append", "path")
TARGETS, PATH_FRAMES = 8, 120


@dataclass(frozen=True)
class Scene:
    """A made-up scene: random colours seen from a circle. Times do not depend on what is to be seen."""

    context: Views
    target: Views
    path: Views
    frame: CanonicalFrame

    @staticmethod
    def make(num_views: int, size: int, device: torch.device | str, path_frames: int = PATH_FRAMES) -> Scene:
        """A scene with ``num_views`` context views of size x size pixels and one more to append."""
        context = _circle(num_views + 1, size, seed=0, with_rgb=True)
        target, path = _circle(TARGETS, size, seed=1), _circle(path_frames, size, seed=2)
        frame = CanonicalFrame.estimate(context.camera_to_world).to(device)
        return Scene(context.to(device), target.to(device), path.to(device), frame)

    def first(self, count: int) -> Views:
        return self.context.select(slice(count))


def _circle(count: int, size: int, seed: int, with_rgb: bool = False) -> Views:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(1, generator=generator) + torch.arange(count) * (2 * math.pi / count)
    zero, one = torch.zeros(count), torch.ones(count)
    forward = torch.stack([-angle.cos(), zero, -angle.sin()], dim=-1)
    down = torch.stack([zero, one, zero], dim=-1)
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, :3] = torch.stack([torch.linalg.cross(down, forward), down, forward, -2 * forward], dim=-1)
    directions = pinhole_directions(torch.tensor([size, size, size / 2, size / 2]), size, size)
    rgb = torch.rand(1, count, size, size, 3, generator=generator) if with_rgb else None
    intrinsics = torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(1, count, 4)
    return Views(poses[None], directions.expand(1, count, size, size, 3), intrinsics, rgb)


class Cached:
    """One memory, kept: the package's own protocol, whatever network speaks it."""

    calls, path_chunk = CALLS, 1

    def __init__(self, network: nn.Module):
        self.network = network

    def remember(self, scene: Scene, count: int) -> Any:
        """What is known of ``count`` views before a call."""
        return self.network.encode(scene.first(count), scene.frame)

    def fresh(self, memory: Any) -> Any:
        """The same, to append to: with room for one view, as an amortised append finds it."""
        return memory.reserve(memory.tokens_per_view[0]) if isinstance(memory, SceneMemory) else memory

    def encode(self, memory: Any, scene: Scene, count: int) -> Any:
        return self.network.encode(scene.first(count), scene.frame)

    def render(self, memory: Any, scene: Scene, count: int) -> Tensor:
        return self.network.decode(memory, scene.target.select(slice(1)))

    def append(self, memory: Any, scene: Scene, count: int) -> Tensor:
        memory = self.network.append(memory, scene.context.select(slice(count, count + 1)))
        return self.network.decode(memory, scene.target)

    def path(self, memory: Any, scene: Scene, count: int) -> Iterable[Tensor]:
        memory = self.network.encode(scene.first(count), scene.frame)
        for index in range(scene.path.num_views):
            yield self.network.decode(memory, scene.path.select(slice(index, index + 1)))


class Recomputing:
    """Nothing is kept but images: every call, and every frame of a path, encodes all context views."""

    calls, path_chunk = CALLS[1:], 1

    def __init__(self, network: nn.Module):
        self.network = network

    def remember(self, scene: Scene, count: int) -> None:
        return None

    def fresh(self, memory: None) -> None:
        return None

    def render(self, memory: None, scene: Scene, count: int) -> Tensor:
        return self.network(scene.first(count), scene.target.select(slice(1)), scene.frame)

    def append(self, memory: None, scene: Scene, count: int) -> Tensor:
        return self.network(scene.first(count + 1), scene.target, scene.frame)

    def path(self, memory: None, scene: Scene, count: int) -> Iterable[Tensor]:
        for index in range(scene.path.num_views):
            yield self.network(scene.first(count), scene.path.select(slice(index, index + 1)), scene.frame)


class Upstream:
    """The official code's algorithm with our blocks: both streams run together, layer by layer.

    It renders a path in chunks of 4 frames, each of which encodes the whole context again. Views that come one by one
    have their keys and values kept, one tensor for each layer which every new view copies, and each such call renders
    all targets; from kept keys and values alone nothing can be rendered.
    """

    calls, path_chunk = CALLS[1:], 4

    def __init__(self, network: EfficientLVSM):
        self.network = network

    def remember(self, scene: Scene, count: int) -> list[KeysValues]:
        kept: list[KeysValues] = []
        self._together(scene.first(count), scene.target, scene.frame, lambda layer, pair: kept.append(pair) or pair)
        return kept

    def fresh(self, kept: list[KeysValues]) -> list[KeysValues]:
        return [(keys.clone(), values.clone()) for keys, values in kept]

    def render(self, kept: list[KeysValues], scene: Scene, count: int) -> Tensor:
        return self._together(scene.first(count), scene.target.select(slice(1)), scene.frame)

    def append(self, kept: list[KeysValues], scene: Scene, count: int) -> Tensor:
        def joined(layer: int, pair: KeysValues) -> KeysValues:
            kept[layer] = tuple(torch.cat(parts, dim=2) for parts in zip(kept[layer], pair))
            return kept[layer]

        view = scene.context.select(slice(count, count + 1))
        return self._together(view, scene.target, scene.frame, joined)

    def path(self, kept: list[KeysValues], scene: Scene, count: int) -> Iterable[Tensor]:
        for first in range(0, scene.path.num_views, self.path_chunk):
            chunk = scene.path.select(slice(first, first + self.path_chunk))
            yield self._together(scene.first(count), chunk, scene.frame)

    def _together(self, context: Views, target: Views, frame: CanonicalFrame, keep=lambda layer, pair: pair) -> Tensor:
        network = self.network
        context_rays, target_rays = (
            pluecker_rays(frame.apply(views.camera_to_world), views.directions) for views in (context, target)
        )
        precision = network.autocast_dtype
        with torch.autocast(target_rays.device.type, dtype=precision, enabled=precision is not None):
            source = network.context_tokenizer(torch.cat([context.rgb * 2 - 1, context_rays], dim=-1)).flatten(0, 1)
            tokens = network.target_tokenizer(target_rays)
            for layer, (context_block, block) in enumerate(zip(network.context_blocks, network.target_blocks)):
                source = context_block(source)
                joint = source.unflatten(0, (context.num_scenes, -1)).flatten(1, 2)
                tokens = block(tokens, *keep(layer, block.keys_values(joint)))
            return network.head(tokens, target.height, target.width)
