"""Measures what rendering costs against the number of context views: FLOPs, time and peak memory, side by side.

Compared are this package (memory kept, and everything computed again at each call), the official code's algorithm with
the same blocks, and LVSM, decoder-only and encoder-decoder. Weights and images are random: time does not depend on
them. FLOPs are counted (2 for a multiply-add) at the sizes measured and at the paper's, which costs no computation.
Methods take turns within one process, so that a busy neighbour hits them alike; times are medians with their range.

    python -m scripts.benchmarks.efficiency --preset small --beside "nothing else"
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains about GPUs that are not there

import torch
import tyro
from rich.console import Console
from rich.progress import track

from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version, spread
from elvsm_nerfstudio.evaluation.timing import machine, milliseconds
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.training.flops import count_flops
from scripts.benchmarks.goals import goals
from scripts.benchmarks.measurements import GemmReplay, on_meta, peak_bytes, recorded_gemms
from scripts.benchmarks.methods import PATH_FRAMES, Cached, Recomputing, Scene, Upstream
from scripts.benchmarks.pages import part_of_this_processor, write_part
from scripts.benchmarks.tables import page_part, plot, tables

console = Console()


@dataclass(frozen=True)
class Preset:
    """Sizes at which networks are compared; LVSM has the same width and as many blocks in all."""

    image_size: int
    """Pixels a side."""
    network: EfficientLVSMConfig


PRESETS = {
    "paper": Preset(256, EfficientLVSMConfig()),
    "small": Preset(128, EfficientLVSMConfig(width=384, num_layers=6)),
    "tiny": Preset(32, EfficientLVSMConfig(width=64, num_layers=2, head_dim=32)),
}
VIEW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
PEAK_PATH_FRAMES = 8
"""Frames of the path during which memory is measured: frames are handed out, so that more of them need no more."""


@dataclass
class Args:
    """Options."""

    preset: Literal["paper", "small", "tiny"] = "small"
    """Sizes to measure: the paper's (256 px, width 768, 12 + 12 layers), 128 px with width 384 and 6 + 6 layers, or
    32 px with width 64 and 2 + 2 layers. FLOPs at the paper's sizes are counted in any case."""
    device: str = "cpu"
    """Device to measure on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the transformers. The matmul rate is measured in both."""
    max_views: int = 64
    """Largest number of context views; 1, 2, 4, ... up to it."""
    repeats: int = 5
    """Timed runs of each kind, after one to warm up."""
    longest_run: float = 20.0
    """Seconds. What would take longer, by its FLOPs and the measured matmul rate, is counted but not run."""
    output: Path = Path("efficiency_benchmark")
    """Folder for benchmark_efficiency.json, .md and .png."""
    page: Optional[Path] = None
    """Markdown page into which the main tables are written, between <!-- efficiency-PRESET --> and its end; on a CPU
    with AMX <!-- efficiency-PRESET-amx -->, where the page has that."""
    beside: str = "nothing"
    """What else ran on the machine; goes into the result."""


