"""The efficiency benchmark's result as Markdown tables and as log-log curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from scripts.benchmarks.methods import CALLS, PATH_FRAMES, TARGETS

TITLES = {
    "encode": "(a) encode N views",
    "render": "(b) render 1 view from N",
    "append": f"(c) add 1 view to N, render {TARGETS}",
    "path": f"(d) {PATH_FRAMES} frames from N",
}
LABELS = {
    "cached": "ours, memory kept",
    "recomputing": "ours, recomputing",
    "upstream": "upstream's algorithm",
    "lvsm-decoder": "LVSM decoder-only",
    "lvsm-encoder-decoder": "LVSM encoder-decoder",
}


def tables(result: Mapping[str, Any]) -> str:
    """Goals, FLOPs at the paper's sizes, then times and memory as measured."""
    rows = result["rows"]
    cells = {(row["call"], row["method"], row["views"]): row for row in rows}
    parts = [_conditions(result), _goals(result["goals"]), _rates(result["matmul_rate"])]

    def paper(call: str, method: str, views: int) -> Optional[str]:
        found = result["paper_flops"].get(call, {}).get(method, {}).get(views)
        return None if found is None else f"{found / 1e9:,.0f}"

    def time(call: str, method: str, views: int) -> Optional[str]:
        ms = cells.get((call, method, views), {}).get("ms")
        return ms and f"{ms['median']:,.1f} ({ms['min']:,.1f} to {ms['max']:,.1f})"

    def peak(call: str, method: str, views: int) -> Optional[str]:
        found = cells.get((call, method, views), {}).get("peak_bytes")
        return found and f"{found / 2**20:,.1f}"

    paper_counts = sorted(next(iter(result["paper_flops"]["render"].values())))
    measured = sorted({row["views"] for row in rows})
    parts.append(_by_call("GFLOPs at 256 px, width 768, 12 + 12 layers (LVSM 24)", paper, paper_counts))
    parts.append(_by_call("Time in ms", time, measured))
    parts.append(_by_call("Peak memory in MiB, beside weights, images and what was remembered before", peak, measured))
    return "\n\n".join(parts) + "\n"


def page_part(result: Mapping[str, Any]) -> str:
    """What a page of docs/ shows: times with a column for each number of views, and the goals; at the paper's sizes,
    where few of the calls can be timed on a CPU, the rates."""
    if result["preset"] == "paper":
        about_rates = [goal for goal in result["goals"] if "matmul" in goal["goal"]]
        return "\n\n".join([_conditions(result), _rates(result["matmul_rate"]), _goals(about_rates)])
    counts = sorted({row["views"] for row in result["rows"]})
    lines = ["| ms, from N context views | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for call in CALLS:
        for method, label in LABELS.items():
            here = {
                r["views"]: r["ms"] for r in result["rows"] if (r["call"], r["method"]) == (call, method) and r["ms"]
            }
            if here:
                cells = [f"{here[count]['median']:,.0f}" if count in here else "-" for count in counts]
                last = here[max(here)]
                cells[counts.index(max(here))] += f" ({last['min']:,.0f} to {last['max']:,.0f})"
                lines.append(f"| {TITLES[call]}: {label} | " + " | ".join(cells) + " |")
    kept = {row["views"]: row for row in result["rows"] if (row["call"], row["method"]) == ("path", "cached")}
    peaks = [f"{kept[count]['peak_bytes'] / 2**20:,.0f}" for count in counts]
    lines.append("| peak MiB of (d), ours, beside images, weights and memory | " + " | ".join(peaks) + " |")
    met = [goal for goal in result["goals"] if goal["met"] is not None]
    return "\n\n".join([_conditions(result), "\n".join(lines), _goals(met)])


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, {result['device']}, "
        f"{result['precision']}, {result['image_size']} px, preset {result['preset']}, random weights; beside: "
        f"{result['beside']} (load {result['load_before']:.1f} before). Medians of {result['repeats']} turns (range)."
    )


def _by_call(title: str, cell: Callable[[str, str, int], Optional[str]], counts: Sequence[int]) -> str:
    parts = [f"### {title}"]
    for call in CALLS:
        methods = [method for method in LABELS if any(cell(call, method, count) for count in counts)]
        if methods:
            lines = [
                "| N | " + " | ".join(LABELS[method] for method in methods) + " |",
                "|---" * (len(methods) + 1) + "|",
            ]
            lines += [
                f"| {count} | " + " | ".join(cell(call, method, count) or "-" for method in methods) + " |"
                for count in counts
            ]
            parts.append(f"{TITLES[call]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _goals(outcomes: Sequence[Mapping[str, Any]]) -> str:
    lines = ["#### Goals", "", "| goal | wanted | found | met |", "|---|---|---|---|"]
    for outcome in outcomes:
        value = "not measured" if outcome["value"] is None else f"{outcome['value']:.3g}"
        value += f"; {outcome['within']} within" if "within" in outcome else ""
        met = {None: "-", True: "yes", False: "no"}[outcome["met"]]
        lines.append(f"| {outcome['goal']} | {outcome['target']} | {value} | {met} |")
    return "\n".join(lines)


def _rates(rates: Mapping[str, Any]) -> str:
    lines = ["#### Rate: encode 2 views and render 1, against the same matrix products alone", ""]
    lines += ["| precision | network, ms | matrix products, ms | TFLOP/s of those | network / matmul rate |"]
    lines += ["|---|---|---|---|---|"]
    for precision, found in rates["precisions"].items():
        ratio = found["network_over_matmul_rate"]
        lines.append(
            f"| {precision} | {found['ms']['network']['median']:,.1f} | {found['ms']['matmuls']['median']:,.1f} | "
            f"{found['matmul_tflops']:.3g} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
        )
    return "\n".join(lines)


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """FLOPs at the paper's sizes, times and peak memory against the number of views; a panel for each call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paper = [
        {"call": call, "method": method, "views": count, "value": value / 1e9}
        for call, methods in result["paper_flops"].items()
        for method, counts in methods.items()
        for count, value in counts.items()
    ]
    time = [{**row, "value": row["ms"] and row["ms"]["median"]} for row in result["rows"]]
    peak = [{**row, "value": row["peak_bytes"] and row["peak_bytes"] / 2**20} for row in result["rows"]]
    kinds = (
        ("GFLOPs, paper's sizes", paper),
        (f"ms, preset {result['preset']}", time),
        (f"peak MiB, preset {result['preset']}", peak),
    )
    figure, axes = plt.subplots(len(kinds), len(CALLS), figsize=(16, 10), dpi=90, squeeze=False)
    for line, (label, rows) in zip(axes, kinds):
        for panel, call in zip(line, CALLS):
            for colour, (method, name) in enumerate(LABELS.items()):
                points = [(r["views"], r["value"]) for r in rows if (r["call"], r["method"]) == (call, method)]
                points = sorted(point for point in points if point[1])
                if points:
                    panel.plot(*zip(*points), marker="o", ms=3, color=f"C{colour}", label=name)
            panel.set(xscale="log", yscale="log", title=TITLES[call], xlabel="context views N", ylabel=label)
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.set_visible(bool(panel.lines))
    axes[0, 1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
