"""The way through the context cameras, and the video of all methods side by side on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.views import Views

PANEL, GAP, CAPTION = 256, 8, 26
"""Pixels: least height of a panel, space between panels, line of text above each. Ours."""
COLUMNS = 4
BACKGROUND, INK = "#16181d", "#e6e8eb"


def path_through(context: Views, count: int) -> Cameras:
    """A closed path through one scene's context cameras, pinholes of their mean lens.

    The point nearest to all optical axes is the middle. About it, and the cameras' mean up axis, positions go the
    shorter way round from one camera to the next in order of azimuth, over the largest gap last; each camera looks at
    the point of its own axis nearest to the middle, with the mean up axis upwards.
    """
    centres, forward, middle, basis = _setting(context)
    axis = basis[2]
    depth = ((middle - centres) * forward).sum(-1, keepdim=True).clamp(min=0.1)
    focus = centres + depth * forward

    x, y, z = ((centres - middle) @ basis.T).unbind(-1)
    azimuth, radius = torch.atan2(y, x), torch.hypot(x, y)
    order, _ = _from_largest_gap(azimuth)
    step = torch.remainder(azimuth[order].roll(-1) - azimuth[order] + math.pi, 2 * math.pi) - math.pi

    at = torch.arange(count) * len(order) / max(count, 1)
    here, share = at.long(), at - at.long()
    ease = share * share * (3 - 2 * share)  # slow where a photo is

    def between(values: Tensor) -> Tensor:
        values = values[order]
        weight = ease.reshape(-1, *[1] * (values.dim() - 1))
        return values[here] * (1 - weight) + values.roll(-1, 0)[here] * weight

    angle = azimuth[order][here] + ease * step[here]
    local = torch.stack([between(radius) * angle.cos(), between(radius) * angle.sin(), between(z)], dim=-1)
    position = local @ basis + middle
    backward = torch.nn.functional.normalize(position - between(focus), dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(axis.expand_as(backward), backward), dim=-1)
    pose = torch.stack([right, torch.linalg.cross(backward, right), backward, position], dim=-1)

    fx, fy, _, _ = (
        context.intrinsics[0].cpu().mean(dim=0) * torch.tensor([context.width, context.height] * 2)
    ).tolist()
    return Cameras(pose, fx, fy, context.width / 2, context.height / 2, context.width, context.height)


def largest_gap(context: Views) -> float:
    """Radians between the two neighbours of one scene's context cameras that are farthest apart, seen from above the
    middle that they look at."""
    centres, _, middle, basis = _setting(context)
    x, y, _ = ((centres - middle) @ basis.T).unbind(-1)
    return _from_largest_gap(torch.atan2(y, x))[1]


def _setting(context: Views) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "3 3"]]:
    """Centres and viewing axes of the cameras, the middle that they look at, and a basis whose last row is up."""
    poses = context.camera_to_world[0].cpu().float()
    centres, forward, up = poses[:, :3, 3], poses[:, :3, 2], -poses[:, :3, 1]
    axis = up.mean(dim=0)
    axis = torch.nn.functional.normalize(axis if axis.norm() > 0.1 else torch.tensor([0.0, 0.0, 1.0]), dim=0)
    side = torch.linalg.cross(axis, torch.eye(3)[axis.abs().argmin()])
    side = torch.nn.functional.normalize(side, dim=0)
    return centres, forward, _middle(centres, forward), torch.stack([side, torch.linalg.cross(axis, side), axis])


def _from_largest_gap(azimuth: Float[Tensor, " view"]) -> tuple[Tensor, float]:
    """Views in order of azimuth from the largest gap on, and that gap in radians."""
    order = azimuth.argsort()
    ahead = torch.remainder(azimuth[order].roll(-1) - azimuth[order], 2 * math.pi)
    ahead = ahead if len(order) > 1 else torch.tensor([2 * math.pi])
    return order.roll(-int(ahead.argmax()) - 1), float(ahead.max())


def _middle(centres: Float[Tensor, "view 3"], forward: Float[Tensor, "view 3"]) -> Float[Tensor, " 3"]:
    """The point nearest to all optical axes (least squares); of nearly parallel ones, one at the distance of the
    cameras from each other."""
    across = torch.eye(3) - forward[:, :, None] * forward[:, None, :]
    middle = torch.linalg.lstsq(across.sum(dim=0), (across @ centres[:, :, None]).sum(dim=0)).solution[:, 0]
    if (((middle - centres) * forward).sum(-1) > 0).all():
        return middle
    extent = (centres - centres.mean(dim=0)).norm(dim=-1).max()
    return centres.mean(dim=0) + 2 * extent * torch.nn.functional.normalize(forward.mean(dim=0), dim=0)


def write_video(path: Path, titles: Sequence[str], folders: Sequence[Path], files: Sequence[str], fps: int) -> None:
    """One panel for each method under its name; the pictures of each are in its folder."""
    import mediapy  # brings matplotlib

    with Image.open(folders[0] / files[0]) as image:
        width, height = image.size
    scale = max(1, round(PANEL / height))
    width, height = width * scale, height * scale
    columns = min(COLUMNS, len(folders))
    rows = math.ceil(len(folders) / columns)
    size = columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP
    size = tuple(side + side % 2 for side in size)  # H.264 wants even sizes
    font = ImageFont.load_default(15)
    with whole(path, suffix=path.suffix) as partial, mediapy.VideoWriter(partial, size[::-1], fps=fps, crf=18) as video:
        for file in files:
            canvas = Image.new("RGB", size, BACKGROUND)
            pen = ImageDraw.Draw(canvas)
            for i, (title, folder) in enumerate(zip(titles, folders)):
                left = GAP + i % columns * (width + GAP)
                top = GAP + i // columns * (height + CAPTION + GAP)
                pen.text((left, top + 3), title, INK, font)
                with Image.open(folder / file) as image:
                    canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + CAPTION))
            video.add_image(np.asarray(canvas))
