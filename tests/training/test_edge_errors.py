"""The error of neighbours' differences against loops, at patch borders, and in the model."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_pipeline

from elvsm_nerfstudio.training.edge_errors import edge_errors


def test_it_is_that_of_loops():
    difference = torch.rand(2, 3, 4, 5, 3, dtype=torch.float64) - 0.5
    found = edge_errors(difference)
    assert found.shape == (2, 3)
    image = difference[1, 2]
    down = [(image[i + 1, j, c] - image[i, j, c]) ** 2 for i in range(3) for j in range(5) for c in range(3)]
    right = [(image[i, j + 1, c] - image[i, j, c]) ** 2 for i in range(4) for j in range(4) for c in range(3)]
    assert found[1, 2].item() == pytest.approx((sum(down) / len(down) + sum(right) / len(right)).item())


def test_equal_errors_cost_more_where_neighbours_disagree():
    """The same error of each pixel: once the image is too bright, once every other patch of 8 pixels too dark."""
    even = torch.full((32, 32, 3), 0.1)
    patches = torch.ones(4).cumsum(0).remainder(2).mul(2).sub(1).repeat_interleave(8)
    assert edge_errors(even) == 0
    # 3 of 31 differences to the right are of 0.2, and none downwards.
    assert edge_errors(even * patches[:, None]).item() == pytest.approx(3 / 31 * 0.2**2, rel=1e-4)


def test_it_is_weighed_beside_the_pixels_error(collection):
    model = tiny_pipeline(collection).model
    truth, rgb = torch.rand(2, 1, 2, 8, 8, 3)
    pixels = model.get_loss_dict({"rgb": rgb}, {"image": truth})["mse"]
    model.config = replace(model.config, edge_weight=0.5)
    both = model.get_loss_dict({"rgb": rgb}, {"image": truth})["mse"]
    assert both.item() == pytest.approx(pixels.item() + 0.5 * edge_errors(rgb - truth).mean().item(), rel=1e-5)
