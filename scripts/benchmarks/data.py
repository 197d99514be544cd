"""Measures how fast and in how much memory training data is read; writes JSON, a table and a plot.

Throughput is images decoded, composited, cropped and batched per second, against a plain loop on one core that makes
the same pixels with PIL alone (open, composite where transparent, resize, crop), and against a bare one (open and
resize only). Loop and loaders take turns, so that a busy neighbour hits them alike.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from rich.console import Console
from rich.progress import track

from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.realestate10k_dataparser import ENCODED_IMAGES
from elvsm_nerfstudio.data.samples import StepBatches, TrainingSamples, training_batches
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import RandomViewSampler
from elvsm_nerfstudio.evaluation.report import table_row, write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version

SCENES_PER_BATCH, CONTEXT_VIEWS, TARGET_VIEWS = 4, 4, 6
IMAGES_PER_BATCH = SCENES_PER_BATCH * (CONTEXT_VIEWS + TARGET_VIEWS)
NUM_SCENES_OPENED = 70_000
console = Console()


@dataclass
class Args:
    """Options."""

    data: tuple[Path, ...]
    """Data sets to read, e.g. an object set at 64 px, one at 256 px, and chunks."""
    image_size: tuple[int, ...]
    """Side of the square that each one's images are cropped to."""
    output: Path = Path("data_benchmark")
    """Folder for benchmark_data.json, .md and .png."""
    num_images: int = 2000
    """Images of a timed run."""
    repeats: int = 5
    """Timed runs of each kind."""
    num_scenes: int = 2000
    """Scenes that are walked while memory is measured."""
    beside: str = "nothing"
    """What else ran on the machine; goes into the result."""


def samples_of(data: Path, side: int) -> TrainingSamples:
    """Training samples of a data set's train split."""
    collection = SceneCollection.open(data, NerfstudioDataParserConfig())
    sampler = RandomViewSampler(TARGET_VIEWS, targets_include_context=False)
    spec = ImageSpec((side, side))
    entries = collection.split("train")
    return TrainingSamples(collection, entries, sampler, spec, 0, (CONTEXT_VIEWS,) * 2, SCENES_PER_BATCH)


