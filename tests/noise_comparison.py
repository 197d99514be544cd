"""A small comparison as `elvsm compare` leaves it, with its page, made without rendering anything."""

from __future__ import annotations

from pathlib import Path

import torch

from elvsm_nerfstudio.compare.page import write_page
from elvsm_nerfstudio.compare.plots import write_plots
from elvsm_nerfstudio.compare.scoring import frame_file, score, summary
from elvsm_nerfstudio.evaluation.report import write_image

SCENES, COUNTS, TARGETS, SIZE = ("chair", "a b#1", "table"), (2, 4), (3, 7), 48
METRICS = ["psnr", "ssim", "flip"]
NOISE = {("ours", 2): 0.2, ("ours", 4): 0.1, ("gaussians", 2): 0.3, ("gaussians", 4): 0.15, ("copy-nearest", 2): 0.5,
         ("copy-nearest", 4): 0.4}  # fmt: skip


def write_comparison(root: Path) -> Path:
    """A comparison of noisy colours: the third scene is the hardest for all, and Gaussians fail on one."""
    records, generator = [], torch.Generator().manual_seed(0)
    for scene in SCENES:
        for frame in (0, 1, 2, 5):
            write_image(root / "images" / scene / "context" / frame_file(frame), torch.rand(SIZE, SIZE, 3))
        for frame in TARGETS:
            write_image(root / "images" / scene / "target" / frame_file(frame), torch.full((SIZE, SIZE, 3), 0.5))
    for (method, count), noise in NOISE.items():
        for i, scene in enumerate(SCENES):
            about = {"method": method, "context_views": count, "scene": scene}
            if (method, count, scene) == ("gaussians", 4, "chair"):
                records.append({**about, "status": "failed", "error": "RuntimeError: <b>no</b> </script> points"})
                continue
            pictures = root / "methods" / method / f"{count}_views" / scene
            for frame in TARGETS:
                error = torch.randn(SIZE, SIZE, 3, generator=generator) * noise * (1 + i) / 3
                write_image(pictures / "target" / frame_file(frame), 0.5 + error)
            rows = score(pictures / "target", root / "images" / scene / "target", pictures / "errors", TARGETS)
            costs = {"first_picture_seconds": noise, "render_ms": [1.0, 2.0], "peak_bytes": 2**28, "disk_bytes": 2**20}
            records.append({**about, "status": "done", "images": rows, **costs})
    methods = []
    for name in ("ours", "gaussians", "copy-nearest"):
        found = {c: [r for r in records if (r["method"], r["context_views"]) == (name, c)] for c in COUNTS}
        summaries = {str(count): summary(listed, METRICS) for count, listed in found.items()}
        kind = "baseline" if name == "copy-nearest" else "network"
        methods.append({"name": name, "kind": kind, "folder": name, "note": "a note", "summaries": summaries})
    frames = {"context": [0, 1, 2, 5], "targets": list(TARGETS)}
    names = {"context_names": ["a", "b", "c", "d"], "target_names": ["e", "f"]}
    result = {
        "title": "Noise on three scenes", "made": "2026-01-01T00:00:00", "command": "elvsm compare",
        "code": {"version": "1", "commit": None}, "versions": {"torch": "2"}, "beside": "nothing", "data": "data",
        "machine": {"processor": "CPU", "cores": 1, "threads": 1, "device": "cpu"}, "background": "white",
        "image_size": [SIZE, SIZE], "context_views": list(COUNTS), "metrics": METRICS, "methods": methods,
        "scenes": [{"name": name, **frames, **names} for name in SCENES], "records": records, "notes": ["A note."],
        "videos": [],
    }  # fmt: skip
    result["plots"] = write_plots(root, result)
    write_page(root / "index.html", result)
    return root
