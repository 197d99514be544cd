"""The error across patches' borders against loops, where it is zero and where it is not, and in the model."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_pipeline

from elvsm_nerfstudio.training.border_errors import border_errors


def test_it_is_that_of_loops():
    difference = torch.rand(2, 3, 12, 8, 3, dtype=torch.float64) - 0.5
    found = border_errors(difference, 4)
    assert found.shape == (2, 3)
    image = difference[1, 2]
    down = [(image[i, j, c] - image[i - 1, j, c]) ** 2 for i in (4, 8) for j in range(8) for c in range(3)]
    right = [(image[i, 4, c] - image[i, 3, c]) ** 2 for i in range(12) for c in range(3)]
    assert found[1, 2].item() == pytest.approx((sum(down) / len(down) + sum(right) / len(right)).item())


def test_it_sees_borders_alone():
    """The same error of each pixel: in the whole image alike, in stripes inside of patches, in every other patch."""
    even = torch.full((16, 16, 3), 0.1)
    inside = even.clone()
    inside[:, [2, 5, 10, 13]] *= -1  # not beside a border
    every_other = even.clone()
    every_other[:, 8:] *= -1
    assert border_errors(even, 8) == 0 and border_errors(inside, 8) == 0
    assert border_errors(every_other, 8).item() == pytest.approx(0.2**2, rel=1e-5)
    assert border_errors(every_other, 16) == 0  # a single patch


def test_it_is_weighed_beside_the_pixels_error(collection):
    model = tiny_pipeline(collection).model
    patch = model.config.network.patch_size
    truth, rgb = torch.rand(2, 1, 2, 2 * patch, 3 * patch, 3)
    pixels = model.get_loss_dict({"rgb": rgb}, {"image": truth})["mse"]
    model.config = replace(model.config, border_weight=0.5)
    both = model.get_loss_dict({"rgb": rgb}, {"image": truth})["mse"]
    assert both.item() == pytest.approx(pixels.item() + 0.5 * border_errors(rgb - truth, patch).mean().item(), rel=1e-5)
