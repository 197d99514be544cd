"""Draws the PSNR of runs against steps and time, from their tensorboard logs: all validation scenes, where a run
evaluated them (``--steps-per-eval-all-images N``), the baseline of copying the nearest context view, and, for a run
alone, its training batches.

    elvsm plot --runs outputs/NAME/METHOD/TIMESTAMP outputs/OTHER/METHOD/TIMESTAMP --output curve.png

Curves are named by what --experiment-name was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.evaluation.training_curves import plot_runs


@dataclass
class PlotOptions:
    """Options."""

    runs: tuple[Path, ...]
    """Folders of runs on the same data, each with its config.yml and tensorboard events."""
    output: Path
    """PNG to write; the numbers come beside it as JSON."""


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(PlotOptions, "plot", __doc__, args)
    plot_runs(options.runs, options.output)
    print(f"{options.output}, {options.output.with_suffix('.json')}")
