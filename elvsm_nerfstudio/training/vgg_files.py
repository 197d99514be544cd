"""The frozen VGGs that losses need: where their files lie, and how they are read. Nothing is downloaded here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
from torch import Tensor

Convolutions = list[list[tuple[Tensor, Tensor]]]
"""Weights [out, in, 3, 3] and biases [out] of a VGG's convolutions, by stage; between two stages lies a pooling."""

Backbone = Literal["vgg19", "vgg16"]

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five stages."""
DEPTHS = {"vgg19": (2, 2, 4, 4, 4), "vgg16": (2, 2, 3, 3, 3)}
"""Convolutions of each stage."""


@dataclass(frozen=True)
class VggFile:
    """A file that is looked for in torch.hub's folder of checkpoints."""

    name: str
    fetch: str
    """The command that puts it there."""

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


FILES = {
    # MatConvNet's conversion of the weights of Simonyan & Zisserman, 576 MB; LVSM and Efficient-LVSM name it.
    "vgg19": VggFile("imagenet-vgg-verydeep-19.mat", "elvsm fetch vgg19"),
    # torchvision's own training of VGG-16, which LPIPS is built on.
    "vgg16": VggFile("vgg16-397923af.pth", "elvsm fetch lpips"),
}


def find_vgg(backbone: Backbone, path: Optional[Path] = None) -> Path:
    """The file of a network's weights: the one given, or torch.hub's.

    Raises:
        FileNotFoundError: with the command that fetches it.
    """
    found = FILES[backbone].path if path is None else path
    if not found.is_file():
        raise FileNotFoundError(
            f"the perceptual loss needs the weights of {backbone}, and there is no file {found}. Get them with\n"
            f"    {FILES[backbone].fetch}\n"
            "or name the file with --pipeline.model.perceptual.weights-file, or train without the loss: "
            "--pipeline.model.perceptual.backbone none"
        )
    return found


def read_vgg(backbone: Backbone, path: Path) -> Convolutions:
    """Reads all convolutions of a VGG in fp32.

    Args:
        path: of VGG-19 in MatConvNet's format (.mat), of VGG-16 in torchvision's (.pth).

    Raises:
        ValueError: for a file that is broken or holds something else, with the command that fetches the true one.
    """
    try:
        return _READERS[backbone](path)
    except Exception as error:  # what is raised depends on where the file breaks off
        raise ValueError(
            f"{path} cannot be read as the weights of {backbone} ({type(error).__name__}: {error}); expected "
            f"{FILES[backbone].name}, as this writes it anew:\n    {FILES[backbone].fetch}"
        ) from error


def _read_matconvnet(path: Path) -> Convolutions:
    from scipy.io import loadmat

    layers = loadmat(path, variable_names=["layers"], simplify_cells=True)["layers"]
    weights = {layer["name"]: layer["weights"] for layer in layers if layer["type"] == "conv"}
    stages: Convolutions = []
    for stage, depth in enumerate(DEPTHS["vgg19"]):
        stages.append([])
        for i in range(depth):
            name = f"conv{stage + 1}_{i + 1}"
            kernel, bias = (torch.from_numpy(array) for array in weights[name])
            # MatConvNet: height, width, in, out.
            stages[-1].append(_checked("vgg19", stage, i, kernel.permute(3, 2, 0, 1), bias))
    return stages


def _read_torchvision(path: Path) -> Convolutions:
    state = torch.load(path, map_location="cpu", weights_only=True)
    stages: Convolutions = []
    position = 0
    for stage, depth in enumerate(DEPTHS["vgg16"]):
        stages.append([])
        for i in range(depth):
            parameters = (state[f"features.{position}.{name}"] for name in ("weight", "bias"))
            stages[-1].append(_checked("vgg16", stage, i, *parameters))
            position += 2  # the convolution and its ReLU
        position += 1  # the pooling
    return stages


def _checked(backbone: Backbone, stage: int, i: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    channels = WIDTHS[stage]
    inputs = channels if i else (WIDTHS[stage - 1] if stage else 3)
    expected = [channels, inputs, 3, 3], [channels]
    if (list(weight.shape), list(bias.shape)) != expected:
        raise ValueError(
            f"conv{stage + 1}_{i + 1}: found shapes {list(weight.shape)} and {list(bias.shape)}, "
            f"expected {expected[0]} and {expected[1]}"
        )
    return weight.float().contiguous(), bias.float().contiguous()


_READERS = {"vgg19": _read_matconvnet, "vgg16": _read_torchvision}
