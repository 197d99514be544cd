"""A scene as a network remembers it: what it keeps of every context view in every layer. In files, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Optional, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elvsm_nerfstudio.files import write_safetensors
from elvsm_nerfstudio.geometry import CanonicalFrame, nearest_views
from elvsm_nerfstudio.nn.device_memory import NotEnoughMemoryError
from elvsm_nerfstudio.nn.token_store import Tokens, TokenStore
from elvsm_nerfstudio.views import Views

FORMAT = "elvsm_nerfstudio.SceneMemory 1"
_FRAME = ("axes", "centre", "scale")


class MemoryFileError(ValueError):
    """A file that is no memory, is damaged, or was made by another network. The message names the file."""


@runtime_checkable
class Encoder(Protocol):
    """What is known in here of the network that makes memories."""

    @property
    def architecture(self) -> str:
        """What it computes with its weights."""
        ...

    def fingerprint(self) -> str:
        """A hash of architecture and weights."""
        ...

    def weights_token(self) -> WeightsToken:
        """The same object for as long as the weights stay as they are."""
        ...

    def new_store(self, num_scenes: int, capacity: int) -> TokenStore:
        """An empty store for so many tokens of each scene."""
        ...


@dataclass(frozen=True, eq=False)
class WeightsToken:
    """Stands for a network's weights for as long as they stay as they are."""

    network: Callable[[], Optional[Encoder]]
    """The network, for as long as it is there."""


@dataclass(frozen=True)
class StoredView:
    """Where a view's tokens lie in the store."""

    id: int
    start: int
    tokens: int


