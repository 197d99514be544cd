"""Reading images: decode, composite on a background, resize and centre-crop."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from elvsm_nerfstudio.geometry import cover_size, crop_offset

Background = Literal["white", "black"]
"""Colour behind transparent pixels."""


class DataError(ValueError):
    """Data that cannot be used; the message says which file, what was found and what was expected."""


def read_image(
    path: Path, camera_size: tuple[int, int], size: tuple[int, int], background: Background
) -> UInt8[Tensor, "height width 3"]:
    """One image as the network gets it.

    Transparent images are composited, the whole is resized (Lanczos, as in the paper's protocol) to just cover
    ``size``, and the middle is cut out. ``resize_and_crop_cameras`` gives the matching cameras.

    Args:
        camera_size: (height, width) that the camera states for this image; the file may differ from it by one
            pixel, the rounding of downscaled copies.
        size: (height, width) wanted.

    Raises:
        DataError: naming a file that is missing, cannot be decoded, or is of another size than its camera says.
    """
    try:
        with Image.open(path) as opened:
            image = _composite(opened, background)
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"image {path} cannot be read ({error}); replace it or take its frame out") from error
    if abs(image.height - camera_size[0]) > 1 or abs(image.width - camera_size[1]) > 1:
        raise DataError(
            f"image {path} is {image.width}x{image.height}, but its camera says {camera_size[1]}x{camera_size[0]} "
            "(width x height); correct w and h, or resize the image"
        )
    resized = cover_size(camera_size, size)
    if image.size != (resized[1], resized[0]):
        image = image.resize((resized[1], resized[0]), Image.Resampling.LANCZOS)
    top, left = crop_offset(resized, size)
    return torch.from_numpy(np.array(image.crop((left, top, left + size[1], top + size[0]))))


def _composite(image: Image.Image, background: Background) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")
