"""An animation of a comparison: the photos given, and what methods make of them, seen from all around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from elvsm_nerfstudio.compare.layout import Layout, MethodSpec
from elvsm_nerfstudio.compare.scoring import frame_file
from elvsm_nerfstudio.files import whole
from scripts.benchmarks.splatfacto_tables import NETWORK, ROWS

PANEL, GAP, CAPTION = 128, 4, 18
"""Pixels: side of a panel, space between panels, line of text above each column."""
BLOCKS = 2
"""Scenes beside each other."""
PHOTOS = 4
"""Photos that are shown, in a square."""
MILLISECONDS = 120
"""For each frame."""
SHORT = {NETWORK: "Efficient-LVSM"}
"""Names that would not fit over a panel."""


def pictured(result: Mapping[str, Any]) -> list[MethodSpec]:
    """The methods of a comparison that pictures show: those of the summary; tables have all."""
    shown = [method for method in result["methods"] if method["name"] in ROWS]
    return [MethodSpec(method["name"], method["kind"], method["method"]) for method in shown]


def turn(root: Path, result: Mapping[str, Any], context_views: int, frames: int) -> list[Image.Image]:
    """A block for each scene of a comparison: context views in a square, then renders of its video by each method that
    pictures show.

    Args:
        root: the comparison's folder.
        result: what ``compare`` returned.
        context_views: the number that the videos are of.
        frames: of a video.
    """
    layout = Layout(root.resolve())
    specs = pictured(result)
    columns = ["photos", *(SHORT.get(spec.name, spec.name) for spec in specs)]
    scenes, block = result["scenes"], len(columns) * (PANEL + GAP) + 2 * GAP
    places = [(i % BLOCKS * block, CAPTION + i // BLOCKS * (PANEL + GAP)) for i in range(len(scenes))]
    size = min(BLOCKS, len(scenes)) * block - 3 * GAP, places[-1][1] + PANEL
    still = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(still), ImageFont.load_default(13)
    for left, _ in places[:BLOCKS]:
        for column, title in enumerate(columns):
            pen.text((left + column * (PANEL + GAP), 0), title, "black", font)
    for scene, (left, top) in zip(scenes, places):
        for i, frame in enumerate(scene["context"][: min(PHOTOS, context_views)]):
            photo = _panel(layout.images(scene["name"], "context") / frame_file(frame), PANEL // 2)
            still.paste(photo, (left + i % 2 * (PANEL // 2), top + i // 2 * (PANEL // 2)))
    return [_frame(still, layout, specs, scenes, places, context_views, frame_file(i)) for i in range(frames)]


def _frame(
    still: Image.Image,
    layout: Layout,
    specs: Sequence[MethodSpec],
    scenes: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int]],
    context_views: int,
    file: str,
) -> Image.Image:
    canvas = still.copy()
    for scene, (left, top) in zip(scenes, places):
        for column, spec in enumerate(specs, start=1):
            render = layout.pictures(spec, context_views, scene["name"], "path") / file
            if render.exists():  # not where the method failed
                canvas.paste(_panel(render, PANEL), (left + column * (PANEL + GAP), top))
    return canvas


def _panel(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def write_animation(path: Path, frames: Sequence[Image.Image]) -> None:
    """An animated WebP that repeats for ever."""
    options = {"save_all": True, "duration": MILLISECONDS, "loop": 0, "quality": 60, "method": 6}
    with whole(path) as partial:
        frames[0].save(partial, format="WEBP", append_images=frames[1:], **options)
