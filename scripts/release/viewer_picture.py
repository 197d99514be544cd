"""Takes the picture of the viewer in docs/memory-and-viewer.md: starts ns-viewer on a run, and looks at it in Chromium.

    python -m scripts.release.viewer_picture --load-config outputs/.../config.yml --output docs/pictures/viewer.png

Prints how large the file is. Needs Chromium (Debian: chromium).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro
from PIL import Image

from elvsm_nerfstudio.files import whole
from scripts.release.browser import Browser, find_chromium, wait_for_line

PANEL_WIDTH = 320
STILL_FRAMES = 10
"""Drawings of the page over which what stands still does not change; at SHARP each takes long."""
FULL_SIZE = r"/Resolution: (512x\d+|\d+x512)px/.test(document.body.innerText)"
"""JavaScript: whether the picture is the one that nerfstudio renders once the camera stands still."""
SHARP = "Object.defineProperty(window, 'devicePixelRatio', {get: () => 5})"
LAST_BUTTON = "[...document.querySelectorAll('button')].find(e => e.innerText == 'Load memory')"
"""JavaScript; what the panel says comes right after it."""


@dataclass
class Arguments:
    """Writes a picture of nerfstudio's viewer with the panel of context views."""

    load_config: Path
    """The run's config.yml."""
    output: Path
    """The picture, a PNG."""
    size: tuple[int, int] = (1040, 900)
    """Width and height in pixels."""
    zoom: float = 0.0
    """How far the mouse wheel is turned towards the scene, in its pixels; 100 are a notch."""
    drag: tuple[int, int] = (0, 0)
    """Pixels to the right and down by which the mouse turns the scene."""


@contextmanager
def ns_viewer(config: Path, log: Path) -> Iterator[str]:
    """ns-viewer as users start it, for a while: its address.

    Args:
        log: file for all that it prints.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [Path(sys.executable).parent / "ns-viewer", "--load-config", config, "--viewer.websocket-port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        try:
            wait_for_line(process.stdout, rf"HTTP .*:{port}\b", "ns-viewer's address", log)
        except AssertionError as error:
            raise AssertionError(f"{error}; it printed\n{log.read_text()}") from None
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(10)


def settled(page: Browser) -> np.ndarray:
    """The page, uint8 [height, width, 3], once the scene is rendered in full size and stands still."""

    def still() -> tuple[np.ndarray, ...]:
        # The camera glides to a halt; then nerfstudio renders it in full size.
        before = page.screenshot()
        page.draw(STILL_FRAMES)
        after = page.screenshot()
        return (after,) if page.run(FULL_SIZE) and np.abs(after.astype(int) - before).mean() < 0.5 else ()

    return page.wait_for(still, "a picture that stays as it is")[0]


def main(args: Arguments) -> None:
    if find_chromium() is None:
        sys.exit("There is no Chromium (Debian: chromium), which looks at the viewer.")
    with TemporaryDirectory() as name, ns_viewer(args.load_config.resolve(), Path(name) / "log") as url:
        with closing(Browser(Path(name) / "profile", args.size)) as page:
            # viser draws fewer pixels where it is slow, down to a fifth of what the screen has.
            page.send("Page.addScriptToEvaluateOnNewDocument", source=SHARP)
            page.open(url)
            page.wait_for_text("views in use")
            middle = (args.size[0] - PANEL_WIDTH) // 2, args.size[1] // 2
            page.drag(middle, (middle[0] + args.drag[0], middle[1] + args.drag[1]))
            page.wheel(middle, -args.zoom)
            page.run(f"{LAST_BUTTON}.scrollIntoView()")
            picture = settled(page)
    with whole(args.output) as partial:
        Image.fromarray(picture).save(partial, format="PNG", optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
