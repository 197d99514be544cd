"""A headless Chromium, driven over its DevTools protocol: just enough to look at a page, drag and click."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np
from PIL import Image
from websockets.sync.client import connect

PROGRAMS = "chromium", "chromium-browser", "google-chrome"
PATIENCE = 300
"""Seconds to wait for anything: a busy machine starts and renders slowly."""


def find_chromium() -> Optional[str]:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page of one browser. ``errors`` are those of the page's scripts and of its own server's files.

    Args:
        folder: for the browser's profile, new and empty.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (800, 600)):
        self.errors, self._loaded = [], False
        self._ids = itertools.count()
        self._process = subprocess.Popen(
            [find_chromium(), "--headless=new", "--no-sandbox", "--remote-debugging-port=0",
             f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "--use-angle=swiftshader",
             "--enable-unsafe-swiftshader", "--no-first-run", "--disable-quic", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
             # The page links to logos elsewhere; no test should depend on them, or wait for them.
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        listening = wait_for_line(self._process.stderr, r"DevTools listening on ws://[^/]*:(\d+)/", "the browser")
        with urllib.request.urlopen(f"http://localhost:{listening[1]}/json/list") as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        self._socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(size)

    def resize(self, size: tuple[int, int]) -> None:
        """Gives the page another width and height in pixels."""
        self.size = size
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def send(self, method: str, **parameters) -> dict[str, Any]:
        """Calls a method of the protocol; notes the events that come before its answer."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        event = message.get("params", {})
        self._loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif message.get("method") == "Log.entryAdded" and event["entry"]["level"] == "error":
            entry = event["entry"]
            if not (entry["source"] == "network" and "localhost" not in entry.get("url", "")):
                self.errors.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")
        elif message.get("method") == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in event["args"]))

    def open(self, url: str) -> None:
        """Goes to a page, and waits until it has been loaded."""
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._note(json.loads(self._socket.recv(timeout=PATIENCE)))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for_text(self, text: str) -> None:
        """Waits until the page shows it."""
        shown = f"!!document.body?.innerText.includes({json.dumps(text)})"
        self.wait_for(lambda: self.run(shown), f"the text {text}")

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """The condition's first true value; it is looked at again whenever the page has been drawn anew."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"waited {seconds} s for {what}"
            self.draw()
        return value

    def draw(self, frames: int = 1) -> None:
        """Waits until the page has been drawn so many times."""
        self.run(
            f"new Promise(done => {{ let left = {frames};"
            "const next = () => left-- > 0 ? requestAnimationFrame(next) : done(); next(); })"
        )

    def screenshot(self) -> np.ndarray:
        """The page as uint8 [height, width, 3]."""
        png = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))

    def drag(self, start: tuple[int, int], end: tuple[int, int], steps: int = 8) -> None:
        """With the left button held down; a click where the ends are equal."""
        self._mouse("mouseMoved", *start)
        self._mouse("mousePressed", *start)
        for step in range(1, steps + 1):
            self._mouse("mouseMoved", *(a + (b - a) * step / steps for a, b in zip(start, end)))
        self._mouse("mouseReleased", *end)

    def wheel(self, at: tuple[int, int], distance: float) -> None:
        """Turns the mouse wheel, away from the user where the distance in pixels is negative."""
        self.send("Input.dispatchMouseEvent", type="mouseWheel", x=at[0], y=at[1], deltaX=0, deltaY=distance)

    def _mouse(self, kind: str, x: float, y: float) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=1, clickCount=1)

    def click(self, element: str) -> None:
        """Clicks the middle of the element that a JavaScript expression finds, once nothing moves any more."""
        box = self.run(
            f"(async () => {{ const e = {element}; if (!e) return null; e.scrollIntoView({{block: 'center'}});"
            "const moving = document.getAnimations().filter(a => a.effect.getComputedTiming().endTime < Infinity);"
            "await Promise.allSettled(moving.map(a => a.finished));"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        assert box is not None, f"the page has no {element}"
        self.drag(tuple(box), tuple(box), steps=1)


def wait_for_line(output: IO[str], pattern: str, what: str, log: Path = Path(os.devnull)) -> re.Match[str]:
    """What a program prints, up to the first line in which a pattern is found; the rest is read on beside.

    Args:
        log: file for all of it.

    Raises:
        AssertionError: where the program ends before it, or prints nothing of the kind for ``PATIENCE`` seconds.
    """
    found: queue.SimpleQueue[Optional[re.Match[str]]] = queue.SimpleQueue()

    def read() -> None:
        with log.open("w") as copy:
            for line in output:
                copy.write(line)
                copy.flush()
                if match := re.search(pattern, line):
                    found.put(match)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        match = found.get(timeout=PATIENCE)
    except queue.Empty:
        raise AssertionError(f"waited {PATIENCE} s for {what}") from None
    assert match is not None, f"the program ended before {what}"
    return match
