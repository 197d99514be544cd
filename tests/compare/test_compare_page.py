"""The page of a comparison in a real browser: pictures load, tables sort, the slider moves, nothing complains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elvsm_nerfstudio.compare.page import write_page
from elvsm_nerfstudio.compare.plots import write_plots
from elvsm_nerfstudio.compare.scoring import frame_file, score, summary
from elvsm_nerfstudio.evaluation.report import write_image
from scripts.release.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: chromium)")

SCENES, COUNTS, TARGETS, SIZE = ("chair", "a b#1", "table"), (2, 4), (3, 7), 48
METRICS = ["psnr", "ssim", "flip"]
NOISE = {("ours", 2): 0.2, ("ours", 4): 0.1, ("gaussians", 2): 0.3, ("gaussians", 4): 0.15, ("copy-nearest", 2): 0.5,
         ("copy-nearest", 4): 0.4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison of noisy colours: the third scene is the hardest for all, and Gaussians fail on one."""
    root, generator = tmp_path_factory.mktemp("page"), torch.Generator().manual_seed(0)
    records = []
    for scene in SCENES:
        for frame in (0, 1, 2, 5):
            write_image(root / "images" / scene / "context" / frame_file(frame), torch.rand(SIZE, SIZE, 3))
        for frame in TARGETS:
            write_image(root / "images" / scene / "target" / frame_file(frame), torch.full((SIZE, SIZE, 3), 0.5))
    for (method, count), noise in NOISE.items():
        for i, scene in enumerate(SCENES):
            about = {"method": method, "context_views": count, "scene": scene}
            if (method, count, scene) == ("gaussians", 4, "chair"):
                records.append({**about, "status": "failed", "error": "RuntimeError: <b>no</b> </script> points"})
                continue
            pictures = root / "methods" / method / f"{count}_views" / scene
            for frame in TARGETS:
                error = torch.randn(SIZE, SIZE, 3, generator=generator) * noise * (1 + i) / 3
                write_image(pictures / "target" / frame_file(frame), 0.5 + error)
            rows = score(pictures / "target", root / "images" / scene / "target", pictures / "errors", TARGETS)
            costs = {"first_picture_seconds": noise, "render_ms": [1.0, 2.0], "peak_bytes": 2**28, "disk_bytes": 2**20}
            records.append({**about, "status": "done", "images": rows, **costs})
    methods = []
    for name in ("ours", "gaussians", "copy-nearest"):
        found = {c: [r for r in records if (r["method"], r["context_views"]) == (name, c)] for c in COUNTS}
        summaries = {str(count): summary(listed, METRICS) for count, listed in found.items()}
        kind = "baseline" if name == "copy-nearest" else "network"
        methods.append({"name": name, "kind": kind, "folder": name, "note": "a note", "summaries": summaries})
    frames = {"context": [0, 1, 2, 5], "targets": list(TARGETS)}
    names = {"context_names": ["a", "b", "c", "d"], "target_names": ["e", "f"]}
    result = {
        "title": "Noise on three scenes", "made": "2026-01-01T00:00:00", "command": "elvsm compare",
        "code": {"version": "1", "commit": None}, "versions": {"torch": "2"}, "beside": "nothing", "data": "data",
        "machine": {"processor": "CPU", "cores": 1, "threads": 1, "device": "cpu"}, "background": "white",
        "image_size": [SIZE, SIZE], "context_views": list(COUNTS), "metrics": METRICS, "methods": methods,
        "scenes": [{"name": name, **frames, **names} for name in SCENES], "records": records, "notes": ["A note."],
        "videos": [],
    }  # fmt: skip
    result["plots"] = write_plots(root, result)
    write_page(root / "index.html", result)
    return root


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"), size=(1300, 900))
    browser.open((folder / "index.html").as_uri())
    browser.wait_for_text("Scene by scene")
    yield browser
    browser.run("1")  # collects events
    browser.close()


def texts(page: Browser, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({selector!r})].map(e => e.innerText)")


