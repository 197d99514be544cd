"""nerfstudio cameras to views, whatever the camera type; lenses that are no pinholes through nerfstudio's own rays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Optional

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from elvsm_nerfstudio.geometry import opengl_to_opencv, pad_to_multiple, pinhole_directions
from elvsm_nerfstudio.views import Views

# nerfstudio 1.1.5 indexes tensors with lists; it works, but torch says so at six places of every program.
warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")

CENTRAL_CAMERAS = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR)
"""Camera types whose rays all pass through one point, which is what a context or target view has to be. FISHEYE624 is
not among them: nerfstudio's rays of several of these are all of the first one's lens."""
ROTATION_TOLERANCE = 0.01
"""Largest entry of R^T R - 1 of a camera's rotation: pose files with few digits pass, sheared axes do not."""


def views_from_cameras(
    cameras: Cameras,
    patch_size: int,
    rgb: Optional[Float[Tensor, "view height width 3"]] = None,
    device: Optional[torch.device | str] = None,
) -> Views:
    """One scene's views from V nerfstudio cameras of equal size.

    The ray grid is extended on the right and below to a multiple of the patch size (rays beyond the border are as
    valid as those inside), so a render of these views is to be cropped to the cameras' own size.

    Cameras on the CPU are checked there, and nothing waits for a GPU on which the views shall be; pinhole cameras need
    no more than that. Other lenses' rays are nerfstudio's, which waits several times.

    Args:
        cameras: [view], any central type, distortion included.
        rgb: their images in [0, 1], whose size must then be a multiple of the patch size.
        device: of the views; if absent, that of the images, or else of the cameras.

    Raises:
        ValueError: for cameras without a single centre of projection, of mixed sizes, or with impossible numbers.
    """
    device = torch.device(device or (cameras if rgb is None else rgb).device)
    cameras = on_cpu(cameras)
    check_cameras(cameras)
    height, width = int(cameras.height.flatten()[0]), int(cameras.width.flatten()[0])
    if (cameras.height != height).any() or (cameras.width != width).any():
        raise ValueError(f"cameras of mixed sizes: heights {cameras.height.unique().tolist()}, widths "
                         f"{cameras.width.unique().tolist()}; resize the images to one size first")  # fmt: skip
    padded = pad_to_multiple(height, patch_size), pad_to_multiple(width, patch_size)
    if rgb is not None and tuple(rgb.shape[1:3]) != padded:
        raise ValueError(f"images are {tuple(rgb.shape[1:3])}; expected {padded}, a multiple of the patch size")

    intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)
    poses = torch.eye(4).repeat(len(intrinsics), 1, 1)
    poses[:, :3] = opengl_to_opencv(cameras.camera_to_worlds)
    normalised = intrinsics / intrinsics.new_tensor([padded[1], padded[0], padded[1], padded[0]])
    numbers = torch.cat([poses.flatten(1), intrinsics, normalised], dim=-1).to(device, non_blocking=True)
    poses, intrinsics, normalised = numbers.split((16, 4, 4), dim=-1)
    directions = pinhole_directions(intrinsics, *padded)
    others = _other_lenses(cameras)
    if len(others):
        directions[others.to(device)] = _nerfstudio_directions(cameras[others], padded, device)
    return Views(
        camera_to_world=poses.unflatten(-1, (4, 4))[None],
        directions=directions[None],
        intrinsics=normalised[None],
        rgb=None if rgb is None else rgb[None],
    )


def on_cpu(cameras: Cameras) -> Cameras:
    """The cameras on the CPU; from a GPU in one copy of all that this module asks of them."""
    if cameras.device.type == "cpu":
        return cameras
    return unpack_cameras(pack_cameras(cameras).cpu())


