from pathlib import Path

import pytest
import torch
from conftest import random_poses
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from elvsm_nerfstudio.cameras import check_cameras, views_from_cameras
from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.geometry import cover_size, pinhole_directions


def cameras(count: int = 2, height: int = 53, width: int = 41, **changes) -> Cameras:
    options = dict(
        camera_to_worlds=random_poses(count, torch.Generator().manual_seed(0))[:, :3],
        fx=50.0, fy=52.0, cx=20.0, cy=27.5, height=height, width=width,
    )  # fmt: skip
    return Cameras(**{**options, **changes})


def world_rays(cams: Cameras) -> torch.Tensor:
    return torch.stack([cams.generate_rays(i, keep_shape=True).directions for i in range(len(cams))])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distortion_params": torch.tensor([0.06, -0.08, 0.0, 0.0, -0.001, 0.0002])},
        {"camera_type": CameraType.FISHEYE, "distortion_params": torch.tensor([0.02, 0.01, 0.0, 0.0, 0.0, 0.0])},
        {"camera_type": CameraType.EQUIRECTANGULAR, "fx": 20.5, "fy": 53.0},
    ],
    ids=["pinhole", "distorted", "fisheye", "equirectangular"],
)
def test_rays_are_nerfstudios_own(changes):
    cams = cameras(**changes)
    views = views_from_cameras(cams, patch_size=8)
    assert views.directions.shape == (1, 2, 56, 48, 3)
    world = torch.einsum("vij,vhwj->vhwi", views.camera_to_world[0, :, :3, :3], views.directions[0])
    assert torch.allclose(world[:, :53, :41], world_rays(cams), atol=2e-6)


def test_rays_of_pinholes_are_nerfstudios_to_the_bit():
    focal = torch.tensor([[50.0], [61.3], [38.7]])
    cams = cameras(count=3, fx=focal, fy=focal.flip(0), cx=focal / 3, camera_to_worlds=torch.eye(4)[:3].expand(3, 3, 4))
    found = views_from_cameras(cams, patch_size=1).directions[0]
    assert torch.equal(found, world_rays(cams) * torch.tensor([1.0, -1.0, -1.0]))


def test_lenses_of_all_kinds_side_by_side():
    """Each of them as if it were alone."""
    kinds = [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.PERSPECTIVE, CameraType.EQUIRECTANGULAR]
    distortion = torch.zeros(4, 6)
    distortion[2, :2] = torch.tensor([0.06, -0.08])
    cams = cameras(
        count=4, camera_type=kinds, distortion_params=distortion, fx=torch.tensor([[50.0], [48], [47], [41]])
    )
    together = views_from_cameras(cams, patch_size=8).directions[0]
    for index in range(4):
        assert torch.equal(together[index], views_from_cameras(cams[index : index + 1], patch_size=8).directions[0, 0])
    assert len({float(rays[0, 0, 0]) for rays in together}) == 4


def test_padding_continues_the_pinhole_grid():
    views = views_from_cameras(cameras(), patch_size=8)
    assert torch.allclose(
        views.directions[0, 0], pinhole_directions(torch.tensor([50.0, 52.0, 20.0, 27.5]), 56, 48), atol=1e-6
    )


def test_central_ray_of_a_fisheye_looks_ahead():
    cams = cameras(camera_type=CameraType.FISHEYE, cx=20.5, cy=26.5, distortion_params=torch.zeros(6))
    directions = views_from_cameras(cams, patch_size=1).directions
    assert directions.isfinite().all()
    assert torch.equal(directions[0, 0, 26, 20], torch.tensor([0.0, 0.0, 1.0]))


def test_each_camera_keeps_its_own_lens():
    cams = cameras(count=3, fx=torch.tensor([[50.0], [60.0], [50.0]]))
    directions = views_from_cameras(cams, patch_size=1).directions[0]
    assert torch.equal(directions[0], directions[2])
    assert (directions[0] - directions[1]).abs().max() > 1e-2


def test_cropped_cameras_see_the_same_rays():
    """A pixel of the cropped camera looks where its place in the full image looks, distortion included."""
    cams = cameras(distortion_params=torch.tensor([0.06, -0.08, 0.0, 0.0, -0.001, 0.0002]))
    resized = cover_size((53, 41), (32, 32))
    scene = Scene("scene", DataparserOutputs([Path()] * 2, cams), train_frames=(0, 1), eval_frames=())
    cropped = scene.cropped_cameras((0, 1), ImageSpec((32, 32)))
    top, left = (resized[0] - 32) // 2, (resized[1] - 32) // 2
    y, x = (10.5 + top) * 53 / resized[0], (7.5 + left) * 41 / resized[1]
    index = torch.tensor([[0]])
    expected = cams.generate_rays(index, coords=torch.tensor([[y, x]])).directions[0]
    assert torch.allclose(world_rays(cropped)[0, 10, 7], expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fx": 0.0}, r"camera 0 has focal lengths \[0.0, 52.0\]; expected positive"),
        ({"camera_type": CameraType.ORTHOPHOTO}, "camera 0 is of type ORTHOPHOTO; expected one of PERSPECTIVE"),
        ({"camera_to_worlds": torch.full((2, 3, 4), torch.nan)}, "camera 0 has a pose that is not finite"),
    ],
)
def test_impossible_cameras_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_cameras(cameras(**changes))


def test_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match=r"cameras of mixed sizes: heights \[32, 53\]"):
        views_from_cameras(cameras(height=torch.tensor([[53], [32]])), patch_size=8)
