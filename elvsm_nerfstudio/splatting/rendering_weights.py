"""The network that renders views for a scene's Gaussians, by what a user calls its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from elvsm_nerfstudio.nn.named_weights import trained_image_size, weights_path
from elvsm_nerfstudio.nn.network import SceneNetwork, autocast_dtype
from elvsm_nerfstudio.nn.weights import load_network
from elvsm_nerfstudio.training.checkpoints import CheckpointError, find_checkpoint
from elvsm_nerfstudio.training.run_config import read_run_config

OPTION = "--pipeline.datamanager.weights"


@dataclass(frozen=True)
class Renderer:
    """A network to render with."""

    network: SceneNetwork
    file: Path
    """The file that its weights came from."""
    image_size: Optional[tuple[int, int]]
    """Height and width that it was trained at, where that is known."""


def load_renderer(name: str, device: torch.device | str) -> Renderer:
    """Loads a network.

    Args:
        name: 'pretrained', another name of weights, a file of them, or a run: its folder, its config.yml or one of its
            checkpoints.

    Raises:
        ValueError: where there is none.
    """
    path = Path(name)
    file, network_config, size = name, None, None
    try:
        run = _config_of(path)
        if run is not None:
            pipeline = read_run_config(run).pipeline
            network_config = getattr(pipeline.model, "network", None)
            if network_config is None:
                raise ValueError(f"{name}: found a run without a network; expected one of efficient-lvsm or lvsm")
            file = path if path.suffix == ".ckpt" else find_checkpoint(run.parent / "nerfstudio_models")
            size = tuple(pipeline.datamanager.image_size)
        else:
            size = trained_image_size(name)
        file = weights_path(file)
        network = load_network(file, network_config)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"{OPTION} {error}") from None
    network.autocast_dtype = autocast_dtype("auto", torch.device(device))
    return Renderer(network.to(device), file, size)


def _config_of(path: Path) -> Optional[Path]:
    """The config.yml of the run that a path means; None where it means no run."""
    if path.suffix == ".ckpt":
        path = path.parent.parent
    config = path if path.name == "config.yml" else path / "config.yml"
    return config if config.is_file() else None
