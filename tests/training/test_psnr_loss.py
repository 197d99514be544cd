"""The loss on PSNR against what it is meant to be in its two limits, and in the model."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_pipeline

from elvsm_nerfstudio.training.psnr_loss import SMALLEST_ERROR, TYPICAL_ERROR, psnr_loss


def test_halving_any_large_error_gains_the_same():
    gains = [psnr_loss(torch.tensor([e])) - psnr_loss(torch.tensor([e / 2])) for e in (0.2, 0.8)]
    assert gains[0] == pytest.approx(TYPICAL_ERROR * math.log(2), rel=0.02)
    assert gains[1] == pytest.approx(TYPICAL_ERROR * math.log(2), rel=0.005)


def test_small_errors_count_as_in_the_mean_squared_error():
    errors = torch.tensor([1e-6, 2e-6], dtype=torch.float64)
    assert psnr_loss(errors).item() == pytest.approx(TYPICAL_ERROR / SMALLEST_ERROR * errors.mean().item(), rel=1e-2)


def test_gradient_at_a_typical_error_is_that_of_the_mean_squared_error():
    errors = torch.full((3,), TYPICAL_ERROR, requires_grad=True)
    psnr_loss(errors).backward()
    torch.testing.assert_close(errors.grad, torch.full((3,), 1 / 3), rtol=0.06, atol=0)


def test_model_weighs_each_image_by_its_own_error(collection):
    """Of two targets one is ten times as far off: ten times as steep in the mean squared error, less steep in this."""
    model = tiny_pipeline(collection).model
    truth = torch.full((1, 2, 4, 4, 3), 0.5)
    offsets = torch.tensor([0.04, 0.4]).view(1, 2, 1, 1, 1)
    ratios = {}
    for on in (False, True):
        model.config = replace(model.config, psnr_loss=on)
        rgb = (truth + offsets).requires_grad_()
        losses = model.get_loss_dict({"rgb": rgb}, {"image": truth})
        (loss,) = losses.values()
        loss.backward()
        ratios[list(losses)[0]] = (rgb.grad[0, 1].mean() / rgb.grad[0, 0].mean()).item()
        if not on:
            assert loss.item() == pytest.approx((0.04**2 + 0.4**2) / 2)
    assert ratios["mse"] == pytest.approx(10)
    expected = 10 * (0.04**2 + SMALLEST_ERROR) / (0.4**2 + SMALLEST_ERROR)
    assert ratios["psnr"] == pytest.approx(expected, rel=1e-4) and expected < 0.2
