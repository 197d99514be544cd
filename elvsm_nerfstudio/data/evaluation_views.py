"""Which views are context and which are scored, in each evaluated scene."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.scenes import Scene, SceneEntry
from elvsm_nerfstudio.data.view_samplers import FrameChoice, farthest_point_views


@dataclass(frozen=True)
class EvaluationIndex:
    """The field's index: scene name -> context and target frames, numbered in order of the file names."""

    path: Path
    choices: Mapping[str, FrameChoice]
    num_null: int
    """Scenes that the index names without giving views for them."""

    @staticmethod
    def read(path: Path) -> EvaluationIndex:
        """Reads ``{"scene": {"context": [..], "target": [..]} | null}``.

        Raises:
            DataError: for a file that is not of this form, or an entry whose context and targets overlap.
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
        for name, choice in choices.items():
            _check_disjoint(choice, f"evaluation index {path}, scene {name}")
        return EvaluationIndex(path, choices, num_null=len(raw) - len(choices))

    def listed(self, entries: Sequence[SceneEntry]) -> list[SceneEntry]:
        """The entries that the index has views for.

        Raises:
            DataError: naming scenes of the index that are not among the entries.
        """
        unknown = sorted(set(self.choices) - {entry.name for entry in entries})
        if unknown:
            raise DataError(
                f"evaluation index {self.path} names {len(unknown)} scenes that are not in the evaluated split of the "
                f"data: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
            )
        return [entry for entry in entries if entry.name in self.choices]


def choose_evaluation_views(
    scene: Scene, index: Optional[EvaluationIndex], num_context_views: int, num_target_views: Optional[int]
) -> FrameChoice:
    """Context and targets of a scene: from the index where it lists the scene, else spread by the cameras.

    Without an index, context views are spread over the scene by farthest point, targets evenly over the held-out
    frames that are not context (all of them where no number is given).

    Raises:
        DataError: for frames that the scene does not have, or too few of them.
    """
    if index is not None and scene.name in index.choices:
        choice = index.choices[scene.name]
        for frame in (*choice.context, *choice.target):
            if not 0 <= frame < scene.num_frames:
                raise DataError(
                    f"evaluation index {index.path}, scene {scene.name}: frame {frame}; the scene has frames "
                    f"0..{scene.num_frames - 1}"
                )
        return choice
    poses = scene.cameras.camera_to_worlds[list(scene.train_frames)]
    context = tuple(scene.train_frames[i] for i in farthest_point_views(poses, num_context_views))
    rest = [frame for frame in scene.eval_frames if frame not in context]
    if len(context) < num_context_views or not rest:
        raise DataError(
            f"scene {scene.name} has {len(scene.train_frames)} frames for context and {len(rest)} others for targets; "
            f"expected at least {num_context_views} and 1. Ask for fewer with "
            "--pipeline.datamanager.num-context-views, or hold out more frames of a single scene with its "
            "dataparser's --train-split-fraction or --eval-mode"
        )
    positions = torch.linspace(0, len(rest) - 1, min(num_target_views or len(rest), len(rest))).round().long().tolist()
    choice = FrameChoice(context, tuple(rest[i] for i in positions))
    _check_disjoint(choice, f"scene {scene.name}")
    return choice


def _check_disjoint(choice: FrameChoice, where: str) -> None:
    both = sorted(set(choice.context) & set(choice.target))
    if both or not choice.context or not choice.target:
        found = f"frames {both} are context and target" if both else "no context or no target frames"
        raise DataError(f"{where}: {found}; expected disjoint, non-empty lists")
