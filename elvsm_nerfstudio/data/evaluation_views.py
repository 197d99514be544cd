"""Which views are context and which are scored, in each evaluated scene."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.names import check_name
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneEntry
from elvsm_nerfstudio.data.view_geometry import farthest_point_views
from elvsm_nerfstudio.data.view_samplers import FrameChoice


@dataclass(frozen=True)
class ViewRule:
    """How evaluation chooses the views of a scene. Depends on the scene's cameras alone: nothing is drawn."""

    num_context_views: int
    """Context views; an index with "or" fixes its own number."""
    num_target_views: Optional[int] = None
    """Targets where they do not come from an index, spread evenly over the held-out frames that are not context; all
    of those if absent."""
    source: Literal["index", "index or spread", "index or first", "spread"] = "index or spread"
    """Where the views come from: the index, which must list the scene; the cameras, context spread by farthest point;
    or the frames' order, the first ones being context."""
    num_frames: Optional[int] = None
    """Frames to choose from, sampled uniformly over the scene; all of them if absent or if there are fewer."""
    frame_gap: Optional[int] = None
    """Chooses from the middle stretch of so many frames alone (or the whole scene, if that is shorter): context spread
    evenly from end to end, targets between. As training with a bounded gap sees a video."""
    targets_may_be_context: bool = False
    """Whether an index may name a context frame as target, as pixelSplat's for RealEstate10K does."""
    allow_fewer: bool = False
    """Where nothing is scored: takes held-out frames and then fewer frames as context where a scene has no more, and
    shows context frames as targets where it has no others."""
    context_frames: Optional[tuple[int, ...]] = None
    """Frames that are context, given one by one instead of by any of the above."""


@dataclass(frozen=True)
class EvaluationIndex:
    """The field's index: scene name -> context and target frames, numbered in order of the file names."""

    path: Path
    choices: Mapping[str, FrameChoice]
    num_null: int
    """Scenes that the index names without giving views for them."""

    @staticmethod
    def read(path: Path) -> EvaluationIndex:
        """Reads pixelSplat's format, ``{"scene": {"context": [..], "target": [..]} | null}``.

        Raises:
            DataError: for a file that is not of this form, or has views for no scene.
        """
        try:
            raw = json.loads(path.read_text("utf8"))
            choices = {
                name: FrameChoice(tuple(map(int, entry["context"])), tuple(map(int, entry["target"])))
                for name, entry in raw.items()
                if entry is not None
            }
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"evaluation index {path} cannot be read ({type(error).__name__}: {error}); expected "
                '{"scene": {"context": [frame, ...], "target": [frame, ...]}, ...}'
            ) from error
        if not choices:
            raise DataError(f"evaluation index {path} has views for no scene")
        for name in choices:
            check_name(name, f"evaluation index {path}")
        return EvaluationIndex(path, choices, num_null=len(raw) - len(choices))

    def missing(self, entries: Sequence[SceneEntry]) -> list[str]:
        """The scenes that the index has views for and that are not among the entries."""
        return sorted(set(self.choices) - {entry.name for entry in entries})

    def listed(self, entries: Sequence[SceneEntry], may_miss_scenes: bool = False) -> list[SceneEntry]:
        """The entries that the index has views for.

        Args:
            may_miss_scenes: whether the index may have views for other scenes too: those who have a part of a data set
                evaluate that.

        Raises:
            DataError: naming scenes of the index that are not among the entries, or if none of them is.
        """
        listed, missing = [entry for entry in entries if entry.name in self.choices], self.missing(entries)
        if missing and not (may_miss_scenes and listed):
            raise DataError(
                f"evaluation index {self.path} names {len(missing)} scenes that are not in the evaluated split of the "
                f"data: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. It has views for {len(listed)} "
                "that are; to evaluate those alone, give --pipeline.datamanager.index-may-miss-scenes True, or `elvsm "
                "run --index-may-miss-scenes`"
            )
        return listed

    def choose(self, scene: Scene, num_context_views: Optional[int] = None) -> FrameChoice:
        """The listed views of a scene, with as many context views as wanted or else as listed.

        More context views than listed are spread evenly between the first and the last of the listed ones (upstream
        fact); of fewer the first are taken.

        Raises:
            DataError: for frames that the scene does not have.
        """
        choice = self.choices[scene.name]
        where = f"evaluation index {self.path}, scene {scene.name}"
        for frame in (*choice.context, *choice.target):
            if not 0 <= frame < scene.num_frames:
                raise DataError(f"{where}: frame {frame}; the scene has frames 0..{scene.num_frames - 1}")
        count = len(choice.context) if num_context_views is None else num_context_views
        context = choice.context[:count]
        if count > len(choice.context) and choice.context:
            ends = min(choice.context), max(choice.context)
            context = tuple(torch.linspace(*ends, count, dtype=torch.float64).round().long().tolist())
            if len(set(context)) < count:
                raise DataError(f"{where}: there are not {count} frames from {ends[0]} to {ends[1]}")
        return FrameChoice(context, choice.target)


