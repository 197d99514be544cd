"""A study's tables, plots and pictures, from what is in its study.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from elvsm_nerfstudio.compare.scoring import METRICS, read_picture
from elvsm_nerfstudio.evaluation.report import sheet, table_row, write_figure, write_image
from scripts.study.scoring import CURVE_VIEWS, Split
from scripts.study.variants import REFERENCE

BASELINE_TITLES = {
    "copy_nearest": "copying the nearest context view",
    "mean_of_context": "the mean of the context views",
}

Result = Mapping[str, Any]
"""The content of study.json, see ``run_study.Study.result``."""
Row = Mapping[str, Any]
"""A variant in it."""


def markdown(result: Result) -> str:
    """All tables."""
    machine, settings = result["machine"], result["settings"]
    budget = f"{settings['minutes']:g} minutes each" if settings["steps"] is None else f"{settings['steps']} steps each"
    parts = [
        f"# Study on {Path(settings['data']).name}, {budget}",
        f"{machine['processor']}, {settings['threads']} thread(s), device {machine['device']}; torch "
        f"{result['versions']['torch']}. Code {result['code']['version']} ({result['code']['commit']}).",
    ]
    done = [row for row in result["variants"] if _finished(row)]
    if done:
        parts += [_main_table(result["variants"]), *_by_views(result, "val")]
        parts += ["![Validation PSNR against steps and minutes](curves.png)"]
        parts += ["![Validation PSNR against the number of context views](views.png)"]
        shown = [*BASELINE_TITLES.values(), *(row["name"] for row in done)]
        parts += [
            f"![Validation scenes](pictures.png)\n\nRows from the top: {CURVE_VIEWS} context views, the truth, "
            f"{', '.join(shown)}."
        ]
        if any("test" in run for row in done for run in row["seeds"].values()):
            parts += _by_views(result, "test")
    parts += [f"{row['name']} has failed:\n\n```\n{row['error']}\n```" for row in result["variants"] if row["error"]]
    plans = {row["name"]: row["plan"] for row in result["variants"] if row["plan"]}
    options = {
        name: " ".join(f"--{key} {value}" for key, value in plan["options"].items()) for name, plan in plans.items()
    }
    parts += [f"Made by `{result['command']}`. The variants, without what is the same for all (data, seed, schedule):"]
    parts += ["\n".join(f"- {name}: `ns-train {plan['method']} {options[name]}`" for name, plan in plans.items())]
    return "\n\n".join(parts) + "\n"


def _main_table(rows: Sequence[Row]) -> str:
    common = min(row["plan"]["steps"] for row in rows if _finished(row))
    reference = next((row for row in rows if row["name"] == REFERENCE and _finished(row)), None)
    head = [
        "variant", "what it tests", "seeds", "steps", "minutes", "wall clock", "PSNR", f"over {REFERENCE}",
        f"PSNR after {common:,} steps", f"over {REFERENCE}",
    ]  # fmt: skip
    lines = [
        f"Validation PSNR in dB from {CURVE_VIEWS} context views, means over images and seeds (lowest to highest seed "
        "in brackets). Each training's schedule ends with its own last step, so at equal steps the others had more "
        "learning rate left. Minutes: of training steps, on a core of its own (wall-clock time x processor time / "
        "wall-clock time of the process); wall clock: of the whole process, start and checkpoints included.",
        "",
        table_row(head),
        table_row(["---"] * len(head)),
    ]
    for row in rows:
        if not _finished(row):
            state = "failed" if row["error"] else "not done"
            lines.append(table_row([row["name"], row["tests"], *[state] * (len(head) - 2)]))
            continue
        runs = _runs(row)
        minutes = statistics.fmean(run["training"]["seconds"] for run in runs) / 60
        wall = statistics.fmean(sum(s.get("wall_seconds", 0) for s in run["training"]["sessions"]) for run in runs) / 60
        cells = [row["name"], row["tests"], len(runs), f"{row['plan']['steps']:,}", f"{minutes:.1f}", f"{wall:.1f}"]
        for value in (_at_the_end, lambda run: _after(run["curve"], common)):
            values = [value(run) for run in runs]
            compared = reference and [value(run) for run in _runs(reference)]
            cells += [_spread(values), _gain(values, compared, row is reference)]
        lines.append(table_row(cells))
    return "\n".join(lines)


def _by_views(result: Result, split: Split) -> list[str]:
    """A table of each metric against the number of context views."""
    rows = [row for row in result["variants"] if _finished(row) and any(split in run for run in _runs(row))]
    baselines = result["baselines"][split]
    counts = [str(count) for count in result["settings"]["context_views"]]
    example = next(iter(baselines.values()))[counts[0]]
    images, scenes = (int(example[name]) for name in ("num_images", "num_scenes"))
    title = {"val": "Validation", "test": "Test"}[split]
    parts = [f"## {title} split by number of context views: {scenes} scenes, {images} images; +- over images"]
    for metric in (name for name in METRICS if name in example):
        label, unit, higher, digits = METRICS[metric]
        head = [f"{label}{f' in {unit}' if unit else ''} {'↑' if higher else '↓'}", *counts]
        lines = [table_row(head), table_row(["---"] * len(head))]
        tables = [(BASELINE_TITLES[name], [scores]) for name, scores in baselines.items()]
        tables += [(row["name"], [run[split] for run in _runs(row) if split in run]) for row in rows]
        for name, seeds in tables:
            cells = []
            for count in counts:
                mean, std = (
                    statistics.fmean(scores[count][key] for scores in seeds) for key in (metric, f"{metric}_std")
                )
                cells.append(f"{mean:.{digits}f} +- {std:.{digits}f}")
            lines.append(table_row([name, *cells]))
        parts.append("\n".join(lines))
    return parts


def write_curves(path: Path, result: Result) -> None:
    """Validation PSNR against steps and against minutes, a line for each training."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained", dpi=110)
    for axis, key, label in zip(axes, ("step", "minutes"), ("steps", "minutes of training steps")):
        for run, style in _styled(result):
            axis.plot([p[key] for p in run["curve"]], [p["psnr"] for p in run["curve"]], markersize=3, **style)
        for (name, scores), dashes in zip(result["baselines"]["val"].items(), ("--", ":")):
            level = scores[str(CURVE_VIEWS)]["psnr"]
            axis.axhline(level, color="grey", linestyle=dashes, linewidth=1, label=BASELINE_TITLES[name])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"validation PSNR in dB, {CURVE_VIEWS} context views")
    _finish(figure, axes[0], path)


