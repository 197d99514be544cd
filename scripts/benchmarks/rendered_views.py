"""What brings how much in splatfacto-lvsm: fits on validation objects with parts of it changed, and its renders.

    python -m scripts.benchmarks.rendered_views --data data/objects128 --output docs/results/rendered_views.json \\
        --context-views 8 4 2 --variants none as-it-is every-pixel --beside "nothing"

Every tenth validation object, and captures where asked for. Rows are written as they are done, and kept when called
again with the same weights and steps. Without variants renders alone are looked at: how much of their squared error is
left in the means of areas, how well confidence tells it, and how well photos that are left out are predicted.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import tyro
from nerfstudio.engine.optimizers import Optimizers
from pytorch_msssim import ssim
from rich.console import Console
from torch import Tensor
from torch.nn.functional import avg_pool2d

from elvsm_nerfstudio.compare.layout import dataparser_config
from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.metrics import image_metrics
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import processor
from elvsm_nerfstudio.method_configs import splatfacto_lvsm, splatfacto_sparse
from elvsm_nerfstudio.splatting import model
from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManager
from elvsm_nerfstudio.splatting.model import rendered_view_loss
from elvsm_nerfstudio.splatting.pipeline import SparseSplatfactoPipelineConfig
from elvsm_nerfstudio.splatting.rendered_datamanager import RenderedViewsDataManager
from elvsm_nerfstudio.splatting.rendered_steps import RATES, SHARE, trust
from elvsm_nerfstudio.splatting.rendered_views import leave_out, render_views
from elvsm_nerfstudio.splatting.rendering_weights import load_renderer
from elvsm_nerfstudio.splatting.schedules import multiply_rates
from scripts.benchmarks.captures import CAPTURES
from scripts.benchmarks.pages import write_part

console = Console()
EVERY = 10
AREAS = (2, 4, 8)
AS_IT_IS = "as-it-is"
RENDERS = {
    "psnr": "PSNR, dB",
    **{f"left_in_{area}": f"squared error that is left in means of {area} x {area} pixels" for area in AREAS},
    "confidence_and_error": "correlation of confidence and error over pixels",
    "left_out_network": "PSNR of context views left out in turn, dB: the network's",
    "left_out_mean": "of the mean of the others",
    "left_out_nearest": "of the nearest of the others",
    "left_out_colour": "of the mean colour of the others",
    "trust": "trust",
}
"""What is said of renders."""


def _as_photos(rgb: Tensor, rendered: Tensor, confidence: Tensor) -> Tensor:
    similar = ssim(*(x.permute(2, 0, 1)[None] for x in (rgb, rendered)), data_range=1.0)
    return 0.8 * (rgb - rendered).abs().mean() + 0.2 * (1 - similar)


def _sure_everywhere(rgb: Tensor, rendered: Tensor, confidence: Tensor) -> Tensor:
    return rendered_view_loss(rgb, rendered, torch.ones_like(confidence))


@dataclass(frozen=True)
class Variant:
    """A change to splatfacto-lvsm."""

    options: dict[str, Any]
    """Options of the data manager that the variant changes."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = rendered_view_loss
    renders: bool = True
    points_of_renders: bool = True
    rates: Optional[dict[str, float]] = None
    """By what splatfacto's learning rates are multiplied; as the method does if absent."""


VARIANTS = {
    "none": Variant({}, renders=False),
    AS_IT_IS: Variant({}),
    "trusted": Variant({"rendered_share": SHARE}),
    "points-of-photos": Variant({}, points_of_renders=False),
    "every-pixel": Variant({}, partial(rendered_view_loss, area=1)),
    "areas-of-2-pixels": Variant({}, partial(rendered_view_loss, area=2)),
    "as-photos": Variant({}, _as_photos),
    "sure-everywhere": Variant({}, _sure_everywhere),
    "share-0.4-throughout": Variant({"rendered_share": 0.4, "rendered_end": 1e9}),
    "share-0.8": Variant({"rendered_share": 0.8}),
    "falling-to-zero": Variant({"rendered_end": 1.0}),
    "48-views": Variant({"num_rendered_views": 48}),
    "rates-of-splatfacto": Variant({}, rates={}),
    "means-alone-faster": Variant({}, rates={"means": RATES["means"]}),
    "opacities-half": Variant({}, rates={**RATES, "opacities": 0.5}),
    "opacities-eighth": Variant({}, rates={**RATES, "opacities": 0.125}),
    "none-faster": Variant({}, renders=False, rates=RATES),
}


