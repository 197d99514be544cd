"""Scenes mirrored and in other colours: what keeps few scenes from being learned by heart.

Each changes all views of a scene alike, images and cameras, so that it stays one scene. All numbers here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras

MIRROR_SHARE = 0.5
"""Share of the scenes that are mirrored."""
COLOUR_SHARE = 0.5
"""Share of the scenes in other colours."""
MAX_GAMMA = 1.25
"""Largest exponent of a channel's values in [0, 1]; the smallest is its inverse. It leaves white and black as they are,
and with them backgrounds."""


class Colours(NamedTuple):
    """Other colours of a scene."""

    values: UInt8[Tensor, "channel=3 value=256"]
    """What becomes of each value of each channel."""
    order: list[int]
    """Which channel comes first, second and third."""


@dataclass(frozen=True)
class Change:
    """What is done to all views of one scene."""

    mirrored: bool = False
    colours: Optional[Colours] = None

    def apply(self, rgb: UInt8[Tensor, "view height width 3"], cameras: Float[Tensor, "view 25"]) -> None:
        """Changes images and packed cameras in place."""
        if self.colours is not None:
            channels = [self.colours.values[channel][rgb[..., channel].long()] for channel in self.colours.order]
            rgb.copy_(torch.stack(channels, dim=-1))
        if self.mirrored:
            rgb.copy_(rgb.flip(-2))
            cameras.copy_(mirrored(cameras))


@dataclass(frozen=True)
class Augmentation:
    """What may be done to scenes, beside other lenses (data/lenses.py)."""

    mirror: bool = False
    colour: bool = False

    def draw(self, generator: torch.Generator) -> Change:
        """What is done to a scene. Nothing is drawn for what is off: it moves no random number of the others."""
        is_mirrored = self.mirror and _happens(MIRROR_SHARE, generator)
        recoloured = self.colour and _happens(COLOUR_SHARE, generator)
        return Change(is_mirrored, draw_colours(generator) if recoloured else None)


AS_IT_IS = Change()
NO_AUGMENTATION = Augmentation()


def draw_colours(generator: torch.Generator) -> Colours:
    """Channels in any order, each brightened or darkened a little."""
    gamma = MAX_GAMMA ** (2 * torch.rand(3, 1, generator=generator) - 1)
    values = 255 * torch.linspace(0, 1, 256) ** gamma
    return Colours(values.round().to(torch.uint8), torch.randperm(3, generator=generator).tolist())


def mirrored(cameras: Float[Tensor, "view 25"]) -> Float[Tensor, "view 25"]:
    """Packed cameras of the pictures that are flipped left to right: of the scene with x and -x exchanged."""
    lens, flip = unpack_cameras(cameras), cameras.new_tensor([-1.0, 1.0, 1.0])
    distortion = lens.distortion_params.clone()
    distortion[:, 5] *= -1  # the tangential one along x
    poses = flip[:, None] * lens.camera_to_worlds * torch.cat([flip, flip.new_ones(1)])
    return pack_cameras(replace(lens, camera_to_worlds=poses, cx=lens.width - lens.cx, distortion_params=distortion))


def _happens(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < share
