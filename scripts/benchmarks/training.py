"""Measures a training step, forward, backward, clipping and optimiser: samples per second and peak memory.

Compared are this package, a plain transcription of the official code's step (upstream_step.py), and this package
without each of its measures, so that what each brings can be seen. All see the same batch in the same precision in one
process and take turns, so that a busy neighbour hits them alike; times are medians with their range. The loss is the
mean squared error alone. Weights and images are random: neither time nor memory depends on them.

    python -m scripts.benchmarks.training --beside "nothing else"

Also counts what the registered methods need at their own sizes: FLOPs, and memory extrapolated from a small batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains about GPUs that are not there

import torch
import tyro
from nerfstudio.plugins.types import MethodSpecification
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from elvsm_nerfstudio import method_configs
from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version, spread
from elvsm_nerfstudio.evaluation.timing import machine, milliseconds
from elvsm_nerfstudio.geometry import CanonicalFrame, pinhole_directions
from elvsm_nerfstudio.nn import layers
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.kernels import EPS
from elvsm_nerfstudio.nn.published_weights import to_published
from elvsm_nerfstudio.training.flops import count_flops
from elvsm_nerfstudio.training.optimizers import AdamWOptimizerConfig
from elvsm_nerfstudio.views import Views
from scripts.benchmarks.measurements import on_meta, peak_bytes
from scripts.benchmarks.pages import part_of_this_processor, write_part
from scripts.benchmarks.training_tables import needs_of_methods, plot, step_table, tables
from scripts.benchmarks.upstream_step import UpstreamNetwork, UpstreamStep

console = Console()
LEARNING_RATE = 1e-4
SPEED_GOAL, MEMORY_GOAL = 1.15, 0.9
UTILISATION, GPU_TFLOPS = 0.4, 312
"""The times on an A100 (312 TFLOP/s in bf16) are computed, at a rate that is a guess of ours."""


@dataclass(frozen=True)
class Sizes:
    """A network, and what it is trained on in one step."""

    network: EfficientLVSMConfig
    scenes: int
    context_views: int
    target_views: int
    image_size: int


PRESETS = {
    "small": Sizes(EfficientLVSMConfig(width=384, num_layers=6), 2, 2, 6, 128),
    "tiny": Sizes(EfficientLVSMConfig(width=256, num_layers=4, init_std=0.035), 4, 4, 6, 64),
    "test": Sizes(EfficientLVSMConfig(width=64, num_layers=2, head_dim=32), 2, 2, 2, 64),
}


@dataclass
class Args:
    """Options."""

    preset: Literal["small", "tiny", "test"] = "small"
    """128 px with width 384, 6 + 6 layers and 2 scenes of 2 + 6 views; the batch of efficient-lvsm-tiny; or next to
    nothing."""
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Precisions of the transformer, one after another."""
    device: str = "cpu"
    """Device to measure on."""
    repeats: int = 7
    """Timed turns, after one to warm up."""
    compile: bool = False
    """Also measures both through torch.compile, which takes minutes to compile and needs a C++ compiler."""
    output: Path = Path("training_benchmark")
    """Folder for benchmark_training.json, .md and .png."""
    page: Optional[Path] = None
    """Markdown page into which goals and variants are written, between <!-- training-step --> and its end (on a CPU
    with AMX <!-- training-step-amx -->), and what the methods need, between <!-- training-needs --> and its end."""
    beside: str = "nothing"
    """What else ran on the machine; goes into the result."""


@dataclass(frozen=True)
class Batch:
    """A training batch of random colours and cameras, as our loader gives it: with rays' directions in the camera."""

    context: Views
    target: Views
    fxfycxcy: Tensor
    """In pixels, [scene, view, 4], context first."""

    @staticmethod
    def make(sizes: Sizes, device: torch.device) -> Batch:
        scenes, views, side = sizes.scenes, sizes.context_views + sizes.target_views, sizes.image_size
        generator = torch.Generator().manual_seed(0)
        poses = torch.eye(4).repeat(scenes, views, 1, 1)
        poses[..., :3, 3] = torch.randn(scenes, views, 3, generator=generator)
        fxfycxcy = torch.tensor([side, side, side / 2, side / 2]).expand(scenes, views, 4)
        rgb = torch.rand(scenes, views, side, side, 3, generator=generator)
        all_views = Views(poses, pinhole_directions(fxfycxcy, side, side), fxfycxcy / side, rgb).to(device)
        context = all_views.select(slice(sizes.context_views))
        return Batch(context, all_views.select(slice(sizes.context_views, None)), fxfycxcy.to(device))