@dataclass(frozen=True)
class Subject:
    """What Gaussians are fitted to."""

    name: str
    data: Path
    scene: Optional[str] = None
    """Name of the scene, where ``data`` is a collection."""
    dataparser: Optional[str] = None


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
    captures: Optional[Path] = None
    """Folder of the captures that splatfacto-lvsm is compared on."""
    steps: int = 500
    """Optimisation steps of a fit."""
    num_target_views: int = 8
    """Views of an object that are scored."""
    page: Optional[Path] = None
    """Markdown page into which the tables are written."""
    part: str = "rendered-views"
    """Between which lines of the page: <!-- PART --> and its end."""
    beside: str = "unknown"
    """What else ran on the machine, for the record."""


def config_of(args: Args, subject: Subject, count: int, variant: Variant) -> SparseSplatfactoPipelineConfig:
    """splatfacto-lvsm on a subject, changed; splatfacto-sparse where nothing is rendered."""
    config = deepcopy((splatfacto_lvsm if variant.renders else splatfacto_sparse).config.pipeline)
    options = {
        "data": subject.data,
        "dataparser": dataparser_config(subject.dataparser),
        "image_size": (64, 64),
        "num_context_views": count,
        "scene": subject.scene,
        "eval_num_target_views": args.num_target_views,
        **({"weights": args.weights, **variant.options} if variant.renders else {}),
    }
    config.datamanager = replace(config.datamanager, **options)
    return config


def fit(args: Args, subject: Subject, count: int, variant: Variant) -> dict[str, Any]:
    """Fits Gaussians and scores the targets."""
    config, start = config_of(args, subject, count, variant), time.process_time()
    with ExitStack() as patches:
        if not variant.points_of_renders:
            name = "_rendered_for_points"
            patches.enter_context(mock.patch.object(RenderedViewsDataManager, name, lambda self: None))
        pipeline = config.setup(device=device_to_use(), test_mode="val", world_size=1, local_rank=0)
    manager: ContextFramesDataManager = pipeline.datamanager
    manager.plan(args.steps)
    optimizers = Optimizers(deepcopy(splatfacto_lvsm.config.optimizers), pipeline.get_param_groups())
    multiply_rates(optimizers, manager.rates() if variant.rates is None else variant.rates)
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
    record = manager.record() | {"process_seconds": round(time.process_time() - start, 1)}
    pipeline.eval()
    shown = manager.shown_scene()
    rows = []
    for index, truth in enumerate(shown.views.target.rgb[0]):
        rgb = pipeline.model.get_outputs_for_camera(shown.cameras[index : index + 1])["rgb"]
        rows.append(image_metrics(rgb, truth))
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]} | record


@torch.no_grad()
def look(args: Args, subject: Subject, count: int) -> dict[str, float]:
    """What is wrong with renders of the targets, and whether confidence and trust tell."""
    renderer = load_renderer(args.weights, device_to_use())
    network, config = renderer.network, config_of(args, subject, count, VARIANTS["none"]).datamanager
    config = replace(config, image_size=renderer.image_size or config.image_size)
    scene = config.setup(device=device_to_use(), test_mode="test").shown_scene()
    rendered = render_views(network, scene.views.context, scene.cameras)
    error = rendered.images - scene.views.target.rgb[0]
    squared, channels_first = error.square().mean(), error.permute(0, 3, 1, 2)
    left = {f"left_in_{area}": avg_pool2d(channels_first, area).square().mean() / squared for area in AREAS}
    pairs = torch.stack([rendered.confidence[..., 0].flatten(), error.abs().mean(dim=-1).flatten()])
    found = {"psnr": -10 * squared.log10(), **left, "confidence_and_error": torch.corrcoef(pairs)[0, 1]}
    left_out = leave_out(network, scene.views.context)
    if left_out is not None:
        found |= {f"left_out_{name}": value for name, value in asdict(left_out).items()}
    found["trust"] = trust(left_out and left_out.gain(count), count)
    return {name: round(float(value), 4) for name, value in found.items()}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Fits to objects and to each capture, then renders of objects."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kind = "renders" if row["variant"] == "renders" else "fits"
        name = row["scene"] if row["scene"] in CAPTURES else "objects"
        groups.setdefault(f"{kind} of {name}", []).append(row)
    parts = []
    for title, listed in sorted(groups.items()):
        counts = sorted({row["context_views"] for row in listed})
        lines = _renders(listed, counts) if title.startswith("renders") else _fits(listed, counts)
        head = _row([title, *(f"{count} views" for count in counts)])
        parts.append("\n".join([head, _row(["---"] * (len(counts) + 1)), *lines]))
    return "\n\n".join(parts)


