"""Runs compared methods, each in a process of its own, and scores the pictures that they left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from elvsm_nerfstudio.compare.layout import Job, Layout, MethodSpec, Settings
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.scoring import METRICS, score
from elvsm_nerfstudio.compare.split import Split
from elvsm_nerfstudio.evaluation.metrics import LPIPS_WEIGHTS, what_lpips_lacks
from elvsm_nerfstudio.evaluation.report import write_json

console = Console()
WORKER = ("-m", "elvsm_nerfstudio.compare.worker")
"""Arguments of Python that start the process of one method."""


def jobs_of(args: CompareOptions, scenes: Sequence[dict[str, Any]]) -> list[Job]:
    """Every scene with every number of context views, and a video of some with one of these numbers."""
    with_video = {scene["name"] for scene in scenes[: args.num_videos]}
    shown = max(args.context_views) if args.video_context_views is None else args.video_context_views
    return [
        Job(count, scene["name"], args.video_frames, args.video_image_size)
        if count == shown and scene["name"] in with_video
        else Job(count, scene["name"], 0)
        for count in args.context_views
        for scene in scenes
    ]


def is_done(layout: Layout, spec: MethodSpec, job: Job) -> bool:
    """Whether a method has rendered a scene before, as it would now."""
    path = layout.record(spec, job.count, job.scene)
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    same_method = record["key"] == json.loads(json.dumps(spec.key()))
    path = job.path_frames, job.path_size and list(job.path_size)
    same_path = job.path_frames == 0 or path == (record["path_frames"], record.get("path_size"))
    return record["status"] == "done" and same_method and same_path


def run_method(layout: Layout, settings: Settings, spec: MethodSpec, jobs: Sequence[Job]) -> Iterator[Job]:
    """Runs a method in a process of its own, and gives each job as it is done or has failed.

    Where the process dies, the scene that it was at has failed, and a new one goes on with the next.
    """
    for job in jobs:
        layout.record(spec, job.count, job.scene).unlink(missing_ok=True)
        layout.scores(spec, job.count, job.scene).unlink(missing_ok=True)
    waiting = list(jobs)
    layout.log(spec).parent.mkdir(parents=True, exist_ok=True)
    layout.log(spec).write_text("")
    while waiting:
        file = layout.log(spec).with_name("jobs.json")
        content = {"root": str(layout.root), "settings": asdict(settings), "method": asdict(spec)}
        write_json(file, {**content, "jobs": [asdict(job) for job in waiting]})
        with layout.log(spec).open("a") as log:
            process = subprocess.Popen([sys.executable, *WORKER, str(file)], stdout=log, stderr=subprocess.STDOUT)
            try:
                while True:
                    ended = process.poll() is not None
                    while waiting and layout.record(spec, waiting[0].count, waiting[0].scene).exists():
                        yield waiting.pop(0)
                    if ended:
                        break
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if waiting:
            job = waiting.pop(0)
            end = layout.log(spec).read_text()[-1500:]
            error = f"its process ended with status {process.returncode}. Its last lines:\n{end}"
            about = {"method": spec.name, "scene": job.scene, "context_views": job.count, "key": spec.key()}
            record = {**about, "status": "failed", "error": error, "path_frames": job.path_frames}
            write_json(layout.record(spec, job.count, job.scene), record)
            yield job


def run_all(args: CompareOptions, layout: Layout, settings: Settings, specs: list[MethodSpec], jobs: list[Job]) -> None:
    """Runs what has not been done yet."""
    waiting = {spec.name: [job for job in jobs if not is_done(layout, spec, job)] for spec in specs}
    with progress() as bar:
        task = bar.add_task("", total=len(specs) * len(jobs), what="")
        for spec in specs:
            bar.update(task, what=spec.name, advance=len(jobs) - len(waiting[spec.name]))
            for job in run_method(layout, settings, spec, waiting[spec.name]):
                bar.advance(task)
                record = json.loads(layout.record(spec, job.count, job.scene).read_text())
                if record["status"] == "failed":
                    first = record["error"].splitlines()[0]
                    said = f"{spec.name} failed on {job.scene}, {job.count} views: {first}"
                    console.print(said, style="yellow", markup=False, soft_wrap=True)


def score_all(
    layout: Layout, specs: list[MethodSpec], jobs: list[Job], split: Split, metrics: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Every method's records with the scores of its saved pictures; what has been scored before is read."""
    records: dict[str, list[dict[str, Any]]] = {spec.name: [] for spec in specs}
    with progress() as bar:
        task = bar.add_task("", total=len(specs) * len(jobs), what="scores")
        for spec in specs:
            for job in jobs:
                record = json.loads(layout.record(spec, job.count, job.scene).read_text())
                if record["status"] == "done":
                    record["images"] = _scores(layout, spec, job, split[job.scene].target, metrics)
                records[spec.name].append(record)
                bar.advance(task)
    return records


def _scores(
    layout: Layout, spec: MethodSpec, job: Job, frames: Sequence[int], metrics: Sequence[str]
) -> list[dict[str, float]]:
    path = layout.scores(spec, job.count, job.scene)
    if path.exists():
        rows = json.loads(path.read_text())
        if set(rows[0]) == {"frame", *metrics}:
            return rows
    predictions, errors = (layout.pictures(spec, job.count, job.scene, kind) for kind in ("target", "errors"))
    rows = score(predictions, layout.images(job.scene, "target"), errors, frames)
    write_json(path, rows)
    return rows


def measured_metrics(size: tuple[int, int]) -> tuple[list[str], list[str]]:
    """The metrics that can be had here, and notes on those that cannot."""
    lacking = {f"lpips_{net}": what_lpips_lacks(size, net) for net in LPIPS_WEIGHTS}
    names = [name for name in METRICS if lacking.get(name) is None]
    notes = list(dict.fromkeys(note for note in lacking.values() if note is not None))
    return names, notes


def progress() -> Progress:
    """A bar with a field ``what``."""
    columns = TextColumn("[green]{task.fields[what]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)
