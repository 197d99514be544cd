"""A trainer over tiny data, small enough for a test, in this process."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elvsm_nerfstudio.method_configs import efficient_lvsm_tiny
from elvsm_nerfstudio.trainer import EfficientLVSMTrainer, EfficientLVSMTrainerConfig


@pytest.fixture(autouse=True)
def no_writers_are_left():
    """A trainer sets nerfstudio's global writers up; the viewer paces itself by what they say."""
    yield
    from nerfstudio.utils import writer  # not the first of nerfstudio's modules to import: it is in a circle

    for left in (writer.GLOBAL_BUFFER, writer.EVENT_WRITERS, writer.EVENT_STORAGE):
        left.clear()


def tiny_config(
    folder: Path,
    data: Path,
    scenes_per_batch: int = 2,
    prefix_loss: bool = False,
    muon: bool = False,
    compress_gradients: bool = False,
    **options,
) -> EfficientLVSMTrainerConfig:
    """The tiny method's config with an even smaller network in fp32; ``options`` are the trainer's."""
    config = replace(deepcopy(efficient_lvsm_tiny.config), output_dir=folder, experiment_name="a", timestamp="run")
    config = replace(config, vis="tensorboard", **options)
    config.machine = replace(config.machine, device_type="cpu", seed=3)
    config.optimizers["network"]["optimizer"].muon = muon
    model, datamanager = config.pipeline.model, config.pipeline.datamanager
    model.network = replace(model.network, width=32, num_layers=2, head_dim=16)
    config.pipeline.compress_gradients = compress_gradients
    model.precision, model.prefix_loss = "fp32", prefix_loss
    sizes = dict(image_size=(16, 16), num_context_views=2, num_target_views=2, scenes_per_batch=scenes_per_batch)
    config.pipeline.datamanager = replace(datamanager, data=data, num_workers=0, **sizes)
    return config


def tiny_trainer(folder: Path, data: Path, rank: int = 0, world_size: int = 1, **options) -> EfficientLVSMTrainer:
    """A trainer that is set up, as nerfstudio's launcher does it."""
    config = tiny_config(folder, data, **options)
    torch.manual_seed(config.machine.seed + rank)
    trainer = config.setup(local_rank=rank, world_size=world_size)
    trainer.setup()
    return trainer


def gradients(trainer: EfficientLVSMTrainer) -> dict[str, torch.Tensor]:
    """Of the network's weights, by name."""
    return {name: p.grad.clone() for name, p in trainer.pipeline.model.network.named_parameters()}
