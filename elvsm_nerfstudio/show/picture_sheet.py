"""Rows of pictures under captions, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from elvsm_nerfstudio.evaluation.report import write_image

TILE, GAP, CAPTION = 176, 8, 28
"""Pixels: height of a picture, white between them, height of a line of text."""


@dataclass(frozen=True)
class Row:
    """Pictures of one kind."""

    caption: str
    images: Sequence[Image.Image]


def to_image(rgb: Float[Tensor, "height width 3"]) -> Image.Image:
    """Colours in [0, 1] as an 8-bit picture."""
    return Image.fromarray((rgb.detach().clamp(0, 1) * 255).round().byte().cpu().numpy())


def write_sheet(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows of equally large pictures, each under its caption, as a PNG."""
    width, height = rows[0].images[0].size
    tile = round(width * TILE / height), TILE
    columns = max(len(row.images) for row in rows)
    canvas = Image.new("RGB", (columns * (tile[0] + GAP) + GAP, len(rows) * (tile[1] + CAPTION + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for i, row in enumerate(rows):
        top = GAP + i * (tile[1] + CAPTION + GAP)
        pen.text((GAP, top + 3), row.caption, "black", font)
        for j, image in enumerate(row.images):
            smooth = Image.Resampling.BICUBIC if image.height < TILE else Image.Resampling.LANCZOS
            canvas.paste(image.resize(tile, smooth), (GAP + j * (tile[0] + GAP), top + CAPTION))
    write_image(path, torch.from_numpy(np.array(canvas)) / 255)
