"""Perceptual losses: distances between the features that frozen networks see in two images.

They compute in the transformer's precision. On a CPU bf16 takes half the time (4 images of 256 px with VGG-16, forward
and backward, one core: 1.22 s against 2.36 s), and moves the parameters' gradient less than the transformer's own bf16
does: relative L2 error 0.7 to 1.3 % against 0.9 to 3.2 % (LPIPS: 3 to 5 % against 3 to 8 %), measured on
efficient-lvsm-tiny at images of 7 to 25 dB. Pixel by pixel its gradient is less exact: cosines of 0.82 to 0.99 to that
of fp32.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.training.vgg_files import Backbone, Convolutions, find_vgg, read_vgg

LEAST_SIZE = 16
"""Pixels a side: four poolings leave one."""


class PerceptualLoss(ABC):
    """A distance of images to true ones, as a frozen network sees it; no gradient flows to the truth.

    Not a module, so that no state dict, optimiser or DDP wrapper finds the network.
    """

    def __call__(
        self, prediction: Float[Tensor, "*batch height width 3"], truth: Float[Tensor, "*batch height width 3"]
    ) -> Float[Tensor, ""]:
        """The loss, in fp32, of colours in [0, 1].

        Raises:
            ValueError: for images of other shapes than the true ones', and below 16 pixels a side.
        """
        if prediction.shape != truth.shape or prediction.ndim < 4 or min(prediction.shape[-3:-1]) < LEAST_SIZE:
            raise ValueError(
                f"perceptual loss: found images of shapes {list(prediction.shape)} and {list(truth.shape)}; expected "
                f"both [..., height, width, 3] with at least {LEAST_SIZE} pixels a side"
            )
        # The caller may be inside autocast.
        with torch.autocast(prediction.device.type, enabled=False):
            return self._distance(*(images.float().flatten(0, -4) for images in (prediction, truth.detach())))

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the network to a device, to compute there in bf16 or fp32. It starts on the CPU in fp32."""

    @abstractmethod
    def _distance(
        self, prediction: Float[Tensor, "image height width 3"], truth: Float[Tensor, "image height width 3"]
    ) -> Float[Tensor, ""]:
        """The loss of fp32 images."""


@dataclass
class PerceptualLossConfig:
    """Which perceptual loss is added to the mean squared error, if any."""

    backbone: Literal["none", "vgg19", "vgg16", "lpips"] = "none"
    """'vgg19' is the paper's (MatConvNet's weights, to be fetched first); 'vgg16' is the same distance on torchvision's
    VGG-16, with layer weights of our own; 'lpips' is LPIPS with VGG-16."""
    weight: float = 0.5
    """Weight of the perceptual loss; that of the mean squared error is 1 (paper: 0.5)."""
    target_views: Optional[int] = None
    """Target views of each scene that it looks at in a step; all of them if absent. They are drawn at random, so that
    one of six makes the same on average, at a sixth of the cost."""
    weights_file: Optional[Path] = None
    """The frozen network's weights; looked for in torch's cache (under TORCH_HOME) if absent. lpips takes VGG-16's."""

    @property
    def network(self) -> Optional[Backbone]:
        """The frozen network whose weights are needed; None where there is to be no such loss."""
        if self.backbone == "none":
            return None
        return "vgg16" if self.backbone == "lpips" else self.backbone

    def build(self) -> Optional[PerceptualLoss]:
        """Reads the weights; None where there is to be no such loss.

        Raises:
            FileNotFoundError: where the weights are missing, with the command that fetches them.
            ValueError: where their file is broken, and for less than one target view.
        """
        if (network := self.network) is None:
            return None
        if self.target_views is not None and self.target_views < 1:
            raise ValueError(
                f"--pipeline.model.perceptual.target-views: found {self.target_views}; expected at least 1, or None "
                "for all target views"
            )
        convolutions = read_vgg(network, find_vgg(network, self.weights_file))
        return LPIPSLoss(convolutions) if self.backbone == "lpips" else VGGLoss(convolutions, VGG_TERMS[network])


