"""Takes the picture of the viewer in docs/memory-and-viewer.md: starts ns-viewer on a run, and looks at it in Chromium.

    python -m scripts.release.viewer_picture --load-config outputs/.../config.yml --output docs/pictures/viewer.png

Prints how large the file is. Needs Chromium (Debian: chromium).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro
from PIL import Image

from elvsm_nerfstudio.files import whole
from scripts.release.browser import PATIENCE, Browser, find_chromium, wait_for

PANEL_WIDTH = 320
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
    url = f"http://localhost:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "ns-viewer", "--load-config", config, "--viewer.websocket-port", str(port)],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(url).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, PATIENCE, "ns-viewer")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def settled(page: Browser) -> np.ndarray:
    """The page, uint8 [height, width, 3], once the scene is rendered in full size and stands still."""

    def still() -> tuple[np.ndarray, ...]:
        # The camera glides to a halt; 0.2 s later nerfstudio renders it in full size.
        before = page.screenshot()
        time.sleep(2)
        after = page.screenshot()
        full_size = page.run(r"/Resolution: (512x\d+|\d+x512)px/.test(document.body.innerText)")
        return (after,) if full_size and np.abs(after.astype(int) - before).mean() < 0.5 else ()

    return wait_for(still, PATIENCE, "a picture that stays as it is")[0]


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
