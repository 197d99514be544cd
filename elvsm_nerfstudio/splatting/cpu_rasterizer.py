"""gsplat's ``rasterization`` without CUDA: differentiable, same arguments, same pictures, in plain torch.

Projection, covariances and spherical harmonics are gsplat's own torch functions; what they lack, the compositing, is in
compositing.py. The rules are those of gsplat 1.4.0, the version that nerfstudio pins. The code runs on any device.
"""

from __future__ import annotations

from typing import Any, Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.splatting.compositing import BLOCK, Composite, plan_chunks, tile_bounds


def rasterization(
    means: Float[Tensor, "gaussian 3"],
    quats: Float[Tensor, "gaussian 4"],
    scales: Float[Tensor, "gaussian 3"],
    opacities: Float[Tensor, " gaussian"],
    colors: Float[Tensor, "*camera gaussian channel"] | Float[Tensor, "*camera gaussian coefficient 3"],
    viewmats: Float[Tensor, "camera 4 4"],
    Ks: Float[Tensor, "camera 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: Optional[int] = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Optional[Float[Tensor, "camera channel"]] = None,
    render_mode: Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"] = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: Literal["pinhole", "ortho", "fisheye"] = "pinhole",
    covars: Optional[Float[Tensor, "gaussian 3 3"]] = None,
) -> tuple[Float[Tensor, "camera height width rendered"], Float[Tensor, "camera height width 1"], dict[str, Any]]:
    """Renders Gaussians from cameras; the arguments and their defaults are gsplat.rasterization's.

    Args:
        quats: w, x, y, z, of any length.
        colors: colours of any number of channels, or coefficients of spherical harmonics where ``sh_degree`` is given;
            for all cameras, or for each its own.
        viewmats: world to camera, OpenCV axes.
        packed: must be False: results for each pair of camera and Gaussian, as splatfacto and gsplat's strategy for it
            read them.
        channel_chunk: means nothing here, any number of channels is rendered at once.
        backgrounds: colours behind everything; depth has none.

    Returns:
        Colours (with depth as the last channel, or alone, as ``render_mode`` says), alphas, and gsplat's meta:
        ``radii`` [camera, gaussian] in pixels, 0 where a Gaussian is not seen, ``means2d`` (with ``absgrad``: filled by
        the backward pass), ``depths``, ``conics``, ``opacities``, ``tiles_per_gauss`` and the sizes. There are no lists
        of intersections (``isect_ids``, ``flatten_ids``, ``isect_offsets``).

    Raises:
        NotImplementedError: for what splatfacto does not use: packed, sparse gradients, distributed, other lenses.
    """
    unsupported = {
        "packed=True": packed,
        "sparse_grad=True": sparse_grad,
        "distributed=True": distributed,
        f"camera_model={camera_model!r}": camera_model != "pinhole",
        f"tile_size={tile_size}, not a multiple of {BLOCK}": tile_size % BLOCK != 0,
    }
    for option, wanted in unsupported.items():
        if wanted:
            raise NotImplementedError(f"the CPU rasterizer cannot do {option}; gsplat's can, on a CUDA device")
    if covars is not None:
        quats = scales = None
    antialiased = rasterize_mode == "antialiased"
    projected = [
        _project(means, quats, scales, covars, viewmat, K, width, height, eps2d, near_plane, far_plane, antialiased)
        for viewmat, K in zip(viewmats, Ks)
    ]
    radii, means2d, depths, conics, factors = (torch.stack(parts) for parts in zip(*projected))
    radii = radii * (radii > radius_clip)
    opacities = opacities * factors
    if sh_degree is None:
        colors = colors.expand(len(viewmats), *colors.shape[-2:])
    else:
        colors = _sh_colors(sh_degree, means, colors, viewmats)
    if render_mode != "RGB":
        parts = [depths[..., None]] if render_mode in ("D", "ED") else [colors, depths[..., None]]
        colors = torch.cat(parts, dim=-1)
    absolute = None
    if absgrad:
        means2d.absgrad = absolute = torch.zeros_like(means2d)

    images = []
    for camera in range(len(viewmats)):
        parts = [part[camera] for part in (means2d, conics, opacities)]
        chunks = plan_chunks(*parts, radii[camera], depths[camera].detach(), tile_size, width, height)
        columns, rows = -(-width // BLOCK), -(-height // BLOCK)
        sums = None if absolute is None else absolute[camera]
        blocks = Composite.apply(*parts, colors[camera], chunks, columns * rows, sums)
        image = blocks.unflatten(0, (rows, columns)).unflatten(2, (BLOCK, BLOCK)).transpose(1, 2)
        images.append(image.flatten(2, 3).flatten(0, 1)[:height, :width])
    rendered, alphas = torch.stack(images).split((colors.shape[-1], 1), dim=-1)

    has_color, has_depth = "RGB" in render_mode, render_mode != "RGB"
    if backgrounds is not None and has_color:
        behind = torch.cat([backgrounds, torch.zeros_like(backgrounds[:, :1])], dim=-1) if has_depth else backgrounds
        rendered = rendered + (1 - alphas) * behind[:, None, None]
    if render_mode.endswith("ED"):
        expected = rendered[..., -1:] / alphas.clamp(min=1e-10)
        rendered = torch.cat([rendered[..., :-1], expected], dim=-1)
    first, last = tile_bounds(means2d.detach(), radii, tile_size, width, height)
    meta = {
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities,
        "tiles_per_gauss": (last - first).prod(dim=-1).int(),
        "tile_width": -(-width // tile_size),
        "tile_height": -(-height // tile_size),
        "tile_size": tile_size,
        "width": width,
        "height": height,
        "n_cameras": len(viewmats),
    }
    return rendered, alphas, meta


def _project(
    means: Float[Tensor, "gaussian 3"],
    quats: Optional[Float[Tensor, "gaussian 4"]],
    scales: Optional[Float[Tensor, "gaussian 3"]],
    covars: Optional[Float[Tensor, "gaussian 3 3"]],
    viewmat: Float[Tensor, "4 4"],
    K: Float[Tensor, "3 3"],
    width: int,
    height: int,
    eps2d: float,
    near: float,
    far: float,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Radii, means, depths, conics and opacity factors of all Gaussians in one camera."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    depths = means @ viewmat[2, :3] + viewmat[2, 3]
    within = (depths > near) & (depths < far)
    # What lies outside is projected from a harmless place, so that no infinity gets into its (zero) gradient.
    harmless = viewmat.detach()[:3, :3].T @ (means.new_tensor([0.0, 0.0, near + 1.0]) - viewmat.detach()[:3, 3])
    placed = torch.where(within[:, None], means, harmless)
    # The factor is a root of a determinant that rounds to zero or below, for thin Gaussians, in single precision.
    precision = torch.float64 if antialiased else means.dtype
    if covars is None:
        covars, _ = _quat_scale_to_covar_preci(quats.to(precision), scales.to(precision), compute_preci=False)
    geometry = (part.to(precision) for part in (placed, covars, viewmat[None], K[None]))
    radii, means2d, _, conics, factors = _fully_fused_projection(
        *geometry, width, height, eps2d, near, far, calc_compensations=antialiased
    )
    factors = torch.ones_like(depths) if factors is None else factors[0].to(means.dtype)
    return radii[0] * within, means2d[0].to(means.dtype), depths, conics[0].to(means.dtype), factors


def _sh_colors(
    degree: int, means: Float[Tensor, "gaussian 3"], coefficients: Tensor, viewmats: Float[Tensor, "camera 4 4"]
) -> Float[Tensor, "camera gaussian 3"]:
    """Colours of the Gaussians as the cameras see them."""
    from gsplat.cuda._torch_impl import _spherical_harmonics

    centres = torch.linalg.inv(viewmats)[:, None, :3, 3]
    directions = means - centres
    used = coefficients[..., : (degree + 1) ** 2, :].expand(len(viewmats), len(means), -1, 3)
    return (_spherical_harmonics(degree, directions, used) + 0.5).clamp(min=0)
