"""The picture of a model card: samples from an evaluation's sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from elvsm_nerfstudio.evaluation.report import GAP, sheet, write_image

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
