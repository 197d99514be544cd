"""Draws the PSNR of runs against steps and time, from their tensorboard logs: all validation scenes, where a run
evaluated them (``--steps-per-eval-all-images N``), the floor of copying the nearest context view, and, for a run alone,
its training batches.

    python scripts/plot_run.py --runs outputs/NAME/METHOD/TIMESTAMP outputs/OTHER/METHOD/TIMESTAMP --output curve.png

Curves are named by what --experiment-name was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from run_log import read_events
from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

from elvsm_nerfstudio.evaluation.report import write_figure, write_json

EVALUATION = "Eval Images Metrics Dict (all images)/"
TRAINING, VALIDATION, COPYING = "training batches", "validation scenes", "copying the nearest context view"
TAGS = {TRAINING: "Train Metrics Dict/psnr", VALIDATION: f"{EVALUATION}psnr", COPYING: f"{EVALUATION}psnr_copy_nearest"}

Curve = list[dict[str, float]]


@dataclass
class PlotRun:
    """A picture of the curves, and the numbers in a JSON beside it."""

    runs: tuple[Path, ...]
    """Folders of runs on the same data, each with its config.yml and tensorboard events."""
    output: Path
    """PNG to write."""

    def main(self) -> None:
        """Draws.

        Raises:
            ValueError: for runs without such logs, and two of one name.
        """
        if len(self.runs) == 1:
            curves = read_curves(self.runs[0])
        else:
            curves = {}
            for run in self.runs:
                found = read_curves(run, (VALIDATION, COPYING))
                name = run.resolve().parents[1].name
                if name in curves:
                    raise ValueError(f"--runs: two are named {name}; expected different --experiment-name")
                curves |= {name: found.pop(VALIDATION), **found}
        write_curves(self.output, curves)
        write_json(self.output.with_suffix(".json"), curves)
        print(f"{self.output}, {self.output.with_suffix('.json')}")


def read_curves(run: Path, wanted: Sequence[str] = tuple(TAGS)) -> dict[str, Curve]:
    """Curves of ``TAGS`` from a run's tensorboard log. The first is needed, others may be missing.

    Args:
        run: its folder.

    Raises:
        ValueError: where the first is not there.
    """
    logged = read_events(run, list(TAGS.values()))
    found = {what: list(logged[tag].values()) for what, tag in TAGS.items() if tag in logged}
    if wanted[0] not in found:
        raise ValueError(
            f"{run} holds no tensorboard log of PSNR on {wanted[0]}; train with --vis tensorboard and, for "
            f"{VALIDATION}, --steps-per-eval-all-images N"
        )
    start = min(event.wall_time for curve in found.values() for event in curve)
    return {what: [_row(event, start) for event in found[what]] for what in wanted if what in found}


def _row(event: ScalarEvent, start: float) -> dict[str, float]:
    return {"step": event.step, "minutes": round((event.wall_time - start) / 60, 2), "psnr": round(event.value, 3)}


def write_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """A picture of curves by name."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), dpi=110, sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("step", "minutes"), ("steps", "minutes since the start, breaks included")):
        for name, curve in curves.items():
            style = dict(alpha=0.3, linewidth=1) if name == TRAINING else dict(marker="o", markersize=3)
            axis.plot([row[key] for row in curve], [row["psnr"] for row in curve], label=name, **style)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR, dB")
    axes[0].legend()
    write_figure(path, figure)


def main() -> None:
    """Command line."""
    try:
        tyro.cli(PlotRun, description=__doc__).main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
