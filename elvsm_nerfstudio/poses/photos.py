"""Photos as structure from motion wants them: readable, upright, and sorted by the camera that took them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from elvsm_nerfstudio.data.images import DataError, eight_bits
from elvsm_nerfstudio.data.names import natural_order
from elvsm_nerfstudio.files import whole

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp")
COPIED_FORMATS, COPIED_MODES = ("JPEG", "PNG"), ("RGB", "RGBA", "L")
"""What COLMAP and nerfstudio both read as it is; anything else is written anew."""
EXIF = ExifTags.Base
LENS_TAGS = (EXIF.FocalLength, EXIF.FocalLengthIn35mmFilm, EXIF.LensModel)


@dataclass(frozen=True)
class Photo:
    """A photo of a capture."""

    name: str
    """Of its file in the folder of the capture's images."""
    camera: tuple
    """Equal for photos of one camera at one focal length: width and height in pixels, and what EXIF says of it."""


def check_source(source: Path) -> None:
    """Raises DataError for what is neither a folder nor a video."""
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a folder of photos or a video")
    if not source.is_dir() and not is_video(source):
        raise DataError(f"{source}: expected a folder of photos or a video ({', '.join(VIDEO_SUFFIXES)})")


def is_video(source: Path) -> bool:
    """Whether this is a file with the name of a video."""
    return source.suffix.lower() in VIDEO_SUFFIXES and not source.is_dir()


def find_photos(folder: Path) -> list[Path]:
    """The photos of a folder, by name (2 before 10); those of its subfolders are not among them.

    Raises:
        DataError: where there are none, saying what there is instead.
    """
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = sorted(files, key=natural_order)
    photos = [file for file in files if _is_photo(file)]
    if photos:
        return photos
    expected = f"expected photos ({', '.join(PHOTO_SUFFIXES)})"
    below = sorted(d for d in folder.iterdir() if d.is_dir() and any(map(_is_photo, d.iterdir())))
    if below:
        raise DataError(f"{folder}: {expected}; found some in its subfolder {below[0]}: name that one")
    videos = [file for file in files if is_video(file)]
    if videos:
        raise DataError(f"{folder}: {expected}; found the video {videos[0].name}: name the file itself")
    if any(file.suffix.lower() in (".heic", ".heif") for file in files):
        raise DataError(f"{folder}: {expected}; found HEIC files: convert them to JPEG first")
    found = sorted({file.suffix or file.name for file in files})
    raise DataError(f"{folder}: {expected}; found {', '.join(found[:8]) or 'nothing'}")


def copy_photos(files: Sequence[Path], folder: Path, advance: Callable[[], None]) -> list[Photo]:
    """Copies photos into a folder, turned as EXIF says; those that are there already, by an earlier call, stay.

    A photo that is in the folder itself is used in place.

    Raises:
        DataError: naming a photo that cannot be read, and two photos that would have one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    photos: dict[str, Photo] = {}
    for file in files:
        photo = _copy(file, folder)
        if photo.name in photos:
            raise DataError(f"{file}: another photo would become {folder / photo.name} too; rename one of them")
        photos[photo.name] = photo
        advance()
    return list(photos.values())


def _copy(file: Path, folder: Path) -> Photo:
    try:
        with Image.open(file) as image:
            exif = image.getexif()
            upright = exif.get(EXIF.Orientation, 1) in (0, 1)
            as_it_is = upright and image.format in COPIED_FORMATS and image.mode in COPIED_MODES
            jpeg = image.format == "JPEG"
            name = file.name if as_it_is or jpeg else f"{file.stem}.png"
            target = folder / re.sub(r"\s", "_", name)  # in COLMAP's lists of pairs a space ends a name
            in_place = file.resolve() == target.resolve()
            if not in_place and file.resolve().parent == folder.resolve():
                raise DataError(
                    f"image {file} would become {target.name} (JPEG or PNG, without spaces in its name) beside your "
                    "file; choose another --output"
                )
            if in_place and not as_it_is:
                raise DataError(
                    f"image {file} has to be turned or converted, which would change your file; choose another --output"
                )
            if not in_place and not _is_copy_of(target, file):
                with whole(target) as partial:
                    if as_it_is:
                        image.load()  # a damaged photo is found here and not by COLMAP
                        partial.write_bytes(file.read_bytes())
                    else:
                        turned = ImageOps.exif_transpose(image)
                        turned = turned if turned.mode in COPIED_MODES else eight_bits(file, turned)
                        options = {"format": "JPEG", "quality": 95, "subsampling": 0} if jpeg else {"format": "PNG"}
                        turned.save(partial, exif=turned.getexif().tobytes(), **options)
                    os.utime(partial, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {file} cannot be read ({error}); replace it, or take it out of the folder") from error
    with Image.open(target) as image:
        return Photo(target.name, (*image.size, *_lens(image.getexif())))


def _is_copy_of(copy: Path, file: Path) -> bool:
    return copy.is_file() and copy.stat().st_mtime_ns == file.stat().st_mtime_ns


def _lens(exif: Image.Exif) -> tuple[str, ...]:
    details = exif.get_ifd(EXIF.ExifOffset)
    return tuple(str(value) for value in (exif.get(EXIF.Make), exif.get(EXIF.Model), *map(details.get, LENS_TAGS)))


def _is_photo(file: Path) -> bool:
    return file.suffix.lower() in PHOTO_SUFFIXES
