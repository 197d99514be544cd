"""The training benchmark's result as Markdown tables and as bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 2**30


def tables(result: Mapping[str, Any]) -> str:
    """Goals, then every variant, then what the registered methods need."""
    parts = [step_table(result)]
    if result["needs"]:
        parts.append(needs_of_methods(result))
    return "\n\n".join(parts) + "\n"


def step_table(result: Mapping[str, Any]) -> str:
    """Conditions, goals and every variant of a step."""
    machine = result["machine"]
    parts = [
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, {result['device']}; "
        f"{result['batch']}; {result['network']}; beside: {result['beside']} (load {result['load_before']:.1f} "
        f"before). Medians of {result['repeats']} turns (range). Loss: mean squared error. Peak memory is beside "
        "weights and moments.",
        _goals(result["goals"]),
        _variants(result),
    ]
    return "\n\n".join(parts)


def _goals(goals: Mapping[str, Any]) -> str:
    lines = ["| ours against upstream | times as fast | memory |", "|---|---|---|"]
    for row in goals["found"]:
        speed, memory = ("met" if row[f"{kind}_met"] else "not met" for kind in ("speed", "memory"))
        lines.append(
            f"| {row['precision']} | {row['speed']:.2f} (goal {goals['speed']}: {speed}) | {row['memory']:.2f} "
            f"(goal {goals['memory']}: {memory}) |"
        )
    return "\n".join(lines)


def _variants(result: Mapping[str, Any]) -> str:
    lines = [
        "| precision | step | ms | samples/s | times as fast as upstream | peak MiB | of upstream's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ms, fast = row["ms"], row["times_as_fast_as_upstream"]
        lines.append(
            f"| {row['precision']} | {row['variant']} | {ms['median']:,.0f} ({ms['min']:,.0f} to {ms['max']:,.0f}) | "
            f"{row['samples_per_second']:.2f} | {fast['median']:.2f} ({fast['min']:.2f} to {fast['max']:.2f}) | "
            f"{row['peak_bytes'] / 2**20:,.0f} | {row['of_upstreams_memory']:.2f} |"
        )
    return "\n".join(lines)


def needs_of_methods(result: Mapping[str, Any]) -> str:
    """Counted FLOPs and memory of the registered methods."""
    a100 = result["a100"]
    rate = f"{a100['utilisation']:.0%} of its {a100['tflops']} TFLOP/s"
    lines = [
        "| method | gradient checkpointing | TFLOPs a scene | memory: GiB, and for each scene | ms a scene, A100 |",
        "|---|---|---|---|---|",
    ]
    for row in result["needs"]:
        checkpointing = ("on" if row["gradient_checkpointing"] else "off") + (" (default)" if row["default"] else "")
        lines.append(
            f"| {row['method']} | {checkpointing} | {row['flops_per_scene'] / 1e12:,.2f} | "
            f"{row['bytes_without_scenes'] / GIB:.2f} + {row['bytes_per_scene'] / GIB:.2f} | "
            f"{1e3 * row['a100_seconds_per_scene']:,.1f} |"
        )
    note = (
        "Counted: FLOPs of forward and backward (three times the forward's, four with checkpointing). Extrapolated: "
        f"memory in bf16, from small batches on the CPU. Computed: time on an A100 at {rate}, a guess. Without "
        "perceptual loss and REPA."
    )
    return note + "\n\n" + "\n".join(lines)


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Time and peak memory of every variant; a column for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    precisions = list(dict.fromkeys(row["precision"] for row in result["rows"]))
    figure, axes = plt.subplots(2, len(precisions), figsize=(7 * len(precisions), 7), dpi=90, squeeze=False)
    for column, precision in enumerate(precisions):
        rows = [row for row in result["rows"] if row["precision"] == precision][::-1]
        names = [row["variant"] for row in rows]
        colours = ["C1" if name.startswith("upstream") else "C0" for name in names]
        median = [row["ms"]["median"] for row in rows]
        low, high = ([abs(row["ms"][end] - row["ms"]["median"]) for row in rows] for end in ("min", "max"))
        axes[0, column].barh(names, median, xerr=[low, high], color=colours, ecolor="grey")
        axes[0, column].set(title=f"{precision}: ms a step")
        axes[1, column].barh(names, [row["peak_bytes"] / 2**20 for row in rows], color=colours)
        axes[1, column].set(title=f"{precision}: peak MiB")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
