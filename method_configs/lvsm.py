"""LVSM, the baseline: its two networks with the data, evaluation and viewer of Efficient-LVSM.

The tiny ones have the width, the number of layers and the parameters of ``efficient-lvsm-tiny``; what that spends on
cross-attention, they spend on a wider MLP.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio.method_configs.efficient_lvsm import efficient_lvsm, efficient_lvsm_tiny
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.network import NetworkConfig


def _variant(of: MethodSpecification, name: str, network: NetworkConfig, description: str) -> MethodSpecification:
    """A method with another network, and with LVSM's schedule and clipping."""
    config = replace(deepcopy(of.config), method_name=name)
    config.pipeline = replace(config.pipeline, model=replace(config.pipeline.model, network=network))
    optimizer, scheduler = (config.optimizers["network"][part] for part in ("optimizer", "scheduler"))
    config.optimizers = {
        "network": {
            "optimizer": replace(optimizer, clip_norm=1.0, skip_norm=5.0),
            "scheduler": replace(scheduler, decay="cosine"),
        }
    }
    return MethodSpecification(config=config, description=description)


lvsm_decoder_only = _variant(
    efficient_lvsm,
    "lvsm-decoder-only",
    LVSMDecoderOnlyConfig(),
    "LVSM, decoder-only: the baseline that attends over all views for every target (171 M, 256 px).",
)
lvsm_encoder_decoder = _variant(
    efficient_lvsm,
    "lvsm-encoder-decoder",
    LVSMEncoderDecoderConfig(),
    "LVSM, encoder-decoder: the baseline that reads all views into 3,072 latent tokens (173 M, 256 px).",
)

_tiny = {"width": 256, "mlp_ratio": 5, "init_std": 0.035}

lvsm_decoder_only_tiny = _variant(
    efficient_lvsm_tiny,
    "lvsm-decoder-only-tiny",
    LVSMDecoderOnlyConfig(num_layers=8, **_tiny),
    "LVSM, decoder-only, small enough to train on a CPU (7.6 M, 64 px).",
)
lvsm_encoder_decoder_tiny = _variant(
    efficient_lvsm_tiny,
    "lvsm-encoder-decoder-tiny",
    LVSMEncoderDecoderConfig(num_layers=4, num_latents=192, **_tiny),
    "LVSM, encoder-decoder, small enough to train on a CPU (7.7 M, 64 px).",
)