@dataclass(frozen=True)
class VGGTerms:
    """What is particular to one VGG: how it wants its images, and how much each of its layers counts."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """The network is given (colour - mean) / std, of RGB in [0, 1]."""
    features: tuple[float, float, float, float, float]
    """Weights of the mean absolute differences at relu1_2, relu2_2, relu3_2, relu4_2 and relu5_2; that of the colours
    themselves is 1."""


VGG_TERMS = {
    # As LVSM and Efficient-LVSM train (after Chen & Koltun 2017): images x255 minus the channels' means, and
    # the sum of all terms, that of the images included, divided by 255.
    "vgg19": VGGTerms(
        mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
        std=(1 / 255, 1 / 255, 1 / 255),
        features=(1 / 2.6 / 255, 1 / 4.8 / 255, 1 / 3.7 / 255, 1 / 5.6 / 255, 10 / 1.5 / 255),
    ),
    # Layers and weights are our choice: the layers of the same names, and weights by Chen & Koltun's rule, that all
    # terms contribute alike; measured on 12 photos of 256 px against the same photos blurred by 2 and by 4 px.
    "vgg16": VGGTerms(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        features=(1 / 8.5, 1 / 15.5, 1 / 18, 1 / 6.6, 1 / 2.9),
    ),
}


class VGGLoss(PerceptualLoss):
    """Mean absolute differences of the colours and of five layers of a VGG with average pooling, weighted and summed.

    Means are over all images, pixels and channels.
    """

    def __init__(self, convolutions: Convolutions, terms: VGGTerms):
        *stages, last = convolutions
        self._convolutions = [*stages, last[:2]]  # nothing is read behind relu5_2
        self._terms = terms
        self.to(torch.device("cpu"), torch.float32)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        # From the fp32 weights each time, so that nothing is lost on the way back from bf16.
        self._stages = [
            [(w.to(device, dtype, memory_format=torch.channels_last), b.to(device, dtype)) for w, b in stage]
            for stage in self._convolutions
        ]
        self._mean, self._std = (torch.tensor(x, device=device) for x in (self._terms.mean, self._terms.std))
        self._dtype = dtype

    def _distance(
        self, prediction: Float[Tensor, "image height width 3"], truth: Float[Tensor, "image height width 3"]
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            expected = list(self._features(truth))
        loss = (prediction - truth).abs().mean()
        for weight, found, wanted in zip(self._terms.features, self._features(prediction), expected):
            loss = loss + weight * (found - wanted).abs().mean(dtype=torch.float32)
        return loss

    def _features(self, images: Float[Tensor, "image height width 3"]) -> Iterator[Float[Tensor, "image c h w"]]:
        # Pixels stay as they lie in memory: channels-last, which is faster.
        x = ((images - self._mean) / self._std).permute(0, 3, 1, 2).to(self._dtype)
        for stage, convolutions in enumerate(self._stages):
            if stage:
                x = F.avg_pool2d(x, 2)
            for i, (weight, bias) in enumerate(convolutions):
                x = F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True)
                if i == 1:
                    yield x


class LPIPSLoss(PerceptualLoss):
    """LPIPS (v0.1) with VGG-16, of the package lpips, averaged over the images."""

    def __init__(self, convolutions: Convolutions):
        from lpips import LPIPS

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, about lpips's way of asking for weights
            # pnet_rand: else it downloads what torch's cache lacks. All that is random is overwritten.
            self._network = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        modules = [module for module in self._network.net.modules() if isinstance(module, torch.nn.Conv2d)]
        for module, (weight, bias) in zip(modules, (pair for stage in convolutions for pair in stage), strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
        self.to(torch.device("cpu"), torch.float32)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._dtype = dtype

    def _distance(
        self, prediction: Float[Tensor, "image height width 3"], truth: Float[Tensor, "image height width 3"]
    ) -> Float[Tensor, ""]:
        images = (images.permute(0, 3, 1, 2) for images in (prediction, truth))
        with torch.autocast(prediction.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self._network(*images, normalize=True).float().mean()
