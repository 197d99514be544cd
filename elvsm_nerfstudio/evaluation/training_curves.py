"""What runs have logged for tensorboard: events, and curves of PSNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from elvsm_nerfstudio.evaluation.report import write_figure, write_json

EVALUATION = "Eval Images Metrics Dict (all images)/"
TRAINING, VALIDATION, COPYING = "training batches", "validation scenes", "copying the nearest context view"
TAGS = {TRAINING: "Train Metrics Dict/psnr", VALIDATION: f"{EVALUATION}psnr", COPYING: f"{EVALUATION}psnr_copy_nearest"}

Curve = list[dict[str, float]]


def read_events(run: Path, tags: Sequence[str]) -> dict[str, dict[int, ScalarEvent]]:
    """All that was logged of some tags, by step in order; tags that were not logged are left out.

    Of steps that a run made twice, as it was interrupted, the later values count.

    Args:
        run: the folder with the events' files.
    """
    log = EventAccumulator(str(run), size_guidance={"scalars": 0})
    log.Reload()
    known = set(log.Tags()["scalars"])
    logged = {tag: sorted(log.Scalars(tag), key=lambda event: event.wall_time) for tag in tags if tag in known}
    return {tag: dict(sorted({e.step: e for e in events}.items())) for tag, events in logged.items()}


def read_scalars(run: Path, tags: Sequence[str]) -> dict[str, dict[int, float]]:
    """The values alone of ``read_events``."""
    return {tag: {step: e.value for step, e in events.items()} for tag, events in read_events(run, tags).items()}


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Draws the curves of runs, and writes the numbers as JSON beside the picture.

    Args:
        runs: their folders; a run alone is drawn with its training batches.
        output: PNG to write.

    Raises:
        ValueError: for runs without such logs, and two of one name.
    """
    if len(runs) == 1:
        curves = read_curves(runs[0])
    else:
        curves = {}
        for run in runs:
            found = read_curves(run, (VALIDATION, COPYING))
            name = run.resolve().parents[1].name
            if name in curves:
                raise ValueError(f"--runs: two are named {name}; expected different --experiment-name")
            curves |= {name: found.pop(VALIDATION), **found}
    write_curves(output, curves)
    write_json(output.with_suffix(".json"), curves)


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
