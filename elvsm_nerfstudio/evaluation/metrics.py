"""Image metrics: the one place where numbers come from. All of them in fp32, of colours clamped to [0, 1]."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from functools import cache, lru_cache
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LPIPS_WEIGHTS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""torchvision's file names, under torch.hub's checkpoint folder."""
FETCH = "elvsm fetch lpips"
LPIPS_LEAST_SIZE = 32
"""Pixels a side. Below 31, AlexNet's last layers have no pixel left (VGG-16's below 16)."""
REMEMBERED_BYTES = 256 * 2**20
"""Of features of LPIPS's networks, each."""
SSIM_WINDOW = 11
MAX_PSNR = 100.0
"""PSNR of identical images, which has no finite value."""


def psnr(
    prediction: Float[Tensor, "*batch height width 3"], truth: Float[Tensor, "*batch height width 3"]
) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB, over everything given, of colours clamped to [0, 1]; at most 100 dB."""
    error = (prediction.float().clamp(0, 1) - truth.float().clamp(0, 1)).square().mean()
    return -10 * error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def ssim(prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Structural similarity as the paper's evaluation computes it: scikit-image, 11x11 Gaussian, data range 1.

    Raises:
        ValueError: for images smaller than the window.
    """
    from skimage.metrics import structural_similarity

    height, width, _ = truth.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM: found an image of {height} x {width} pixels; expected at least 11 x 11, its window")
    images = (_array(image) for image in (prediction, truth))
    return float(
        structural_similarity(*images, win_size=SSIM_WINDOW, gaussian_weights=True, data_range=1.0, channel_axis=-1)
    )


def flip(prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Mean LDR-FLIP of sRGB colours, in [0, 1], 0 for equal images: NVIDIA's own implementation.

    Seen at its default of 67 pixels per degree: a 4K monitor, 0.7 m wide, from 0.7 m. (Andersson et al., "FLIP: A
    Difference Evaluator for Alternating Images", HPG 2020.)
    """
    from flip_evaluator import evaluate

    _, mean, _ = evaluate(_array(truth), _array(prediction), "LDR", applyMagma=False, parameters={})
    return float(mean)


def flip_map(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]
) -> Float[Tensor, "height width 3"]:
    """Where ``flip`` sees errors: each pixel's in magma's colours, from black (none) to pale yellow (1)."""
    from flip_evaluator import evaluate

    colours, _, _ = evaluate(_array(truth), _array(prediction), "LDR", applyMagma=True, parameters={})
    return torch.from_numpy(np.ascontiguousarray(colours))


def what_lpips_lacks(size: tuple[int, int], net: str) -> Optional[str]:
    """Why LPIPS by ``net`` cannot be had of images of ``size`` (height, width) on this machine; None if it can."""
    height, width = size
    if min(height, width) < LPIPS_LEAST_SIZE:
        return (
            f"LPIPS is left out: found images of {height} x {width} pixels; it needs {LPIPS_LEAST_SIZE} x "
            f"{LPIPS_LEAST_SIZE} or more"
        )
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if (checkpoints / LPIPS_WEIGHTS[net]).exists():
        return None
    missing = " and ".join(name for name in LPIPS_WEIGHTS.values() if not (checkpoints / name).exists())
    return f"LPIPS is left out: {missing} missing in {checkpoints}; `{FETCH}` gets the weights"


def lpips(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"], net: str = "vgg"
) -> Optional[float]:
    """LPIPS (v0.1) with the network ``vgg`` or ``alex``.

    None, with one warning, where the networks' weights are not on this machine or the images are smaller than 32
    pixels a side.
    """
    lacking = what_lpips_lacks((truth.shape[0], truth.shape[1]), net)
    if lacking is not None:
        _warn_once(lacking)
        return None
    network = _lpips_network(net, prediction.device)
    # The caller may be inside autocast.
    with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
        images = (image.float().clamp(0, 1).permute(2, 0, 1)[None] for image in (prediction, truth))
        return float(network(*images, normalize=True))


def image_metrics(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]
) -> dict[str, float]:
    """``psnr``, ``ssim``, ``flip``, ``lpips_vgg`` and ``lpips_alex``; the last two only where they can be had."""
    metrics = {"psnr": float(psnr(prediction, truth)), "ssim": ssim(prediction, truth), "flip": flip(prediction, truth)}
    perceptual = {f"lpips_{net}": lpips(prediction, truth, net) for net in LPIPS_WEIGHTS}
    return {**metrics, **{name: value for name, value in perceptual.items() if value is not None}}


def mean_over_areas(
    images: Float[Tensor, "*view height width channels"], size: tuple[int, int]
) -> Float[Tensor, "*view reduced_height reduced_width channels"]:
    """An image, or several, reduced to ``size`` (height, width)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, -3), size).movedim(-3, -1)


def _array(image: Float[Tensor, "height width 3"]) -> Float[np.ndarray, "height width 3"]:
    """As the NumPy packages want it: clamped, float32, contiguous, on the CPU."""
    return image.detach().float().clamp(0, 1).cpu().contiguous().numpy()


@lru_cache(maxsize=4)
def _lpips_network(net: str, device: torch.device) -> torch.nn.Module:
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about lpips's way of asking for weights
        try:
            network = LPIPS(net=net, verbose=False)
        except Exception as error:  # what is raised depends on where the file breaks off
            weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS[net]
            raise RuntimeError(f"{weights} cannot be read; `{FETCH}` writes it anew") from error
    network.net = _Remembering(network.net)
    return network.to(device).eval().requires_grad_(False)


class _Remembering(torch.nn.Module):
    """The features of images, computed once while an image is among the last ones: an evaluation compares each photo
    with several pictures, and what is copied from a photo with several others."""

    def __init__(self, features: torch.nn.Module):
        super().__init__()
        self.features = features
        self._last: OrderedDict[tuple[bytes, torch.Size], tuple[Tensor, ...]] = OrderedDict()

    def forward(self, image: Float[Tensor, "1 3 height width"]) -> tuple[Tensor, ...]:
        key = hashlib.sha256(image.cpu().contiguous().numpy()).digest(), image.shape
        if key not in self._last:
            self._last[key] = self.features(image)
        self._last.move_to_end(key)
        while len(self._last) > 1 and sum(map(_num_bytes, self._last.values())) > REMEMBERED_BYTES:
            self._last.popitem(last=False)
        return self._last[key]


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
