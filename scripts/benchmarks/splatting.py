"""Measures how fast splatfacto-sparse trains: iterations per second against image size and number of Gaussians.

An iteration is all of a training step: projection, spherical harmonics of degree 3, compositing, L1 and SSIM loss, the
way back, what gsplat's strategy keeps, and Adam. Two clouds: a sphere's surface, opaque, as a trained scene is; and a
volume filled at random at opacity 0.1, with much overlap, as a random initialisation is. Times are medians with their
range.

    python -m scripts.benchmarks.splatting --output splatting.json --beside "nothing else"
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from rich.console import Console
from rich.progress import track

from elvsm_nerfstudio.evaluation.report import write_figure, write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version, spread
from elvsm_nerfstudio.evaluation.timing import processor
from elvsm_nerfstudio.method_configs.splatfacto_sparse import splatfacto_sparse
from elvsm_nerfstudio.splatting.model import SparseSplatfactoModelConfig
from elvsm_nerfstudio.splatting.rasterization import Backend, choose_backend

console = Console()

STEP = 3001
"""A step at which all bands are in use, and nothing is split, pruned or reset."""


@dataclass
class Args:
    """Options."""

    output: Path
    """JSON; the table goes beside it as Markdown, the plot as PNG."""
    sizes: tuple[int, ...] = (128, 256)
    """Pixels a side."""
    gaussians: tuple[int, ...] = (2_000, 10_000, 50_000)
    """Numbers of Gaussians."""
    repeats: int = 5
    """Measured iterations, after two that are not."""
    threads: int = 1
    """Threads that torch uses."""
    device: str = "cpu"
    """Device to compute on."""
    backend: Backend = "auto"
    """What renders."""
    beside: str = "unknown"
    """What else ran on the machine, for the record."""


def cloud(kind: str, count: int) -> torch.Tensor:
    """Points [count, 3] of a sphere of radius 0.7, or in the cube of that half side."""
    generator = torch.Generator().manual_seed(0)
    if kind == "surface":
        return 0.7 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return 1.4 * (torch.rand(count, 3, generator=generator) - 0.5)


def training_step(args: Args, kind: str, size: int, count: int) -> Callable[[], Any]:
    """A function that does one training iteration."""
    points = cloud(kind, count)
    model = SparseSplatfactoModelConfig(backend=args.backend).setup(
        scene_box=None, num_train_data=1, metadata={}, device=args.device, seed_points=(points, points * 100 + 128)
    )
    model.to(args.device).train()
    if kind == "surface":
        model.opacities.data.fill_(2.0)
    optimizers = {
        name: splatfacto_sparse.config.optimizers[name]["optimizer"].setup(parameters)
        for name, parameters in model.get_gaussian_param_groups().items()
    }
    model.optimizers, model.step = optimizers, STEP
    pose = torch.eye(4, device=args.device)[None, :3]
    pose[:, 2, 3] = 2.2
    focal = 1.2 * size
    camera = Cameras(pose, fx=focal, fy=focal, cx=size / 2, cy=size / 2, height=size, width=size).to(args.device)
    batch = {"image": torch.rand(size, size, 3, generator=torch.Generator().manual_seed(1)).to(args.device)}

    def step() -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        sum(model.get_loss_dict(model.get_outputs(camera), batch).values()).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.step_post_backward(STEP)
        if args.device != "cpu":
            torch.cuda.synchronize()

    return step


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Times of a function, after two calls that are not measured."""
    times = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        function()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return times


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} thread(s), {result['device']}, rasterizer {result['backend']}; "
        f"beside: {result['beside']}. Iterations per second, median of {result['repeats']} (range).",
        "",
        "| cloud | image | " + " | ".join(f"{count:,} Gaussians" for count in result["gaussians"]) + " |",
        "|---|---|" + "---|" * len(result["gaussians"]),
    ]
    cells = {(row["cloud"], row["size"], row["gaussians"]): row["iterations_per_second"] for row in result["rows"]}
    for kind, size in dict.fromkeys((row["cloud"], row["size"]) for row in result["rows"]):
        rates = [cells[kind, size, count] for count in result["gaussians"]]
        texts = [f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})" for rate in rates]
        lines.append(f"| {kind} | {size} px | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Medians against the number of Gaussians, a line for each cloud and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=110, layout="constrained")
    for kind, size in dict.fromkeys((row["cloud"], row["size"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["cloud"], row["size"]) == (kind, size)]
        points = [(row["gaussians"], row["iterations_per_second"]["median"]) for row in rows]
        axes.plot(*zip(*points), marker="o", linestyle="-" if kind == "surface" else "--", label=f"{kind}, {size} px")
    axes.set(xscale="log", yscale="log", xlabel="Gaussians", ylabel="training iterations per second")
    axes.set_xticks(result["gaussians"], [f"{count:,}" for count in result["gaussians"]], minor=False)
    axes.set_xticks([], minor=True)
    for which in ("major", "minor"):
        axes.tick_params(axis="y", which=which, labelsize=8)
        getattr(axes.yaxis, f"set_{which}_formatter")(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    write_figure(path, figure)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    cases = [(kind, size, n) for kind in ("surface", "volume") for size in args.sizes for n in args.gaussians]
    rows = []
    for kind, size, count in track(cases, "Measuring", console=console):
        torch.manual_seed(0)
        step = training_step(args, kind, size, count)
        rates = [1 / time for time in seconds(step, args.repeats)]
        rows.append({"cloud": kind, "size": size, "gaussians": count, "iterations_per_second": spread(rates)})
    device = torch.device(args.device)
    result = {
        "command": ["python", *sys.argv],
        "backend": choose_backend(args.backend, args.device),
        "device": args.device,
        "beside": args.beside,
        "repeats": args.repeats,
        "gaussians": list(args.gaussians),
        "machine": {
            "processor": processor(device),
            "threads": args.threads,
            "torch": torch.__version__,
        },
        "code": code_version(),
        "rows": rows,
    }
    write_json(args.output, result)
    write_text(args.output.with_suffix(".md"), table(result))
    write_plot(args.output.with_suffix(".png"), result)
    console.print(table(result), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
