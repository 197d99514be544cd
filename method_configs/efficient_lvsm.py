"""Efficient-LVSM at the paper's size, and small enough for a CPU."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio.data.datamanager import ViewSetDataManagerConfig
from elvsm_nerfstudio.model import EfficientLVSMModelConfig
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.pipeline import EfficientLVSMPipelineConfig
from elvsm_nerfstudio.training.optimizers import AdamWOptimizerConfig, WarmupSchedulerConfig

_base = TrainerConfig(
    method_name="efficient-lvsm",
    steps_per_save=2000,
    steps_per_eval_batch=500,
    steps_per_eval_image=500,
    steps_per_eval_all_images=25000,
    max_num_iterations=100000,
    mixed_precision=False,
    pipeline=EfficientLVSMPipelineConfig(
        datamanager=ViewSetDataManagerConfig(view_sampler="bounded-gap", frame_gap=(25, 192)),
        model=EfficientLVSMModelConfig(),
    ),
    optimizers={
        "network": {
            "optimizer": AdamWOptimizerConfig(lr=4e-4),
            "scheduler": WarmupSchedulerConfig(warmup_steps=3000, decay="constant"),
        }
    },
    viewer=ViewerConfig(default_composite_depth=False),
    vis="viewer",
)

efficient_lvsm = MethodSpecification(
    config=_base,
    description="Efficient-LVSM: new views of a scene from a few posed photos in one forward pass (199 M, 256 px).",
)


def _tiny() -> TrainerConfig:
    config = replace(deepcopy(_base), method_name="efficient-lvsm-tiny", max_num_iterations=10000)
    config.pipeline = replace(
        config.pipeline,
        datamanager=replace(
            config.pipeline.datamanager,
            image_size=(64, 64),
            scenes_per_batch=4,
            num_context_views=4,
            num_target_views=6,
            targets_include_context=False,
            view_sampler="random",
            num_workers=1,
        ),
        model=replace(config.pipeline.model, network=EfficientLVSMConfig(width=256, num_layers=4, init_std=0.035)),
    )
    config.optimizers = {
        "network": {
            "optimizer": AdamWOptimizerConfig(lr=5e-4),
            "scheduler": WarmupSchedulerConfig(warmup_steps=100, decay="cosine", max_steps=10000),
        }
    }
    return config


efficient_lvsm_tiny = MethodSpecification(
    config=_tiny(),
    description="Efficient-LVSM small enough to train on a CPU (7.6 M, 64 px).",
)
