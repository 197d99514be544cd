"""The page of scripts/benchmarks/gpu.py: its numbers as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PUBLISHED = {
    4: (24.37, 123.1),
    8: (28.62, 286.0),
    16: (42.96, 801.7),
    32: (72.84, 2592.0),
    48: (103.26, 5408.0),
    64: (138.43, 9231.0),
}
"""Milliseconds that the paper gives for N views and 8 targets, its own and LVSM's; for which GPU it does not say."""


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    peak = result["peak_flops"]
    known = f", peak {peak / 1e12:.0f} TFLOP/s" if peak else ""
    parts = [
        "# On a GPU",
        f"{result['device']}, torch {result['torch']}, CUDA {result['cuda']}, {result['precision']}{known}, "
        f"{result['sizes']} sizes. Medians of {result['repeats']} runs, smallest to largest in brackets.",
        "## The paper's table",
        f"One more view is taken in and {result['targets']} targets are rendered, in ms.",
        _paper(result["paper"]),
    ]
    for title, name in (
        ("Frames along a path", "path"),
        ("A training step", "training"),
        ("Attention", "attention"),
        ("Encoding, rendering, appending", "calls"),
        ("Agreement with fp32 on the CPU", "agreement"),
        ("Tests on a GPU", "tests"),
    ):
        parts += [f"## {title}", _table(result[name])]
    return "\n\n".join(parts) + "\n"


def _paper(rows: list[dict[str, Any]]) -> str:
    if "views" not in rows[0]:
        return _table(rows)
    cells: dict[int, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["views"], {"views": str(row["views"])})[row["method"]] = _time(row)
    for count, line in cells.items():
        if count in PUBLISHED:
            line["published, ours"], line["published, LVSM"] = (f"{ms:.1f}" for ms in PUBLISHED[count])
    return _markdown(list(cells.values()))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = {}
        for name, value in row.items():
            if name == "ms" or name in ("left_out", "failed"):
                line["ms"] = _time(row)
            elif name == "flops":
                line["GFLOP"] = f"{value / 1e9:.4g}"
            elif name == "peak_bytes":
                line["peak MiB"] = f"{value / 2**20:.1f}"
            else:
                line[name.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(line)
    return _markdown(lines)


def _time(row: dict[str, Any]) -> str:
    if "ms" in row:
        return "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["ms"])
    return str(row.get("left_out") or row.get("failed", "")).replace("\n", " ").replace("|", "/")


def _markdown(lines: Sequence[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names, ["---"] * len(names), *([line.get(name, "") for name in names] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
