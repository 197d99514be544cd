"""Which frames of a scene are context and which are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.data.view_geometry import azimuth_order, farthest_point_views
from elvsm_nerfstudio.geometry import nearest_views


@dataclass(frozen=True)
class FrameChoice:
    """Positions of frames within a scene."""

    context: tuple[int, ...]
    target: tuple[int, ...]


@runtime_checkable
class ViewSampler(Protocol):
    """Chooses the views of one training sample."""

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        """Draws from the generator alone: equal arguments and generator states give equal choices.

        Args:
            frames: the scene's usable frames, ascending, which is the order of their file names.
            poses: camera-to-world of these frames, OpenGL axes.
            num_context_views: of this step, at least 1.
            step: of training.

        Raises:
            ValueError: for a scene with too few frames; the message continues "the scene has ".
        """
        ...


@dataclass(frozen=True)
class _TargetDraw:
    """What samplers share: how many targets, and from where.

    With ``targets_include_context`` targets are drawn from all frames of the draw, so that a context view may be
    its own target, as in the official training; otherwise context and targets are disjoint.
    """

    num_target_views: int
    targets_include_context: bool

    def _num_frames(self, frames: Sequence[int], num_context_views: int) -> int:
        """Frames of the draw: as many as if context and targets were disjoint."""
        needed = num_context_views + self.num_target_views
        if len(frames) < needed:
            raise ValueError(
                f"{len(frames)} frames; expected at least {needed}, for {num_context_views} context and "
                f"{self.num_target_views} target views"
            )
        return needed

    def _choice(
        self, frames: Sequence[int], context: list[int], targets: list[int], generator: torch.Generator
    ) -> FrameChoice:
        """Frames at drawn, disjoint positions."""
        if self.targets_include_context:
            targets = _draw([*context, *targets], self.num_target_views, generator)
        return FrameChoice(tuple(frames[i] for i in context), tuple(frames[i] for i in targets))

    def _choice_with_any_targets(
        self, frames: Sequence[int], context: list[int], generator: torch.Generator
    ) -> FrameChoice:
        """Context at drawn positions, targets among all the other frames."""
        others = [i for i in range(len(frames)) if i not in context]
        return self._choice(frames, context, _draw(others, self.num_target_views, generator), generator)


@dataclass(frozen=True)
class RandomViewSampler(_TargetDraw):
    """Unordered views: frames drawn uniformly, without repetition."""

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        drawn = _draw(range(len(frames)), self._num_frames(frames, num_context_views), generator)
        return self._choice(frames, drawn[:num_context_views], drawn[num_context_views:], generator)


@dataclass(frozen=True)
class BoundedGapSampler(_TargetDraw):
    """Views of a video: context at both ends of a stretch of frames, the rest of the views strictly between them.

    The gap, from the first to the last frame of the stretch, is uniform over [min_gap, max_gap] as far as the scene
    and the number of views allow, and so is the place of the stretch. It counts positions within ``frames``. Its
    upper bound grows linearly from ``initial_max_gap`` (``min_gap`` if absent) to ``max_gap`` at ``warmup_steps``.
    A single context view is at either end, and the other end is then one of the frames for targets. Context is in
    ascending order. The official training draws views so, with these gaps and no warm-up.
    """

    min_gap: int = 25
    max_gap: int = 192
    initial_max_gap: Optional[int] = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_gap <= self._initial_max_gap <= self.max_gap:
            raise ValueError(
                f"frame gap {self.min_gap} to {self.max_gap}, at first to {self._initial_max_gap}; expected "
                "1 <= smallest <= largest at first <= largest (--pipeline.datamanager.frame-gap)"
            )

    @property
    def _initial_max_gap(self) -> int:
        return self.min_gap if self.initial_max_gap is None else self.initial_max_gap

    def max_gap_at(self, step: int) -> int:
        """The upper bound of the gap at a training step."""
        if step >= self.warmup_steps:
            return self.max_gap
        return self._initial_max_gap + (self.max_gap - self._initial_max_gap) * step // self.warmup_steps

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        if len(frames) <= self.min_gap:
            raise ValueError(
                f"{len(frames)} frames; expected at least {self.min_gap + 1}, the smallest frame gap plus one "
                "(--pipeline.datamanager.frame-gap); photos that are no video are for --pipeline.datamanager."
                "view-sampler random"
            )
        num_frames = self._num_frames(frames, num_context_views)
        smallest = max(self.min_gap, num_frames - 1)
        largest = max(smallest, min(self.max_gap_at(step), len(frames) - 1))
        gap = _integer(smallest, largest, generator)
        start = _integer(0, len(frames) - 1 - gap, generator)
        ends = _draw([start, start + gap], 2, generator)[:num_context_views]
        inside = [i for i in range(start, start + gap + 1) if i not in ends]
        drawn = [*ends, *_draw(inside, num_frames - len(ends), generator)]
        return self._choice(frames, sorted(drawn[:num_context_views]), drawn[num_context_views:], generator)


@dataclass(frozen=True)
class AngularGroupSampler(_TargetDraw):
    """Views around an object: one context view from each of as many arcs, targets among all the other views.

    The views, in order of azimuth (``azimuth_order``), are cut from a random one on into ``num_context_views``
    consecutive groups of nearly equal size, and each group gives one context view. So the official training on
    objects, which takes 4 of 32 views.
    """

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        self._num_frames(frames, num_context_views)
        order = azimuth_order(poses)
        start = _integer(0, len(order) - 1, generator)
        order = order[start:] + order[:start]
        bounds = [len(order) * group // num_context_views for group in range(num_context_views + 1)]
        context = [order[_integer(low, high - 1, generator)] for low, high in zip(bounds[:-1], bounds[1:])]
        return self._choice_with_any_targets(frames, context, generator)


@dataclass(frozen=True)
class FarthestPointSampler(_TargetDraw):
    """Context spread over the scene by farthest point from a random view on, targets among all the other views."""

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        self._num_frames(frames, num_context_views)
        first = _integer(0, len(frames) - 1, generator)
        return self._choice_with_any_targets(frames, farthest_point_views(poses, num_context_views, first), generator)


@dataclass(frozen=True)
class NearestViewSampler(_TargetDraw):
    """Views close together: a random view, which is the first target, and those nearest to it (``nearest_views``).

    They are dealt at random into context and the other targets. The first target is never context; with
    ``targets_include_context`` the others are drawn from all the views near it.
    """

    def __call__(
        self,
        frames: Sequence[int],
        poses: Float[Tensor, "frame 3 4"],
        num_context_views: int,
        generator: torch.Generator,
        step: int,
    ) -> FrameChoice:
        num_frames = self._num_frames(frames, num_context_views)
        anchor = _integer(0, len(frames) - 1, generator)
        # More views than asked for may have the very pose of the anchor, which then is not among the nearest.
        nearest = nearest_views(poses, poses[anchor : anchor + 1], num_frames)[0].tolist()
        near = [i for i in nearest if i != anchor][: num_frames - 1]
        dealt = _draw(near, len(near), generator)
        context, others = dealt[:num_context_views], dealt[num_context_views:]
        if self.targets_include_context:
            others = _draw(dealt, self.num_target_views - 1, generator)
        return FrameChoice(tuple(frames[i] for i in context), tuple(frames[i] for i in (anchor, *others)))


def draw_num_context_views(bounds: tuple[int, int], seed: int, step: int) -> int:
    """Number of context views of a training step, uniform over the inclusive bounds.

    It depends on nothing but seed and step, so that all scenes of the step's batch, on all ranks, have as many.
    """
    return _integer(*bounds, torch.Generator().manual_seed(mix_seed(seed, 2, step)))


def mix_seed(seed: int, stream: int, number: int) -> int:
    """One 63-bit seed from three numbers; neighbours are as unrelated as any (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + number * 0x8CB92BA72F3D8DD7 + 0x9E3779B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def _draw(positions: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """``count`` of the positions, in random order, without repetition."""
    return [positions[i] for i in torch.randperm(len(positions), generator=generator)[:count].tolist()]


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform over the inclusive bounds."""
    return int(torch.randint(low, high + 1, (), generator=generator))
