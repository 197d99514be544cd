"""What an evaluation leaves behind: averages, what was evaluated, by which code, and a plot."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import elvsm_nerfstudio
from elvsm_nerfstudio.evaluation.report import write_figure
from elvsm_nerfstudio.views import ViewSet

Row = Mapping[str, Any]
"""One scored image: scene, image, context_views, and its metrics."""


def averages(rows: Sequence[Row], metrics: Sequence[str], get_std: bool) -> dict[str, float]:
    """Means over images (``psnr``) and over scenes' means (``psnr_per_scene``), and the spread over images."""
    result: dict[str, float] = {}
    scenes: dict[str, list[Row]] = {}
    for row in rows:
        scenes.setdefault(row["scene"], []).append(row)
    for name in metrics:
        values = [row[name] for row in rows]
        result[name] = statistics.fmean(values)
        if get_std:
            result[f"{name}_std"] = statistics.pstdev(values)
        per_scene = [statistics.fmean(row[name] for row in listed) for listed in scenes.values()]
        result[f"{name}_per_scene"] = statistics.fmean(per_scene)
    return {**result, "num_images": float(len(rows)), "num_scenes": float(len(scenes))}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of some times."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Fingerprint:
    """SHA-256 of everything that was scored: names, pixels and cameras, as the network and the metrics got them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, scene: str, image_names: Sequence[str], views: ViewSet) -> None:
        self._hash.update("\0".join((scene, *image_names, "")).encode())
        for part in (views.context, views.target):
            self._hash.update((part.rgb * 255).round().byte().cpu().numpy().tobytes())
            self._hash.update(part.camera_to_world.float().cpu().numpy().tobytes())
            self._hash.update(part.intrinsics.float().cpu().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def code_version() -> dict[str, Optional[str]]:
    """The package's version and, where it is a git checkout, its commit."""
    package = Path(elvsm_nerfstudio.__file__).parent

    def git(*command: str) -> Optional[str]:
        try:
            done = subprocess.run(["git", "-C", str(package), *command], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below somebody else's repository is not of that repository.
    tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = git("describe", "--always", "--dirty", "--abbrev=12") if tracked else None
    return {"version": elvsm_nerfstudio.__version__, "commit": commit}


def plot_against_views(path: Path, title: str, by_views: Mapping[int, Mapping[str, float]]) -> None:
    """Plots PSNR against the number of context views, the model's and the baseline's, with the spread over images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted(by_views)
    figure, axes = plt.subplots(figsize=(6, 4), dpi=110)
    for key, label in (("psnr", "this run"), ("psnr_copy_nearest", "copying the nearest context view")):
        means = [by_views[count][key] for count in counts]
        deviations = [by_views[count].get(f"{key}_std", 0.0) for count in counts]
        axes.errorbar(counts, means, yerr=deviations, marker="o", capsize=3, label=label)
    axes.set(title=title, xlabel="context views", ylabel="PSNR in dB (bars: standard deviation over images)")
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    write_figure(path, figure)
