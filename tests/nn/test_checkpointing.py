"""Gradient checkpointing: less memory, the same gradients."""

import pytest
import torch
from conftest import make_views

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from scripts.benchmarks.measurements import peak_bytes

SIZES = dict(width=32, num_layers=4, head_dim=16)
CONFIGS = {
    "efficient-lvsm": EfficientLVSMConfig(**SIZES),
    "efficient-lvsm with prope": EfficientLVSMConfig(**SIZES, camera_encoding="prope"),
    "decoder-only": LVSMDecoderOnlyConfig(**SIZES),
    "encoder-decoder": LVSMEncoderDecoderConfig(**SIZES, num_latents=12),
}


def step(network, checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    network.gradient_checkpointing = checkpointing
    views = make_views(2, 5, 32, 32)
    rendered = network(views.select(slice(0, 2)), views.select(slice(2, None)))
    (rendered - views.rgb[:, 2:]).square().mean().backward()
    return rendered.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_renders_and_gradients_are_the_same_bits(kind, dtype):
    torch.manual_seed(0)
    network = CONFIGS[kind].build()
    network.autocast_dtype = dtype
    (plain, gradients), (checkpointed, recomputed) = step(network, False), step(network, True)
    assert torch.equal(plain, checkpointed)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_does_not_grow_with_all_that_a_block_computes(kind):
    network = CONFIGS[kind].build()
    plain, checkpointed = (
        peak_bytes(torch.device("cpu"), lambda: None, lambda _, c=checkpointing: step(network, c))
        for checkpointing in (False, True)
    )
    assert checkpointed < 0.5 * plain


def test_nothing_is_computed_twice_without_gradients():
    network = CONFIGS["efficient-lvsm"].build()
    network.gradient_checkpointing = True
    calls = []
    network.target_blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    views = make_views(1, 3, 16, 16)
    with torch.no_grad():
        network(views.select(slice(0, 2)), views.select(slice(2, None)))
    assert calls == [False]
