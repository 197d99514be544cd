"""What compared methods score on the same images, and the tables of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from elvsm_nerfstudio.evaluation.metrics import flip_map, image_metrics
from elvsm_nerfstudio.evaluation.report import table_row, write_image
from elvsm_nerfstudio.evaluation.results import averages, spread

METRICS = {
    "psnr": ("PSNR", "dB", True, 2),
    "ssim": ("SSIM", "", True, 3),
    "lpips_vgg": ("LPIPS VGG", "", False, 3),
    "lpips_alex": ("LPIPS Alex", "", False, 3),
    "flip": ("FLIP", "", False, 3),
}
"""Label, unit, whether more is better, and digits to show."""
COSTS = {
    "first_picture_seconds": ("first picture", "s"),
    "render_ms": ("render a frame", "ms"),
    "peak_bytes": ("peak memory", "MiB"),
    "disk_bytes": ("on disk", "MiB"),
}
"""Label and unit; less is better for each."""

Record = Mapping[str, Any]
"""One method on one scene from some number of context views. ``method``, ``context_views``, ``scene``, ``status``
("done" or "failed"); if done ``images`` (a row of metrics for each target), ``first_picture_seconds``, ``render_ms`` of
each target, ``frames_per_call``, ``peak_bytes`` and ``disk_bytes``; if failed ``error``."""


def frame_file(frame: int) -> str:
    """Name of a frame's image: by its number, since files in several folders may share a name."""
    return f"{frame:05d}.png"


def read_picture(path: Path) -> Float[Tensor, "height width 3"]:
    """A PNG's colours in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)


def score(predictions: Path, truths: Path, errors: Path, frames: Sequence[int]) -> list[dict[str, float]]:
    """Metrics of each saved prediction, and its error map (FLIP) into the folder ``errors``."""
    rows = []
    for frame in frames:
        prediction, truth = (read_picture(folder / frame_file(frame)) for folder in (predictions, truths))
        rows.append({"frame": frame, **image_metrics(prediction, truth)})
        write_image(errors / frame_file(frame), flip_map(prediction, truth))
    return rows


def summary(records: Sequence[Record], metrics: Sequence[str]) -> dict[str, Any]:
    """Averages and spread over images, also scene by scene, and costs, of one method and number of context views.

    Scenes that failed are counted and left out of the averages.
    """
    done = [record for record in records if record["status"] == "done"]
    result: dict[str, Any] = {"num_done": len(done), "num_failed": len(records) - len(done)}
    if not done:
        return result
    rows = [{"scene": record["scene"], **row} for record in done for row in record["images"]]
    times = [ms for record in done for ms in record["render_ms"]]
    return {
        **result,
        "metrics": averages(rows, metrics, get_std=True),
        "scenes": {
            record["scene"]: averages([row for row in rows if row["scene"] == record["scene"]], metrics, get_std=True)
            for record in done
        },
        "first_picture_seconds": spread([record["first_picture_seconds"] for record in done]),
        "render_ms": spread(times),
        "peak_bytes": max(record["peak_bytes"] for record in done),
        "disk_bytes": max(record["disk_bytes"] for record in done),
    }


def cost(summary: Mapping[str, Any], name: str) -> Optional[float]:
    """A cost in the unit of ``COSTS``: the median of times, the largest of sizes; None where nothing was done."""
    value = summary.get(name)
    if value is None:
        return None
    return value["median"] if isinstance(value, Mapping) else value / 2**20


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison's tables, one for each number of context views."""
    machine, scenes = result["machine"], result["scenes"]
    parts = [
        f"# {result['title']}",
        f"{len(scenes)} scene{'s' if len(scenes) > 1 else ''}, "
        f"{sum(len(scene['targets']) for scene in scenes)} target images, "
        f"{result['image_size'][0]} x {result['image_size'][1]} pixels. Metrics are means over images +- standard "
        "deviation; times are medians, memory and sizes the largest.",
        f"{machine['processor']}, {machine['threads']} threads, device {machine['device']}; beside: "
        f"{result['beside']}. Code {result['code']['version']} ({result['code']['commit']}).",
    ]
    names = [name for name in METRICS if name in result["metrics"]]
    head = ["method", *(f"{METRICS[name][0]} {'↑' if METRICS[name][2] else '↓'}" for name in names)]
    head += [f"{label}, {unit}" for label, unit in COSTS.values()]
    for count in result["context_views"]:
        lines = [f"## {count} context views", table_row(head), table_row(["---"] * len(head))]
        for method in result["methods"]:
            found = method["summaries"][str(count)]
            title = method["name"]
            if found["num_failed"]:
                title += f" ({found['num_failed']} of {found['num_failed'] + found['num_done']} scenes failed)"
            cells = [metric_cell(found, name) for name in names]
            costs = [cost(found, name) for name in COSTS]
            lines.append(table_row([title, *cells, *map(_three_digits, costs)]))
        parts.append("\n".join(lines))
    parts += [f"- {note}" for note in result["notes"]]
    return "\n\n".join(parts) + "\n"


def metric_cell(found: Mapping[str, Any], name: str) -> str:
    """A metric in a table: mean and deviation of a method's summary."""
    if "metrics" not in found:
        return "failed"
    digits = METRICS[name][3]
    return f"{found['metrics'][name]:.{digits}f} +- {found['metrics'][f'{name}_std']:.{digits}f}"


def _three_digits(value: Optional[float]) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
