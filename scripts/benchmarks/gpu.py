"""Everything that is to be measured on a GPU, in one run of a few minutes: one JSON, and one page of tables.

    python -m scripts.benchmarks.gpu --output gpu_benchmark

Needs torch, einops, jaxtyping and safetensors alone: no nerfstudio, no data, no weights (times do not depend on them).
First comes the paper's table, then encoding, rendering and appending against the official code's algorithm and LVSM, a
training step, attention, frames of a path, and, where the whole package is installed, its tests on a GPU. Every number
is a median with its range. A part that fails, or would take longer than --longest-run by its FLOPs, says so in its
place, and the next one is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains about GPUs that are not there

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from elvsm_nerfstudio.evaluation.timing import milliseconds, peak_flops, processor, synchronise
from elvsm_nerfstudio.nn.compiled import CapturedFrames, Compiler
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.training.flops import count_flops
from scripts.benchmarks.gpu_page import page
from scripts.benchmarks.measurements import on_meta, peak_bytes
from scripts.benchmarks.methods import TARGETS, Cached, Scene, Upstream

ROOT = Path(__file__).parents[2]
GPU_TESTS = ("tests/test_gpu.py", "tests/splatting/test_rasterizer.py")
BATCH = 2, 6
"""Context and target views of a scene in a training step."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    network: EfficientLVSMConfig
    image_sizes: tuple[int, ...]
    view_counts: tuple[int, ...]
    paper_counts: tuple[int, ...]
    training_scenes: tuple[int, ...]
    path_frames: int


SIZES = {
    "paper": Sizes(EfficientLVSMConfig(), (256, 512), (1, 2, 4, 8, 16, 32, 64), (4, 8, 16, 32, 48, 64), (1, 8), 64),
    "test": Sizes(EfficientLVSMConfig(width=32, num_layers=2, head_dim=16), (16,), (1, 2), (2,), (1,), 4),
}


