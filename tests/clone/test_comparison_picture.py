"""scripts/release/comparison_picture.py: the upper part of a comparison's page, with what was asked for."""

import numpy as np
import pytest
from noise_comparison import SIZE, TARGETS, write_comparison
from PIL import Image

from elvsm_nerfstudio.compare.scoring import frame_file
from scripts.release.browser import find_chromium
from scripts.release.comparison_picture import Arguments, main

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: chromium)")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("comparison"))


def test_the_picture_shows_the_photo_beside_the_render_that_was_asked_for(comparison, tmp_path):
    file = tmp_path / "page.png"
    main(Arguments(comparison, file, context_views=2, scene="table", method="copy-nearest"))
    picture = np.array(Image.open(file)).astype(int)
    assert picture.shape[1] == 1340 and (picture[-1] == (244, 245, 247)).all(), "nothing below the last part's margin"

    photo = np.array(Image.open(comparison / "images/table/target" / frame_file(TARGETS[0])))[0, 0]
    rows, columns = np.nonzero((picture == photo).all(axis=2))
    top, left, bottom = rows.min(), columns.min(), rows.max() + 1
    assert 550 <= bottom - top <= 560 and 0.95 < len(rows) / ((bottom - top) * (bottom - top) / 2) < 1

    render = comparison / "methods/copy-nearest/2_views/table/target" / frame_file(TARGETS[0])
    middle_of = np.round((np.arange(SIZE) + 0.5) * (bottom - top) / SIZE).astype(int)
    shown = picture[top + middle_of][:, left + middle_of]
    below, right = SIZE * 2 // 3, SIZE * 2 // 3  # of names and of the slider's handle
    assert np.array_equal(shown[below:, right:], np.array(Image.open(render))[below:, right:])


def test_what_was_not_compared_is_an_error_and_writes_nothing(comparison, tmp_path):
    with pytest.raises(SystemExit, match="error: --method theirs: expected one of ours, gaussians, copy-nearest"):
        main(Arguments(comparison, tmp_path / "page.png", method="theirs"))
    with pytest.raises(SystemExit, match="expected index.html in it, which elvsm compare writes"):
        main(Arguments(tmp_path, tmp_path / "page.png"))
    assert not list(tmp_path.iterdir())