def test_all_pictures_load(page):
    page.run("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    pending = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)"
    page.wait_for(lambda: page.run(pending) == [], "the pictures", 10)
    # Two in the slider, its 4 context views, 4 plots; in a scene's row 4 + 1 and two for each method that did not fail.
    assert page.run("document.images.length") == 2 + 4 + 4 + 3 * 5 + 2 * (3 * 3 - 1)


def test_scores_sort_and_the_best_is_marked(page, folder):
    order = "#scores tbody tr .name"
    assert texts(page, order) == ["ours", "gaussians", "copy-nearest"]
    page.click("document.querySelector('#scores th[data-key=psnr] button')")
    assert texts(page, order)[0] == "ours"
    page.click("document.querySelector('#scores th[data-key=psnr] button')")
    assert texts(page, order) == ["copy-nearest", "gaussians", "ours"]
    assert page.run("document.querySelector('#scores th[data-key=psnr]').ariaSort") == "ascending"
    values = page.run(
        "[...document.querySelectorAll('#scores td[data-value]:nth-child(2)')].map(e => +e.dataset.value)"
    )
    assert values == sorted(values)
    best = page.run("[...document.querySelectorAll('#scores .best')].map(e => e.closest('tr').dataset.name)")
    assert set(best) == {"ours"}


def test_failures_are_shown_as_text(page):
    assert texts(page, "#scores .failed") == ["failed on 1 of 3"]
    page.click("document.querySelector('#failures summary')")
    assert texts(page, "#failures pre") == ["RuntimeError: <b>no</b> </script> points"]
    assert page.run("document.querySelectorAll('#scenes tr[data-scene=chair] .failed').length") == 1


def test_scenes_sort_by_a_methods_metric(page):
    scenes = "[...document.querySelectorAll('#scenes tbody tr')].map(e => e.dataset.scene)"
    page.run("find('metric').value = 'flip'; find('metric').onchange()")
    page.click("document.querySelector('#scenes th[data-key=gaussians] button')")
    assert page.run(scenes) == ["a b#1", "table", "chair"]  # the one that failed comes last
    page.click("document.querySelector('#scenes th[data-key=gaussians] button')")
    assert page.run(scenes) == ["table", "a b#1", "chair"]
    page.click("document.querySelector('#scenes th[data-key=name] button')")
    assert page.run(scenes) == ["a b#1", "chair", "table"]
    page.click("document.querySelector('#scenes tr[data-scene=table] [aria-label=\"next target\"]')")
    assert "2 / 2" in texts(page, "#scenes tr[data-scene=table]")[0]
    shown = page.run("document.querySelector('#scenes tr[data-scene=table] td:nth-child(3) img').src")
    assert shown.endswith("methods/ours/4_views/table/target/00007.png")


def test_the_slider_uncovers_one_picture_or_the_other(page):
    page.run("Object.assign(state, {scene: 'table', left: TRUTH, right: 'copy-nearest'}); drawLook()")
    page.wait_for(lambda: page.run("find('over').complete && find('under').complete"), "both pictures", 10)
    page.run("document.querySelector('#wipe').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = page.run("(b => [b.x, b.y, b.width, b.height])(find('wipe').getBoundingClientRect())")
    left, top, width, height = map(int, box)
    y = top + height * 3 // 4

    def noise(share: float) -> tuple[float, float]:
        """Of the picture's left and right third, with the slider put to a share of its width."""
        place = left + int(width * share), y
        page.drag(place, place, steps=1)
        page.wait_for(lambda: abs(float(page.run("find('slider').value")) - 100 * share) < 2, "the slider to move", 5)
        image = page.screenshot()[top + height // 4 : top + height // 2 - 30, left : left + width].astype(float)
        return image[:, width // 10 : width // 3].std(), image[:, 2 * width // 3 : 9 * width // 10].std()

    truth, noisy = noise(0.5)
    assert truth < 2 < 20 < noisy
    assert max(noise(0.95)) < 2  # all of it ground truth
    assert min(noise(0.05)) > 20
    page.click("find('swap')")
    assert page.run("find('left').value") == "copy-nearest"


def test_pictures_of_a_row_lead_to_the_slider(page):
    page.click("document.querySelector('#scenes tr[data-scene=\"a b#1\"] td:nth-child(4) button')")
    assert page.run("[state.scene, state.left, state.right]") == ["a b#1", "ground truth", "gaussians"]
    assert page.run("find('over').src").endswith("methods/gaussians/4_views/a%20b%231/target/00003.png")


def test_the_number_of_context_views_and_the_theme_can_be_changed(page):
    page.click("[...document.querySelectorAll('#counts button')].find(b => b.innerText.startsWith('2 '))")
    assert page.run("document.querySelectorAll('#context img').length") == 2
    assert texts(page, "#scores .failed") == []
    page.run("setTheme('light')")
    light = page.screenshot().mean()
    page.click("find('theme')")
    dark = page.screenshot().mean()
    assert light > 150 > 80 > dark
    assert page.run("getComputedStyle(document.querySelector('.plot.light')).display") == "none"


def test_nothing_complains(page, folder):
    page.run("1")  # collects events
    assert page.errors == []
    html = (folder / "index.html").read_text()
    assert "http://" not in html and "https://" not in html and html.count("</script>") == 2
    assert np.isfinite(page.run("document.documentElement.scrollHeight"))