def plain_images(samples: TrainingSamples, count: int) -> list[Path | bytes]:
    """The image files that the plain loops read; out of chunks they are taken beforehand."""
    files: list[Path | bytes] = []
    for entry in samples.entries:
        scene = samples.collection.load(entry)
        encoded = scene.outputs.metadata.get(ENCODED_IMAGES)
        frames = range(min(CONTEXT_VIEWS + TARGET_VIEWS, scene.num_frames))
        files += [encoded[i] if encoded else scene.outputs.image_filenames[i] for i in frames]
        if len(files) >= count:
            break
    return (files * -(-count // len(files)))[:count]


def opened(file: Path | bytes) -> Image.Image:
    return Image.open(file if isinstance(file, Path) else io.BytesIO(file))


def bare_loop(files: list[Path | bytes], side: int) -> None:
    """Open and resize, nothing else."""
    for file in files:
        with opened(file) as image:
            np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def plain_loop(files: list[Path | bytes], side: int) -> None:
    """The same pixels as the loader's, image by image."""
    for file in files:
        with opened(file) as image:
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            scale = side / min(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            left, top = (width - side) // 2, (height - side) // 2
            np.asarray(image.crop((left, top, left + side, top + side)))


def loader_rate(samples: TrainingSamples, num_workers: int, num_images: int, first_step: int) -> float:
    """Images per second of a running loader: it is started, and its first batches taken, before the clock is."""
    batches = StepBatches(first_step, SCENES_PER_BATCH, rank=0, world_size=1)
    loader = training_batches(samples, batches, num_workers, pin=False)
    for _ in range(2 * num_workers + 2):
        next(loader)
    count = max(1, num_images // IMAGES_PER_BATCH)
    start = time.perf_counter()
    for _ in range(count):
        next(loader)
    rate = count * IMAGES_PER_BATCH / (time.perf_counter() - start)
    del loader
    return rate


def measure_throughput(data: Path, side: int, args: Args) -> dict[str, Any]:
    """Rates of the loops and of loaders with 0, 1 and 2 worker processes, in turns."""
    samples = samples_of(data, side)
    files = plain_images(samples, args.num_images)

    def loop_rate(loop: Callable[[list[Path | bytes], int], None]) -> float:
        start = time.perf_counter()
        loop(files, side)
        return len(files) / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {}
    for repeat in track(range(args.repeats + 1), description=f"{data} at {side} px", console=console, transient=True):
        step = repeat * args.num_images // IMAGES_PER_BATCH
        turn = {"plain loop": loop_rate(plain_loop), "bare loop": loop_rate(bare_loop)}
        for workers in (0, 1, 2):
            turn[f"{workers} workers"] = loader_rate(samples, workers, args.num_images, step)
        if repeat > 0:  # the first turn warms up the system's file cache
            for name, rate in turn.items():
                rates.setdefault(name, []).append(rate)
    return {
        "data": data.name,
        "image_size": side,
        "images_per_second": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in rates.items()
        },
        "against_plain_loop": {
            name: statistics.median(r / p for r, p in zip(v, rates["plain loop"])) for name, v in rates.items()
        },
        "against_bare_loop": {
            name: statistics.median(r / p for r, p in zip(v, rates["bare loop"])) for name, v in rates.items()
        },
    }


def resident_megabytes() -> float:
    """Memory of this process that is not shared with others' files, in MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(data: Path, side: int, num_scenes: int) -> list[tuple[int, float]]:
    """Resident memory against scenes read: no scene comes twice. For a process of its own."""
    torch.set_num_threads(1)
    real = samples_of(data, side)
    entries = [real.entries[i % len(real.entries)] for i in range(num_scenes)]
    with tempfile.TemporaryDirectory() as folder:
        listed = [
            {"name": f"scene_{i}", "path": str(entry.path.resolve()), "split": "train"}
            for i, entry in enumerate(entries)
        ]
        (Path(folder) / "scenes.json").write_text(json.dumps({"scenes": listed}))
        samples = samples_of(Path(folder), side)
        samples.collection.dataparser = real.collection.dataparser
        curve = []
        for k in range(num_scenes):
            samples[k]
            if k % (num_scenes // 40) == 0:
                curve.append((k, resident_megabytes()))
    return curve


def measure_memories(args: Args) -> dict[str, list[tuple[int, float]]]:
    """Memory curves of all data sets, each from a new process."""
    curves = {}
    sets = list(zip(args.data, args.image_size))
    for data, side in track(sets, description="Memory", console=console, transient=True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet) as process:
            curves[f"{data.name}, {side} px"] = process.submit(measure_memory, data, side, args.num_scenes).result()
    return curves


def _quiet() -> None:
    sys.stdout = io.StringIO()  # dataparsers talk


def measure_opening() -> dict[str, float]:
    """Seconds to open collections of 70,000 scenes whose own files do not even exist, by format."""
    seconds = {}
    for kind in ("scenes.json", "chunks", "posed-JSON list"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            names = [f"{i:016x}" for i in range(NUM_SCENES_OPENED)]
            if kind == "scenes.json":
                listed = [{"name": n, "path": n, "split": "train" if i % 10 else "test"} for i, n in enumerate(names)]
                (folder / "scenes.json").write_text(json.dumps({"scenes": listed}))
            for split, part in (("train", names[:63_000]), ("test", names[63_000:])):
                if kind == "scenes.json":
                    continue
                (folder / split).mkdir()
                if kind == "chunks":
                    index = {key: f"{i // 14:06d}.torch" for i, key in enumerate(part)}
                    (folder / split / "index.json").write_text(json.dumps(index))
                    (folder / split / "000000.torch").touch()
                else:
                    (folder / split / "full_list.txt").write_text("".join(f"metadata/{n}.json\n" for n in part))
            start = time.perf_counter()
            collection = SceneCollection.open(folder, NerfstudioDataParserConfig())
            seconds[kind] = time.perf_counter() - start
            assert len(collection.entries) == NUM_SCENES_OPENED
    return seconds


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| data | px | plain loop, images/s | loader, 1 worker | 2 workers | bare loop |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["throughput"]:
        rates, ratio = row["images_per_second"], row["against_plain_loop"]
        cells = [row["data"], str(row["image_size"]), f"{rates['plain loop']['median']:.0f}"]
        for name in ("1 workers", "2 workers"):
            rate = rates[name]
            cells.append(f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f}), {ratio[name]:.2f}x")
        cells.append(f"{rates['bare loop']['median']:.0f}, {ratio['bare loop']:.2f}x")
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def plot(path: Path, result: dict[str, Any]) -> None:
    """Throughput as bars, memory as curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=100)
    names = ("bare loop", "plain loop", "0 workers", "1 workers", "2 workers")
    for i, name in enumerate(names):
        ratios = [row["against_plain_loop"][name] for row in result["throughput"]]
        left.bar(np.arange(len(ratios)) + 0.16 * (i - 2), ratios, 0.15, label=name)
    left.axhline(0.9, color="grey", lw=0.8, ls="--")
    left.axhline(1.7, color="grey", lw=0.8, ls="--")
    left.set_xticks(range(len(result["throughput"])))
    left.set_xticklabels([f"{row['data']}\n{row['image_size']} px" for row in result["throughput"]])
    left.set(ylabel="images per second / plain loop's", title="Reading training data")
    left.set_ylim(0, 2.4)
    left.legend(fontsize=8, ncols=3, loc="upper left")
    for label, curve in result["memory"].items():
        right.plot(*zip(*curve), label=label)
    right.set(xlabel="scenes read", ylabel="resident memory in MB", title="Memory of a loader process", ylim=(0, None))
    right.legend(fontsize=8, loc="lower right")
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    if len(args.data) != len(args.image_size):
        raise SystemExit(f"error: {len(args.data)} --data but {len(args.image_size)} --image-size; expected as many")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    with contextlib.redirect_stdout(io.StringIO()):  # dataparsers talk
        result = {
            "code": code_version(),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
            "beside": args.beside,
            "load_before": load_before,
            "batch": {"scenes": SCENES_PER_BATCH, "context_views": CONTEXT_VIEWS, "target_views": TARGET_VIEWS},
            "throughput": [measure_throughput(data, side, args) for data, side in zip(args.data, args.image_size)],
            "memory": measure_memories(args),
            "seconds_to_open_70000_scenes": measure_opening(),
        }
    write_json(args.output / "benchmark_data.json", result)
    write_text(args.output / "benchmark_data.md", table(result))
    plot(args.output / "benchmark_data.png", result)
    console.print(table(result), markup=False)
    console.print(
        f"Opening 70,000 scenes, seconds: {result['seconds_to_open_70000_scenes']}", markup=False, soft_wrap=True
    )
    console.print(f"{args.output}/benchmark_data.json, .md, .png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
