"""Which frames of a scene are context and which are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class FrameChoice:
    """Positions of frames within a scene."""

    context: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class RandomViewSampler:
    """Unordered views: frames drawn uniformly, without repetition.

    With ``targets_include_context`` targets are drawn from all frames of the draw, so that a context view may be
    its own target, as in the official training; otherwise context and targets are disjoint.
    """

    num_context_views: int
    num_target_views: int
    targets_include_context: bool

    @property
    def num_frames(self) -> int:
        """Frames that a scene must have at least."""
        return self.num_context_views + self.num_target_views

    def __call__(self, frames: Sequence[int], generator: torch.Generator) -> FrameChoice:
        if len(frames) < self.num_frames:
            raise ValueError(
                f"{len(frames)} frames; expected at least {self.num_frames}, for {self.num_context_views} context and "
                f"{self.num_target_views} target views"
            )
        order = torch.randperm(len(frames), generator=generator)[: self.num_frames].tolist()
        drawn = [frames[i] for i in order]
        context, targets = drawn[: self.num_context_views], drawn[self.num_context_views :]
        if self.targets_include_context:
            order = torch.randperm(len(drawn), generator=generator)[: self.num_target_views].tolist()
            targets = [drawn[i] for i in order]
        return FrameChoice(tuple(context), tuple(targets))


def farthest_point_views(camera_to_world: Float[Tensor, "view 3 4"], count: int) -> list[int]:
    """Positions of ``count`` views that are spread out, over camera centres and viewing directions alike.

    Greedy farthest-point sampling on (centre / extent of the centres, viewing axis), from the view farthest from
    the mean: it depends on the cameras only, whatever the order, rotation or scale. Takes OpenGL or OpenCV poses.
    """
    centres = camera_to_world[:, :3, 3] - camera_to_world[:, :3, 3].mean(dim=0)
    extent = centres.norm(dim=-1).max().clamp(min=1e-8)
    features = torch.cat([centres / extent, camera_to_world[:, :3, 2]], dim=-1).double()
    chosen = [int((features - features.mean(dim=0)).norm(dim=-1).argmax())]
    distance = (features - features[chosen[0]]).norm(dim=-1)
    while len(chosen) < min(count, len(features)):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).norm(dim=-1))
    return chosen
