"""nerfstudio cameras to views, whatever the camera type, through nerfstudio's own rays."""

from __future__ import annotations

import warnings
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from elvsm_nerfstudio.geometry import opengl_to_opencv, pad_to_multiple
from elvsm_nerfstudio.views import Views

# nerfstudio 1.1.5 indexes tensors with lists; it works, but torch says so at six places of every program.
warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")

CENTRAL_CAMERAS = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR)
"""Camera types whose rays all pass through one point, which is what a context or target view has to be. FISHEYE624 is
not among them: nerfstudio's rays of several of these are all of the first one's lens."""


def views_from_cameras(
    cameras: Cameras, patch_size: int, rgb: Optional[Float[Tensor, "view height width 3"]] = None
) -> Views:
    """One scene's views from V nerfstudio cameras of equal size.

    The ray grid is extended on the right and below to a multiple of the patch size (rays beyond the border are as
    valid as those inside), so a render of these views is to be cropped to the cameras' own size.

    Args:
        cameras: [view], any central type, distortion included.
        rgb: their images in [0, 1], whose size must then be a multiple of the patch size.

    Raises:
        ValueError: for cameras without a single centre of projection, of mixed sizes, or with impossible numbers.
    """
    check_cameras(cameras)
    height, width = int(cameras.height.flatten()[0]), int(cameras.width.flatten()[0])
    if (cameras.height != height).any() or (cameras.width != width).any():
        raise ValueError(f"cameras of mixed sizes: heights {cameras.height.unique().tolist()}, widths "
                         f"{cameras.width.unique().tolist()}; resize the images to one size first")  # fmt: skip
    padded = pad_to_multiple(height, patch_size), pad_to_multiple(width, patch_size)
    if rgb is not None and tuple(rgb.shape[1:3]) != padded:
        raise ValueError(f"images are {tuple(rgb.shape[1:3])}; expected {padded}, a multiple of the patch size")

    intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)
    poses = torch.eye(4, device=cameras.device).repeat(len(intrinsics), 1, 1)
    poses[:, :3] = opengl_to_opencv(cameras.camera_to_worlds)
    return Views(
        camera_to_world=poses[None],
        directions=_directions(cameras, intrinsics, padded)[None],
        intrinsics=(intrinsics / intrinsics.new_tensor([padded[1], padded[0], padded[1], padded[0]]))[None],
        rgb=None if rgb is None else rgb[None],
    )


def check_cameras(cameras: Cameras) -> None:
    """Raises ValueError for cameras that cannot be rendered from, saying which and why."""
    central = [kind.value for kind in CENTRAL_CAMERAS]
    for index, kind in enumerate(cameras.camera_type.flatten().tolist()):
        if kind not in central:
            names = ", ".join(k.name for k in CENTRAL_CAMERAS)
            raise ValueError(f"camera {index} is of type {CameraType(kind).name}; expected one of {names}")
    poses = cameras.camera_to_worlds.flatten(0, -3)
    focal = torch.cat([cameras.fx, cameras.fy], dim=-1).reshape(-1, 2)
    finite = poses.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(f"camera {int((~finite).nonzero()[0])} has a pose that is not finite (NaN or infinity)")
    usable = (focal.isfinite() & (focal > 0)).all(dim=1)
    if not usable.all():
        index = int((~usable).nonzero()[0])
        raise ValueError(f"camera {index} has focal lengths {focal[index].tolist()}; expected positive numbers")


def _directions(
    cameras: Cameras, intrinsics: Float[Tensor, "view 4"], size: tuple[int, int]
) -> Float[Tensor, "view height width 3"]:
    """Unit ray directions in the OpenCV camera frame; cameras with the same lens share the work."""
    distortion = cameras.distortion_params
    distortion = intrinsics.new_zeros(len(intrinsics), 6) if distortion is None else distortion
    lenses, which = torch.cat([intrinsics, distortion, cameras.camera_type.to(intrinsics)], dim=-1).unique(
        dim=0, return_inverse=True
    )
    identity = torch.eye(4, device=lenses.device)[:3].expand(len(lenses), 3, 4)
    lens_cameras = Cameras(
        camera_to_worlds=identity,
        fx=lenses[:, 0:1],
        fy=lenses[:, 1:2],
        cx=lenses[:, 2:3],
        cy=lenses[:, 3:4],
        height=size[0],
        width=size[1],
        distortion_params=lenses[:, 4:-1],
        camera_type=lenses[:, -1:].long(),
    )
    y, x = torch.meshgrid(
        torch.arange(size[0], device=lenses.device) + 0.5, torch.arange(size[1], device=lenses.device) + 0.5,
        indexing="ij",
    )  # fmt: skip
    coords = torch.stack([y, x], dim=-1).expand(len(lenses), *size, 2)
    index = torch.arange(len(lenses), device=lenses.device)[:, None, None, None].expand(-1, *size, 1)
    directions = lens_cameras.generate_rays(camera_indices=index, coords=coords).directions
    # nerfstudio divides 0 by 0 for a fisheye's central ray, which looks straight ahead.
    fisheye = lens_cameras.camera_type == CameraType.FISHEYE.value
    central = (coords == lenses[:, None, None, [3, 2]]).all(dim=-1, keepdim=True) & fisheye[:, None, None]
    directions = torch.where(central, directions.new_tensor([0.0, 0.0, -1.0]), directions)
    if not directions.isfinite().all():
        raise ValueError("the cameras' distortion leads to rays that are not finite; check the distortion parameters")
    return (directions * directions.new_tensor([1.0, -1.0, -1.0]))[which]