def pack_cameras(cameras: Cameras) -> Float[Tensor, "*camera 25"]:
    """All numbers of each camera: camera-to-world (3x4, row major, OpenGL axes), fx, fy, cx, cy in pixels, six
    distortion parameters (0 where there are none), height, width and type."""
    pose, distortion = cameras.camera_to_worlds.flatten(-2), cameras.distortion_params
    distortion = torch.zeros_like(pose[..., :6]) if distortion is None else distortion
    lens, whole = (cameras.fx, cameras.fy, cameras.cx, cameras.cy), (cameras.height, cameras.width, cameras.camera_type)
    return torch.cat([part.float() for part in (pose, *lens, distortion, *whole)], dim=-1)


def unpack_cameras(numbers: Float[Tensor, "*camera 25"]) -> Cameras:
    """The cameras that ``pack_cameras`` made numbers of."""
    pose, fx, fy, cx, cy, distortion, height, width, kind = numbers.split((12, 1, 1, 1, 1, 6, 1, 1, 1), dim=-1)
    return Cameras(pose.unflatten(-1, (3, 4)), fx, fy, cx, cy, width.long(), height.long(), distortion, kind.long())


def can_be_extended(cameras: Cameras) -> bool:
    """Whether pixels beyond the border have rays: not where a picture holds all directions that there are."""
    return bool((cameras.camera_type != CameraType.EQUIRECTANGULAR.value).all())


def extended_cameras(cameras: Cameras, above: int, left: int) -> Cameras:
    """The cameras with so many more pixels above their pictures and to the left; on the CPU."""
    return replace(
        cameras, cx=cameras.cx + left, cy=cameras.cy + above, width=cameras.width + left, height=cameras.height + above
    )


def check_cameras(cameras: Cameras, names: Optional[Sequence[object]] = None) -> None:
    """Raises ValueError for cameras that cannot be rendered from, saying which and why.

    Args:
        names: of the cameras' images, for messages.
    """

    def refuse(wrong: Tensor, reason: Callable[[int], str]) -> None:
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"{camera_name(index, names)} {reason(index)}")

    kinds = cameras.camera_type.flatten()
    central = torch.isin(kinds, kinds.new_tensor([kind.value for kind in CENTRAL_CAMERAS]))
    refuse(
        ~central,
        lambda i: (
            f"is of type {CameraType(int(kinds[i])).name}; expected one of "
            f"{', '.join(kind.name for kind in CENTRAL_CAMERAS)}"
        ),
    )
    poses = cameras.camera_to_worlds.flatten(0, -3).flatten(1)
    refuse(~poses.isfinite().all(dim=1), lambda i: "has a pose that is not finite (NaN or infinity)")
    focal, centre, size = (
        torch.cat([getattr(cameras, name) for name in pair], dim=-1).reshape(-1, 2)
        for pair in (("fx", "fy"), ("cx", "cy"), ("width", "height"))
    )
    refuse(
        ~(focal.isfinite() & (focal > 0)).all(dim=1),
        lambda i: f"has focal lengths {focal[i].tolist()}; expected positive numbers",
    )
    refuse(
        ~centre.isfinite().all(dim=1),
        lambda i: f"has its principal point at {centre[i].tolist()}; expected finite numbers",
    )
    refuse(
        ~(size > 0).all(dim=1),
        lambda i: (
            f"says that its image is {'x'.join(map(str, size[i].tolist()))} (width x height); expected w and h "
            "of the image in pixels"
        ),
    )


def camera_name(index: int, names: Optional[Sequence[object]] = None) -> str:
    """What messages call a camera."""
    return f"camera {index}" if names is None else f"camera {index} ({names[index]})"


