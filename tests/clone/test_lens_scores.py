"""Scores of a network through other lenses: same pixels, and what is compared with what."""

from types import SimpleNamespace

import pytest
import torch
from conftest import write_collection
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.metrics import psnr
from scripts.release.lens_scores import (
    Case,
    _common,
    _render,
    cases,
    lens_scores,
    lens_table,
    patch_border_ratio,
)

SIZE = 48


class Blank(torch.nn.Module):
    """Renders everything in one grey."""

    config = SimpleNamespace(patch_size=8)
    calls = 0

    def forward(self, context, target, frame):
        self.calls += 1
        return torch.full_like(target.rgb, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("lenses"), "train test", num_frames=8, size=(96, 96))


def test_a_lens_and_the_collections_own_are_compared_on_the_same_pixels(data):
    collection = SceneCollection.open(data, NerfstudioDataParserConfig())
    scene = collection.load(collection.split("test")[0])
    _, as_taken = _render(Blank(), scene, Case("as taken"), SIZE)
    for case in cases(SIZE):
        _, seen = _render(Blank(), scene, case, SIZE)
        own, reference = _common(seen, case.target, False), _common(as_taken, case.target, True)
        assert own.shape == reference.shape
        assert psnr(own, reference) > 26, case.name
        beside = torch.roll(own, 1, dims=2)
        assert psnr(beside, reference) < psnr(own, reference) - 3, case.name


def test_rows_hold_means_over_all_targets(data):
    network = Blank()
    rows = lens_scores(network, data, SIZE)
    assert network.calls == 1 + len(cases(SIZE))
    assert [row["case"] for row in rows] == ["as taken", *(case.name for case in cases(SIZE))]
    collection = SceneCollection.open(data, NerfstudioDataParserConfig())
    scene = collection.load(collection.split("test")[0])
    _, truth = _render(Blank(), scene, Case("as taken"), SIZE)
    expected = torch.stack([psnr(torch.full_like(image, 0.5), image) for image in truth]).mean()
    assert rows[0]["psnr"] == rows[0]["psnr_as_taken"] == pytest.approx(float(expected), abs=1e-4)
    shown = next(row for row in rows if row["case"].startswith("context, principal point 3"))
    assert shown["psnr"] == pytest.approx(float(expected), abs=1e-4), "the targets are as taken"
    assert "| as taken | " in lens_table(rows) and "| +0.00 |" in lens_table(rows)


def test_patch_borders_show_in_the_ratio():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(2, 32, 32, 3, generator=generator)
    assert patch_border_ratio(smooth, 8) == pytest.approx(1, abs=0.05)
    tiles = torch.rand(2, 4, 4, 3, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert patch_border_ratio(tiles + 0.1 * smooth, 8) > 5
