"""A scene as a network remembers it: what it keeps of every context view in every layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.device_memory import NotEnoughMemoryError
from elvsm_nerfstudio.nn.nearest import nearest_views
from elvsm_nerfstudio.nn.token_store import Tokens, TokenStore


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
    weights: object
    """Token of the weights that made the memory: memories with another one are not appended, and not decoded."""
    next_id: int
    """The first id that no view has had yet."""
    derived: dict[str, Tensor] = field(default_factory=dict, init=False)
    """What the network made of all views together, kept for the next decode. No operation hands it on."""

    @staticmethod
    def of(
        store: TokenStore,
        ids: Sequence[int],
        tokens_per_view: Sequence[int],
        camera_to_world: Float[Tensor, "scene view 4 4"],
        intrinsics: Float[Tensor, "scene view 4"],
        frame: CanonicalFrame,
        weights: object,
    ) -> SceneMemory:
        """The memory of views whose tokens lie in a store one after another."""
        starts = accumulate(tokens_per_view, initial=0)
        views = tuple(StoredView(*view) for view in zip(ids, starts, tokens_per_view))
        # Cameras are copied: the memory must not change when the views that it was made from do.
        cameras = (x.detach().to(store.device, torch.float32, copy=True) for x in (camera_to_world, intrinsics))
        return SceneMemory(store, views, *cameras, frame, weights, max(0, *(id + 1 for id in ids)))

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

    def append(self, other: SceneMemory, ids: Sequence[int] | None = None) -> SceneMemory:
        """This memory and then another's views, in this one's dtype and on its device.

        Args:
            other: must have been encoded by the same weights in the same frame; the size of its images may differ.
            ids: of the new views; by default they are numbered on from the last.

        Raises:
            ValueError: for another frame, weights or number of scenes, and ids that are taken.
            NotEnoughMemoryError: with the bytes needed and available.
        """
        self._check_belongs(other)
        ids = check_ids(range(self.next_id, self.next_id + other.num_views) if ids is None else ids, other.num_views)
        taken = set(ids) & set(self.ids)
        if taken:
            raise ValueError(f"SceneMemory.append: the memory already has views {sorted(taken)}")

        if self.store.carries_gradients or other.store.carries_gradients:
            store = self.store.joined(self.runs, other.store, other.runs)
            mine, start = self.packed(0), self.num_tokens
        else:
            base = self.reserve(other.num_tokens)
            store, mine = base.store, base.views
            start = store.append(other.store, other.runs)
        added = (replace(view, id=id) for view, id in zip(other.packed(start), ids))
        return replace(
            self,
            store=store,
            views=(*mine, *added),
            camera_to_world=torch.cat([self.camera_to_world, other.camera_to_world.to(self.device)], dim=1),
            intrinsics=torch.cat([self.intrinsics, other.intrinsics.to(self.device)], dim=1),
            next_id=max(self.next_id, max(ids) + 1),
        )

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
        if store.carries_gradients or store.room() >= tokens:
            return self
        needed = self.num_tokens + tokens
        try:
            store = store.copy(self.runs, capacity=max(needed, 2 * self.num_tokens))
        except (NotEnoughMemoryError, torch.OutOfMemoryError):
            store = store.copy(self.runs, capacity=needed)
        return replace(self, store=store, views=self.packed(0))

    def compact(self) -> SceneMemory:
        """The same memory in storage of its own, in one piece and without room to grow.

        For what is to be rendered many times after views were dropped, and to let go of the dropped ones.
        """
        if self.runs == [(0, self.store.capacity)]:
            return self
        return replace(self, store=self.store.copy(self.runs), views=self.packed(0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SceneMemory:
        """What is kept of the views moved and cast; cameras and frame are moved but stay in fp32."""
        device = self.device if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        dtype = dtype or self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        return replace(
            self,
            store=self.store.copy(self.runs, device=device, dtype=dtype),
            views=self.packed(0),
            camera_to_world=self.camera_to_world.to(device),
            intrinsics=self.intrinsics.to(device),
            frame=self.frame.to(device),
        )

    def packed(self, start: int) -> tuple[StoredView, ...]:
        """The views as they lie once their runs are copied one after another to a position."""
        starts = {}
        for view in sorted(self.views, key=lambda view: view.start):
            starts[view.id] = start
            start += view.tokens
        return tuple(replace(view, start=starts[view.id]) for view in self.views)

    def _check_belongs(self, other: SceneMemory) -> None:
        if other.weights is not self.weights:
            raise ValueError(
                "SceneMemory.append: the views were encoded by other weights (another network, or this one before "
                "its weights changed); encode all of them again"
            )
        if other.num_scenes != self.num_scenes:
            raise ValueError(f"SceneMemory.append: found {other.num_scenes} scenes, expected {self.num_scenes}")
        mine, theirs = self.frame, other.frame
        if mine is not theirs and not all(
            torch.equal(getattr(mine, name), getattr(theirs, name).to(mine.centre.device))
            for name in ("axes", "centre", "scale")
        ):
            raise ValueError(
                "SceneMemory.append: the views were encoded in another canonical frame; "
                "encode them with frame=memory.frame"
            )


def check_ids(ids: Sequence[int], num_views: int) -> tuple[int, ...]:
    """View ids as plain integers; ValueError where they are too few or many, or not all different."""
    ids = tuple(int(id) for id in ids)
    if len(ids) != num_views or len(set(ids)) != len(ids):
        raise ValueError(f"found view ids {list(ids)}; expected {num_views} different ones")
    return ids
