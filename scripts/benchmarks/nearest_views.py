"""Measures what is lost and saved when each target attends to its k nearest context views only: PSNR and time.

Scenes have the context of the protocol 'wide-range': as many views as asked for, spread by farthest point.

    python -m scripts.benchmarks.nearest_views --run outputs/NAME/METHOD/TIMESTAMP/config.yml --output DIR
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import tyro
from nerfstudio.utils.eval_utils import eval_setup
from rich.console import Console
from rich.progress import track

from elvsm_nerfstudio.data.datamanager import EvaluationScene
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version, spread

console = Console()


@dataclass
class Args:
    """Options."""

    run: Path
    """The run's config.yml."""
    output: Path = Path("nearest_views")
    """Folder for nearest_views.json, .md and .png."""
    context_views: int = 12
    """Context views of every scene."""
    nearest: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12)
    """Numbers of nearest views to compare."""
    beside: str = "nothing"
    """What else ran on the machine; goes into the result."""


@dataclass
class Rendered:
    """One target, rendered from its k nearest views."""

    psnr: float
    ms: float


def measure(args: Args) -> dict[str, Any]:
    """PSNR and time of one render for every k, over all scenes of the evaluated split."""
    _, pipeline, checkpoint, _ = eval_setup(args.run)
    model, data = pipeline.model, pipeline.datamanager
    rule = replace(find_protocol("wide-range").views, num_context_views=args.context_views)

    def render(scene: EvaluationScene, k: int) -> list[Rendered]:
        model.config.nearest_views = k
        rendered = []
        for index in range(len(scene.target_names)):
            start = time.perf_counter()
            rgb = model.get_outputs_for_camera(scene.cameras[index : index + 1])["rgb"].cpu()
            ms = (time.perf_counter() - start) * 1e3
            rendered.append(Rendered(float(psnr(rgb, scene.views.target.rgb[0, index].cpu())), ms))
        return rendered

    scenes: dict[int, list[list[Rendered]]] = {k: [] for k in args.nearest}
    for number, entry in enumerate(track(data.eval_entries, description="Scenes", console=console, transient=True)):
        scene = data.evaluation_scene(entry, rule)
        model.set_context(scene.views)
        for k in args.nearest if number == 0 else ():
            render(scene, k)  # warm-up
        for k in args.nearest:  # in turns, so that a busy neighbour hits all alike
            scenes[k].append(render(scene, k))
    largest = list(chain(*scenes[max(args.nearest)]))
    return {
        "run": str(args.run),
        "checkpoint": checkpoint.name,
        "code": code_version(),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "beside": args.beside,
        "context_views": args.context_views,
        "image_size": list(data.config.image_size),
        "num_scenes": len(data.eval_entries),
        "nearest": {
            k: {
                "psnr": statistics.fmean(r.psnr for r in chain(*found)),
                "psnr_std_over_scenes": statistics.pstdev(statistics.fmean(r.psnr for r in one) for one in found),
                "psnr_against_largest": statistics.fmean(r.psnr - full.psnr for r, full in zip(chain(*found), largest)),
                "render_ms": spread([r.ms for r in chain(*found)]),
            }
            for k, found in scenes.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| nearest views k | PSNR | against the largest k | render, ms (range) |", "|---|---|---|---|"]
    for k, row in result["nearest"].items():
        ms = row["render_ms"]
        lines.append(
            f"| {k} | {row['psnr']:.2f} +- {row['psnr_std_over_scenes']:.2f} | {row['psnr_against_largest']:+.2f} | "
            f"{ms['median']:.1f} ({ms['min']:.1f} to {ms['max']:.1f}) |"
        )
    return "\n".join(lines) + "\n"


def plot(path: Path, result: dict[str, Any]) -> None:
    """PSNR and time against k."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["nearest"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained")
    left.plot(list(rows), [row["psnr"] for row in rows.values()], marker="o")
    left.set(xlabel="nearest views k", ylabel="PSNR, dB", title=f"of {result['context_views']} context views")
    right.plot(list(rows), [row["render_ms"]["median"] for row in rows.values()], marker="o")
    right.set(xlabel="nearest views k", ylabel="render, ms (median)", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    if not args.nearest or max(args.nearest) > args.context_views or min(args.nearest) < 1:
        raise SystemExit(f"error: --nearest {args.nearest}: expected numbers from 1 to --context-views")
    result = measure(args)
    write_json(args.output / "nearest_views.json", result)
    write_text(args.output / "nearest_views.md", table(result))
    plot(args.output / "nearest_views.png", result)
    console.print(table(result), markup=False)
    console.print(f"{args.output}/nearest_views.json, .md, .png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