class Bench:
    """Networks and their measurements on one device, with a budget of time.

    Args:
        seconds: after which no part is begun any more.
        longest_run: what would take longer by its FLOPs is not run, in seconds.
        repeats: timed runs, after two to warm up.
    """

    def __init__(self, sizes: Sizes, device: str, seconds: float, longest_run: float, repeats: int):
        self.sizes, self.device, self.repeats = sizes, torch.device(device), repeats
        self.deadline, self.longest_run = time.monotonic() + seconds, longest_run
        self.precision = torch.bfloat16 if self.device.type == "cuda" else None
        self.peak = peak_flops(self.device)

    def build(self, config: NetworkConfig, device: str | torch.device | None = None) -> SceneNetwork:
        """A network with random weights, in eval mode."""
        device = self.device if device is None else device
        with torch.device(device):
            network = config.build().eval()
        network.autocast_dtype = None if device == "meta" else self.precision
        if device == "meta":
            network.chunk_tokens = sys.maxsize  # groups of views cost the same, and fewer of them are counted faster
        return network

    def configs(self, image_size: int) -> dict[str, NetworkConfig]:
        """Ours and LVSM, of as many blocks and channels."""
        ours = self.sizes.network
        shared = {name: getattr(ours, name) for name in ("width", "head_dim", "patch_size", "mlp_ratio")}
        latents = 3 * (image_size // ours.patch_size) ** 2  # as many as three of LVSM's views
        return {
            "ours": ours,
            "lvsm-decoder": LVSMDecoderOnlyConfig(num_layers=2 * ours.num_layers, **shared),
            "lvsm-encoder-decoder": LVSMEncoderDecoderConfig(num_layers=ours.num_layers, num_latents=latents, **shared),
        }

    def measure(
        self, run: Callable[[Any], Any], flops: int, prepare: Callable[[], Any] = lambda: None, launches: bool = True
    ) -> dict[str, Any]:
        """FLOPs, milliseconds, share of the peak, peak memory beside what is there already, and kernels launched.

        Args:
            prepare: makes what a run is given; not measured.
        """
        expected = flops / (0.3 * (self.peak or 1e12))
        if expected > self.longest_run:
            return {"flops": flops, "left_out": f"about {expected:.0f} s by its FLOPs"}
        if time.monotonic() > self.deadline:
            return {"flops": flops, "left_out": "no time was left"}
        for _ in range(2):
            run(prepare())
        times: list[float] = []
        begun = time.monotonic()
        while len(times) < self.repeats and (len(times) < 3 or time.monotonic() - begun < self.longest_run):
            times.append(milliseconds(self.device, partial(run, prepare())))
        found = {"flops": flops, "ms": spread(times), "peak_bytes": peak_bytes(self.device, prepare, run)}
        if self.peak is not None:
            found["share_of_peak"] = flops / self.peak / (statistics.median(times) / 1e3)
        if launches:
            found["launches"] = count_launches(self.device, partial(run, prepare()))
        return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def count_launches(device: torch.device, run: Callable[[], Any]) -> int:
    """Kernels that a run launches on a GPU; operations that it calls on a CPU."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        synchronise(device)
    events = profiler.events()
    if cuda:
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    return sum(event.name.startswith("aten::") for event in events)


def flops_of(bench: Bench, config: NetworkConfig, method: type, call: str, count: int, image_size: int) -> int:
    """FLOPs of a call, counted on the meta device, where it costs nothing."""
    with on_meta():
        one, scene = method(bench.build(config, "meta")), Scene.make(count, image_size, "meta", 1)
        state = _state(one, call, scene, count)
        return count_flops(lambda: _run(one, call, scene, count, state))


def _run(method: Any, call: str, scene: Scene, count: int, state: Any) -> Any:
    return getattr(method, call)(state, scene, count)


def _state(method: Any, call: str, scene: Scene, count: int) -> Any:
    state = method.remember(scene, count) if call in ("render", "append") else None
    return method.fresh(state) if call == "append" else state


@torch.no_grad()
def calls(bench: Bench, names: tuple[str, ...], counts: tuple[int, ...], image_size: int) -> Iterator[dict[str, Any]]:
    """A row for every call, number of context views and method."""
    configs = bench.configs(image_size)
    methods = {name: (Cached, configs[name]) for name in configs} | {"official": (Upstream, configs["ours"])}
    networks = {name: bench.build(config) for name, config in configs.items()}
    for count in counts:
        scene = Scene.make(count, image_size, bench.device, 1)
        for name, (kind, config) in methods.items():
            method = kind(networks[name if name in networks else "ours"])
            for call in names:
                if call not in kind.calls:
                    continue
                flops = flops_of(bench, config, kind, call, count, image_size)
                row = {"image_size": image_size, "views": count, "call": call, "method": name}
                run = partial(_run, method, call, scene, count)
                with _failures(row):
                    row.update(bench.measure(run, flops, partial(_state, method, call, scene, count)))
                yield row


def paper(bench: Bench) -> list[dict[str, Any]]:
    """The paper's table: one more view is taken in and 8 targets are rendered, at the smaller size."""
    return list(calls(bench, ("append",), bench.sizes.paper_counts, bench.sizes.image_sizes[0]))


def encode_render_append(bench: Bench) -> list[dict[str, Any]]:
    """Encoding N views, rendering one from N, and taking in one more, at every size."""
    names = ("encode", "render", "append")
    return [row for size in bench.sizes.image_sizes for row in calls(bench, names, bench.sizes.view_counts, size)]


def training(bench: Bench) -> list[dict[str, Any]]:
    """A training step of 2 + 6 views a scene: forward, backward, fused AdamW."""
    size, rows = bench.sizes.image_sizes[0], []
    for scenes in bench.sizes.training_scenes:
        for options in ({}, {"compiled": True}, {"checkpointing": True}):
            network = bench.build(bench.sizes.network).train()
            network.gradient_checkpointing = "checkpointing" in options
            row = {"scenes": scenes, "image_size": size, **options}
            with _failures(row):
                if "compiled" in options:
                    _compile(bench, network)
                step = _step(network, _batch(scenes, size, bench.device))
                flops = 3 * _forward_flops(bench, scenes, size)
                row.update(bench.measure(step, flops))
                if "ms" in row:
                    tokens = scenes * sum(BATCH) * (size // bench.sizes.network.patch_size) ** 2
                    row["tokens_per_second"] = tokens / row["ms"]["median"] * 1e3
            rows.append(row)
            del network
    return rows


def _batch(scenes: int, size: int, device: torch.device | str) -> tuple[Any, Any]:
    """Context and targets of equal scenes: what is seen does not matter."""
    scene = Scene.make(sum(BATCH), size, device, 1)

    def repeated(first: int, last: int) -> Any:
        views = scene.context.select(slice(first, last))
        return views._map(lambda x: x.expand(scenes, *x.shape[1:]))

    return repeated(0, BATCH[0]), repeated(BATCH[0], sum(BATCH))


def _forward_flops(bench: Bench, scenes: int, size: int) -> int:
    with on_meta():
        network = bench.build(bench.sizes.network, "meta")
        return count_flops(lambda: network(*_batch(scenes, size, "meta")))


def _step(network: SceneNetwork, batch: tuple[Any, Any]) -> Callable[[None], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step(_: None = None) -> None:
        optimizer.zero_grad()
        (network(*batch) - batch[1].rgb).square().mean().backward()
        optimizer.step()

    return step


def _compile(bench: Bench, network: SceneNetwork) -> None:
    """Every block of the network. On CPUs without code: no C++ compiler is asked for."""
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    network.compiler = Compiler(required=True, backend=backend)


def _capture(bench: Bench, network: SceneNetwork) -> None:
    """Every frame of the network. On CPUs what would be captured is run again."""

    def run_again(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        result = run()
        return lambda: result.copy_(run()), result

    network.captured_frames = CapturedFrames() if bench.device.type == "cuda" else CapturedFrames(run_again)


def attention(bench: Bench) -> list[dict[str, Any]]:
    """Queries of one target to the keys of N views, by PyTorch's back ends."""
    network, size, rows = bench.sizes.network, bench.sizes.image_sizes[0], []
    tokens, heads = (size // network.patch_size) ** 2, network.width // network.head_dim
    dtype = bench.precision or torch.float32
    for count in bench.sizes.view_counts:
        queries, keys, values = (
            torch.randn(1, heads, number * tokens, network.head_dim, device=bench.device, dtype=dtype)
            for number in (1, count, count)
        )
        flops = 4 * tokens * tokens * count * network.width
        expected = F.scaled_dot_product_attention(queries.float(), keys.float(), values.float())
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "FA3", "FA4"):
            row = {"views": count, "back_end": name}
            with _failures(row), _back_end(name):

                def run(_: None = None, q: Tensor = queries, k: Tensor = keys, v: Tensor = values) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v)

                row["error"] = (run().float() - expected).abs().max().item()
                row.update(bench.measure(run, flops, launches=False))
            rows.append(row)
    return rows


@contextmanager
def _back_end(name: str) -> Iterator[None]:
    if name not in ("FA3", "FA4"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            yield
        return
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise RuntimeError(f"torch {torch.__version__} does not know {name}")
    activate(name)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@torch.no_grad()
def path(bench: Bench) -> list[dict[str, Any]]:
    """Frames a second along a path from 8 views, 1 to 16 in a call, and how far they are from those one by one."""
    rows, frames = [], bench.sizes.path_frames
    count = min(8, max(bench.sizes.view_counts))
    for size in bench.sizes.image_sizes:
        scene = Scene.make(count, size, bench.device, frames)
        for blocks in ("as they are", "compiled", "compiled, in a CUDA graph"):
            network = bench.build(bench.sizes.network)
            memory, alone = network.encode(scene.first(count), scene.frame), None
            for together in (1, 4, 16):
                row = {"image_size": size, "views": count, "frames_per_call": together, "blocks": blocks}
                with _failures(row):
                    if blocks != "as they are" and together == 1:
                        _compile(bench, network)
                    if blocks == "compiled, in a CUDA graph" and together == 1:
                        _capture(bench, network)

                    run = partial(_frames, network, memory, scene, together)
                    images = torch.cat(run(), dim=1)
                    alone = images if alone is None else alone
                    row["difference"] = (images - alone).abs().max().item()
                    flops = frames * flops_of(bench, bench.sizes.network, Cached, "render", count, size)
                    row.update(bench.measure(run, flops))
                    if network.captured_frames is not None and network.captured_frames.failure is not None:
                        raise RuntimeError(network.captured_frames.failure)
                    if "ms" in row:
                        row["frames_per_second"] = frames / row["ms"]["median"] * 1e3
                rows.append(row)
    return rows


def _frames(network: SceneNetwork, memory: Any, scene: Scene, together: int, _: None = None) -> list[Tensor]:
    starts = range(0, scene.path.num_views, together)
    return [network.decode(memory, scene.path.select(slice(first, first + together))) for first in starts]


@torch.no_grad()
def agreement(bench: Bench) -> list[dict[str, Any]]:
    """How far images are from those of the same weights in fp32 on the CPU: wrong kernels are no fast ones."""
    size, rows = bench.sizes.image_sizes[0], []
    config = replace(bench.sizes.network, num_layers=2, init_std=0.05)
    reference = bench.build(config, "cpu")
    reference.autocast_dtype = None
    scene = Scene.make(2, size, "cpu", 1)
    expected = reference(scene.first(2), scene.target, scene.frame)
    for precision in ("fp32", "bf16"):
        network = bench.build(config)
        network.load_state_dict(reference.state_dict())
        network.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
        found = network(scene.first(2).to(bench.device), scene.target.to(bench.device), scene.frame.to(bench.device))
        rows.append({"precision": precision, "difference": (found.cpu() - expected).abs().max().item()})
    return rows


def gpu_tests(bench: Bench) -> list[dict[str, Any]]:
    """The tests that are marked ``gpu``, which need the whole package."""
    missing = [name for name in ("pytest", "nerfstudio") if not _is_installed(name)]
    if missing:
        return [{"left_out": f"{' and '.join(missing)}: not installed"}]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={report}", *GPU_TESTS]
        seconds = max(30.0, bench.deadline - time.monotonic())
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
        return outcomes(report.read_text())


def outcomes(report: str) -> list[dict[str, Any]]:
    """A row for each test of a JUnit report: passed, skipped, or why it failed."""
    rows = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        row = {"test": case.get("name")}
        for found in case:
            if found.tag in ("failure", "error"):
                row["failed"] = found.get("message", found.tag)
        row["outcome"] = "failed" if "failed" in row else "passed" if case.find("skipped") is None else "skipped"
        rows.append(row)
    return rows


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "agreement": agreement,
    "paper": paper,
    "path": path,
    "training": training,
    "attention": attention,
    "calls": encode_render_append,
    "tests": gpu_tests,
}
"""In the order in which they are measured; where time runs out, the last ones are left out."""


@contextmanager
def _failures(row: dict[str, Any]) -> Iterator[None]:
    """Notes what went wrong within the block, in the row."""
    try:
        yield
    except Exception as error:  # whatever it is, the other numbers are wanted too
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def benchmark(sizes: str, device: str, seconds: float, longest_run: float, repeats: int) -> dict[str, Any]:
    """All parts, and where they were measured."""
    bench = Bench(SIZES[sizes], device, seconds, longest_run, repeats)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "device": processor(bench.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sizes": sizes,
        "targets": TARGETS,
        "precision": "bf16" if bench.precision else "fp32",
        "peak_flops": bench.peak,
        "repeats": repeats,
    }
    for name, part in PARTS.items():
        begun = time.monotonic()
        try:
            result[name] = part(bench)
        except Exception:  # out of memory, say: the parts after it are wanted too
            result[name] = [{"failed": traceback.format_exc(limit=-3)}]
        result.setdefault("seconds", {})[name] = time.monotonic() - begun
        print(f"{name}: {result['seconds'][name]:.0f} s", flush=True)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="paper", help="of networks and images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=450.0, help="after which nothing is begun any more")
    parser.add_argument("--longest-run", type=float, default=1.5, help="seconds; what takes longer is left out")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs, after two to warm up")
    parser.add_argument("--output", type=Path, default=Path("gpu_benchmark"), help="folder for gpu.json and gpu.md")
    args = parser.parse_args()
    result = benchmark(args.sizes, args.device, args.seconds, args.longest_run, args.repeats)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu.json").write_text(json.dumps(result, indent=1))
    (args.output / "gpu.md").write_text(page(result))
    print(f"{args.output}/gpu.json, gpu.md")


if __name__ == "__main__":
    main()
