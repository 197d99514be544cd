"""Draws a run's PSNR against steps and time, from its tensorboard log: training batches and, where the run evaluated
them (``--steps-per-eval-all-images N``), all validation scenes beside the floor of copying the nearest context view.

    python scripts/plot_run.py --run outputs/NAME/METHOD/TIMESTAMP --output curve.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from elvsm_nerfstudio.evaluation.report import write_json

EVALUATION = "Eval Images Metrics Dict (all images)/"


@dataclass
class PlotRun:
    """A picture of a run's curves, and the numbers in a JSON beside it."""

    run: Path
    """The run's folder, with its config.yml and tensorboard events."""
    output: Path
    """PNG to write."""

    def main(self) -> None:
        events = EventAccumulator(str(self.run))
        events.Reload()
        names = {
            "training batches": "Train Metrics Dict/psnr",
            "validation scenes": f"{EVALUATION}psnr",
            "copying the nearest context view": f"{EVALUATION}psnr_copy_nearest",
        }
        curves = {label: events.Scalars(tag) for label, tag in names.items() if tag in events.Tags()["scalars"]}
        if not curves:
            raise SystemExit(f"error: {self.run} holds no tensorboard log with PSNR; train with --vis tensorboard")
        start = min(event.wall_time for curve in curves.values() for event in curve)
        rows = {label: [_row(event, start) for event in curve] for label, curve in curves.items()}

        _, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
        for axis, key, label in zip(axes, ("step", "minutes"), ("steps", "minutes of training, evaluation included")):
            for name, curve in rows.items():
                style = dict(alpha=0.3, linewidth=1) if name == "training batches" else dict(marker="o", markersize=3)
                axis.plot([row[key] for row in curve], [row["psnr"] for row in curve], label=name, **style)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("PSNR, dB")
        axes[0].legend()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        plt.savefig(self.output, dpi=110)
        write_json(self.output.with_suffix(".json"), rows)
        print(f"{self.output}, {self.output.with_suffix('.json')}")


def _row(event: ScalarEvent, start: float) -> dict[str, float]:
    return {"step": event.step, "minutes": round((event.wall_time - start) / 60, 2), "psnr": round(event.value, 3)}


if __name__ == "__main__":
    tyro.cli(PlotRun).main()
