"""What a user can expect of weights on a capture, said before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from elvsm_nerfstudio.geometry import cover_size
from elvsm_nerfstudio.nn.named_weights import PUBLISHED
from elvsm_nerfstudio.nn.network import NetworkConfig

LONGEST = 2.5
"""Longest aspect of a picture that is not cropped."""
MIN_CROP_SAID = 0.02
"""Share of a photo that may be cut off without a word: the rounding to patches."""


@dataclass(frozen=True)
class Training:
    """What weights were trained on."""

    pictures: str
    backgrounds: bool
    """Whether the pictures had a background, and not one thing cut out."""


FURNITURE = Training("single pieces of furniture in front of white", backgrounds=False)
ROOMS = Training("RealEstate10K: videos of rooms, houses and streets", backgrounds=True)
FOR_ROOMS, FOR_THINGS = "efficient-lvsm-256", "pretrained"
"""Names of the weights to use instead."""


def training_of(name: str) -> Optional[Training]:
    """What the weights of a name were trained on; None for weights of one's own."""
    if name == "pretrained":
        return FURNITURE
    return ROOMS if name in PUBLISHED else None


def has_relative_encoding(network: NetworkConfig) -> bool:
    """Whether a network sees cameras relative to one another, and so takes pictures of other aspects."""
    return getattr(network, "camera_encoding", "none") == "prope"


def whole_size(photo: tuple[int, int], trained: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width) of whole photos: the shorter side as trained, the longer one rounded to patches."""
    short = min(trained)
    aspect = min(max(photo) / min(photo), LONGEST)
    long = max(short, round(short * aspect / patch_size) * patch_size)
    return (short, long) if photo[1] >= photo[0] else (long, short)


def share_cut_off(photo: tuple[int, int], size: tuple[int, int]) -> float:
    """Share of a photo that a centre crop to a size loses."""
    return 1 - math.prod(size) / math.prod(cover_size(photo, size))


def expectations(
    name: str, network: NetworkConfig, photo: tuple[int, int], size: tuple[int, int], cut_out: bool
) -> list[str]:
    """Sentences.

    Args:
        name: of the weights, as given.
        photo, size: (height, width) of the photos and of what the network gets.
        cut_out: whether the photos show one thing without its background.
    """
    said = []
    training = training_of(name)
    if training is not None:
        said.append(f"The weights {name} were trained on {training.pictures}.")
        if not training.backgrounds and not cut_out:
            said.append(
                "Your photos have a background, which these weights have never seen: expect rough colours and shapes, "
                f"and blur. Weights for such photos: --weights {FOR_ROOMS} (elvsm weights lists sizes and licences). "
                "Photos of one thing come out better with its background masked (mask_path in transforms.json, or "
                "transparent PNGs)."
            )
        elif training.backgrounds and cut_out:
            said.append(
                "Your photos show one thing without its background, which these weights have never seen; weights for "
                f"such photos: --weights {FOR_THINGS}."
            )
        elif training.backgrounds:
            said.append(
                "Their training photos were neighbours in a video: expect sharp pictures near your photos, and blur "
                "where the view is far from all of them."
            )
    said.append(f"The network gets photos of {size[1]} x {size[0]} pixels, and renders at that size.")
    lost = share_cut_off(photo, size)
    if lost > MIN_CROP_SAID:
        why = "" if has_relative_encoding(network) else ", because this network was trained on that aspect alone"
        said.append(f"{lost:.0%} of each photo, at its edges, is cut off{why}; --image-size sets another size.")
    return said
