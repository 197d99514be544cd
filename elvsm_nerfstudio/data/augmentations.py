"""Scenes mirrored, in other colours and before other backgrounds: what keeps few scenes from being learned by heart.

Each changes all views of a scene alike, images and cameras, so that it stays one scene. All numbers here are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from elvsm_nerfstudio.cameras import unpack_cameras, views_from_cameras

MIRROR_SHARE = 0.5
"""Share of the scenes that are mirrored."""
COLOUR_SHARE = 0.5
"""Share of the scenes in other colours."""
MAX_GAMMA = 1.25
"""Largest exponent of a channel's values in [0, 1]; the smallest is its inverse. It leaves white and black as they are,
and with them backgrounds."""
BACKGROUND_SHARE = 1 / 3
"""Share of the scenes before another background: a third of these before black, one colour and a texture each."""
WAVES = 8
"""Plane waves over the directions, of which a texture is the sum."""
FREQUENCY = (2.0, 20.0)
"""Lowest and highest of them, in radians of the wave for each radian of direction."""


class Colours(NamedTuple):
    """Other colours of a scene."""

    values: UInt8[Tensor, "channel=3 value=256"]
    """What becomes of each value of each channel."""
    order: list[int]
    """Which channel comes first, second and third."""


class Surroundings(NamedTuple):
    """What is seen behind a scene, infinitely far away: a colour for each direction."""

    mean: Float[Tensor, " rgb=3"]
    frequency: Float[Tensor, "wave xyz=3"]
    phase: Float[Tensor, " wave"]
    amplitude: Float[Tensor, "wave rgb=3"]

    def seen(self, direction: Float[Tensor, "*pixel xyz=3"]) -> Float[Tensor, "*pixel rgb=3"]:
        """Colours in [0, 1] in directions of the scene's world, of unit length."""
        waves = (direction @ self.frequency.T + self.phase).cos()
        return (self.mean + waves @ self.amplitude).clamp(0, 1)


@dataclass(frozen=True)
class Change:
    """What is done to all views of one scene."""

    mirrored: bool = False
    colours: Optional[Colours] = None
    surroundings: Optional[Surroundings] = None

    def apply(
        self,
        rgb: UInt8[Tensor, "view height width 3"],
        cameras: Float[Tensor, "view 25"],
        on_black: Optional[UInt8[Tensor, "view height width 3"]] = None,
    ) -> None:
        """Changes images and packed cameras in place.

        Args:
            on_black: the same images on black, where ``rgb`` has them on white: what differs shows the background.
        """
        if self.surroundings is not None and on_black is not None:
            transparent = (rgb.float() - on_black.float()).clamp(min=0) / 255
            behind = self.surroundings.seen(world_directions(cameras))
            rgb.copy_((on_black + 255 * transparent * behind).round().clamp(max=255))
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
    background: bool = False

    def draw(self, generator: torch.Generator) -> Change:
        """What is done to a scene. Nothing is drawn for what is off: it moves no random number of the others."""
        is_mirrored = self.mirror and _happens(MIRROR_SHARE, generator)
        colours = draw_colours(generator) if self.colour and _happens(COLOUR_SHARE, generator) else None
        surrounded = self.background and _happens(BACKGROUND_SHARE, generator)
        return Change(is_mirrored, colours, draw_surroundings(generator) if surrounded else None)


AS_IT_IS = Change()
NO_AUGMENTATION = Augmentation()


def draw_colours(generator: torch.Generator) -> Colours:
    """Channels in any order, each brightened or darkened a little."""
    gamma = MAX_GAMMA ** (2 * torch.rand(3, 1, generator=generator) - 1)
    values = 255 * torch.linspace(0, 1, 256) ** gamma
    return Colours(values.round().to(torch.uint8), torch.randperm(3, generator=generator).tolist())


def draw_surroundings(generator: torch.Generator) -> Surroundings:
    """Black, one colour, or a texture."""
    kind = int(torch.randint(3, (), generator=generator))
    mean = torch.rand(3, generator=generator)
    axis = normalize(torch.randn(WAVES, 3, generator=generator), dim=-1)
    low, high = FREQUENCY
    frequency = axis * low * (high / low) ** torch.rand(WAVES, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(WAVES, generator=generator)
    amplitude = 0.5 * torch.randn(WAVES, 3, generator=generator) / math.sqrt(WAVES)
    return Surroundings(mean * (kind > 0), frequency, phase, amplitude * (kind > 1))


def mirrored(cameras: Float[Tensor, "view 25"]) -> Float[Tensor, "view 25"]:
    """Packed cameras of the pictures that are flipped left to right: of the scene with x and -x exchanged."""
    pose = cameras[:, :12].unflatten(-1, (3, 4))
    flip = cameras.new_tensor([-1.0, 1.0, 1.0])
    pose = flip[:, None] * pose * torch.cat([flip, flip.new_ones(1)])
    result = cameras.clone()
    result[:, :12] = pose.flatten(1)
    width = cameras[:, 23]
    result[:, 14] = width - cameras[:, 14]
    result[:, 21] = -cameras[:, 21]  # the tangential distortion along x
    return result


def world_directions(cameras: Float[Tensor, "view 25"]) -> Float[Tensor, "view height width xyz=3"]:
    """Of each pixel's ray, of unit length."""
    views = views_from_cameras(unpack_cameras(cameras), patch_size=1)
    rotation = views.camera_to_world[0, :, None, None, :3, :3]
    return normalize((rotation @ views.directions[0][..., None])[..., 0], dim=-1)


def _happens(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < share
