"""The network that renders views for a scene's Gaussians, by the name of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from elvsm_nerfstudio.nn.named_weights import PRETRAINED, weights_path
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.nn.precision import autocast_dtype
from elvsm_nerfstudio.nn.weights import load_weights, read_weights
from elvsm_nerfstudio.training.checkpoints import find_checkpoint
from elvsm_nerfstudio.training.run_config import read_run_config

OPTION = "--pipeline.datamanager.weights"
PRETRAINED_SIZE = (64, 64)
"""Height and width that the package's weights were trained at."""


@dataclass(frozen=True)
class RenderingWeights:
    """Weights, and what is known of them."""

    file: Path
    network: NetworkConfig
    image_size: Optional[tuple[int, int]]
    """Height and width that they were trained at, where that is known."""

    def build(self, device: torch.device | str) -> SceneNetwork:
        """The network with its weights, to render with."""
        network = self.network.build()
        load_weights(network, self.file)
        network.autocast_dtype = autocast_dtype("auto", torch.device(device))
        return network.to(device).eval().requires_grad_(False)


def find_weights(name: str) -> RenderingWeights:
    """Finds weights by what a user calls them.

    Args:
        name: 'pretrained', a file of weights, or a run: its folder, its config.yml or one of its checkpoints.

    Raises:
        ValueError: where there are none.
    """
    path = Path(name)
    config = _config_of(path)
    try:
        if config is None:
            size = PRETRAINED_SIZE if name == PRETRAINED else None
            return RenderingWeights(weights_path(path), read_weights(path).config, size)
        pipeline = read_run_config(config).pipeline
        if not hasattr(pipeline.model, "network"):
            raise ValueError(f"{name}: found a run without a network; expected one of efficient-lvsm or lvsm")
        file = path if path.suffix == ".ckpt" else find_checkpoint(config.parent / "nerfstudio_models")
        return RenderingWeights(file, pipeline.model.network, tuple(pipeline.datamanager.image_size))
    except ValueError as error:
        raise ValueError(f"{OPTION} {error}") from None


def _config_of(path: Path) -> Optional[Path]:
    """The config.yml of the run that a path means; None where it means no run."""
    if path.suffix == ".ckpt":
        path = path.parent.parent
    config = path if path.name == "config.yml" else path / "config.yml"
    return config if config.is_file() else None
