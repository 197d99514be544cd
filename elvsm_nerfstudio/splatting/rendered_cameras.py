"""Cameras to render extra views from, placed by the context cameras alone.

Where the context cameras look at one place, the new ones look there too: from within the range of their azimuths and
elevations and a margin, or from all sides where two of them see it from sides far apart. Where they do not, as in a
walk, the new ones stand between neighbours and a little beside. All numbers here are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.quasirandom import SobolEngine

from elvsm_nerfstudio.geometry import nearest_others

Arrangement = Literal["all around one place", "before one place", "between neighbours"]

MIN_CONVERGENCE = 1e-3
"""Mean squared sine of the angles between the viewing axes and the direction that they have most in common."""
MAX_MISS = 0.3
"""The axes miss the place that they look at by so much of their distance from it, at most."""
ALL_AROUND = math.radians(90)
"""Azimuths or directions this far apart mean that a scene is seen from all sides."""
AZIMUTH_MARGIN = math.radians(20)
ELEVATION_MARGIN = math.radians(30)
MAX_ELEVATION = math.radians(80)
BESIDE = 0.25
"""Of the distance between two neighbours: how far beside the way between them a camera stands."""


@dataclass(frozen=True)
class PlacedCameras:
    """Poses for renders, and how they are placed."""

    poses: Float[Tensor, "view 3 4"]
    """Camera-to-world, OpenGL."""
    arrangement: Arrangement


def place_cameras(poses: Float[Tensor, "context 3 4"], count: int, seed: int = 0) -> PlacedCameras:
    """Spreads cameras over where a scene may be looked at from.

    Args:
        poses: of the context cameras, camera-to-world, OpenGL.
        seed: of the low-discrepancy sequence.
    """
    poses = poses.double()
    spread = SobolEngine(3, scramble=True, seed=seed).draw(count).double().to(poses.device)
    place = looked_at(poses)
    if place is None:
        return PlacedCameras(_between(poses, spread).float(), "between neighbours")
    placed, arrangement = _around(poses, place, spread)
    return PlacedCameras(placed.float(), arrangement)


def looked_at(poses: Float[Tensor, "view 3 4"]) -> Optional[Float[Tensor, " xyz"]]:
    """The place that all cameras look at; None where there is none.

    A single camera does not tell how far away it is: it is taken to lie nearest to the origin of the world, about which
    captures are centred.
    """
    centres, axes = poses[:, :, 3], -poses[:, :, 2]
    if len(poses) == 1:
        ahead = float(-(centres[0] @ axes[0]))
        return centres[0] + axes[0] * (ahead if ahead > 0 else float(centres[0].norm()) or 1.0)
    across = torch.eye(3).to(poses) - axes[:, :, None] * axes[:, None]
    mean = across.mean(dim=0)
    if torch.linalg.eigvalsh(mean)[0] < MIN_CONVERGENCE:
        return None
    place = torch.linalg.solve(mean, (across @ centres[:, :, None]).mean(dim=0))[:, 0]
    offset = place - centres
    ahead, missed = (offset * axes).sum(dim=-1), (across @ offset[:, :, None]).norm(dim=(-2, -1))
    return place if (ahead > 0).all() and missed.mean() < MAX_MISS * ahead.mean() else None


def upwards(poses: Float[Tensor, "view 3 4"]) -> Float[Tensor, " xyz"]:
    """Up, as cameras are held: across all of their horizontal axes, and where those leave a choice, their mean up."""
    right, mean = poses[:, :, 0], normalize(poses[:, :, 1].mean(dim=0), dim=0)
    spread = right.T @ right / len(right) + 0.01 * (torch.eye(3).to(poses) - mean[:, None] * mean)
    up = torch.linalg.eigh(spread).eigenvectors[:, 0]
    return up * torch.sign(up @ mean)


def _around(
    poses: Float[Tensor, "context 3 4"], place: Float[Tensor, " xyz"], spread: Float[Tensor, "view 3"]
) -> tuple[Float[Tensor, "view 3 4"], Arrangement]:
    up = upwards(poses)
    offset = poses[:, :, 3] - place
    distance = offset.norm(dim=-1)
    directions = offset / distance[:, None]
    elevation = (directions @ up).clamp(-1, 1).asin()
    front = normalize(poses[:, :, 2].mean(dim=0), dim=0)
    front = front if front.norm() > 0.5 and abs(front @ up) < 0.99 else directions[0]
    front = normalize(front - (front @ up) * up, dim=0)
    side = torch.linalg.cross(up, front)
    azimuth = torch.atan2(directions @ side, directions @ front)
    cosines = torch.stack([(azimuth[:, None] - azimuth).cos(), directions @ directions.T])
    everywhere = len(poses) == 1 or bool(cosines.min() < math.cos(ALL_AROUND))
    low, high = elevation.min() - ELEVATION_MARGIN, elevation.max() + ELEVATION_MARGIN
    low, high = low.clamp(min=-MAX_ELEVATION).sin(), high.clamp(max=MAX_ELEVATION).sin()
    new_elevation = (low + spread[:, 1] * (high - low)).asin()
    if everywhere:
        new_azimuth = spread[:, 0] * 2 * math.pi
    else:
        first, last = azimuth.min() - AZIMUTH_MARGIN, azimuth.max() + AZIMUTH_MARGIN
        new_azimuth = first + spread[:, 0] * (last - first)
    level = new_azimuth.cos()[:, None] * front + new_azimuth.sin()[:, None] * side
    new = new_elevation.cos()[:, None] * level + new_elevation.sin()[:, None] * up
    # As far away as the context cameras that see it from about the same side.
    nearness = 1 / (1.05 - new @ directions.T)
    far = (nearness * distance).sum(dim=-1) / nearness.sum(dim=-1)
    return _looking(place + far[:, None] * new, new, up), "all around one place" if everywhere else "before one place"


def _between(poses: Float[Tensor, "context 3 4"], spread: Float[Tensor, "view 3"]) -> Float[Tensor, "view 3 4"]:
    neighbours = nearest_others(poses)[:, :2]
    number = torch.arange(len(spread), device=poses.device)
    first = number % len(poses)
    second = neighbours[first, (number // len(poses)) % neighbours.shape[1]]
    one, other = poses[first], poses[second]
    way = spread[:, :1]
    backward = normalize((1 - way) * one[:, :, 2] + way * other[:, :, 2], dim=-1)
    up = normalize((1 - way) * one[:, :, 1] + way * other[:, :, 1], dim=-1)
    centre = (1 - way) * one[:, :, 3] + way * other[:, :, 3]
    reach = BESIDE * (one[:, :, 3] - other[:, :, 3]).norm(dim=-1, keepdim=True)
    beside = torch.linalg.cross(up, backward) * (2 * spread[:, 1:2] - 1) + up * (2 * spread[:, 2:] - 1)
    return _looking(centre + reach * beside, backward, up)


def _looking(
    centre: Float[Tensor, "view 3"], backward: Float[Tensor, "view 3"], up: Float[Tensor, "*view 3"]
) -> Float[Tensor, "view 3 4"]:
    """OpenGL poses at some places, looking against ``backward``."""
    right = normalize(torch.linalg.cross(up.expand_as(backward), backward), dim=-1)
    return torch.stack([right, torch.linalg.cross(backward, right), backward, centre], dim=-1)
