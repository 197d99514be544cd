"""Reading images: decode, composite on a background, resize and centre-crop."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from elvsm_nerfstudio.geometry import cover_size, crop_offset
from elvsm_nerfstudio.notices import warn_once

# One limit, at which Pillow refuses; from half of it on it would warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Background = Literal["white", "black"]
"""Colour behind transparent pixels."""

REDUCTIONS = (2, 4, 8)
"""How many times smaller the copies of images are that ns-process-data makes."""


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
    """One image as the network gets it: ``decode_image`` and ``fit_image``."""
    return fit_image(decode_image(path, camera_size, spec.background, encoded), camera_size, spec, window)


def decode_image(
    path: Path,
    camera_size: tuple[int, int],
    background: Background,
    encoded: Optional[bytes] = None,
    mask: Optional[Path] = None,
    reduction: int = 1,
) -> Image.Image:
    """One image in RGB, upright as its camera has it, on the background.

    Args:
        path: the image file; only its name, for messages, where ``encoded`` is given.
        camera_size: (height, width) that the camera states for this image; the file may differ from it by one
            pixel, the rounding of downscaled copies.
        encoded: the file's content, of images that are no files of their own.
        mask: an image that is black where this one is to be background.
        reduction: how many times smaller than the camera states the file is, of a downscaled copy.

    Raises:
        DataError: naming a file that is missing, cannot be decoded, or is of another size than its camera says.
    """
    size = camera_size[0] / reduction, camera_size[1] / reduction
    with open_image(path, encoded) as opened:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        # From the header: a file may be small and its pixels too many.
        turn = _turn(path, (opened.height, opened.width), size, orientation)
        image = eight_bits(path, opened)
    image = image if turn is None else image.transpose(turn)
    if mask is not None:
        image.putalpha(_masked_alpha(image, mask, camera_size))
    if image.mode == "RGBA":
        return Image.alpha_composite(_backdrop(image.size, background), image).convert("RGB")
    return image


def fit_image(
    image: Image.Image, camera_size: tuple[int, int], spec: ImageSpec, window: Optional[Window] = None
) -> UInt8[np.ndarray, "height width 3"]:
    """A decoded image as the network gets it; ``resize_and_crop_intrinsics`` gives the matching camera.

    Args:
        window: what to show of the camera's picture, resized to the size of ``spec``, in place of the middle.
    """
    if window is not None:
        return np.asarray(_resized_window(image, camera_size, window, spec))
    height, width = spec.resized(camera_size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if image.size != (spec.size[1], spec.size[0]):
        top, left = crop_offset((height, width), spec.size)
        image = image.crop((left, top, left + spec.size[1], top + spec.size[0]))
    return np.asarray(image)


@contextmanager
def open_image(path: Path, encoded: Optional[bytes] = None) -> Iterator[Image.Image]:
    """An image file, its pixels not yet decoded.

    Raises:
        DataError: naming the file, for whatever is wrong with it here or in the body.
    """
    try:
        # At once: Pillow reads a file piece by piece, which takes longer for small ones.
        with Image.open(io.BytesIO(path.read_bytes() if encoded is None else encoded)) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"image {path} cannot be read: it has too many pixels ({error}); reduce it") from error
    except (OSError, SyntaxError, ValueError) as error:
        kind = _CONVERSIONS.get(path.suffix.lower())
        if kind is not None and isinstance(error, UnidentifiedImageError):
            raise DataError(f"image {path} cannot be read; {kind}") from error
        raise DataError(f"image {path} cannot be read ({error}); replace it or take its frame out") from error


_HEIC = "convert HEIC to JPEG, which keeps it upright, for example with `magick mogrify -format jpg *.heic`"
_LINEAR = "high dynamic range has no fixed white: tone-map it to PNG or JPEG, for example with ImageMagick or OpenCV"
_RAW = "develop raw photos to JPEG or PNG first"
_CONVERSIONS = {
    **dict.fromkeys((".heic", ".heif"), _HEIC),
    **dict.fromkeys((".exr", ".hdr"), _LINEAR),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"), _RAW),
}
"""What to do with files that Pillow does not read."""
_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From stored to upright pixels, by EXIF orientation, of those that swap the sides."""


