"""Takes the picture of a comparison's page in README: opens what `elvsm compare` wrote in Chromium.

    python -m scripts.release.comparison_picture --comparison outputs/against_splatfacto/objects \\
        --output docs/pictures/comparison.png

The picture reaches from the title to the end of "Look closely", in light colours. Prints how large the file is. Needs
Chromium (Debian: chromium).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image

from elvsm_nerfstudio.files import whole
from scripts.release.browser import Browser, find_chromium

MARGIN = 18
"""Pixels below the last part that is shown: what the page leaves between two."""
SHOWN = "[find('under'), find('over'), ...find('context').children]"
"""JavaScript; the photo, the render and the context views."""


@dataclass
class Arguments:
    """Writes a picture of a comparison's page: scores and costs, and one render beside the photo."""

    comparison: Path
    """Folder that `elvsm compare` wrote."""
    output: Path
    """The picture, a PNG."""
    context_views: Optional[int] = None
    """Number of context views; the largest if absent."""
    scene: Optional[str] = None
    """Scene that is looked at closely; the first if absent."""
    method: Optional[str] = None
    """Method whose render is on the right of the slider; the one of the highest PSNR if absent."""
    width: int = 1340
    """Width in pixels, enough for five metrics; the height is what the page needs."""


def take(page: Browser, args: Arguments) -> UInt8[np.ndarray, "height width 3"]:
    """The picture.

    Raises:
        ValueError: for a number of views, a scene or a method that is not in the comparison.
    """
    page.send("Emulation.setScrollbarsHidden", hidden=True)
    page.open((args.comparison.resolve() / "index.html").as_uri())
    page.wait_for_text("Scene by scene")
    for option, value, key, known in (
        ("--context-views", args.context_views, "count", "result.context_views"),
        ("--scene", args.scene, "scene", "Object.keys(sceneByName)"),
        ("--method", args.method, "right", "Object.keys(byName)"),
    ):
        if value is not None:
            page.run(f"state.{key} = {json.dumps(among(option, value, page.run(known)))}")
    page.run("setTheme('light'); draw()")
    page.wait_for(lambda: page.run(f"{SHOWN}.every(i => i.complete && i.naturalWidth)"), "photos and renders")
    bottom = page.run("find('look').getBoundingClientRect().bottom + window.scrollY")
    page.resize((args.width, round(bottom) + MARGIN))
    return page.screenshot()


def among(option: str, value: Any, known: Sequence[Any]) -> Any:
    """The value, if the comparison has it."""
    if value not in known:
        raise ValueError(f"{option} {value}: expected one of {', '.join(map(str, known))}, which were compared")
    return value


def main(args: Arguments) -> None:
    """Command line."""
    if find_chromium() is None:
        sys.exit("There is no Chromium (Debian: chromium), which opens the page.")
    if not (args.comparison / "index.html").is_file():
        sys.exit(f"error: --comparison {args.comparison}: expected index.html in it, which elvsm compare writes")
    with TemporaryDirectory() as profile, closing(Browser(Path(profile), (args.width, 900))) as page:
        try:
            picture = take(page, args)
        except ValueError as error:
            sys.exit(f"error: {error}")
    with whole(args.output) as partial:
        Image.fromarray(picture).save(partial, format="PNG", optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