@dataclass(frozen=True, eq=False)
class SceneMemory:
    """What a network keeps of context views, and the frame they are encoded in.

    Efficient-LVSM keeps cross-attention keys (normalised) and values, LVSM tokens. What is kept of a view depends on
    that view alone, so a memory of N views is the N memories side by side: views are appended, dropped and selected
    exactly, in any order, at the cost of those views alone. The frame stays as it was when the first views were
    encoded. What a network makes of all views together (``derived``) it makes again when they have changed.

    A memory never changes; each operation returns another one. They share their storage, which has room to grow:
    appending N views one by one copies O(N) tokens, dropping and selecting copies none. Views that lie in one piece
    are read in place; others are gathered layer by layer at every decode, until ``compact``. Storage is freed with
    the last memory that uses any of it.

    The network makes memories (``encode``, ``append``, ``rebase``); nothing in here knows it.
    """

    store: TokenStore
    views: tuple[StoredView, ...]
    camera_to_world: Float[Tensor, "scene view 4 4"]
    """OpenCV camera-to-world of the views in the world, fp32."""
    intrinsics: Float[Tensor, "scene view 4"]
    """fx, fy, cx, cy of the views, normalised: fx and cx by the width, fy and cy by the height."""
    frame: CanonicalFrame
    weights: WeightsToken
    """Of the weights that made the memory: with others it is neither decoded nor appended to."""
    next_id: int = 0
    """The first id that no view has had yet."""
    derived: dict[str, Tensor] = field(default_factory=dict, init=False)
    """What the network made of all views together, kept for the next decode. No operation hands it on."""

    @staticmethod
    def empty(store: TokenStore, frame: CanonicalFrame, weights: WeightsToken) -> SceneMemory:
        """The memory of no views."""
        poses = torch.empty(store.num_scenes, 0, 4, 4, device=store.device)
        return SceneMemory(store, (), poses, poses[..., 0], frame, weights)

    @property
    def num_scenes(self) -> int:
        return self.store.num_scenes

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def ids(self) -> tuple[int, ...]:
        """The views' ids in order: 0, 1, ... as they came, unless the caller gave others. A dropped view's id is not
        used again."""
        return tuple(view.id for view in self.views)

    @property
    def tokens_per_view(self) -> tuple[int, ...]:
        return tuple(view.tokens for view in self.views)

    @property
    def num_tokens(self) -> int:
        """Tokens of all views of one scene."""
        return sum(self.tokens_per_view)

    @property
    def num_bytes(self) -> int:
        """Size of what is kept of this memory's views, all layers and scenes, and of what was derived from it.

        Not counted: what else lies in the store (room to grow, views that only other memories have), and cameras.
        """
        return self.num_tokens * self.store.token_bytes + sum(x.nbytes for x in self.derived.values())

    @property
    def num_layers(self) -> int:
        return self.store.num_layers

    @property
    def device(self) -> torch.device:
        return self.store.device

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype

    def read(self, layer: int) -> Tokens:
        """What is kept of all views for a layer, as it lies in the store: attention has no use for the order."""
        return self.store.read(layer, self.runs)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The views' tokens in the store, as few stretches (first, number) as there are, in order."""
        runs: list[tuple[int, int]] = []
        for view in sorted(self.views, key=lambda view: view.start):
            if runs and sum(runs[-1]) == view.start:
                runs[-1] = (runs[-1][0], runs[-1][1] + view.tokens)
            else:
                runs.append((view.start, view.tokens))
        return runs

    # Views come and go

    def with_views(self, start: int, views: Views, tokens: int, ids: Optional[Sequence[int]] = None) -> SceneMemory:
        """This memory and more views, whose tokens lie in its store one view after another.

        Args:
            start: where the first view's tokens lie.
            tokens: of each view.
            ids: of the new views; by default they are numbered on from the last.

        Raises:
            ValueError: for ids that are taken.
        """
        ids = check_ids(range(self.next_id, self.next_id + views.num_views) if ids is None else ids, views.num_views)
        taken = set(ids) & set(self.ids)
        if taken:
            raise ValueError(f"SceneMemory: cannot add views {list(ids)}; it already has {sorted(taken)}")
        added = (StoredView(id, start + index * tokens, tokens) for index, id in enumerate(ids))
        # Cameras are copied: the memory must not change when the views that it was made from do.
        poses, intrinsics = (
            torch.cat([mine, new.detach().to(mine)], dim=1)
            for mine, new in ((self.camera_to_world, views.camera_to_world), (self.intrinsics, views.intrinsics))
        )
        next_id = max(self.next_id, *(id + 1 for id in ids))
        return SceneMemory(self.store, (*self.views, *added), poses, intrinsics, self.frame, self.weights, next_id)

    def select(self, ids: Sequence[int]) -> SceneMemory:
        """The memory of some of the views, in this order, on the same storage; of all as they are, itself."""
        ids = check_ids(ids, len(ids))
        if ids == self.ids:
            return self
        position = {view.id: index for index, view in enumerate(self.views)}
        if not ids or not set(ids) <= set(position):
            raise ValueError(f"SceneMemory.select: found views {list(ids)}; expected at least one of {list(self.ids)}")
        index = [position[id] for id in ids]
        return replace(
            self,
            views=tuple(self.views[i] for i in index),
            camera_to_world=self.camera_to_world[:, index],
            intrinsics=self.intrinsics[:, index],
        )

    def drop(self, ids: Collection[int]) -> SceneMemory:
        """The memory of the other views, on the same storage. At least one has to stay."""
        unknown = set(ids) - set(self.ids)
        left = [id for id in self.ids if id not in set(ids)]
        if unknown or not left:
            problem = f"no views {sorted(unknown)}" if unknown else "no view would be left"
            raise ValueError(f"SceneMemory.drop: {problem}; the memory has {list(self.ids)}")
        return self.select(left)

    def scene(self, index: int) -> SceneMemory:
        """The memory of one scene of the batch, on the same storage."""
        one = slice(index, index + 1)
        frame = self.frame
        return replace(
            self,
            store=self.store.scene(index),
            camera_to_world=self.camera_to_world[one],
            intrinsics=self.intrinsics[one],
            frame=CanonicalFrame(frame.axes[one], frame.centre[one], frame.scale[one]),
        )

    def nearest(self, camera_to_world: Float[Tensor, "scene target 4 4"], count: int) -> list[list[tuple[int, ...]]]:
        """For every scene and target, the ids (ascending) of the ``count`` views placed best for it.

        By ``nearest_views``; of equally good views those with the lower ids, whatever their order in the memory.
        """
        by_id = sorted(range(self.num_views), key=lambda position: self.views[position].id)
        chosen = nearest_views(self.camera_to_world[:, by_id], camera_to_world, count).tolist()
        ids = sorted(self.ids)
        return [[tuple(ids[i] for i in sorted(views)) for views in targets] for targets in chosen]

    # Storage

    def reserve(self, tokens: int) -> SceneMemory:
        """The same memory with room for more tokens: itself if it has it, or a copy, in twice the space if it fits.

        Raises:
            NotEnoughMemoryError: with the bytes needed and available.
        """
        store = self.store
        if store.room() >= tokens:
            return self
        needed = self.num_tokens + tokens
        try:
            store = store.copy(self.runs, capacity=max(needed, 2 * self.num_tokens))
        except (NotEnoughMemoryError, torch.OutOfMemoryError):
            store = store.copy(self.runs, capacity=needed)
        return replace(self, store=store, views=self._packed())

    def _packed(self) -> tuple[StoredView, ...]:
        """The views as they lie once their runs are copied one after another."""
        stored = sorted(self.views, key=lambda view: view.start)
        starts = dict(zip((view.id for view in stored), accumulate((view.tokens for view in stored), initial=0)))
        return tuple(replace(view, start=starts[view.id]) for view in self.views)

    # Files

    def save(self, path: Path | str) -> None:
        """Writes the memory, its views alone, as safetensors: whole or not at all, never half a file.

        Raises:
            ValueError: where the weights that made it are gone or have changed since.
            OSError: where the file cannot be written.
        """
        tensors = {"camera_to_world": self.camera_to_world, "intrinsics": self.intrinsics}
        tensors |= {f"frame.{name}": getattr(self.frame, name) for name in _FRAME}
        for layer in range(self.num_layers):
            parts = zip(self.store.PARTS, self.read(layer))
            tensors |= {f"{name}.{layer}": part.transpose(1, 2) for name, part in parts}
        network = self.weights.network()
        if network is None or network.weights_token() is not self.weights:
            raise ValueError(f"{path}: the network's weights are no longer those that encoded the memory")
        metadata = {
            "format": FORMAT,
            "network": network.architecture,
            "fingerprint": network.fingerprint(),
            "views": json.dumps([(view.id, view.start, view.tokens) for view in self._packed()]),
            "next_id": str(self.next_id),
        }
        write_safetensors(Path(path), tensors, metadata)


