"""Videos and animations that any player opens, without the program ffmpeg."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from elvsm_nerfstudio.files import whole

MIN_SIDE = 448
"""Pixels: smaller pictures are enlarged by a whole number, to be looked at."""


def enlarged(image: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """The picture with its shorter side brought to at least ``min_side`` by a whole number, smoothly."""
    scale = -(-min_side // min(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def write_mp4(path: Path, frames: Iterable[Image.Image], fps: int) -> None:
    """Writes equally large frames as H.264 in mp4, 4:2:0, under a temporary name first.

    Odd sides, which 4:2:0 does not have, lose a row or column.
    """
    import av

    with whole(path, suffix=path.suffix) as partial:
        with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
            stream = None
            for frame in frames:
                if stream is None:
                    stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
                    stream.width, stream.height = (side - side % 2 for side in frame.size)
                    stream.pix_fmt = "yuv420p"
                cut = frame.convert("RGB").crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(cut)))
            if stream is None:
                raise ValueError(f"{path}: no frames to write")
            container.mux(stream.encode())


def write_gif(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Writes frames as an endless animation, under a temporary name first."""
    first, *others = (frame.convert("RGB").quantize(method=Image.Quantize.FASTOCTREE) for frame in frames)
    with whole(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
