"""The frames that all compared methods get: chosen once, written down, and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from elvsm_nerfstudio.data.evaluation_views import EvaluationIndex, ViewRule, choose_evaluation_views
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.view_samplers import FrameChoice
from elvsm_nerfstudio.evaluation.report import write_json

Split = Mapping[str, FrameChoice]
"""Context and target frames of each scene; the first N context frames are those of a comparison with N views."""


def choose_split(scenes: Sequence[Scene], num_context_views: int, num_target_views: int) -> Split:
    """Context frames farthest point first, and targets spread evenly over the held-out frames that are not context.

    Raises:
        DataError: naming a scene that has too few frames.
    """
    rule = ViewRule(num_context_views, num_target_views, source="spread")
    for scene in scenes:
        # Where a scene is held out as a whole, its frames serve as both.
        held_out = set(scene.eval_frames) - set(scene.train_frames)
        available, needed = len(scene.train_frames), num_context_views + (0 if held_out else 1)
        if available < needed or not scene.eval_frames:
            raise DataError(
                f"--context-views {num_context_views}: scene {scene.name} has {available} frames for context and "
                f"{len(held_out)} held out as targets; expected at least {needed} and, where targets are held out, 1 "
                "of those. Ask for fewer views, or give the scene more frames"
            )
    return {scene.name: choose_evaluation_views(scene, None, rule) for scene in scenes}


def read_split(path: Path, scenes: Sequence[Scene], num_context_views: int) -> Split:
    """The scenes' frames from a file in the field's format, checked against the scenes.

    Raises:
        DataError: naming a scene that the file has no, too few, overlapping or impossible frames for.
    """
    index = EvaluationIndex.read(path)
    missing = [scene.name for scene in scenes if scene.name not in index.choices]
    if missing:
        raise DataError(
            f"{path} has no frames for {_listed(missing)}; expected some for every compared scene. Found are "
            f"{_listed(index.choices)}; compare on some scenes alone with --scenes"
        )
    for scene in scenes:
        found = len(index.choices[scene.name].context)
        if found < num_context_views:
            raise DataError(
                f"{path}, scene {scene.name}: {found} context frames; expected the {num_context_views} of "
                "--context-views. A split is never changed once it is there: ask for fewer views, or choose another "
                "--output"
            )
        choose_evaluation_views(scene, index, ViewRule(found, source="index"))
    return {scene.name: index.choices[scene.name] for scene in scenes}


def write_split(path: Path, split: Split, num_context_views: int) -> None:
    """Writes a split with the first context frames alone, in the field's format."""
    frames = {
        name: {"context": list(choice.context[:num_context_views]), "target": list(choice.target)}
        for name, choice in split.items()
    }
    write_json(path, frames)


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
