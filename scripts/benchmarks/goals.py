"""What the efficiency benchmark's numbers are held against; each outcome is stored with its value, met or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Optional

Row = Mapping[str, Any]


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All goals with what was found: ``met`` is None where this run did not measure what the goal is about."""
    rows = {(row["call"], row["method"], row["views"]): row for row in result["rows"]}
    return [
        *flop_goals(result["paper_flops"]),
        time_ratio_goal(rows),
        slope_goal(rows),
        *matmul_goals(result["matmul_rate"]["precisions"], at_paper_size=result["preset"] == "paper"),
        memory_goal(rows),
    ]


def flop_goals(flops: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ratios of counted FLOPs at the paper's sizes."""

    def ratio(call: str, other: str, views: int) -> Optional[float]:
        found = flops[call].get(other, {}).get(views)
        return None if found is None else found / flops[call]["cached"][views]

    return [
        at_least("FLOPs of append at 64 views, LVSM decoder-only / ours", ratio("append", "lvsm-decoder", 64), 120.0),
        at_least("FLOPs of path from 8 views, upstream / ours", ratio("path", "upstream", 8), 2.2),
    ]


def time_ratio_goal(rows: Mapping[tuple, Row]) -> dict[str, Any]:
    """Other methods' times over ours, turn by turn, divided by the same ratio of FLOPs: how far from 1."""
    details = []
    for (call, method, views), row in rows.items():
        ours = rows.get((call, "cached", views))
        if method == "cached" or not ours or not ours["ms_runs"] or not row["ms_runs"] or not row["flops"]:
            continue
        time_ratio = statistics.median(a / b for a, b in zip(row["ms_runs"], ours["ms_runs"]))
        flop_ratio = row["flops"] / ours["flops"]
        details.append(
            {
                "call": call,
                "method": method,
                "views": views,
                "time_ratio": time_ratio,
                "flop_ratio": flop_ratio,
                "time_over_flops": time_ratio / flop_ratio,
            }
        )
    worst = max(details, key=lambda d: abs(d["time_over_flops"] - 1), default=None)
    return {
        "goal": "time ratio / FLOP ratio of every method, call and number of views, the one farthest from 1",
        "target": "0.8 to 1.2",
        "value": worst and worst["time_over_flops"],
        "met": worst and 0.8 <= worst["time_over_flops"] <= 1.2,
        "within": f"{sum(0.8 <= d['time_over_flops'] <= 1.2 for d in details)} of {len(details)}",
        "details": details,
    }


def slope_goal(rows: Mapping[tuple, Row]) -> dict[str, Any]:
    """Least-squares slopes against the number of views, of time and of FLOPs, each in units of its own mean."""
    found = sorted(
        (views, row["ms"]["median"], row["flops"])
        for (call, method, views), row in rows.items()
        if call == "render" and method == "cached" and row["ms"]
    )
    value, fit = None, None
    if len(found) >= 3:
        views, ms, flops = zip(*found)
        value = relative_slope(views, ms) / relative_slope(views, flops)
        fit = statistics.correlation(views, ms) ** 2
    return {
        "goal": "slope of render's time against views / slope of its FLOPs (each over its mean)",
        "target": "0.9 to 1.1",
        "value": value,
        "met": value and 0.9 <= value <= 1.1,
        "r_squared_of_time": fit,
        "views": [views for views, _, _ in found],
    }


def relative_slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope / statistics.fmean(y)


def matmul_goals(precisions: Mapping[str, Any], at_paper_size: bool) -> list[dict[str, Any]]:
    """The network's rate over that of its matrix products alone; the goals are for the paper's sizes."""
    outcomes = []
    for precision, target in (("fp32", 0.9), ("bf16", 0.75)):
        value = precisions[precision]["network_over_matmul_rate"]["median"]
        outcome = at_least(f"encode 2 and render 1 over the matmul rate, {precision}", value, target)
        outcomes.append(outcome if at_paper_size else {**outcome, "met": None})
    return outcomes


def memory_goal(rows: Mapping[tuple, Row]) -> dict[str, Any]:
    """Peak of a path over the bytes of the memory and the peak of one render; the goal is for 64 views."""
    counts = [
        views
        for (call, method, views), row in rows.items()
        if (call, method) == ("path", "cached") and row["peak_bytes"] and rows["render", "cached", views]["peak_bytes"]
    ]
    value = None
    if counts:
        path, render = (rows[call, "cached", max(counts)] for call in ("path", "render"))
        value = path["peak_bytes"] / (render["memory_bytes"] + render["peak_bytes"])
    return {
        "goal": "peak memory of path / (the memory's own bytes + peak of one render), at 64 views",
        "target": "at most 1.3",
        "value": value,
        "met": value <= 1.3 if counts and max(counts) == 64 else None,
        "views": max(counts, default=None),
    }


def at_least(goal: str, value: Optional[float], target: float) -> dict[str, Any]:
    return {
        "goal": goal,
        "target": f"at least {target}",
        "value": value,
        "met": None if value is None else value >= target,
    }
