"""Writing results: JSON that any parser reads, texts, and pictures to look at; all under a temporary name first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from elvsm_nerfstudio.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 4
"""Pixels of white between the images of a sheet."""


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON (no NaN) under a temporary name and renames it, so that a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text under a temporary name and renames it."""
    with whole(path) as partial:
        partial.write_text(text, "utf8")


def table_row(cells: Sequence[Any]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def write_figure(path: Path, figure: Figure, transparent: bool = False) -> None:
    """Writes a figure of pyplot as a PNG, under a temporary name first, and closes it."""
    from matplotlib import pyplot as plt

    with whole(path) as partial:
        figure.savefig(partial, format="png", transparent=transparent)
    plt.close(figure)


def write_image(path: Path, image: Float[Tensor, "height width 3"]) -> None:
    """Writes colours in [0, 1] as an 8-bit PNG, under a temporary name first."""
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    with whole(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def sheet(rows: Sequence[Sequence[Float[Tensor, "height width 3"]]]) -> Float[Tensor, "sheet_height sheet_width 3"]:
    """Rows of equally large images on white; short rows are filled up with white."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = torch.ones(len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            canvas[top : top + height, left : left + width] = image.detach().cpu().clamp(0, 1)
    return canvas