def _fits(size: tuple[int, int], expected: tuple[float, float]) -> bool:
    return abs(size[0] - expected[0]) <= 1 and abs(size[1] - expected[1]) <= 1


def _turn(
    path: Path, stored: tuple[int, int], expected: tuple[float, float], orientation: int
) -> Optional[Image.Transpose]:
    """How to turn an image so that it has the (height, width) of its camera; None for as it is stored."""
    turn = _TURNS.get(orientation)
    upright = stored if turn is None else stored[::-1]
    if _fits(stored, expected):
        if 2 <= orientation <= 8 and _fits(upright, expected):
            warn_once(
                "EXIF orientation",
                f"Image {path} has EXIF orientation {orientation}, and its size does not tell whether its camera has "
                "it turned: taken as it is stored. If scenes look wrong, turn the pixels and remove the orientation, "
                "for example with `magick mogrify -auto-orient`.",
            )
        return None
    if _fits(upright, expected):
        return turn
    exif = "" if turn is None else f" ({upright[1]}x{upright[0]} as its EXIF orientation {orientation} shows it)"
    raise DataError(
        f"image {path} is {stored[1]}x{stored[0]}{exif}, but its camera says {expected[1]:g}x{expected[0]:g} "
        "(width x height); correct w and h, or resize the image"
    )


def eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """An open image in RGB, or in RGBA where it has transparency; 16 bits are scaled to 8.

    Raises:
        DataError: naming the file, of 32 bits or of floats.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
        return grey.convert("RGBA" if grey.mode == "LA" else "RGB")
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "integer"
        raise DataError(
            f"image {path} has 32-bit {kind} values, for which there is no white; convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


def _masked_alpha(image: Image.Image, mask: Path, expected: tuple[int, int]) -> Image.Image:
    """The alpha channel of an image, transparent where a mask is black too."""
    with open_image(mask) as opened:
        size = opened.height, opened.width
        kept = eight_bits(mask, opened).convert("L").point(lambda value: 255 if value else 0)
    if not _fits(size, expected) and not _fits(size, (image.height, image.width)):
        raise DataError(
            f"mask {mask} is {size[1]}x{size[0]}, but its camera says {expected[1]}x{expected[0]} (width x height)"
        )
    kept = kept.resize(image.size, Image.Resampling.NEAREST)
    return ImageChops.multiply(image.getchannel("A"), kept) if image.mode == "RGBA" else kept


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


def is_cut_out(path: Path, encoded: Optional[bytes] = None, mask: Optional[Path] = None) -> bool:
    """Whether an image is transparent along most of its border, so that there is background beyond it too.

    Args:
        encoded: the file's content, of images that are no files of their own.
        mask: an image that is black where this one is to be background.

    Raises:
        DataError: naming a file that cannot be read.
    """
    with open_image(path, encoded) as opened:
        image = eight_bits(path, opened)
    if mask is not None:
        image.putalpha(_masked_alpha(image, mask, (image.height, image.width)))
    if image.mode != "RGBA":
        return False
    alpha = np.asarray(image)[..., 3]
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    return float(np.median(border)) == 0


def downscaled_copy(path: Path, reduction: int) -> Path:
    """Where ns-process-data puts an image's copy: in images_2, images_4 or images_8 beside images."""
    parts = list(path.parts)
    folders = parts[:-1]
    position = len(folders) - 1 - folders[::-1].index("images") if "images" in folders else len(folders) - 1
    if position >= 0:
        parts[position] += f"_{reduction}"
    return Path(*parts)


def reductions(path: Path, camera_size: tuple[int, int]) -> tuple[int, ...]:
    """Which copies of an image there are, by how many times smaller they are, ascending; (1,) where there are none.

    1 is the image itself, which need not exist where there is a copy.
    """
    found = [1] if path.exists() else []
    for reduction in REDUCTIONS:
        copy = downscaled_copy(path, reduction)
        if copy.is_file():
            with open_image(copy) as image:
                size = image.height, image.width
            if _fits(size, (camera_size[0] / reduction, camera_size[1] / reduction)):
                found.append(reduction)
    return tuple(found) or (1,)


def duplicates(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


@lru_cache(maxsize=4)
def _backdrop(size: tuple[int, int], background: Background) -> Image.Image:
    return Image.new("RGBA", size, background)