class OurStep:
    """What the pipeline, the model and the trainer do with a batch."""

    def __init__(self, network: EfficientLVSM, fused: bool = True):
        self.network = network
        self.optimizer = AdamWOptimizerConfig(lr=LEARNING_RATE).setup(params=network.parameters())
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self.render: Callable[..., Tensor] = network

    def __call__(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        frame = CanonicalFrame.estimate(batch.context.camera_to_world)
        return (self.render(batch.context, batch.target, frame) - batch.target.rgb).square().mean()


class TheirStep:
    """The transcription, with its cameras normalised beforehand, as its loader does; images are channels first."""

    def __init__(self, network: EfficientLVSM, batch: Batch):
        transcription = UpstreamNetwork(network.config).to(batch.fxfycxcy.device)
        transcription.load_state_dict(to_published(network.state_dict()))
        self.step = UpstreamStep(transcription, LEARNING_RATE, network.autocast_dtype)
        frame = CanonicalFrame.estimate(batch.context.camera_to_world)
        count = batch.context.num_views
        intrinsics = batch.fxfycxcy[:, :count], batch.fxfycxcy[:, count:]
        views = batch.context, batch.target
        cameras = [(frame.apply(v.camera_to_world), k) for v, k in zip(views, intrinsics)]
        image, target = (v.rgb.permute(0, 1, 4, 2, 3).contiguous() for v in views)
        self.inputs = (image, *cameras, target)

    def __call__(self, batch: Batch) -> float:
        return self.step(*self.inputs)


def rays_in_step(step: OurStep) -> Callable[[Batch], float]:
    """Directions of all rays from intrinsics in every step, once for context and once for targets."""

    def run(batch: Batch) -> float:
        count, views = batch.context.num_views, []
        for part, intrinsics in ((batch.context, batch.fxfycxcy[:, :count]), (batch.target, batch.fxfycxcy[:, count:])):
            directions = pinhole_directions(intrinsics, part.height, part.width)
            views.append(Views(part.camera_to_world, directions, part.intrinsics, part.rgb))
        return step(Batch(*views, batch.fxfycxcy))

    return run


def plain_rms_norm(x: Tensor, gain: Tensor, eps: float = EPS) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


def nothing_recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


@dataclass
class Variant:
    """A step that takes part, and what of the package is replaced meanwhile."""

    step: Callable[[Batch], float]
    replaced: dict[str, Any] = field(default_factory=dict)
    checkpointing: Optional[EfficientLVSM] = None

    @contextmanager
    def active(self) -> Iterator[Callable[[Batch], float]]:
        with ExitStack() as stack:
            for name, function in self.replaced.items():
                stack.enter_context(mock.patch.object(layers, name, function))
            if self.checkpointing is not None:
                stack.enter_context(mock.patch.object(self.checkpointing, "gradient_checkpointing", True))
            yield self.step


def variants(sizes: Sizes, batch: Batch, precision: str, compiled: bool) -> dict[str, Variant]:
    """Everything that takes turns, by name."""
    torch.manual_seed(0)
    network = sizes.network.build().to(batch.fxfycxcy.device)
    network.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    theirs, ours = TheirStep(network, batch), OurStep(network)
    sdpa = F.scaled_dot_product_attention
    plain = {"rms_norm": plain_rms_norm, "recomputed": nothing_recomputed, "attention": sdpa}
    found = {
        "upstream": Variant(theirs),
        "ours": Variant(ours),
        "ours, AdamW not fused": Variant(OurStep(network, fused=False)),
        "ours, rays' directions computed in the step": Variant(rays_in_step(ours)),
        "ours, torch's RMSNorm": Variant(ours, {"rms_norm": plain_rms_norm}),
        "ours, GELU kept": Variant(ours, {"recomputed": nothing_recomputed}),
        "ours, torch's attention": Variant(ours, {"attention": sdpa}),
        "ours, none of the last three": Variant(ours, plain),
        "ours, gradient checkpointing": Variant(ours, checkpointing=network),
    }
    if compiled:
        compiled_theirs, compiled_ours = TheirStep(network, batch), OurStep(network)
        compiled_theirs.step.network = torch.compile(compiled_theirs.step.network)
        compiled_ours.render = torch.compile(network)
        found |= {"upstream, compiled": Variant(compiled_theirs), "ours, compiled": Variant(compiled_ours)}
    return found


def measure(args: Args, sizes: Sizes, precision: str) -> list[dict[str, Any]]:
    """Times in turns, then peak memory, a row for each variant."""
    device = torch.device(args.device)
    batch = Batch.make(sizes, device)
    found = variants(sizes, batch, precision, args.compile)
    times: dict[str, list[float]] = {name: [] for name in found}
    turns = [(turn, name) for turn in range(args.repeats + 1) for name in found]
    for turn, name in track(turns, description=f"Timing in {precision}", console=console, transient=True):
        with found[name].active() as step:
            ms = milliseconds(device, lambda s=step: s(batch))
        if turn > 0:
            times[name].append(ms)
    rows = []
    for name in track(found, description=f"Memory in {precision}", console=console, transient=True):
        with found[name].active() as step:

            def cleared(step=step) -> Callable[[Batch], float]:
                for each in (found["upstream"].step.step.network, found["ours"].step.network):
                    each.zero_grad(set_to_none=True)
                return step

            peak = peak_bytes(device, cleared, lambda step: step(batch))
        ratios = [theirs / mine for theirs, mine in zip(times["upstream"], times[name])]
        rows.append(
            {
                "precision": precision,
                "variant": name,
                "ms": spread(times[name]),
                "ms_runs": times[name],
                "samples_per_second": sizes.scenes / spread(times[name])["median"] * 1e3,
                "times_as_fast_as_upstream": spread(ratios),
                "peak_bytes": peak,
                "of_upstreams_memory": peak / rows[0]["peak_bytes"] if rows else 1.0,
            }
        )
    return rows


def needs() -> list[dict[str, Any]]:
    """What a step of the registered methods needs: FLOPs counted, memory extrapolated to their number of tokens.

    What the forward pass keeps, and needs at its peak, is in proportion to tokens with attention that keeps no scores,
    so two small batches at full width and depth tell it; weights, gradients and moments come on top.
    """
    names = [name for name in method_configs.__all__ if name.startswith("efficient_lvsm") and "plus" not in name]
    configs = [
        s.config for s in (getattr(method_configs, name) for name in names) if isinstance(s, MethodSpecification)
    ]
    rows = []
    for config in track(configs, description="Needs of the methods", console=console, transient=True):
        data, network = config.pipeline.datamanager, config.pipeline.model.network
        side, views = data.image_size[0], (data.num_context_views, data.num_target_views)
        tokens = sum(views) * (side // network.patch_size) ** 2
        with on_meta(), torch.device("meta"):
            meta = network.build()
            batch = Batch.make(Sizes(network, 1, *views, side), torch.device("meta"))
            forward = count_flops(lambda m=meta, b=batch: m(b.context, b.target))
        for checkpointing in (False, True):
            step = OurStep(network.build())
            step.network.autocast_dtype = torch.bfloat16
            step.network.gradient_checkpointing = checkpointing
            peaks = []
            for scenes in (1, 2):
                small = Batch.make(Sizes(network, scenes, *views, 64), torch.device("cpu"))
                with mock.patch.object(layers, "attention", F.scaled_dot_product_attention):
                    peaks.append(peak_bytes(torch.device("cpu"), lambda: None, lambda _, s=step, b=small: s.loss(b)))
            small_tokens = sum(views) * (64 // network.patch_size) ** 2
            per_token = (peaks[1] - peaks[0]) / small_tokens
            parameters = sum(p.numel() for p in step.network.parameters())
            flops = forward * (4 if checkpointing else 3)
            rows.append(
                {
                    "method": config.method_name,
                    "gradient_checkpointing": checkpointing,
                    "default": checkpointing == config.pipeline.model.gradient_checkpointing,
                    "flops_per_scene": flops,
                    "bytes_without_scenes": 16 * parameters + 2 * peaks[0] - peaks[1],
                    "bytes_per_scene": per_token * tokens,
                    "a100_seconds_per_scene": flops / (UTILISATION * GPU_TFLOPS * 1e12),
                }
            )
    return rows


def main(args: Args) -> None:
    """Command line."""
    sizes, load_before = PRESETS[args.preset], os.getloadavg()[0]
    rows = [row for precision in args.precisions for row in measure(args, sizes, precision)]
    goals = [
        {
            "precision": row["precision"],
            "speed": row["times_as_fast_as_upstream"]["median"],
            "speed_met": row["times_as_fast_as_upstream"]["median"] >= SPEED_GOAL,
            "memory": row["of_upstreams_memory"],
            "memory_met": row["of_upstreams_memory"] <= MEMORY_GOAL,
        }
        for row in rows
        if row["variant"] == "ours"
    ]
    device = torch.device(args.device)
    result = {
        "code": code_version(),
        "machine": machine(device),
        "device": args.device,
        "beside": args.beside,
        "load_before": load_before,
        "preset": args.preset,
        "batch": f"{sizes.scenes} scenes of {sizes.context_views} + {sizes.target_views} views, {sizes.image_size} px",
        "network": sizes.network.describe(),
        "repeats": args.repeats,
        "goals": {"speed": SPEED_GOAL, "memory": MEMORY_GOAL, "found": goals},
        "rows": rows,
        "needs": [] if args.preset == "test" else needs(),
        "a100": {"tflops": GPU_TFLOPS, "utilisation": UTILISATION},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "benchmark_training.json", result)
    text = tables(result)
    write_text(args.output / "benchmark_training.md", text)
    plot(args.output / "benchmark_training.png", result)
    if args.page is not None:
        write_part(args.page, part_of_this_processor(args.page, "training-step"), step_table(result))
        if result["needs"]:
            write_part(args.page, "training-needs", needs_of_methods(result))
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