def choose_evaluation_views(scene: Scene, index: Optional[EvaluationIndex], rule: ViewRule) -> FrameChoice:
    """Context and targets of a scene.

    Context frames come in an order in which any number of the first ones is a sensible choice too: as listed, or
    farthest point first.

    Raises:
        DataError: for frames that the scene does not have, too few of them, or targets that are context.
    """
    listed = index is not None and scene.name in index.choices
    if rule.source == "index" and not listed:
        raise DataError(
            f"scene {scene.name} has no views in an evaluation index; name one with "
            "--pipeline.datamanager.evaluation-index"
        )
    if rule.context_frames is None and listed and rule.source != "spread":
        where = f"evaluation index {index.path}, scene {scene.name}"
        choice = index.choose(scene, rule.num_context_views if rule.source == "index" else None)
        if rule.source == "index or first" and len(choice.context) != rule.num_context_views:
            raise DataError(f"{where}: {len(choice.context)} context frames; expected {rule.num_context_views}")
        _check(choice, where, rule.targets_may_be_context)
        return choice
    return _spread_views(scene, rule)


def _spread_views(scene: Scene, rule: ViewRule) -> FrameChoice:
    usable = set(range(scene.num_frames))
    if rule.num_frames is not None and rule.num_frames < scene.num_frames:
        usable = set(torch.linspace(0, scene.num_frames - 1, rule.num_frames).round().long().tolist())
    frames = [frame for frame in scene.train_frames if frame in usable]
    if rule.allow_fewer and len(frames) < rule.num_context_views:
        frames = sorted(usable)
    if rule.frame_gap is not None:
        gap = min(rule.frame_gap, len(frames) - 1)
        frames = frames[(len(frames) - 1 - gap) // 2 :][: gap + 1]
        usable = set(range(frames[0], frames[-1] + 1))
    if rule.context_frames is not None:
        unknown = [frame for frame in rule.context_frames if not 0 <= frame < scene.num_frames]
        if unknown:
            raise DataError(
                f"--pipeline.datamanager.context-frames {' '.join(map(str, unknown))}: scene {scene.name} has frames "
                f"0..{scene.num_frames - 1}"
            )
        context = rule.context_frames
    elif rule.frame_gap is not None:
        positions = torch.linspace(0, len(frames) - 1, min(rule.num_context_views, len(frames)))
        context = tuple(frames[i] for i in positions.round().long().tolist())
    elif rule.source == "index or first":
        context = tuple(frames[: rule.num_context_views])
    else:
        poses = scene.cameras.camera_to_worlds[frames]
        context = tuple(frames[i] for i in farthest_point_views(poses, rule.num_context_views))
    rest = [frame for frame in scene.eval_frames if frame in usable and frame not in context]
    if rule.allow_fewer:
        rest = rest or sorted(usable - set(context)) or list(context)
    elif len(context) < rule.num_context_views or not rest:
        raise DataError(f"scene {scene.name} {_shortage(scene, len(frames), rule.num_context_views, len(rest))}")
    positions = torch.linspace(0, len(rest) - 1, min(rule.num_target_views or len(rest), len(rest)))
    choice = FrameChoice(context, tuple(rest[i] for i in positions.round().long().tolist()))
    _check(choice, f"scene {scene.name}", allow_overlap=rule.allow_fewer)
    return choice


def _shortage(scene: Scene, num_frames: int, num_context_views: int, num_others: int) -> str:
    """What a scene is short of, and what to do about it."""
    held_out = set(scene.eval_frames) - set(scene.train_frames)
    shortages = []
    if num_frames < num_context_views or scene.eval_frames and not held_out:
        needed = num_context_views + (0 if held_out else 1)
        targets = "" if held_out else f" and {num_others} others for targets"
        shortages.append(
            f"has {num_frames} frames for context{targets}; expected at least {needed}. Ask for fewer context views "
            "with --pipeline.datamanager.num-context-views, or for a run that exists with `elvsm run --from-run CONFIG "
            "--num-context-views N`"
        )
    if not scene.eval_frames:
        shortages.append(
            "has no frame held out as target: hold some out with the dataparser, as in `ns-train METHOD --data DATA "
            "nerfstudio-data --eval-mode interval`, or for a run that exists with `elvsm run --from-run CONFIG "
            "--train-split-fraction 0.8`; or name some in an evaluation index (--evaluation-index FILE)"
        )
    return "; it also ".join(shortages) or "has no frame left that is not context"


def _check(choice: FrameChoice, where: str, allow_overlap: bool) -> None:
    both = sorted(set(choice.context) & set(choice.target))
    if not choice.context or not choice.target:
        raise DataError(f"{where}: no context or no target frames; expected both")
    if both and not allow_overlap:
        raise DataError(
            f"{where}: frames {both} are context and target; expected disjoint lists, unless a "
            "protocol (--pipeline.protocol) says otherwise"
        )
