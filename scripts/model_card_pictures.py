"""Pictures of a model card: samples from an evaluation's sheets, and the training curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from jaxtyping import Float
from matplotlib import pyplot as plt
from PIL import Image
from run_log import read_scalars
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from elvsm_nerfstudio.evaluation.report import GAP, sheet, write_figure, write_image

TAGS = {
    "training batches, means of ten logged ones": "Train Metrics Dict/psnr",
    "validation objects": "Eval Images Metrics Dict (all images)/psnr",
    "validation objects, copying the nearest view": "Eval Images Metrics Dict (all images)/psnr_copy_nearest",
}
TRAINING = next(iter(TAGS))
AVERAGED = 10
ITERATION_TIME = "Train Iter (time)"
CONTEXT_SHOWN = 4
ENLARGED = 2


def write_samples(path: Path, sheets: Sequence[Path], size: tuple[int, int], num_counts: int) -> None:
    """A row for each object: context views, its first target, and the render of it from each number of context views.

    Args:
        sheets: what ns-eval wrote of each object: rows of context, targets, and renders for each number of views.
        size: height and width of an image in them.
    """
    rows = []
    for file in sheets:
        with Image.open(file) as picture:
            pixels = to_tensor(picture.convert("RGB")).permute(1, 2, 0)
        context = [_cell(pixels, size, 0, column) for column in range(CONTEXT_SHOWN)]
        blank = torch.ones_like(context[0])
        renders = [_cell(pixels, size, 2 + row, 0) for row in range(num_counts)]
        rows.append([*context, blank, _cell(pixels, size, 1, 0), blank, *renders])
    # Enlarged to be looked at.
    write_image(path, sheet(rows).repeat_interleave(ENLARGED, dim=0).repeat_interleave(ENLARGED, dim=1))


def _cell(
    pixels: Float[Tensor, "sheet_height sheet_width 3"], size: tuple[int, int], row: int, column: int
) -> Float[Tensor, "height width 3"]:
    height, width = size
    top, left = row * (height + GAP), column * (width + GAP)
    return pixels[top : top + height, left : left + width]


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, PSNR) of a run's tensorboard log, by what was measured; and (step, seconds per step).

    Raises:
        ValueError: where the run has no such log.
    """
    tags = {**TAGS, ITERATION_TIME: ITERATION_TIME}
    logged = read_scalars(run, list(tags.values()))
    curves = {label: list(logged[tag].items()) for label, tag in tags.items() if tag in logged}
    if TRAINING not in curves:
        raise ValueError(f"{run} has no tensorboard log with PSNR; train with --vis tensorboard")
    return curves


def write_curve(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """PSNR against steps."""
    figure, axes = plt.subplots(figsize=(8, 4), dpi=110, layout="constrained")
    for label in TAGS:
        points = curves.get(label, [])
        if label == TRAINING:
            points = [_mean(points[i : i + AVERAGED]) for i in range(0, len(points), AVERAGED)]
        if points:
            axes.plot(*zip(*points), marker="" if label == TRAINING else ".", label=label)
    axes.set(xlabel="steps", ylabel="PSNR in dB")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def _mean(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    return tuple(sum(values) / len(values) for values in zip(*points))
