"""A comparison's plots, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elvsm_nerfstudio.compare.scoring import METRICS, cost
from elvsm_nerfstudio.evaluation.report import write_figure

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#8b5cf6", "#d4a017", "#06b6d4", "#ec4899")
"""Of the methods in their order; baselines are grey."""
BASELINE_COLOURS = ("#8a8f98", "#b3b7be")
INK = {"light": "#1f2328", "dark": "#e6e8eb"}


def method_colours(methods: list[Mapping[str, Any]]) -> dict[str, str]:
    """Each method's colour by name."""
    learned = iter(COLOURS * len(methods))
    baselines = iter(BASELINE_COLOURS * len(methods))
    return {method["name"]: next(baselines if method["kind"] == "baseline" else learned) for method in methods}


def write_plots(folder: Path, result: Mapping[str, Any]) -> list[str]:
    """Writes ``quality_views_*.png`` and ``quality_time_*.png``, light and dark; returns which of the two there are."""
    kinds = {"quality_time": _against_time}
    if len(result["context_views"]) > 1:
        kinds = {"quality_views": _against_views, **kinds}
    for kind, draw in kinds.items():
        for theme, ink in INK.items():
            _write(folder / f"{kind}_{theme}.png", ink, draw, result)
    return list(kinds)


def _against_views(axes, result: Mapping[str, Any], metric: str, better: str) -> None:
    counts = result["context_views"]
    for method, colour in _methods(result):
        found = {count: method["summaries"][str(count)].get("metrics") for count in counts}
        points = [(count, metrics[metric]) for count, metrics in found.items() if metrics]
        if points:
            axes.plot(*zip(*points), marker="o", color=colour, label=method["name"])
    axes.set(xlabel="context views", ylabel=better)
    axes.set_xticks(counts)


def _against_time(axes, result: Mapping[str, Any], metric: str, better: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for method, colour in _methods(result):
        done = {count: method["summaries"][str(count)] for count in result["context_views"]}
        done = {count: found for count, found in done.items() if "metrics" in found}
        points = [(cost(found, "first_picture_seconds"), found["metrics"][metric]) for found in done.values()]
        if points:
            axes.plot(*zip(*points), marker="o", linewidth=1, color=colour, label=method["name"])
        for count, point in zip(done, points):
            axes.annotate(count, point, (5, 3), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xlabel="seconds from photos to the first picture", ylabel=better, xscale="log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _methods(result: Mapping[str, Any]):
    colours = method_colours(result["methods"])
    return [(method, colours[method["name"]]) for method in result["methods"]]


def _write(path: Path, ink: str, draw, result: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {key: ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")}
    style |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
    shown = [name for name in ("psnr", "lpips_vgg", "ssim") if name in result["metrics"]][:2]
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), dpi=110, layout="constrained")
        for axis, name in zip(axes, shown):
            label, unit, higher, _ = METRICS[name]
            draw(
                axis,
                result,
                name,
                f"{label}{f' in {unit}' if unit else ''}, {'higher' if higher else 'lower'} is better",
            )
            axis.grid(alpha=0.25, color=ink)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        write_figure(path, figure, transparent=True)