def without_scale(
    rotations: Float[Tensor, "camera 3 3"], names: Optional[Sequence[object]] = None
) -> tuple[Float[Tensor, "camera 3 3"], float]:
    """Rotations, and the factor that all of them have in common and that is divided out; 1 if there is none.

    Raises:
        ValueError: naming a camera whose matrix is not a rotation: mirrored, singular, sheared, or of another scale
            than the others'.
    """
    matrices = rotations.double()
    determinant = torch.linalg.det(matrices)
    scale = determinant.clamp(min=0) ** (1 / 3)
    common = float(scale.median())
    products = matrices.transpose(1, 2) @ matrices / max(common, 1e-12) ** 2
    error = (products - torch.eye(3, dtype=products.dtype, device=products.device)).abs().amax(dim=(1, 2))
    wrong = ~(error < ROTATION_TOLERANCE) | ~(determinant > 0)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{camera_name(index, names)} has a pose without a rotation in it (determinant "
            f"{float(determinant[index]):.3g}; R^T R differs from 1 by {float(error[index]):.3g}); expected "
            "right-angled axes of equal length, not mirrored, sheared or zero"
        )
    if abs(common - 1) < ROTATION_TOLERANCE / 2:
        return rotations, 1.0
    return (matrices / common).to(rotations), common


def _other_lenses(cameras: Cameras) -> Int[Tensor, " other"]:
    """Which of the cameras are no pinholes."""
    others = (cameras.camera_type != CameraType.PERSPECTIVE.value).squeeze(-1)
    if cameras.distortion_params is not None:
        others = others | (cameras.distortion_params != 0).any(dim=-1)
    return others.nonzero().squeeze(-1)


def _nerfstudio_directions(
    cameras: Cameras, size: tuple[int, int], device: torch.device
) -> Float[Tensor, "view height width 3"]:
    """Unit ray directions in the OpenCV camera frame; cameras with the same lens share the work."""
    distortion = cameras.distortion_params
    distortion = torch.zeros(len(cameras), 6) if distortion is None else distortion
    numbers = (cameras.fx, cameras.fy, cameras.cx, cameras.cy, distortion, cameras.camera_type.float())
    lenses, which = torch.cat(numbers, dim=-1).unique(dim=0, return_inverse=True)
    lenses = lenses.to(device)
    identity = torch.eye(4, device=device)[:3].expand(len(lenses), 3, 4)
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
        torch.arange(size[0], device=device) + 0.5, torch.arange(size[1], device=device) + 0.5,
        indexing="ij",
    )  # fmt: skip
    coords = torch.stack([y, x], dim=-1).expand(len(lenses), *size, 2)
    index = torch.arange(len(lenses), device=device)[:, None, None, None].expand(-1, *size, 1)
    directions = lens_cameras.generate_rays(camera_indices=index, coords=coords).directions
    # nerfstudio divides 0 by 0 for a fisheye's central ray, which looks straight ahead.
    fisheye = lens_cameras.camera_type == CameraType.FISHEYE.value
    central = (coords == lenses[:, None, None, [3, 2]]).all(dim=-1, keepdim=True) & fisheye[:, None, None]
    directions = torch.where(central, directions.new_tensor([0.0, 0.0, -1.0]), directions)
    if not directions.isfinite().all():
        raise ValueError("the cameras' distortion leads to rays that are not finite; check the distortion parameters")
    return (directions * directions.new_tensor([1.0, -1.0, -1.0]))[which.to(device)]


def in_fewer_pixels(camera: Cameras, scale: float) -> Cameras:
    """A camera [1] that sees the same in a picture that is smaller by a factor up to 1."""
    height, width = int(camera.height[0]), int(camera.width[0])
    return in_pixels(camera, max(1, round(height * scale)), max(1, round(width * scale)))


def in_pixels(cameras: Cameras, height: int, width: int) -> Cameras:
    """Cameras [view] that see the same in pictures of another size."""
    y, x = height / cameras.height.clamp(min=1), width / cameras.width.clamp(min=1)
    return replace(
        cameras,
        fx=cameras.fx * x,
        fy=cameras.fy * y,
        cx=cameras.cx * x,
        cy=cameras.cy * y,
        width=torch.full_like(cameras.width, width),
        height=torch.full_like(cameras.height, height),
    )
