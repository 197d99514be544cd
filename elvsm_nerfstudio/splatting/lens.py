"""Lenses that gsplat cannot render, by way of the pinhole camera that sees as much.

A render of a distorted camera is a pinhole render, looked up at where the camera's own pixels look; a distorted photo
becomes a pinhole picture the other way round. So no photo is resampled before it is compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor
from torch.nn.functional import grid_sample

from elvsm_nerfstudio.cameras import views_from_cameras

MIN_FORWARD = 0.2
"""Least cosine between a ray and the viewing axis: a pinhole picture of a half angle above 78 degrees is mostly rim."""
STEPS = 8
"""Of the fixed-point iteration that undoes a distortion."""


def is_pinhole(camera: Cameras) -> bool:
    """Whether gsplat renders this camera as it is."""
    distortion = camera.distortion_params
    straight = distortion is None or not distortion.any()
    return straight and bool((camera.camera_type == CameraType.PERSPECTIVE.value).all())


@dataclass(frozen=True)
class PinholeView:
    """What a lens sees, as seen by a pinhole camera with the same focal lengths."""

    size: tuple[int, int]
    """Height and width of the pinhole picture."""
    centre: tuple[float, float]
    """Its principal point, x and y in pixels."""
    grid: Float[Tensor, "height width 2"]
    """Where in it the lens's pixels look, in grid_sample's coordinates."""

    @staticmethod
    def of(camera: Cameras) -> PinholeView:
        """For one camera of shape (1,).

        Raises:
            ValueError: for a lens that sees too far to the side.
        """
        points = _image_plane(camera)
        low, high = points.amin(dim=(0, 1)).floor() - 1, points.amax(dim=(0, 1)).ceil() + 1
        size = high - low
        grid = (points - low) / size * 2 - 1
        width, height = size.long().tolist()
        return PinholeView((height, width), tuple((-low).tolist()), grid)

    def camera(self, camera: Cameras) -> Cameras:
        """The pinhole camera at the place of the other."""
        x, y = self.centre
        return Cameras(
            camera_to_worlds=camera.camera_to_worlds,
            fx=camera.fx,
            fy=camera.fy,
            cx=torch.full_like(camera.cx, x),
            cy=torch.full_like(camera.cy, y),
            height=self.size[0],
            width=self.size[1],
            metadata=camera.metadata,
        )

    def seen_by_lens(
        self, picture: Float[Tensor, "pinhole_height pinhole_width channel"]
    ) -> Float[Tensor, "height width channel"]:
        """A pinhole picture as the lens sees it, bilinearly."""
        sampled = grid_sample(picture.permute(2, 0, 1)[None], self.grid[None].to(picture), align_corners=False)
        return sampled[0].permute(1, 2, 0)


def undistort(
    camera: Cameras, image: Float[Tensor, "height width 3"]
) -> tuple[Float[Tensor, "height width 3"], Bool[Tensor, "height width"]]:
    """A photo as a pinhole camera with the same intrinsics takes it, and where that is known.

    Args:
        camera: of shape (1,).
    """
    height, width = image.shape[:2]
    if is_pinhole(camera):
        return image, torch.ones(height, width, dtype=torch.bool, device=image.device)
    centre = torch.cat([camera.cx, camera.cy], dim=-1)[0].to(image)
    seen = (_image_plane(camera) + centre).permute(2, 0, 1)[None]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    wanted = torch.stack([x, y], dim=-1).to(image)
    size = image.new_tensor([width, height])
    place = wanted.clone()
    for _ in range(STEPS):
        found = grid_sample(seen, (place / size * 2 - 1)[None], padding_mode="border", align_corners=False)
        place = place + wanted - found[0].permute(1, 2, 0)
    picture = grid_sample(image.permute(2, 0, 1)[None], (place / size * 2 - 1)[None], align_corners=False)
    inside = ((place > 0) & (place < size)).all(dim=-1)
    return picture[0].permute(1, 2, 0), inside


def _image_plane(camera: Cameras) -> Float[Tensor, "height width 2"]:
    """Where pixels look, on the image plane in pixels from the principal point."""
    directions = views_from_cameras(camera, patch_size=1).directions[0, 0]
    if directions[..., 2].min() < MIN_FORWARD:
        angle = math.degrees(math.acos(max(-1.0, float(directions[..., 2].min()))))
        raise ValueError(
            f"a camera of type {CameraType(int(camera.camera_type.flatten()[0])).name} sees {angle:.0f} degrees to the "
            f"side; splatting renders up to {math.degrees(math.acos(MIN_FORWARD)):.0f}"
        )
    focal = torch.cat([camera.fx, camera.fy], dim=-1)[0]
    return (directions[..., :2] / directions[..., 2:] * focal).float()
