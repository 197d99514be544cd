import math

import pytest
import torch
from conftest import look_at, make_views, random_poses

from elvsm_nerfstudio.geometry import (
    CanonicalFrame,
    cover_size,
    opengl_to_opencv,
    pad_to_multiple,
    pinhole_directions,
    pluecker_rays,
    resize_and_crop_intrinsics,
)


def test_opengl_to_opencv_turns_up_into_down_and_backward_into_forward():
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    turned = opengl_to_opencv(pose)
    assert torch.equal(turned.diagonal(), torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.equal(turned[:3, 3], pose[:3, 3])
    assert torch.equal(opengl_to_opencv(turned), pose)


def test_pinhole_directions_hit_pixel_centres():
    intrinsics = torch.tensor([50.0, 40.0, 3.0, 5.5])
    directions = pinhole_directions(intrinsics, 6, 9)
    point = torch.tensor([(7.5 - 3.0) / 50.0, (2.5 - 5.5) / 40.0, 1.0])
    assert torch.allclose(directions[2, 7], point / point.norm())


def test_pluecker_moment_is_the_same_for_every_point_of_the_ray():
    views = make_views(1, 3, 8, 16)
    rays = pluecker_rays(views.camera_to_world, views.directions)
    moment, direction = rays[..., :3], rays[..., 3:]
    assert torch.allclose(direction.norm(dim=-1), torch.ones(1, 3, 8, 16))
    point = views.camera_to_world[..., None, None, :3, 3] + 2.7 * direction
    assert torch.allclose(torch.linalg.cross(point, direction), moment, atol=1e-6)


@pytest.mark.parametrize("size, crop", [((480, 270), (64, 64)), ((200, 200), (64, 64)), ((53, 41), (64, 48))])
def test_intrinsics_after_resize_and_crop_see_the_same_point_at_the_same_place(size, crop):
    intrinsics = torch.tensor([300.0, 310.0, 0.52 * size[1], 0.47 * size[0]])
    resized = cover_size(size, crop)
    assert resized[0] >= crop[0] and resized[1] >= crop[1] and (resized[0] == crop[0] or resized[1] == crop[1])
    new = resize_and_crop_intrinsics(intrinsics, torch.tensor(size), torch.tensor(resized), crop)
    x, y = 0.13, -0.08  # a direction, as x / z and y / z
    pixel = torch.tensor([x * intrinsics[0] + intrinsics[2], y * intrinsics[1] + intrinsics[3]])
    ratio = torch.tensor([resized[1] / size[1], resized[0] / size[0]])
    offset = torch.tensor([(resized[1] - crop[1]) // 2, (resized[0] - crop[0]) // 2])
    expected = pixel * ratio - offset
    assert torch.allclose(torch.stack([x * new[0] + new[2], y * new[1] + new[3]]), expected, atol=1e-4)


def test_width_is_rounded_to_a_multiple_as_the_official_preprocessing_does():
    assert cover_size((360, 640), (256, 256)) == (256, 455)
    assert cover_size((360, 640), (256, 256), width_multiple=8) == (256, 456)
    assert cover_size((640, 360), (256, 256), width_multiple=8)[1] == 256


def test_pad_to_multiple():
    assert [pad_to_multiple(n, 8) for n in (1, 8, 9, 41)] == [8, 8, 16, 48]


def similarity(seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    return rotation * rotation.det().sign(), torch.randn(3, generator=generator), 3.7


def move_world(poses: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The same cameras in a rotated, shifted and scaled world."""
    rotation, shift, scale = similarity(seed)
    moved = poses.clone()
    moved[..., :3, :3] = rotation @ poses[..., :3, :3]
    moved[..., :3, 3] = scale * (poses[..., :3, 3] @ rotation.T) + shift
    return moved


def test_canonical_frame_cancels_rotation_translation_and_scale_of_the_world():
    poses = make_views(2, 5, 8, 8).camera_to_world
    moved = move_world(poses)
    ours = CanonicalFrame.estimate(poses).apply(poses)
    assert torch.allclose(CanonicalFrame.estimate(moved).apply(moved), ours, atol=2e-5)
    assert math.isclose(float(ours[0, :, :3, 3].abs().max()), 1 / 1.35, abs_tol=1e-5)


def test_canonical_frame_does_not_depend_on_the_order_of_views():
    poses = make_views(1, 5, 8, 8).camera_to_world
    order = torch.tensor([3, 0, 4, 1, 2])
    ours = CanonicalFrame.estimate(poses).apply(poses)
    theirs = CanonicalFrame.estimate(poses[:, order]).apply(poses)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_canonical_frame_of_one_view_is_that_view():
    pose = make_views(1, 1, 8, 8).camera_to_world
    assert torch.allclose(CanonicalFrame.estimate(pose).apply(pose)[0, 0], torch.eye(4), atol=1e-6)


def test_canonical_frame_of_cameras_evenly_around_an_object_is_a_rotation():
    angles = torch.arange(4) * math.pi / 2
    poses = torch.stack([look_at(torch.stack([2 * a.cos(), 2 * a.sin(), torch.tensor(1.0)])) for a in angles])
    frame = CanonicalFrame.estimate(opengl_to_opencv(poses)[None])
    assert torch.allclose(frame.axes[0].T @ frame.axes[0], torch.eye(3), atol=1e-5)
    assert frame.apply(opengl_to_opencv(poses)[None]).isfinite().all()


def test_random_poses_look_at_the_origin():
    poses = random_poses(4, torch.Generator().manual_seed(0))
    toward = torch.nn.functional.normalize(-poses[:, :3, 3], dim=-1)
    assert torch.allclose(-poses[:, :3, 2], toward, atol=1e-6)
