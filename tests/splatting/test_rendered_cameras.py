"""Where cameras for rendered views stand, by the context cameras alone."""

import math

import pytest
import torch
from conftest import look_at

from elvsm_nerfstudio.splatting.rendered_cameras import (
    AZIMUTH_MARGIN,
    BESIDE,
    ELEVATION_MARGIN,
    looked_at,
    place_cameras,
    upwards,
)


def around(*degrees: tuple[float, float], distance: float = 3.0) -> torch.Tensor:
    """OpenGL poses at azimuths and elevations around the origin, +Z up."""
    places = []
    for azimuth, elevation in degrees:
        a, e = math.radians(azimuth), math.radians(elevation)
        places.append(torch.tensor([math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)]) * distance)
    return torch.stack([look_at(place)[:3] for place in places])


def directions(poses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Azimuths and elevations seen from the origin."""
    x, y, z = torch.nn.functional.normalize(poses[:, :, 3], dim=-1).unbind(-1)
    return torch.atan2(y, x), z.asin()


def test_all_around_an_object():
    placed = place_cameras(around((0, 10), (120, 40), (240, 25), distance=4.0), 32)
    assert placed.arrangement == "all around one place"
    assert torch.allclose(placed.poses[:, :, 3].norm(dim=-1), torch.tensor(4.0), atol=1e-4)
    azimuth, elevation = directions(placed.poses)
    assert azimuth.sort().values.diff().max() < math.radians(40), "a side is left out"
    assert math.radians(10) - ELEVATION_MARGIN <= elevation.min() < math.radians(10)
    assert math.radians(40) < elevation.max() <= math.radians(40) + ELEVATION_MARGIN + 1e-4
    # They look at the place, and stand upright.
    to_place = -torch.nn.functional.normalize(placed.poses[:, :, 3], dim=-1)
    assert torch.allclose(-placed.poses[:, :, 2], to_place, atol=1e-4)
    assert placed.poses[:, 2, 0].abs().max() < 5e-3 and (placed.poses[:, 2, 1] > 0).all()


def test_from_above_and_from_below_is_all_around():
    placed = place_cameras(around((0, 60), (50, -60)), 32)
    assert placed.arrangement == "all around one place"
    azimuth, elevation = directions(placed.poses)
    assert azimuth.sort().values.diff().max() < math.radians(60)
    assert elevation.min() < math.radians(-50) and elevation.max() > math.radians(50)


def test_two_cameras_on_one_side_leave_the_other():
    placed = place_cameras(around((-20, 20), (30, 20)), 32)
    assert placed.arrangement == "before one place"
    azimuth, _ = directions(placed.poses)
    assert math.radians(-20) - AZIMUTH_MARGIN <= azimuth.min() < math.radians(-20)
    assert math.radians(30) < azimuth.max() <= math.radians(30) + AZIMUTH_MARGIN + 1e-4


def test_a_walk_gets_cameras_between_neighbours_and_beside():
    poses = torch.eye(4)[:3].repeat(4, 1, 1)
    poses[:, 2, 3] = -2.0 * torch.arange(4)  # forwards, as they look
    assert looked_at(poses.double()) is None
    placed = place_cameras(poses, 40)
    assert placed.arrangement == "between neighbours"
    assert torch.allclose(placed.poses[:, :, :3], torch.eye(3).expand(40, 3, 3), atol=1e-5)
    x, y, z = placed.poses[:, :, 3].unbind(-1)
    assert -6.01 < z.min() < -5 and -1 < z.max() < 0.01
    for beside in (x, y):
        assert 0.3 < beside.max() <= 4 * BESIDE + 1e-5 and -4 * BESIDE - 1e-5 <= beside.min() < -0.3


def test_cameras_that_look_outwards_look_at_no_place():
    poses = around((0, 0), (90, 0), (180, 0), (270, 0))
    poses[:, :, [0, 2]] *= -1
    assert looked_at(poses.double()) is None


def test_one_camera():
    (pose,) = around((50, 30), distance=2.0)
    assert torch.allclose(looked_at(pose[None].double()), torch.zeros(3).double(), atol=1e-5)
    away = pose.clone()
    away[:, [0, 2]] *= -1  # the origin lies behind it
    assert torch.allclose(looked_at(away[None].double()), 2 * away[:, 3].double(), atol=1e-4)
    assert place_cameras(pose[None], 8).poses.isfinite().all()


@pytest.mark.parametrize("poses", [around((0, 10), (120, 40), (240, 25)), around((-20, 20), (30, 20), (10, 0))])
def test_the_worlds_frame_and_scale_do_not_matter(poses):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn * torch.linalg.det(turn)
    moved = turn @ poses
    moved[:, :, 3] = 7 * moved[:, :, 3] + torch.tensor([3.0, -20.0, 5.0])
    expected = turn @ place_cameras(poses, 12).poses
    expected[:, :, 3] = 7 * expected[:, :, 3] + torch.tensor([3.0, -20.0, 5.0])
    assert torch.allclose(place_cameras(moved, 12).poses, expected, atol=1e-3)


def test_up_is_the_cameras_up_however_they_are_pitched():
    up = upwards(around((0, 60), (50, 60)).double())
    assert torch.allclose(up, torch.tensor([0, 0, 1.0]).double(), atol=0.05)
    straight_down = torch.eye(4)[:3].repeat(3, 1, 1).double()
    assert torch.allclose(upwards(straight_down), torch.tensor([0, 1.0, 0]).double(), atol=1e-6)
