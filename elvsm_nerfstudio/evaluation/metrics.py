"""Image metrics: the one place where numbers come from."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

LPIPS_WEIGHTS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""torchvision's file names, under torch.hub's checkpoint folder."""
MAX_PSNR = 100.0
"""PSNR of identical images, which has no finite value."""


def psnr(
    prediction: Float[Tensor, "*batch height width 3"], truth: Float[Tensor, "*batch height width 3"]
) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB, over everything given, of colours clamped to [0, 1]; at most 100 dB."""
    error = (prediction.clamp(0, 1) - truth.clamp(0, 1)).square().mean()
    return -10 * error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def ssim(prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Structural similarity as the paper's evaluation computes it: scikit-image, 11x11 Gaussian, data range 1."""
    from skimage.metrics import structural_similarity

    images = (image.clamp(0, 1).float().cpu().numpy() for image in (prediction, truth))
    return float(structural_similarity(*images, win_size=11, gaussian_weights=True, data_range=1.0, channel_axis=-1))


def lpips(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"], net: str = "vgg"
) -> Optional[float]:
    """LPIPS (v0.1) of colours in [0, 1], or None where the network's weights are not on this machine."""
    network = _lpips_network(net, prediction.device)
    if network is None:
        return None
    with torch.no_grad():
        images = (image.clamp(0, 1).float().permute(2, 0, 1)[None] for image in (prediction, truth))
        return float(network(*images, normalize=True))


def image_metrics(
    prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]
) -> dict[str, float]:
    """PSNR, SSIM and, where its weights are present, LPIPS (VGG)."""
    metrics = {"psnr": float(psnr(prediction, truth)), "ssim": ssim(prediction, truth)}
    perceptual = lpips(prediction, truth)
    return metrics if perceptual is None else {**metrics, "lpips": perceptual}


@lru_cache(maxsize=4)
def _lpips_network(net: str, device: torch.device) -> Optional[torch.nn.Module]:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS[net]
    if not weights.exists():
        warnings.warn(f"LPIPS is left out: {weights} is missing (torchvision's {net} weights)", stacklevel=3)
        return None
    from lpips import LPIPS

    return LPIPS(net=net, verbose=False).to(device).eval().requires_grad_(False)
