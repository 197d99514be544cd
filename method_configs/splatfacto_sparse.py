"""splatfacto on a few context frames: the baseline that optimises for each scene."""

from __future__ import annotations

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManagerConfig
from elvsm_nerfstudio.splatting.model import SparseSplatfactoModelConfig
from elvsm_nerfstudio.splatting.pipeline import SparseSplatfactoPipelineConfig
from elvsm_nerfstudio.splatting.schedules import FloatExponentialDecaySchedulerConfig


def _adam(lr: float) -> dict:
    return {"optimizer": AdamOptimizerConfig(lr=lr, eps=1e-15), "scheduler": None}


# Learning rates are splatfacto's. The iterations are ours: a fixed budget, with which nothing is chosen by the targets.
splatfacto_sparse = MethodSpecification(
    config=TrainerConfig(
        method_name="splatfacto-sparse",
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        max_num_iterations=1000,
        mixed_precision=False,
        pipeline=SparseSplatfactoPipelineConfig(
            datamanager=ContextFramesDataManagerConfig(),
            model=SparseSplatfactoModelConfig(),
        ),
        optimizers={
            "means": {
                "optimizer": AdamOptimizerConfig(lr=1.6e-4, eps=1e-15),
                "scheduler": FloatExponentialDecaySchedulerConfig(lr_final=1.6e-6, max_steps=30000),
            },
            "features_dc": _adam(0.0025),
            "features_rest": _adam(0.0025 / 20),
            "opacities": _adam(0.05),
            "scales": _adam(0.005),
            "quats": _adam(0.001),
            "camera_opt": {
                "optimizer": AdamOptimizerConfig(lr=1e-4, eps=1e-15),
                "scheduler": FloatExponentialDecaySchedulerConfig(
                    lr_final=5e-7, max_steps=30000, warmup_steps=1000, lr_pre_warmup=0
                ),
            },
            "bilateral_grid": {
                "optimizer": AdamOptimizerConfig(lr=2e-3, eps=1e-15),
                "scheduler": FloatExponentialDecaySchedulerConfig(
                    lr_final=1e-4, max_steps=30000, warmup_steps=1000, lr_pre_warmup=0
                ),
            },
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    ),
    description="splatfacto (gsplat) on a few context frames of one scene, on CUDA or on a CPU: the baseline.",
)
