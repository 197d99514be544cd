"""Efficient-LVSM with relative camera encoding, trained on any number of views.

Network, cost and memory are those of ``efficient-lvsm``; the recipe is ours.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio.method_configs.efficient_lvsm import efficient_lvsm, efficient_lvsm_tiny
from elvsm_nerfstudio.training.optimizers import AdamWOptimizerConfig, WarmupSchedulerConfig


def _plus(of: MethodSpecification, name: str, description: str, **datamanager) -> MethodSpecification:
    """A method with PRoPE, rays in each camera's own frame, 1 to 8 context views, and many lenses in training: with
    such rays, a network that was trained through one lens knows that lens alone."""
    config = replace(deepcopy(of.config), method_name=name)
    pipeline = config.pipeline
    config.pipeline = replace(
        pipeline,
        datamanager=replace(pipeline.datamanager, num_context_views=(1, 8), lens_augmentation=True, **datamanager),
        model=replace(
            pipeline.model, network=replace(pipeline.model.network, camera_encoding="prope", ray_frame="camera")
        ),
    )
    return MethodSpecification(config=config, description=description)


efficient_lvsm_plus = _plus(
    efficient_lvsm,
    "efficient-lvsm-plus",
    "Efficient-LVSM with relative camera encoding, for any number of views (199 M, 256 px).",
)

efficient_lvsm_plus_tiny = _plus(
    efficient_lvsm_tiny,
    "efficient-lvsm-plus-tiny",
    "Efficient-LVSM with relative camera encoding, for any number of views, on a CPU (7.6 M, 64 px).",
    scenes_per_batch=6,
)
efficient_lvsm_plus_tiny.config.pipeline.model.psnr_loss = True
efficient_lvsm_plus_tiny.config.optimizers = {
    "network": {
        "optimizer": AdamWOptimizerConfig(lr=3e-3, muon=True),
        "scheduler": WarmupSchedulerConfig(warmup_steps=100, decay="cosine"),
    }
}