def write_views(path: Path, result: Result) -> None:
    """Validation PSNR against the number of context views, with the baselines."""
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained", dpi=110)
    counts = result["settings"]["context_views"]
    for run, style in _styled(result):
        axis.plot(counts, [run["val"][str(count)]["psnr"] for count in counts], **style)
    for (name, scores), dashes in zip(result["baselines"]["val"].items(), ("--", ":")):
        levels = [scores[str(count)]["psnr"] for count in counts]
        axis.plot(counts, levels, color="grey", linestyle=dashes, label=BASELINE_TITLES[name])
    axis.set(xlabel="context views", ylabel="validation PSNR in dB", xscale="log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    _finish(figure, axis, path)


def write_pictures(path: Path, baselines: Path, rows: Sequence[Path]) -> None:
    """The baselines' sheet, and below it a row of renders for each variant."""
    height = read_picture(rows[0]).shape[0]
    top = read_picture(baselines)
    # The sheet's own rows again, so that the gaps are the same.
    gap = sheet([[top], [top]]).shape[0] - 2 * top.shape[0]
    bands = [top[first : first + height] for first in range(0, top.shape[0], height + gap)]
    write_image(path, sheet([[band] for band in (*bands, *map(read_picture, rows))]))


def _styled(result: Result):
    """Each finished training with its line's style: a colour for each variant, seeds after the first without label."""
    colours = plt.get_cmap("tab20").colors
    for index, row in enumerate(row for row in result["variants"] if _finished(row)):
        for position, run in enumerate(_runs(row)):
            label = row["name"] if position == 0 else None
            dashes = "-" if position == 0 else "--"
            yield run, {"color": colours[index % 20], "label": label, "linestyle": dashes, "marker": "o"}


def _finish(figure: plt.Figure, axis: plt.Axes, path: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    write_figure(path, figure)


def _finished(row: Row) -> bool:
    return bool(_runs(row))


def _runs(row: Row) -> list[Mapping[str, Any]]:
    """Trainings that have been scored, in order of their seeds."""
    return [run for run in row["seeds"].values() if "val" in run]


def _at_the_end(run: Mapping[str, Any]) -> float:
    return run["val"][str(CURVE_VIEWS)]["psnr"]


def _after(curve: Sequence[Mapping[str, float]], steps: int) -> Optional[float]:
    """PSNR after so many steps, between the curve's points on a straight line; None before the first."""
    known = [point["step"] for point in curve]
    if steps < known[0]:
        return None
    return float(np.interp(steps, known, [point["psnr"] for point in curve]))


def _spread(values: Sequence[Optional[float]]) -> str:
    if None in values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _gain(values: Sequence[Optional[float]], reference: Optional[Sequence[Optional[float]]], itself: bool) -> str:
    if reference is None or itself or None in values or None in reference:
        return "–"
    return f"{statistics.fmean(values) - statistics.fmean(reference):+.2f}"
