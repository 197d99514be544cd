"""What brings how much in splatfacto-lvsm: fits on validation objects with parts of it changed, and its renders.

    python -m scripts.benchmarks.rendered_views --data data/objects64 --output docs/results/rendered_views.json \\
        --context-views 8 4 2 --variants none as-it-is every-pixel --beside "nothing"

Every tenth validation object. Rows are written as they are done, and kept when called again. Without variants renders
alone are looked at: how much of their squared error is left in the means of areas, and how well confidence tells it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import tyro
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import Optimizers
from rich.console import Console
from torch import Tensor
from torch.nn.functional import avg_pool2d

from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.metrics import image_metrics
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import processor
from elvsm_nerfstudio.method_configs.splatfacto_lvsm import splatfacto_lvsm
from elvsm_nerfstudio.splatting import model
from elvsm_nerfstudio.splatting.model import rendered_view_loss
from elvsm_nerfstudio.splatting.pipeline import SparseSplatfactoPipelineConfig
from elvsm_nerfstudio.splatting.rendered_datamanager import RenderedViewsDataManager
from elvsm_nerfstudio.splatting.rendered_views import render_views
from elvsm_nerfstudio.splatting.rendering_weights import load_renderer

console = Console()
EVERY = 10
AREAS = (2, 4, 8)


def _every_pixel(rgb: Tensor, rendered: Tensor, confidence: Tensor) -> Tensor:
    return ((rgb - rendered) * confidence).abs().mean()


def _sure_everywhere(rgb: Tensor, rendered: Tensor, confidence: Tensor) -> Tensor:
    return rendered_view_loss(rgb, rendered, torch.ones_like(confidence))


@dataclass(frozen=True)
class Variant:
    """A change to splatfacto-lvsm."""

    options: dict[str, Any]
    """Options of the data manager that the variant changes."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = rendered_view_loss
    renders: bool = True


VARIANTS = {
    "none": Variant({}, renders=False),
    "as-it-is": Variant({}),
    "every-pixel": Variant({}, _every_pixel),
    "sure-everywhere": Variant({}, _sure_everywhere),
    "share-0.6": Variant({"rendered_share": 0.6}),
    "falling-to-zero": Variant({"rendered_share": 0.6, "rendered_end": 1.0}),
    "48-views": Variant({"num_rendered_views": 48}),
}


@dataclass
class Args:
    """Options."""

    data: Path
    """Collection of objects."""
    output: Path
    """JSON."""
    context_views: tuple[int, ...] = (2, 4, 8)
    """Numbers of context views."""
    variants: tuple[str, ...] = ()
    """What is fitted: 'none' (no renders, splatfacto-sparse), 'as-it-is', and changes to that."""
    weights: str = "pretrained"
    """Weights of the network that renders."""
    num_scenes: Optional[int] = None
    """Only so many of the objects."""
    steps: int = 500
    """Of a fit."""
    num_target_views: int = 8
    """Views of an object that are scored."""
    beside: str = "unknown"
    """What else ran on the machine, for the record."""


def config_of(args: Args, scene: str, count: int, variant: Variant) -> SparseSplatfactoPipelineConfig:
    """splatfacto-lvsm on an object, changed."""
    config = deepcopy(splatfacto_lvsm.config.pipeline)
    options = {
        "data": args.data,
        "image_size": (64, 64),
        "num_context_views": count,
        "scene": scene,
        "eval_num_target_views": args.num_target_views,
        "weights": args.weights,
        **variant.options,
    }
    config.datamanager = replace(config.datamanager, **options)
    return config


def fit(args: Args, scene: str, count: int, variant: Variant) -> dict[str, Any]:
    """Fits an object and scores its targets."""
    config = config_of(args, scene, count, variant)
    pipeline = config.setup(device=device_to_use(), test_mode="val", world_size=1, local_rank=0)
    manager: RenderedViewsDataManager = pipeline.datamanager
    if variant.renders:
        manager.plan(args.steps)
    optimizers = Optimizers(deepcopy(splatfacto_lvsm.config.optimizers), pipeline.get_param_groups())
    pipeline.train()
    with mock.patch.object(model, "rendered_view_loss", variant.loss):
        for step in range(args.steps):
            pipeline.model.step_cb(optimizers, step)
            optimizers.zero_grad_all()
            camera, batch = manager.next_train(step)
            sum(pipeline.model.get_loss_dict(pipeline.model(camera), batch).values()).backward()
            optimizers.optimizer_step_all()
            optimizers.scheduler_step_all(step)
            pipeline.model.step_post_backward(step)
    pipeline.eval()
    shown = manager.shown_scene()
    rows = []
    for index, truth in enumerate(shown.views.target.rgb[0]):
        rgb = pipeline.model.get_outputs_for_camera(shown.cameras[index : index + 1])["rgb"]
        rows.append(image_metrics(rgb, truth))
    scores = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return {**scores, "rendered_views": manager.record()["rendered_views"]}


@torch.no_grad()
def look(args: Args, scene: str, count: int) -> dict[str, float]:
    """What is wrong with renders of the targets, and whether confidence tells."""
    config = config_of(args, scene, count, VARIANTS["none"]).datamanager
    scene = config.setup(device=device_to_use(), test_mode="test").shown_scene()
    network = load_renderer(args.weights, device_to_use()).network
    rendered = render_views(network, scene.views.context, scene.cameras)
    error = rendered.images - scene.views.target.rgb[0]
    squared, channels_first = error.square().mean(), error.permute(0, 3, 1, 2)
    left = {f"left_in_{area}": avg_pool2d(channels_first, area).square().mean() / squared for area in AREAS}
    pairs = torch.stack([rendered.confidence[..., 0].flatten(), error.abs().mean(dim=-1).flatten()])
    found = {"psnr": -10 * squared.log10(), **left, "confidence_and_error": torch.corrcoef(pairs)[0, 1]}
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    val = SceneCollection.open(args.data, NerfstudioDataParserConfig()).split("val")
    names = [entry.name for entry in val][::EVERY][: args.num_scenes]
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    done = {(row["scene"], row["context_views"], row["variant"]) for row in rows}
    for count in args.context_views:
        for scene in names:
            for variant in args.variants or ("renders",):
                if (scene, count, variant) in done:
                    continue
                if args.variants:
                    found = fit(args, scene, count, VARIANTS[variant])
                else:
                    found = look(args, scene, count)
                rows.append({"scene": scene, "context_views": count, "variant": variant, **found})
                console.print(f"{scene}, {count} views, {variant}: {found['psnr']:.2f} dB")
                about = {"processor": processor(device_to_use()), "code": code_version(), "beside": args.beside}
                write_json(args.output, {**about, "weights": args.weights, "steps": args.steps, "rows": rows})
    for count in args.context_views:
        for variant in dict.fromkeys(row["variant"] for row in rows):
            scores = [row["psnr"] for row in rows if (row["context_views"], row["variant"]) == (count, variant)]
            if scores:
                print(f"| {count} | {variant} | {statistics.fmean(scores):.2f} | {len(scores)} |")


if __name__ == "__main__":
    main()
