"""Sharp frames of a video, at even spacing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.files import whole

if TYPE_CHECKING:
    from av.container import InputContainer

LOOKED_AT = 8
"""Frames of each stretch among which the sharpest is found."""
SIDE = 480
"""Pixels of the longer side at which sharpness is measured."""


def extract_sharp_frames(video: Path, folder: Path, count: int, progress: Callable[[float], None]) -> list[Path]:
    """Writes frames of a video as JPEGs: the sharpest of the middle half of each of ``count`` equal stretches.

    Taken from the middle half, no two neighbours are less than half the mean distance apart. Frames are turned as the
    video says. A video of fewer frames gives all of them.

    Args:
        progress: told the share of the video that has been looked at.

    Raises:
        DataError: for a file that is no video that can be read.
    """
    with _opened(video) as container:
        seconds = _duration(container)
        if seconds is None:
            raise DataError(f"{video} does not say how long it is; convert it to mp4 first")
        return _extract(container, folder, count, seconds, progress)


def video_size(video: Path) -> tuple[int, int]:
    """(height, width) of a video's frames, upright.

    Raises:
        DataError: for a file that is no video that can be read.
    """
    with _opened(video) as container:
        for _, frame in _frames(container):
            picture = _upright(frame)
            return picture.height, picture.width
    raise DataError(f"{video} has no frames")


@contextmanager
def _opened(video: Path) -> Iterator[InputContainer]:
    import av

    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise DataError(f"{video} has no video in it")
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {video} cannot be read ({error})") from error


def _extract(
    container: InputContainer, folder: Path, count: int, seconds: float, progress: Callable[[float], None]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or 30)
    stretch = max(seconds / count, 1 / rate)
    every = stretch / 2 / LOOKED_AT
    written: list[Path] = []
    best: Optional[tuple[float, Image.Image]] = None
    current, looked_at = 0, -1.0

    def write() -> None:
        if best is not None:
            file = folder / f"frame_{len(written) + 1:05d}.jpg"
            with whole(file) as partial:
                best[1].save(partial, format="JPEG", quality=95, subsampling=0)
            written.append(file)

    for at, frame in _frames(container):
        position = at / stretch + 1e-6  # times are rounded
        if int(position) > current:
            write()
            best, current = None, int(position)
        # A stretch of three frames or fewer has none in its middle half to choose from.
        middle = abs(position - current - 0.5) <= 0.25 or stretch * rate < 4
        if middle and (best is None or at - looked_at >= every):
            looked_at = at
            picture = _upright(frame)
            sharpness = _sharpness(picture)
            if best is None or sharpness > best[0]:
                best = sharpness, picture
        progress(min(1.0, at / seconds))
    write()
    return written


def _frames(container: InputContainer) -> Iterator[tuple[float, object]]:
    """Seconds from the first frame on, and frames."""
    start: Optional[float] = None
    for number, frame in enumerate(container.decode(video=0)):
        at = number / float(container.streams.video[0].average_rate or 30) if frame.time is None else frame.time
        start = at if start is None else start
        yield at - start, frame


def _duration(container: InputContainer) -> Optional[float]:
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _upright(frame) -> Image.Image:
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey picture."""
    grey = image.convert("L")
    grey.thumbnail((SIDE, SIDE))
    laplacian = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
    return ImageStat.Stat(grey.filter(laplacian)).var[0]