def load_memory(path: Path | str, network: Encoder) -> SceneMemory:
    """Reads what ``SceneMemory.save`` wrote, onto the network's device and in the precision of its memories.

    Args:
        network: with the weights that encoded the memory.

    Raises:
        MemoryFileError: for what is no memory, is damaged or cut short, or was encoded by another network.
        NotEnoughMemoryError: with the bytes needed and available.
    """
    try:
        with safe_open(path, "pt") as file:
            _check_origin(path, file.metadata() or {}, network)
            return _read(file, network)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise MemoryFileError(f"{path} is not a scene memory, or is damaged: {error}") from error


def _check_origin(path: Path | str, metadata: Mapping[str, str], network: Encoder) -> None:
    if metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata["network"] != network.architecture:
        raise MemoryFileError(
            f"{path}: encoded by another architecture, {metadata['network']}; this network is {network.architecture}"
        )
    expected = network.fingerprint()
    if metadata["fingerprint"] != expected:
        raise MemoryFileError(
            f"{path}: encoded by other weights (fingerprint {metadata['fingerprint']}, this network's is {expected}); "
            "encode the views again"
        )


def _read(file, network: Encoder) -> SceneMemory:
    metadata, frame = file.metadata(), (file.get_tensor(f"frame.{name}") for name in _FRAME)
    views = tuple(StoredView(*view) for view in json.loads(metadata["views"]))
    poses, intrinsics = file.get_tensor("camera_to_world"), file.get_tensor("intrinsics")
    scenes, tokens = len(poses), sum(view.tokens for view in views)
    store = network.new_store(scenes, tokens)
    start = store.take(tokens)
    for layer in range(store.num_layers):
        parts = tuple(file.get_tensor(f"{part}.{layer}").transpose(1, 2) for part in store.PARTS)
        if any(part.transpose(1, 2).shape != store.shape for part in parts):
            raise TypeError(f"found {tuple(parts[0].shape)} in layer {layer} for {len(views)} views, {tokens} tokens")
        store.write(start, layer, parts)
    # Copies: what safetensors returns is mapped from the file, which may be gone before the memory is.
    poses, intrinsics, *frame = (x.to(store.device, copy=True) for x in (poses, intrinsics, *frame))
    token, next_id = network.weights_token(), int(metadata["next_id"])
    memory = SceneMemory(store, views, poses, intrinsics, CanonicalFrame(*frame), token, next_id)
    if memory._packed() != views or poses.shape != (scenes, len(views), 4, 4) or intrinsics.shape != poses.shape[:3]:
        raise TypeError(f"its views {metadata['views']} do not fit its tensors")
    return memory


def check_ids(ids: Sequence[int], num_views: int) -> tuple[int, ...]:
    """View ids as plain integers; ValueError where they are too few or many, or not all different."""
    ids = tuple(int(id) for id in ids)
    if len(ids) != num_views or len(set(ids)) != len(ids):
        raise ValueError(f"found view ids {list(ids)}; expected {num_views} different ones")
    return ids
