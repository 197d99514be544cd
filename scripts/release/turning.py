"""The animation at the top of the README: the photos given, and what methods make of them, seen from all around.

    python -m scripts.release.turning --objects data/objects64 --output outputs/turning

Every fifth object of the test split, chosen by that rule alone, through `elvsm compare` from 4 context views. Called
again, what is done is kept. Writes docs/pictures/turning.webp.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image, ImageDraw, ImageFont

from elvsm_nerfstudio.compare.comparison import compare
from elvsm_nerfstudio.compare.layout import Layout, MethodSpec, dataparser_config
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.scoring import frame_file
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.files import whole

EVERY = 5
"""Every fifth object is shown."""
CONTEXT_VIEWS = 4
PANEL, GAP, CAPTION = 128, 4, 18
"""Pixels: side of a panel, space between panels, line of text above each column."""
BLOCKS = 2
"""Objects beside each other."""
SHORT = {"efficient-lvsm-plus-tiny": "Efficient-LVSM"}
"""Names that would not fit over a panel."""


@dataclass
class Args:
    """Options."""

    objects: Path
    """Collection of objects."""
    output: Path
    """Folder of the comparison."""
    picture: Path = Path("docs/pictures/turning.webp")
    """The animation to write."""
    methods: tuple[str, ...] = ("efficient-lvsm-plus-tiny", "splatfacto-lvsm", "splatfacto-sparse")
    """Methods to show: the same option as that of `elvsm compare`."""
    frames: int = 24
    """Frames of a turn."""
    milliseconds: int = 120
    """For each frame."""
    splat_iterations: int = 500
    """Optimisation steps."""


def compared(args: Args) -> dict[str, Any]:
    """The comparison, with the frames of a turn for each object."""
    test = SceneCollection.open(args.objects, dataparser_config(None)).split("test")
    scenes = tuple(entry.name for entry in test[::EVERY])
    return compare(
        CompareOptions(
            data=args.objects,
            methods=args.methods,
            output=args.output,
            scenes=scenes,
            context_views=(CONTEXT_VIEWS,),
            splat_iterations=args.splat_iterations,
            num_videos=len(scenes),
            video_frames=args.frames,
        )
    )


def animation(root: Path, result: Mapping[str, Any], frames: int) -> list[Image.Image]:
    """A block for each object: its context views, four in a square, then each method's renders of the turn."""
    layout = Layout(root.resolve())
    specs = [MethodSpec(method["name"], method["kind"], method["method"]) for method in result["methods"]]
    columns = ["photos", *(SHORT.get(spec.name, spec.name) for spec in specs)]
    scenes, block = result["scenes"], len(columns) * (PANEL + GAP) + 2 * GAP
    size = BLOCKS * block - 3 * GAP, CAPTION + -(-len(scenes) // BLOCKS) * (PANEL + GAP) - GAP
    still = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(still), ImageFont.load_default(13)
    for left in range(0, min(BLOCKS, len(scenes)) * block, block):
        for column, title in enumerate(columns):
            pen.text((left + column * (PANEL + GAP), 0), title, "black", font)
    places = [(i % BLOCKS * block, CAPTION + i // BLOCKS * (PANEL + GAP)) for i in range(len(scenes))]
    for scene, (left, top) in zip(scenes, places):
        for i, frame in enumerate(scene["context"][:CONTEXT_VIEWS]):
            photo = _panel(layout.images(scene["name"], "context") / frame_file(frame), PANEL // 2)
            still.paste(photo, (left + i % 2 * (PANEL // 2), top + i // 2 * (PANEL // 2)))
    turn = []
    for frame in range(frames):
        canvas = still.copy()
        for scene, (left, top) in zip(scenes, places):
            for column, spec in enumerate(specs, start=1):
                file = layout.pictures(spec, CONTEXT_VIEWS, scene["name"], "path") / frame_file(frame)
                if file.exists():  # not where the method failed
                    canvas.paste(_panel(file, PANEL), (left + column * (PANEL + GAP), top))
        turn.append(canvas)
    return turn


def _panel(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def write_animation(path: Path, frames: Sequence[Image.Image], milliseconds: int) -> None:
    """An animated WebP that repeats for ever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        frames[0].save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=milliseconds,
            loop=0,
            quality=60,
            method=6,
        )


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        result = compared(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_animation(args.picture, animation(args.output, result, args.frames), args.milliseconds)
    print(f"{args.picture}: {args.picture.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
