"""A comparison from its options to its page."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from nerfstudio.configs.dataparser_configs import all_dataparsers

from elvsm_nerfstudio.compare.data import find_scenes, keep_images, keep_settings, keep_split
from elvsm_nerfstudio.compare.layout import Job, Layout, MethodSpec, Settings, dataparser_config
from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.page import write_page
from elvsm_nerfstudio.compare.path import write_video
from elvsm_nerfstudio.compare.plots import write_plots
from elvsm_nerfstudio.compare.rows import OTHER_DATA, find_methods, image_size
from elvsm_nerfstudio.compare.runs import console, jobs_of, measured_metrics, run_all, score_all
from elvsm_nerfstudio.compare.scoring import frame_file, markdown, summary
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import machine


def compare(args: CompareOptions) -> dict[str, Any]:
    """Runs, scores and reports; returns what is in results.json.

    Raises:
        ValueError: for options and data that cannot be used, before anything is run.
    """
    if not args.context_views or min(args.context_views) < 1 or args.num_target_views < 1:
        raise ValueError("--context-views and --num-target-views: expected numbers of at least 1")
    if args.video_context_views not in (None, *args.context_views):
        raise ValueError(
            f"--video-context-views {args.video_context_views}: expected one of --context-views "
            f"{' '.join(map(str, args.context_views))}"
        )
    if args.dataparser is not None and args.dataparser not in all_dataparsers:
        raise ValueError(f"--dataparser {args.dataparser} is unknown; expected one of {', '.join(all_dataparsers)}")
    layout = Layout(args.output.resolve())
    collection = SceneCollection.open(args.data.resolve(), dataparser_config(args.dataparser))
    specs = find_methods(args, collection.whole_scenes)
    loaded = find_scenes(args, collection)
    settings = Settings(
        data=str(args.data.resolve()),
        image_size=image_size(args, specs),
        background=args.background,
        dataparser=args.dataparser,
        num_target_views=args.num_target_views,
        scenes=tuple(scene.name for scene in loaded),
    )
    metrics, notes = measured_metrics(settings.image_size)
    for note in notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for spec in specs:
        if spec.note is not None and spec.note.startswith(OTHER_DATA):
            console.print(f"{spec.name}: {spec.note}", style="yellow", markup=False, soft_wrap=True)

    keep_settings(layout, settings)
    split = keep_split(args, layout, loaded)
    scenes = keep_images(args, layout, settings, split)
    jobs = jobs_of(args, scenes)
    run_all(args, layout, settings, specs, jobs)
    records = score_all(layout, specs, jobs, split, metrics)
    result = result_of(args, settings, scenes, specs, records, metrics, notes)
    result["videos"] = write_videos(layout, specs, records, jobs)
    result["plots"] = write_plots(layout.root, result)
    write_json(layout.root / "results.json", result)
    write_text(layout.root / "table.md", markdown(result))
    write_page(layout.root / "index.html", result)
    return result


def notes_of(specs: Sequence[MethodSpec], records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How costs were measured."""
    done = [record for listed in records.values() for record in listed if record["status"] == "done"]
    cuda = any(record["device"].startswith("cuda") for record in done)
    of = "what PyTorch had allocated on the GPU" if cuda else "resident memory of the method's own process"
    memory = f"the most {of} while the scene was prepared and rendered"
    if done and not cuda:
        before = max(record["memory_before_bytes"] for record in done) / 2**20
        memory += f", Python and its libraries included ({before:.0f} MiB before anything was loaded)"
    if not all(record["peak_is_of_this_scene"] for record in done):
        memory += "; of all scenes up to it, where the system could not reset its count"
    together = max((record.get("frames_per_call", 1) for record in done), default=1)
    share = (
        f"; networks render up to {together} targets in one call, and a frame's time is its share of the call"
        if together > 1
        else ""
    )
    return [
        "First picture: from decoded photos to the first render, with programs and weights loaded. For networks: to "
        "encode the context views (after one warm-up) and render; for Gaussians: initial points, rendered "
        "views where there are any, and optimisation; for fine-tuned networks: the fine-tuning too.",
        f"Render a frame: median over targets, the device waited for, after a first one that does not count{share}.",
        f"Peak memory: {memory}.",
        "On disk: weights for networks (the same for all scenes), Gaussians (for each scene), the context "
        "photos, decoded, for baselines.",
    ]


def result_of(
    args: CompareOptions,
    settings: Settings,
    scenes: list,
    specs: list[MethodSpec],
    records: dict,
    metrics: list,
    notes: list,
) -> dict[str, Any]:
    """Everything that was found, for results.json and the page."""
    counts = sorted(set(args.context_views))
    methods = []
    for spec in specs:
        by_count = {count: [r for r in records[spec.name] if r["context_views"] == count] for count in counts}
        summaries = {str(count): summary(listed, metrics) for count, listed in by_count.items()}
        methods.append({**asdict(spec), "folder": spec.folder, "summaries": summaries})
    device = device_to_use()
    packages = ("torch", "nerfstudio", "gsplat", "lpips", "flip-evaluator")
    return {
        "title": args.title or f"Comparison on {args.data.resolve().name}",
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["elvsm", *sys.argv[1:]]),
        "code": code_version(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {**machine(device), "device": str(device)},
        "beside": args.beside,
        "data": settings.data,
        "image_size": list(settings.image_size),
        "background": settings.background,
        "context_views": counts,
        "metrics": metrics,
        "scenes": scenes,
        "methods": methods,
        "records": [record for listed in records.values() for record in listed],
        "notes": [*notes, *notes_of(specs, records)],
    }


def write_videos(layout: Layout, specs: list[MethodSpec], records: dict, jobs: list[Job]) -> list[dict[str, Any]]:
    """A video for each scene that has one, of the methods that did not fail on it."""
    videos = []
    for job in (job for job in jobs if job.path_frames):
        done = [
            spec
            for spec in specs
            for record in records[spec.name]
            if (record["scene"], record["context_views"], record["status"]) == (job.scene, job.count, "done")
        ]
        if done:
            file = f"path_{job.scene.replace('/', '_')}.mp4"
            folders = [layout.pictures(spec, job.count, job.scene, "path") for spec in done]
            frames = [frame_file(i) for i in range(job.path_frames)]
            write_video(layout.root / file, [spec.name for spec in done], folders, frames, fps=24)
            videos.append({"scene": job.scene, "context_views": job.count, "file": file})
    return videos
