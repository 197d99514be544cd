"""The path of elvsm orbit."""

import math

import pytest
import torch
from conftest import look_at

from elvsm_nerfstudio.cli.orbit import orbit


def ring(azimuths: torch.Tensor, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    """Cameras [view, 3, 4] around a centre, 2 away from its axis and 1 above it."""
    poses = torch.stack([look_at(torch.tensor([2 * a.cos(), 2 * a.sin(), 1.0])) for a in azimuths])
    poses[:, :3, 3] += torch.tensor(centre)
    return poses[:, :3]


def test_the_circle_is_that_of_the_cameras_and_looks_at_their_centre():
    centre = torch.tensor([3.0, -1.0, 0.5])
    context = ring(torch.arange(5) * 0.9, tuple(centre.tolist()))
    path = orbit(context, 8)
    assert torch.allclose(path[0, :3], context[0], atol=1e-4)
    offset = path[:, :3, 3] - centre
    assert torch.allclose(offset[:, :2].norm(dim=-1), torch.full((8,), 2.0), atol=1e-4)
    assert torch.allclose(offset[:, 2], torch.ones(8), atol=1e-4)
    assert torch.allclose(path[:, :3, 2], torch.nn.functional.normalize(offset, dim=-1), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_world_may_be_turned_in_any_way(axis):
    """With y or -z up frames used to roll over."""
    context = ring(torch.arange(5) * 0.9)
    for quarter in (1, 2, 3):
        turn = torch.linalg.matrix_exp(quarter * math.pi / 2 * skew(torch.eye(3)[axis]))
        expected = turn @ orbit(context, 8)[:, :3]
        assert torch.allclose(orbit(turn @ context, 8)[:, :3], expected, atol=1e-4)


def skew(vector: torch.Tensor) -> torch.Tensor:
    x, y, z = vector.tolist()
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.4])
def test_cameras_that_look_the_same_way_have_no_orbit(spread):
    context = ring(torch.linspace(-spread, spread, 6))
    context[:, 1, 3] += torch.arange(6) * 0.3
    with pytest.raises(ValueError, match=r"all 6 context cameras look the same way, within \d+ degrees.*interpolate"):
        orbit(context, 8)


def test_cameras_that_look_outwards_have_no_orbit():
    context = ring(torch.arange(6) * math.pi / 3)
    context[:, :, [0, 2]] *= -1  # about their up axis by half a turn
    with pytest.raises(ValueError, match="no common point: .* behind 6 of the 6.*ns-render spiral"):
        orbit(context, 8)
