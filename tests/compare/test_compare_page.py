"""The page of a comparison in a real browser: pictures load, tables sort, the slider moves, nothing complains."""

from __future__ import annotations

import numpy as np
import pytest
from noise_comparison import write_comparison

from scripts.release.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: chromium)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("page"))


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
