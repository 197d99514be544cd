"""A scene as the network remembers it: keys and values of every context view in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.geometry import CanonicalFrame


@dataclass(frozen=True)
class SceneMemory:
    """Cross-attention keys (normalised) and values of context views, per layer, and the frame they are encoded in.

    Context views never see each other, so a memory of N views is the N memories side by side: views are appended
    and selected exactly, in any order, at the cost of those views alone. The frame stays as it was when the first
    views were encoded.
    """

    keys: tuple[Float[Tensor, "scene head token head_dim"], ...]
    """One tensor a layer; tokens of all views one after another."""
    values: tuple[Float[Tensor, "scene head token head_dim"], ...]
    tokens_per_view: tuple[int, ...]
    """Number of tokens of each view, in order."""
    frame: CanonicalFrame

    @property
    def num_views(self) -> int:
        return len(self.tokens_per_view)

    @property
    def num_bytes(self) -> int:
        """Size of the keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def append(self, other: SceneMemory) -> SceneMemory:
        """This memory and then another's views; both must have been encoded in the same frame."""
        mine, theirs = self.frame, other.frame
        if not all(
            torch.equal(getattr(mine, name), getattr(theirs, name).to(mine.centre.device))
            for name in ("axes", "centre", "scale")
        ):
            raise ValueError(
                "SceneMemory.append: the views were encoded in another canonical frame; "
                "encode them with frame=memory.frame"
            )
        return replace(
            self,
            keys=tuple(torch.cat(pair, dim=2) for pair in zip(self.keys, other.keys)),
            values=tuple(torch.cat(pair, dim=2) for pair in zip(self.values, other.values)),
            tokens_per_view=self.tokens_per_view + other.tokens_per_view,
        )

    def select(self, views: Sequence[int]) -> SceneMemory:
        """The memory of some of the views, given by position."""
        unknown = [view for view in views if not 0 <= view < self.num_views]
        if unknown or len(views) == 0:
            raise ValueError(
                f"SceneMemory.select: found views {list(views)}; expected at least one of 0..{self.num_views - 1}"
            )
        starts = [sum(self.tokens_per_view[:view]) for view in views]
        index = torch.cat([torch.arange(s, s + self.tokens_per_view[v]) for s, v in zip(starts, views)])
        index = index.to(self.keys[0].device)
        return replace(
            self,
            keys=tuple(x.index_select(2, index) for x in self.keys),
            values=tuple(x.index_select(2, index) for x in self.values),
            tokens_per_view=tuple(self.tokens_per_view[view] for view in views),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SceneMemory:
        """Keys and values moved and cast; the frame is moved but stays in fp32."""
        return replace(
            self,
            keys=tuple(x.to(device=device, dtype=dtype) for x in self.keys),
            values=tuple(x.to(device=device, dtype=dtype) for x in self.values),
            frame=self.frame if device is None else self.frame.to(device),
        )