def _fits(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[str]:
    """PSNR, LPIPS and number of scenes of splatfacto-lvsm as it is; what others differ by on scenes that both have."""
    scores = {(row["variant"], row["context_views"], row["scene"]): row for row in rows}
    lines = []
    for variant in VARIANTS:
        cells = []
        for count in counts:
            scenes = [scene for name, number, scene in scores if (name, number) == (variant, count)]
            both = [scene for scene in scenes if (AS_IT_IS, count, scene) in scores]
            pairs = [(scores[variant, count, scene], scores[AS_IT_IS, count, scene]) for scene in both]
            cells.append(_cell(pairs, variant == AS_IT_IS))
        if any(cell != "-" for cell in cells):
            lines.append(_row([variant, *cells]))
    return lines


def _cell(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], absolute: bool) -> str:
    if not pairs:
        return "-"
    psnr, lpips = (
        statistics.fmean(
            one.get(metric, math.nan) - (0 if absolute else other.get(metric, math.nan)) for one, other in pairs
        )
        for metric in ("psnr", "lpips_vgg")
    )
    return f"{psnr:.2f} dB, {lpips:.3f} ({len(pairs)})" if absolute else f"{psnr:+.2f} dB, {lpips:+.3f} ({len(pairs)})"


def _renders(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[str]:
    lines = []
    for name, title in RENDERS.items():
        by_count = [[row[name] for row in rows if row["context_views"] == count and name in row] for count in counts]
        lines.append(_row([title, *(f"{statistics.fmean(found):.2f}" if found else "-" for found in by_count)]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rows_of(output: Path, of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call with the same weights and steps; none where it had others."""
    content = json.loads(output.read_text()) if output.exists() else {}
    return content["rows"] if of.items() <= content.items() else []


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    val = SceneCollection.open(args.data, dataparser_config(None)).split("val")
    subjects = [Subject(entry.name, args.data, entry.name) for entry in val[::EVERY][: args.num_scenes]]
    if args.captures is not None:
        subjects += [Subject(name, args.captures / name, None, parser) for name, parser in CAPTURES.items()]
    fingerprint = load_renderer(args.weights, torch.device("cpu")).network.fingerprint()
    of = {"weights": args.weights, "fingerprint": fingerprint, "steps": args.steps}
    rows = rows_of(args.output, of)
    done = {(row["scene"], row["context_views"], row["variant"]) for row in rows}
    for count in args.context_views:
        for subject in subjects:
            for variant in args.variants or ("renders",):
                if (subject.name, count, variant) in done:
                    continue
                if args.variants:
                    found = fit(args, subject, count, VARIANTS[variant])
                else:
                    found = look(args, subject, count)
                rows.append({"scene": subject.name, "context_views": count, "variant": variant, **found})
                console.print(
                    f"{subject.name}, {count} views, {variant}: {found['psnr']:.2f} dB", markup=False, soft_wrap=True
                )
                about = {"processor": processor(device_to_use()), "code": code_version(), "beside": args.beside}
                write_json(args.output, {**about, **of, "rows": rows})
    found = tables(rows)
    if args.page is not None:
        write_part(args.page, args.part, found)
    print(found)


if __name__ == "__main__":
    main()
