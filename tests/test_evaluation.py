import json
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import make_views

from elvsm_nerfstudio.evaluation import metrics
from elvsm_nerfstudio.evaluation.floors import copy_nearest
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(24, 20, 3, generator=generator)
    return (truth + 0.1 * torch.randn(24, 20, 3, generator=generator)), truth


def test_psnr_is_that_of_clamped_colours():
    prediction, truth = images()
    expected = 10 * math.log10(1 / ((prediction.clamp(0, 1) - truth) ** 2).mean().item())
    assert float(metrics.psnr(prediction, truth)) == pytest.approx(expected, abs=1e-4)
    assert float(metrics.psnr(truth, truth)) == 100.0


def test_ssim_equals_a_plain_gaussian_window_computation():
    prediction, truth = (image.clamp(0, 1) for image in images())
    x = torch.arange(11) - 5.0
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = (window / window.sum()).double()
    kernel = (window[:, None] * window)[None, None]

    def blur(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(image.double().permute(2, 0, 1)[:, None], kernel)

    a, b = blur(prediction), blur(truth)
    sample = 121 / 120  # scikit-image's default: the sample covariance of the 11x11 window
    va, vb = ((blur(i.double().square()) - m.square()) * sample for i, m in ((prediction, a), (truth, b)))
    cab = (blur(prediction.double() * truth.double()) - a * b) * sample
    value = (2 * a * b + 1e-4) * (2 * cab + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
    assert metrics.ssim(prediction, truth) == pytest.approx(float(value.mean()), abs=1e-5)


def test_lpips_is_left_out_with_one_warning_where_weights_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics._lpips_network.cache_clear()
    with pytest.warns(UserWarning, match="LPIPS is left out: .*vgg16-397923af.pth is missing"):
        assert set(metrics.image_metrics(*images())) == {"psnr", "ssim"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.image_metrics(*images())
    metrics._lpips_network.cache_clear()


def test_lpips_is_computed_where_weights_are_present(tmp_path, monkeypatch):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "hub/checkpoints" / metrics.LPIPS_WEIGHTS["alex"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics._lpips_network.cache_clear()
    truth = torch.rand(64, 64, 3)
    near, far = (truth + amount * torch.rand(64, 64, 3) for amount in (0.05, 0.5))
    assert metrics.lpips(truth, truth, "alex") == 0.0
    assert 0 < metrics.lpips(near, truth, "alex") < metrics.lpips(far, truth, "alex")
    metrics._lpips_network.cache_clear()


def test_copy_nearest_takes_the_nearest_camera():
    context = make_views(2, 4, 8, 8)
    target = context.select([2, 0])
    moved = target.camera_to_world.clone()
    moved[..., 0, 3] += 1e-3
    copied = copy_nearest(context, type(target)(moved, target.directions, target.intrinsics))
    assert torch.equal(copied, context.rgb[:, [2, 0]])


def test_json_is_strict_and_written_whole(tmp_path):
    write_json(tmp_path / "deep/a.json", {"psnr": 1.5})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"psnr": 1.5}
    with pytest.raises(ValueError):
        write_json(tmp_path / "deep/a.json", {"psnr": math.nan})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"psnr": 1.5}


def test_sheet_puts_rows_below_each_other(tmp_path):
    from PIL import Image

    red, blue = torch.zeros(6, 5, 3), torch.zeros(6, 5, 3)
    red[..., 0], blue[..., 2] = 1, 1
    write_image(tmp_path / "sheet.png", sheet([[red, blue], [blue]]))
    picture = np.array(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (16, 14, 3)
    assert picture[0, 0].tolist() == [255, 0, 0] and picture[0, 13].tolist() == [0, 0, 255]
    assert picture[15, 0].tolist() == [0, 0, 255] and picture[15, 13].tolist() == [255, 255, 255]