def methods_of(preset: Preset, device: torch.device, precision: str) -> dict[str, Any]:
    """Everything that is compared, with weights of its own on the device."""
    torch.manual_seed(0)

    def build(config: NetworkConfig) -> SceneNetwork:
        with torch.device(device):
            network = config.build().eval()
        network.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
        if device.type == "meta":
            network.chunk_tokens = sys.maxsize  # groups of views cost the same, and fewer of them are counted faster
        return network

    ours = preset.network
    sizes = {name: getattr(ours, name) for name in ("width", "head_dim", "patch_size", "mlp_ratio")}
    decoder_only = LVSMDecoderOnlyConfig(num_layers=2 * ours.num_layers, **sizes)
    # LVSM's encoder-decoder has 3,072 latent tokens: as many as three of its views.
    latents = 3 * (preset.image_size // ours.patch_size) ** 2
    encoder_decoder = LVSMEncoderDecoderConfig(num_layers=ours.num_layers, num_latents=latents, **sizes)
    network = build(ours)
    return {
        "cached": Cached(network),
        "recomputing": Recomputing(network),
        "upstream": Upstream(network),
        "lvsm-decoder": Cached(build(decoder_only)),
        "lvsm-encoder-decoder": Cached(build(encoder_decoder)),
    }


def execute(method: Any, call: str, state: Any, scene: Scene, count: int) -> None:
    """One call to its end; frames of a path are thrown away one by one, as they would be written to a file."""
    result = getattr(method, call)(state, scene, count)
    if call == "path":
        for _ in result:
            pass


def state_for(method: Any, call: str, scene: Scene, count: int) -> Any:
    """What is known before a call; two of them start from images."""
    return method.remember(scene, count) if call in ("render", "append") else None


def flops_of(method: Any, call: str, count: int, image_size: int) -> int:
    """FLOPs of a call; of a path, those of two chunks of frames extended to all: all chunks cost the same."""

    def counted(frames: int) -> int:
        scene = Scene.make(count, image_size, "meta", frames)
        state = state_for(method, call, scene, count)
        state = method.fresh(state) if call == "append" else state
        return count_flops(lambda: execute(method, call, state, scene, count))

    with on_meta():
        if call != "path":
            return counted(1)
        one, two = counted(method.path_chunk), counted(2 * method.path_chunk)
        return one + (PATH_FRAMES // method.path_chunk - 1) * (two - one)


def all_flops(preset: Preset, counts: tuple[int, ...]) -> dict[str, dict[str, dict[int, int]]]:
    """call -> method -> number of views -> FLOPs."""
    methods = methods_of(preset, torch.device("meta"), "fp32")
    cases = [(name, call, count) for name, method in methods.items() for call in method.calls for count in counts]
    flops: dict[str, dict[str, dict[int, int]]] = {}
    for name, call, count in track(cases, description="Counting FLOPs", console=console, transient=True):
        row = flops.setdefault(call, {}).setdefault(name, {})
        row[count] = flops_of(methods[name], call, count, preset.image_size)
    return flops


@torch.no_grad()
def matmul_rates(preset: Preset, device: torch.device, repeats: int) -> dict[str, Any]:
    """Encoding 2 views and rendering 1, and its matrix products alone, in turns: TFLOP/s of both in each precision."""
    rates = {}
    meta = methods_of(preset, torch.device("meta"), "fp32")["cached"].network
    with on_meta():
        scene = Scene.make(2, preset.image_size, "meta", 1)
        gemms = recorded_gemms(lambda: meta(scene.first(2), scene.path, scene.frame))
        flops = count_flops(lambda: meta(scene.first(2), scene.path, scene.frame))
    scene = Scene.make(2, preset.image_size, device, 1)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        network = methods_of(preset, device, precision)["cached"].network
        replay = GemmReplay(gemms, device, dtype)
        runs: dict[str, list[float]] = {"network": [], "matmuls": []}
        for repeat in range(repeats + 1):
            turn = {
                "network": milliseconds(device, lambda n=network: n(scene.first(2), scene.path, scene.frame)),
                "matmuls": milliseconds(device, replay),
            }
            if repeat > 0:
                for name, value in turn.items():
                    runs[name].append(value)
        rates[precision] = {
            "ms": {name: spread(values) for name, values in runs.items()},
            "network_over_matmul_rate": spread([m / n for m, n in zip(runs["matmuls"], runs["network"])]),
            "matmul_tflops": flops / spread(runs["matmuls"])["median"] / 1e9,
        }
    return {"context_views": 2, "targets": 1, "flops": flops, "precisions": rates}


@torch.no_grad()
def measure(args: Args, preset: Preset, flops: dict[str, Any], flops_per_ms: float) -> list[dict[str, Any]]:
    """Time and peak memory of every call of every method for every number of views, one row each."""
    device = torch.device(args.device)
    methods = methods_of(preset, device, args.precision)
    rows = []
    counts = next(iter(flops["render"].values()))
    cases = [(count, call) for count in counts for call in flops]
    for count, call in track(cases, description="Measuring", console=console, transient=True):
        scene = Scene.make(count, preset.image_size, device)
        short = replace(scene, path=scene.path.select(slice(PEAK_PATH_FRAMES)))
        here = {name: method for name, method in methods.items() if call in method.calls}
        seconds = {name: flops[call][name][count] / flops_per_ms / 1e3 for name in here}
        timed = [name for name in here if seconds[name] <= args.longest_run]
        part = PEAK_PATH_FRAMES / PATH_FRAMES if call == "path" else 1.0
        weighed = [name for name in here if seconds[name] * part <= args.longest_run]
        states = {name: state_for(methods[name], call, scene, count) for name in weighed}
        times = in_turns(methods, call, states, scene, count, timed, args.repeats)
        for name in here:
            state = states.get(name)
            rows.append(
                {
                    "call": call,
                    "method": name,
                    "views": count,
                    "flops": flops[call][name][count],
                    "ms": spread(times[name]) if name in timed else None,
                    "ms_runs": times.get(name, []),
                    "peak_bytes": peak_of(methods[name], call, state, short, count) if name in weighed else None,
                    "memory_bytes": getattr(state, "num_bytes", None),
                }
            )
    return rows


def in_turns(
    methods: dict[str, Any],
    call: str,
    states: dict[str, Any],
    scene: Scene,
    count: int,
    names: list[str],
    repeats: int,
) -> dict[str, list[float]]:
    """Times in ms of methods that take turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            method, state = methods[name], states[name]
            state = method.fresh(state) if call == "append" else state
            ms = milliseconds(scene.path.directions.device, lambda m=method, s=state: execute(m, call, s, scene, count))
            if repeat > 0:
                times[name].append(ms)
    return times


def peak_of(method: Any, call: str, state: Any, scene: Scene, count: int) -> int:
    """Bytes that a call needs beside weights, images and what was remembered before it."""

    def prepare() -> Any:
        return method.fresh(state) if call == "append" else state

    return peak_bytes(scene.path.directions.device, prepare, lambda state: execute(method, call, state, scene, count))


def benchmark(args: Args) -> dict[str, Any]:
    """Counts, measures and compares with the goals."""
    preset, device = PRESETS[args.preset], torch.device(args.device)
    load_before = os.getloadavg()[0]
    rates = matmul_rates(preset, device, args.repeats)
    flops = all_flops(preset, tuple(count for count in VIEW_COUNTS if count <= args.max_views))
    flops_per_ms = rates["precisions"][args.precision]["matmul_tflops"] * 1e9
    result = {
        "code": code_version(),
        "machine": machine(device),
        "torch": torch.__version__,
        "beside": args.beside,
        "load_before": load_before,
        "preset": args.preset,
        "image_size": preset.image_size,
        "network": vars(preset.network),
        "device": args.device,
        "precision": args.precision,
        "weights": "random",
        "repeats": args.repeats,
        "matmul_rate": rates,
        "rows": measure(args, preset, flops, flops_per_ms),
        "paper_flops": all_flops(PRESETS["paper"], VIEW_COUNTS),
    }
    return {**result, "goals": goals(result)}


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    result = benchmark(args)
    write_json(args.output / "benchmark_efficiency.json", result)
    text = tables(result)
    write_text(args.output / "benchmark_efficiency.md", text)
    plot(args.output / "benchmark_efficiency.png", result)
    if args.page is not None:
        write_part(args.page, part_of_this_processor(args.page, f"efficiency-{args.preset}"), page_part(result))
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"{args.output}/benchmark_efficiency.json, .md, .png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
