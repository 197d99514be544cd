"""Scores the trainings of a study alike: the same scenes, context views and targets, in the study's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.data.datamanager import EvaluationScene
from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.metrics import lpips, psnr, ssim
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json
from elvsm_nerfstudio.evaluation.results import averages
from elvsm_nerfstudio.nn.network import autocast_dtype
from elvsm_nerfstudio.nn.weights import load_weights
from elvsm_nerfstudio.runs import read_config
from elvsm_nerfstudio.training.checkpoints import list_checkpoints
from elvsm_nerfstudio.views import Views
from scripts.study.layout import Layout, Settings, Split, read_json
from scripts.study.training import core_share, seconds_after, steps_of
from scripts.study.variants import Variant

CURVE_VIEWS = 4
"""Context views of curves, of the table's main columns and of the pictures."""
NUM_PICTURES = 8
"""Scenes with a picture."""

Render = Callable[[Views, Views], Float[Tensor, "scene target height width 3"]]
"""Renders targets from context views: a network or a baseline."""
Measure = Callable[[Tensor, Tensor], dict[str, float]]
"""Metrics of a prediction and the truth."""


class Scorer:
    """The scenes of each split, read once.

    Context views are spread by farthest point, so that fewer are the first of more; targets are among the other
    views, the same for each number of context views. Each number is encoded in the canonical frame of its own cameras,
    as in training; in one frame, appending views to a memory gives the same renders.
    """

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, device_to_use()
        self._scenes: dict[Split, list[EvaluationScene]] = {}

    def scenes(self, split: Split, config: Path) -> list[EvaluationScene]:
        """All scenes of a split, with images as a run has them.

        Raises:
            DataError: for scenes with too few views.
        """
        if split not in self._scenes:
            options = replace(read_config(config, "--output").pipeline.datamanager, scene=None, num_context_views=1)
            datamanager = options.setup(device=str(self.device), test_mode=split)
            rule = view_rule(self.settings)
            self._scenes[split] = [datamanager.evaluation_scene(entry, rule) for entry in datamanager.eval_entries]
        return self._scenes[split]

    def network(self, config: Path, checkpoint: Path) -> Render:
        """A run's network as it renders, with the weights of one of its checkpoints."""
        model = read_config(config, "--output").pipeline.model
        network = model.network.build()
        load_weights(network, checkpoint, network.config)
        network.autocast_dtype = autocast_dtype(model.precision, self.device)
        return network.to(self.device).eval()

    # Pieces, each kept in the study's folder

    def curve(self, layout: Layout, variant: Variant, seed: int) -> list[dict[str, float]]:
        """Validation PSNR at every checkpoint of a training; then all but the last are deleted."""
        path, run = layout.curve(variant.name, seed), layout.run(variant, seed)
        checkpoints = list_checkpoints(run / "nerfstudio_models")
        points = read_json(path)
        if points is None:
            config = run / "config.yml"
            scenes = self.scenes("val", config)
            training = read_json(layout.training(variant.name, seed))
            share = core_share(training["sessions"], self.settings.threads)
            steps = [steps_of(checkpoint) for checkpoint in checkpoints]
            options = read_json(layout.plan(variant.name))["options"]
            points = []
            for count, checkpoint, seconds in zip(steps, checkpoints, seconds_after(run, steps, options)):
                rows = score(self.network(config, checkpoint), scenes, [CURVE_VIEWS], only_psnr)
                scores = averages(rows, ["psnr"], get_std=True)
                points.append({"step": count, "minutes": seconds * share / 60, **scores})
            write_json(path, points)
        for checkpoint in checkpoints[:-1]:
            checkpoint.unlink()
        return points

    def scores(self, layout: Layout, variant: Variant, seed: int, split: Split) -> dict[str, Any]:
        """Averages of a training's last weights by number of context views."""
        path, run = layout.scores(variant.name, seed, split), layout.run(variant, seed)
        if not path.exists():
            config = run / "config.yml"
            scenes = self.scenes(split, config)
            network = self.network(config, list_checkpoints(run / "nerfstudio_models")[-1])
            if split == "val":
                write_image(layout.pictures(variant.name, seed), sheet([pictures(network, scenes)]))
            write_json(path, {"images": score(network, scenes, self.settings.context_views, all_metrics)})
        return by_views(read_json(path)["images"])

    def baselines(self, layout: Layout, split: Split, config: Path) -> dict[str, dict[str, Any]]:
        """Averages of what needs no learning, each by number of context views."""
        path = layout.baselines(split)
        if not path.exists():
            scenes, counts = self.scenes(split, config), self.settings.context_views
            if split == "val":
                shown = shown_scenes(scenes)
                context = [[scene.views.context.rgb[0, view] for scene in shown] for view in range(CURVE_VIEWS)]
                truth = [scene.views.target.rgb[0, 0] for scene in shown]
                renders = [pictures(baseline, scenes) for baseline in BASELINES.values()]
                write_image(layout.baseline_pictures, sheet([*context, truth, *renders]))
            write_json(
                path, {name: score(baseline, scenes, counts, all_metrics) for name, baseline in BASELINES.items()}
            )
        return {name: by_views(rows) for name, rows in read_json(path).items()}


def view_rule(settings: Settings) -> ViewRule:
    """Which views are context and which are targets."""
    return ViewRule(max(settings.context_views), settings.num_target_views, source="spread")


def shown_scenes(scenes: Sequence[EvaluationScene]) -> list[EvaluationScene]:
    """The scenes with a picture, spread over all."""
    positions = torch.linspace(0, len(scenes) - 1, min(NUM_PICTURES, len(scenes))).round().long().tolist()
    return [scenes[position] for position in positions]


@torch.no_grad()
def pictures(render: Render, scenes: Sequence[EvaluationScene]) -> list[Float[Tensor, "height width 3"]]:
    """The first target of each shown scene."""
    return [
        render(scene.views.context.select(range(CURVE_VIEWS)), scene.views.target.select([0]))[0, 0]
        for scene in shown_scenes(scenes)
    ]


@torch.no_grad()
def score(
    render: Render, scenes: Sequence[EvaluationScene], counts: Sequence[int], measure: Measure
) -> list[dict[str, Any]]:
    """A row for each target of each scene from each number of context views, the first ones."""
    rows = []
    for scene in scenes:
        for count in counts:
            renders = render(scene.views.context.select(range(count)), scene.views.target)[0]
            for name, picture, truth in zip(scene.target_names, renders, scene.views.target.rgb[0]):
                about = {"scene": scene.name, "image": name, "context_views": count}
                rows.append({**about, **measure(picture, truth)})
    return rows


def only_psnr(prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> dict[str, float]:
    """``psnr``."""
    return {"psnr": float(psnr(prediction, truth))}


def all_metrics(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]
) -> dict[str, float]:
    """``psnr``, ``ssim`` and, where it can be had, ``lpips_vgg``: what the paper reports."""
    perceptual = lpips(prediction, truth, "vgg")
    metrics = {**only_psnr(prediction, truth), "ssim": ssim(prediction, truth)}
    return metrics if perceptual is None else {**metrics, "lpips_vgg": perceptual}


def by_views(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Averages and spread over images for each number of context views."""
    metrics = [name for name in rows[0] if name not in ("scene", "image", "context_views")]
    counts = dict.fromkeys(row["context_views"] for row in rows)
    groups = {count: [row for row in rows if row["context_views"] == count] for count in counts}
    return {str(count): averages(group, metrics, get_std=True) for count, group in groups.items()}
