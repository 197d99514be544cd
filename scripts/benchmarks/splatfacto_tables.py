"""Tables of scripts/benchmarks/against_splatfacto.py, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from elvsm_nerfstudio.compare.scoring import METRICS, metric_cell
from elvsm_nerfstudio.evaluation.report import table_row

SHOWN = ("psnr", "lpips_vgg")
"""Metrics in the tables and the plot; the JSON has all."""
GAUSSIANS, NETWORK, BOTH = "splatfacto-sparse", "efficient-lvsm-plus-tiny", "splatfacto-lvsm"
ROWS = {GAUSSIANS: f"`{GAUSSIANS}`", NETWORK: f"`{NETWORK}`, the network alone", BOTH: f"`{BOTH}`"}


class Goal(NamedTuple):
    """What was aimed at on objects, before it was measured."""

    psnr: float
    """At least, in dB."""
    lpips: Optional[float] = None
    """At most; below the two others' where it is None."""

    def __str__(self) -> str:
        return f"{self.psnr:g}, {'below both' if self.lpips is None else self.lpips}"

    def outcome(self, psnr: float, lpips: float, others: Sequence[float]) -> str:
        """What came of it; ``others`` are the LPIPS of the other two methods."""
        met = lpips < min(others) if self.lpips is None else lpips <= self.lpips
        below = "met" if psnr >= self.psnr else f"missed by {self.psnr - psnr:.2f} dB"
        return f"{below}, {'met' if met else 'missed'}"


GOALS = {2: Goal(20), 4: Goal(24.5), 8: Goal(25.5, 0.111)}
"""By the number of context views."""


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of each comparison."""
    parts = []
    for name, result in results.items():
        methods = result["methods"]
        shown = [metric for metric in SHOWN if any(metric in s for found in methods.values() for s in found.values())]
        counts = [str(count) for count in result["context_views"]]
        head = [f"{METRICS[metric][0]} from {counts[0]} views" for metric in shown]
        cells = ["method", *(cell for first in head for cell in (first, *counts[1:]))]
        images = sum(len(scene["targets"]) for scene in result["scenes"])
        lines = [f"**{name}**: {len(result['scenes'])} scene(s), {images} images.", "", *_head(cells)]
        for method, found in methods.items():
            rows = [(found[count], metric) for metric in shown for count in counts]
            cells = [metric_cell({"metrics": row} if metric in row else row, metric) for row, metric in rows]
            lines.append(table_row([method, *cells]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """How splatfacto-lvsm stands on objects beside the two that it is made of, and beside splatfacto on everything.

    Raises:
        ValueError: for a JSON without objects, one of the three methods, or a number of views that has a goal.
    """
    for method in ROWS:
        for count in GOALS:
            if "psnr" not in results.get("objects", {}).get("methods", {}).get(method, {}).get(str(count), {}):
                raise ValueError(f"the summary: expected scores of {method} on objects from {count} views")
    found = {
        method: {count: tuple(results["objects"]["methods"][method][str(count)][m] for m in SHOWN) for count in GOALS}
        for method in ROWS
    }
    lines = _head(["on objects, PSNR in dB, LPIPS (VGG) from", *(f"{count} views" for count in GOALS)])
    for method, title in ROWS.items():
        cells = [", ".join(_marked([found[m][count] for m in ROWS], found[method][count])) for count in GOALS]
        lines.append(table_row([title, *cells]))
    lines.append(table_row(["goal", *GOALS.values()]))
    outcomes = [
        goal.outcome(*found[BOTH][count], [found[m][count][1] for m in (GAUSSIANS, NETWORK)])
        for count, goal in GOALS.items()
    ]
    lines.append(table_row(["outcome", *outcomes]))
    lines += ["", *_head([f"PSNR of `{BOTH}` over `{GAUSSIANS}`, dB, from", *(f"{count} views" for count in GOALS)])]
    for name, result in results.items():
        lines.append(table_row([name, *(_ahead(result["methods"], count) for count in GOALS)]))
    return "\n".join(lines)


def _head(cells: Sequence[str]) -> list[str]:
    return [table_row(cells), table_row(["---"] * len(cells))]


def _marked(all_scores: Sequence[tuple[float, float]], scores: tuple[float, float]) -> list[str]:
    """PSNR and LPIPS in words, in bold what no other's is better than, as far as digits show."""
    marked = []
    for column, metric in enumerate(SHOWN):
        higher, digits = METRICS[metric][2:4]
        shown = [f"{row[column]:.{digits}f}" for row in all_scores]
        value = f"{scores[column]:.{digits}f}"
        marked.append(f"**{value}**" if value == (max if higher else min)(shown, key=float) else value)
    return marked


def _ahead(methods: Mapping[str, Mapping[str, Any]], count: int) -> str:
    both, gaussians = (methods.get(method, {}).get(str(count), {}).get("psnr") for method in (BOTH, GAUSSIANS))
    if both is None or gaussians is None:
        return "failed"
    return f"{round(both - gaussians, 2) + 0.0:+.2f}"  # no -0.00
