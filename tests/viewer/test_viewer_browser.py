"""nerfstudio's viewer in a real browser: the picture follows the camera and the controls, and nothing complains."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_pipeline, write_scene
from PIL import Image

from scripts.release.browser import Browser, find_chromium
from scripts.release.viewer_picture import FULL_SIZE, ns_viewer

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: chromium)")

# viser 0.2.7 says this of the handle of nerfstudio's crop box, whatever the method.
KNOWN_ERROR = "THREE.BufferGeometry.computeBoundingSphere(): Computed radius is NaN"


EVIL = "{document.title=1}<b"
"""In the name of every photo: to viser's renderer of Markdown a script, and a tag that is never closed."""


@pytest.fixture
def scene(tmp_path) -> Path:
    folder = write_scene(tmp_path / "spheres", num_frames=12)
    for image in (folder / "images").iterdir():
        image.rename(image.with_stem(image.stem + EVIL))
    transforms = folder / "transforms.json"
    transforms.write_text(transforms.read_text().replace(".png", f"{EVIL}.png"))
    return folder


@pytest.fixture
def run(scene, tmp_path) -> Path:
    """The config of a run with an untrained network whose colours are strong."""
    from elvsm_nerfstudio.method_configs import efficient_lvsm_tiny

    pipeline = tiny_pipeline(scene)
    with torch.no_grad():
        pipeline.model.network.head.weight.mul_(20)
    config = replace(deepcopy(efficient_lvsm_tiny.config), pipeline=pipeline.config, output_dir=tmp_path / "outputs")
    config.experiment_name, config.timestamp, config.data = "viewer", "run", scene
    config.get_checkpoint_dir().mkdir(parents=True)
    checkpoint = {"step": 0, "pipeline": pipeline.state_dict()}
    torch.save(checkpoint, config.get_checkpoint_dir() / "step-000000000.ckpt")
    path = config.get_base_dir() / "config.yml"
    path.write_text(yaml.dump(config))
    return path


@pytest.fixture
def server(run, tmp_path) -> Iterator[tuple[str, Path]]:
    """ns-viewer as users start it: its address, and the file with all that it prints."""
    log = tmp_path / "server.log"
    with ns_viewer(run, log) as url:
        yield url, log


@pytest.fixture
def page(server, tmp_path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=KEEP_IMAGES)
        browser.open(server[0])
        browser.wait_for_text("Context views")
        yield browser
    finally:
        browser.close()


# Renders are compared as the page gets them: on the screen they have fewer pixels where the machine is slow.
KEEP_IMAGES = """
    const address = URL.createObjectURL;
    window.images = [];
    URL.createObjectURL = blob => { window.images.push(blob); return address.call(URL, blob); };
"""


def kept_image(page: Browser, index: int) -> Image.Image:
    data = page.run(
        "new Promise(done => { const reader = new FileReader(); reader.onload = () => done(reader.result);"
        f"reader.readAsDataURL(window.images[{index}]); }})"
    )
    return Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))


def picture(page: Browser) -> np.ndarray:
    """The last render in full size, once no other comes: int [height, width, 3]."""

    def settled() -> bool:
        # The camera glides to a halt; then nerfstudio renders it in full size.
        number = page.run("images.length")
        page.draw(60)
        return page.run(FULL_SIZE) and page.run("images.length") == number

    page.wait_for(settled, "a picture that stays as it is")
    # With a render comes its depth, a PNG; other images are the photos at their cameras.
    images = (kept_image(page, index) for index in reversed(range(page.run("images.length"))))
    return np.array(next(i for i in images if i.format == "JPEG" and max(i.size) == 512).convert("RGB")).astype(int)


def changed(page: Browser, before: np.ndarray) -> np.ndarray:
    """The picture after it has become another one."""

    def other() -> tuple[np.ndarray, ...]:
        now = picture(page)
        return (now,) if np.abs(now - before).mean() > 1 else ()

    return page.wait_for(other, "another picture")[0]


def num_colours(image: np.ndarray) -> int:
    """Coarsely: what JPEG makes of a single colour is to be one."""
    return len(np.unique(image.reshape(-1, 3) // 32, axis=0))


def control(label: str) -> str:
    """JavaScript for the input that has a label."""
    return (
        f"document.getElementById([...document.querySelectorAll('label')].find(l => l.innerText == '{label}')?.htmlFor)"
    )


def with_text(selector: str, text: str) -> str:
    """JavaScript for the element that shows a text."""
    return f"[...document.querySelectorAll('{selector}')].find(e => e.offsetParent && e.innerText == '{text}')"


def choose(page: Browser, label: str, option: str) -> None:
    page.click(control(label))
    page.wait_for(lambda: page.run(f"!!{with_text('[role=option]', option)}"), f"the options of {label}")
    page.click(with_text("[role=option]", option))
    page.wait_for(lambda: page.run(f"{control(label)}.value") == option, f"{label} to be {option}")


def test_the_picture_follows_camera_and_controls(server, page):
    page.wait_for_text("2 of 11 views in use")
    shown = next(text for text in page.run("document.body.innerText").splitlines() if "views in use" in text)
    assert shown.count(EVIL) == 2 and page.run("document.title") != "1"
    page.click(with_text("button", "Hide Train Cams"))  # what changes from here on is the render
    first = picture(page)

    page.drag((200, 300), (300, 340))
    changed(page, first)
    assert page.screenshot()[60:-80, 80:470].std() > 1  # it is on the screen

    used = page.run("[...document.querySelectorAll('label')].map(l => l.innerText).filter(t => t.startsWith('View '))")
    (dropped, *_) = [label for label in used if page.run(f"{control(label)}.checked")]

    def from_one_view() -> np.ndarray:
        """The picture while one of the two views is dropped."""
        both = picture(page)
        page.click(control(dropped))
        page.wait_for_text("1 of 11 views in use")
        one_view = changed(page, both)
        page.click(control(dropped))
        page.wait_for_text("2 of 11 views in use")
        changed(page, one_view)
        return one_view

    # More than once where the camera had not quite come to rest.
    same = "the same views to make the same picture"
    page.wait_for(lambda: np.abs(from_one_view() - from_one_view()).mean() < 0.5, same)

    choose(page, "Choice", "farthest point")
    choose(page, "Choice", "nearest to camera")
    page.wait_for(lambda: not page.run(f"!!{control(dropped)}"), "the boxes to go")
    choose(page, "Choice", "manual")
    page.wait_for(lambda: page.run(f"!!{control(dropped)}"), "the boxes to come back")

    choose(page, "Output type", "attention_view")
    page.wait_for(lambda: num_colours(picture(page)) < 40, "a colour for each view")
    attention = picture(page)
    choose(page, "Output type", "attention_evenness")
    changed(page, attention)

    page.run("1")  # collects events
    assert [error for error in page.errors if KNOWN_ERROR not in error] == []
    printed = server[1].read_text()
    assert "Done loading checkpoint" in printed
    assert not any(word in printed for word in ("Traceback", "Error", "Exception")), printed
