"""Points on surfaces from two photos that share nothing and blurred views between them."""

import math
from dataclasses import replace

import torch
from conftest import look_at
from torch.nn.functional import avg_pool2d

from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.splatting.photo_hull import hull_points
from elvsm_nerfstudio.splatting.plane_sweep import PosedImages, surface_points

SIZE, RADIUS = 32, 0.5


def colour(points: torch.Tensor) -> torch.Tensor:
    return 0.45 + 0.35 * torch.sin(5 * points + torch.tensor([0.0, 1.0, 2.0]))


def balls(*degrees: float) -> PosedImages:
    """A coloured ball on white, seen from azimuths and an elevation of 20 degrees, 2 away."""
    places = [torch.tensor([math.cos(a), math.sin(a), 0.36]) * 2 for a in map(math.radians, degrees)]
    poses = torch.eye(4).repeat(len(degrees), 1, 1)
    poses[:, :3] = opengl_to_opencv(torch.stack([look_at(place)[:3] for place in places]))
    intrinsics = torch.tensor([1.6 * SIZE, 1.6 * SIZE, SIZE / 2, SIZE / 2]).expand(len(degrees), 4)
    blank = torch.ones(len(degrees), SIZE, SIZE, 3)
    views = PosedImages(blank, blank[..., 0] > 0, blank[..., 0] < 0, poses, intrinsics)
    rays = torch.nn.functional.normalize(views.rays(), dim=-1)
    centre = poses[:, None, None, :3, 3]
    along = -(rays * centre).sum(dim=-1)
    within = RADIUS**2 - centre.square().sum(dim=-1) + along.square()
    points = centre + (along - within.clamp(min=0).sqrt())[..., None] * rays
    rgb = torch.where((within > 0)[..., None], colour(points), 1.0)
    return replace(views, rgb=rgb, empty=(1 - rgb).amax(dim=-1) < 2 / 255)


def test_points_lie_where_all_views_let_a_surface_be():
    photos, sharp = balls(0, 180), balls(*range(15, 360, 30))
    assert len(surface_points(photos, num_planes=32)[0]) < 50  # the two see no side in common
    blurred = avg_pool2d(sharp.rgb.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
    renders = replace(sharp, rgb=blurred, empty=(1 - blurred).amax(dim=-1) < 0.06)
    points, rgb = hull_points(photos, renders, 400, torch.Generator().manual_seed(0))
    assert len(points) == len(rgb) == 400
    far_off = points.norm(dim=-1) - RADIUS
    assert far_off.abs().median() < 0.04 and far_off.quantile(0.95) < 0.12
    # All around, and each with its colour.
    sides = torch.histc(torch.atan2(points[:, 1], points[:, 0]), 6, -math.pi, math.pi)
    assert sides.min() > 30
    assert (rgb - colour(RADIUS * points / points.norm(dim=-1, keepdim=True))).abs().mean() < 0.12
    again, _ = hull_points(photos, renders, 400, torch.Generator().manual_seed(0))
    assert torch.equal(points, again)


def test_one_wrong_outline_does_not_cut_and_a_photo_does():
    photos, renders = balls(0, 180), balls(*range(15, 360, 30))
    renders.empty[3] = True
    points, _ = hull_points(photos, renders, 200, torch.Generator().manual_seed(0))
    assert len(points) == 200
    photos.empty[1, :, : SIZE // 2] = True  # half of the ball is not there
    points, _ = hull_points(photos, renders, 200, torch.Generator().manual_seed(0))
    pixels, depth = photos.project(1, points)
    shown = pixels[photos.inside(pixels, depth)]
    assert len(shown) > 50 and shown[:, 0].min() >= SIZE // 2


def test_no_points_of_nothing_and_none_without_outlines():
    photos, renders = balls(0, 180), balls(90, 270)
    outlines = photos.empty.clone()
    photos.empty[:] = False
    assert len(hull_points(photos, renders, 10, torch.Generator())[0]) == 0
    photos.empty[:] = outlines
    assert len(hull_points(photos, renders, 10, torch.Generator())[0]) == 10
    for views in (photos, renders):
        views.empty[:] = True
    assert len(hull_points(photos, renders, 10, torch.Generator())[0]) == 0
