"""Points from a few views alone: on surfaces, in the visible range, through lenses."""

from dataclasses import replace

import pytest
import torch
from conftest import look_at
from nerfstudio.cameras.cameras import Cameras

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.splatting.initial_points import initial_points, points_from_file
from elvsm_nerfstudio.splatting.lens import PinholeView, is_pinhole, undistort
from elvsm_nerfstudio.splatting.plane_sweep import PosedImages, surface_points, visible_range

SIZE = 48


def wall(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A texture without repetition."""
    return torch.stack([0.5 + 0.4 * torch.sin(3 * x + y * y), 0.5 + 0.4 * torch.sin(4 * y - x * x + 1),
                        0.5 + 0.4 * torch.sin(2 * x * y + 2 * x)], dim=-1)  # fmt: skip


def cameras(distortion: float = 0.0) -> Cameras:
    """Three in front of the plane z = 0, 2.2 to 2.4 away from its middle."""
    places = torch.tensor([[-0.5, 0.1, 2.2], [0.0, -0.3, 2.3], [0.5, 0.2, 2.2]])
    focal = torch.full((3, 1), 1.1 * SIZE)
    lens = torch.zeros(3, 6)
    lens[:, 0] = distortion
    return Cameras(
        camera_to_worlds=torch.stack([look_at(place)[:3] for place in places]),
        fx=focal, fy=focal, cx=torch.full((3, 1), SIZE / 2 + 1.5), cy=torch.full((3, 1), SIZE / 2 - 1.0),
        height=SIZE, width=SIZE, distortion_params=lens,
    )  # fmt: skip


def photos(views: Cameras) -> torch.Tensor:
    """What the cameras see of the wall, exactly, through their lenses."""
    from elvsm_nerfstudio.cameras import views_from_cameras

    seen = views_from_cameras(views, patch_size=1)
    rays = torch.einsum("vij,vhwj->vhwi", seen.camera_to_world[0, :, :3, :3], seen.directions[0])
    centre = seen.camera_to_world[0, :, None, None, :3, 3]
    points = centre - rays * centre[..., 2:] / rays[..., 2:]
    return wall(points[..., 0], points[..., 1])


def posed(views: Cameras, rgb: torch.Tensor, empty: torch.Tensor | None = None) -> PosedImages:
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[:, :3] = opengl_to_opencv(views.camera_to_worlds)
    intrinsics = torch.cat([views.fx, views.fy, views.cx, views.cy], dim=-1)
    known = torch.ones(rgb.shape[:3], dtype=torch.bool)
    return PosedImages(rgb, known, ~known if empty is None else empty, poses, intrinsics)


def test_points_lie_on_the_surface_with_its_colours():
    views = cameras()
    points, colours = surface_points(posed(views, photos(views)), num_planes=96)
    assert len(points) > 0.4 * 3 * SIZE * SIZE
    # A pixel is 1 / (1.1 * 48) of the distance wide, and depth is seen from a base of less than half the distance.
    assert points[:, 2].abs().quantile(0.9) < 0.06 and points[:, 2].abs().median() < 0.025
    truth = wall(points[:, 0], points[:, 1])
    assert (colours - truth).abs().mean() < 0.05


def test_the_visible_range_comes_from_the_cameras():
    views = cameras()
    images = posed(views, photos(views))
    near, far = visible_range(images)
    assert 0.2 < near < 1.3 and far > 10
    bigger = replace(images, camera_to_world=images.camera_to_world.clone())
    bigger.camera_to_world[:, :3, 3] *= 7
    assert visible_range(bigger) == pytest.approx((7 * near, 7 * far), rel=1e-4)
    away = replace(images, camera_to_world=images.camera_to_world.clone())
    turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    away.camera_to_world[1:, :3, :3] = turn @ away.camera_to_world[1:, :3, :3]
    away.camera_to_world[2, :3, :3] = images.camera_to_world[2, :3, :3] @ torch.tensor(
        [[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]
    )
    away.camera_to_world[1:, :3, 3] += torch.tensor([[0.0, 0, 9], [30, 0, 0]])
    assert visible_range(away) is None


def test_no_texture_no_points():
    views = cameras()
    points, _ = surface_points(posed(views, torch.full((3, SIZE, SIZE, 3), 0.7)), num_planes=32)
    assert len(points) == 0


def test_lenses_are_undone_and_done_again():
    bent, straight = cameras(distortion=0.15), cameras()
    assert not is_pinhole(bent) and is_pinhole(straight)
    photo, pinhole_photo = photos(bent)[:1], photos(straight)[:1]
    assert (photo - pinhole_photo).abs().mean() > 0.01
    picture, inside = undistort(bent[0:1], photo[0])
    assert 0.7 < inside.float().mean() < 1
    core = inside.clone()
    core[:2], core[-2:], core[:, :2], core[:, -2:] = False, False, False, False
    assert (picture - pinhole_photo[0]).abs()[core].mean() < 0.004

    view = PinholeView.of(bent[0:1])
    wide = view.camera(bent[0:1])
    assert is_pinhole(wide) and view.size != (SIZE, SIZE)
    again = view.seen_by_lens(photos(wide)[0])
    assert again.shape == photo[0].shape and (again - photo[0]).abs().max() < 0.02


def test_a_lens_that_looks_backwards_is_refused():
    from nerfstudio.cameras.cameras import CameraType

    fisheye = cameras()
    fisheye.camera_type = torch.full((3, 1), CameraType.FISHEYE.value)
    fisheye.fx = fisheye.fy = torch.full((3, 1), 10.0)
    with pytest.raises(ValueError, match="FISHEYE sees [0-9]+ degrees to the side"):
        PinholeView.of(fisheye[0:1])


def test_initial_points_are_drawn_and_filled_up():
    views = cameras()
    rgb = photos(views)

    def points(kind: str, images: torch.Tensor, count: int, seed: int = 0):
        return initial_points(kind, views, images, "white", count, torch.Generator().manual_seed(seed))

    swept = points("plane-sweep", rgb, 300)
    assert swept.xyz.shape == swept.rgb.shape == (300, 3) and swept.record["of_plane_sweep"] == 300
    assert swept.xyz[:, 2].abs().median() < 0.03 and 1 < swept.rgb.max() <= 255
    assert torch.equal(points("plane-sweep", rgb, 300).xyz, swept.xyz)
    filled = points("plane-sweep", torch.full_like(rgb, 0.7), 300)
    assert filled.record == {"kind": "plane-sweep", "points": 300, "of_plane_sweep": 0, "at_random": 300}
    random = points("random", rgb, 300)
    assert random.record["at_random"] == 300 and random.xyz[:, 2].std() > 0.1
    # Each on the ray of the pixel that it has its colour from, and so in a picture.
    images = posed(views, rgb)
    inside = torch.stack([images.inside(*images.project(view, random.xyz)) for view in range(3)])
    assert (inside.sum(dim=0) >= 2).all()


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("kind", ["plane-sweep", "random"])
def test_points_keep_out_of_what_shows_the_background(kind, background):
    """A round piece of the wall before a plain background: every point lies within the cones of all views through it,
    and has its colours."""
    views, behind = cameras(), {"white": 1.0, "black": 0.0}[background]
    images = posed(views, photos(views))
    points = torch.stack([images.camera_to_world[i, :3, 3] + on_wall(images)[i][..., None] * images.rays()[i]
                          for i in range(3)])  # fmt: skip
    on_piece = points.norm(dim=-1) < 0.4
    assert 0.05 < on_piece.float().mean() < 0.5
    rgb = torch.where(on_piece[..., None], images.rgb, behind)
    found = initial_points(kind, views, rgb, background, 400, torch.Generator().manual_seed(0))
    assert len(found.xyz) == 400 and (found.record["of_plane_sweep"] > 50) == (kind == "plane-sweep")
    for view in range(3):
        pixels, _ = images.project(view, found.xyz)
        x, y = pixels.long().clamp(0, SIZE - 1).unbind(-1)
        assert on_piece[view, y, x].all()
    assert (found.rgb / 255 - behind).abs().amax(dim=-1).min() > 0.1


def on_wall(images: PosedImages) -> torch.Tensor:
    """Depths at which rays meet the plane z = 0."""
    return -images.camera_to_world[:, None, None, 2, 3] / images.rays()[..., 2]


def test_views_of_nothing_are_refused():
    views = cameras()
    with pytest.raises(DataError, match="initial-points plane-sweep: found 0 places for points; expected at least 4"):
        initial_points("plane-sweep", views, torch.ones(3, SIZE, SIZE, 3), "white", 100, torch.Generator())


def test_points_of_a_file_go_where_the_cameras_are(tmp_path):
    from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

    file = tmp_path / "points.xyz"
    file.write_text("1 0 0\n0 1 0\n0 0 1\n1 1 1\n0 0 0\n")
    transform = torch.tensor([[0.0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 1, 0]])
    outputs = DataparserOutputs([], cameras(), dataparser_transform=transform, dataparser_scale=0.5)
    points = points_from_file(file, outputs, 10, torch.Generator().manual_seed(0))
    assert sorted(points.xyz.tolist()) == sorted(
        [[2.5, 0.5, 0.0], [2.0, 0.0, 0.0], [2.5, 0.0, 0.5], [2.0, 0.5, 0.5], [2.5, 0.0, 0.0]]
    )
    with pytest.raises(DataError, match="nothing.ply does not exist"):
        points_from_file(tmp_path / "nothing.ply", outputs, 10, torch.Generator())
