"""Reading images: decode, composite on a background, resize and centre-crop."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elvsm_nerfstudio.geometry import cover_size, crop_offset

Background = Literal["white", "black"]
"""Colour behind transparent pixels."""


class Window(NamedTuple):
    """A part of a picture, in its pixels; it may reach beyond the border."""

    left: float
    top: float
    right: float
    bottom: float


class DataError(ValueError):
    """Data that cannot be used; the message says which file, what was found and what was expected."""


@dataclass(frozen=True)
class ImageSpec:
    """How images become what the network gets: composited, resized (Lanczos, as in the paper's protocol) to just
    cover ``size``, and the middle cut out."""

    size: tuple[int, int]
    """Height and width."""
    background: Background = "white"
    width_multiple: int = 1
    """The width after the resize, before the cut, is rounded to a multiple of this."""

    def resized(self, camera_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) after the resize of an image of some (height, width)."""
        return cover_size(camera_size, self.size, self.width_multiple)


def read_image(
    path: Path,
    camera_size: tuple[int, int],
    spec: ImageSpec,
    encoded: Optional[bytes] = None,
    window: Optional[Window] = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """One image as the network gets it; ``resize_and_crop_intrinsics`` gives the matching camera.

    Args:
        path: the image file; only its name, for messages, where ``encoded`` is given.
        camera_size: (height, width) that the camera states for this image; the file may differ from it by one
            pixel, the rounding of downscaled copies.
        encoded: the file's content, of images that are no files of their own.
        window: what to show of the camera's picture, resized to the size of ``spec``, in place of the middle.

    Raises:
        DataError: naming a file that is missing, cannot be decoded, or is of another size than its camera says.
    """
    try:
        # At once: Pillow reads a file piece by piece, which takes longer for small ones.
        with Image.open(io.BytesIO(path.read_bytes() if encoded is None else encoded)) as opened:
            image = _composite(opened, spec.background)
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read ({error}); replace it or take its frame out") from error
    if abs(image.height - camera_size[0]) > 1 or abs(image.width - camera_size[1]) > 1:
        raise DataError(
            f"image {path} is {image.width}x{image.height}, but its camera says {camera_size[1]}x{camera_size[0]} "
            "(width x height); correct w and h, or resize the image"
        )
    if window is not None:
        return np.asarray(_resized_window(image, camera_size, window, spec))
    height, width = spec.resized(camera_size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if image.size != (spec.size[1], spec.size[0]):
        top, left = crop_offset((height, width), spec.size)
        image = image.crop((left, top, left + spec.size[1], top + spec.size[0]))
    return np.asarray(image)


def _resized_window(image: Image.Image, camera_size: tuple[int, int], window: Window, spec: ImageSpec) -> Image.Image:
    """A window of an image, with background where it reaches beyond the border."""
    x, y = image.width / camera_size[1], image.height / camera_size[0]
    left, top, right, bottom = window.left * x, window.top * y, window.right * x, window.bottom * y
    before = max(0, math.ceil(-left)), max(0, math.ceil(-top))
    after = max(0, math.ceil(right - image.width)), max(0, math.ceil(bottom - image.height))
    if any((*before, *after)):
        size = image.width + before[0] + after[0], image.height + before[1] + after[1]
        extended = Image.new("RGB", size, spec.background)
        extended.paste(image, before)
        image = extended
    box = left + before[0], top + before[1], right + before[0], bottom + before[1]
    return image.resize((spec.size[1], spec.size[0]), Image.Resampling.LANCZOS, box=box)


def is_cut_out(path: Path, encoded: Optional[bytes] = None) -> bool:
    """Whether an image is transparent along most of its border, so that there is background beyond it too.

    Args:
        encoded: the file's content, of images that are no files of their own.

    Raises:
        DataError: naming a file that cannot be read.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes() if encoded is None else encoded)) as image:
            if not _has_transparency(image):
                return False
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read ({error}); replace it or take its frame out") from error
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    return float(np.median(border)) == 0


def duplicates(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _composite(image: Image.Image, background: Background) -> Image.Image:
    if _has_transparency(image):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(_backdrop(rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


@lru_cache(maxsize=4)
def _backdrop(size: tuple[int, int], background: Background) -> Image.Image:
    return Image.new("RGBA", size, background)
