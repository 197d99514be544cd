"""Efficient-LVSM against one training step as the official code takes it, transcribed from a description."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_views
from test_network import random_network
from torch import Tensor

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.published_weights import from_published, to_published
from scripts.benchmarks.upstream_step import UpstreamNetwork, UpstreamStep

CONFIG = EfficientLVSMConfig(width=32, num_layers=3, head_dim=16)
CONTEXT, TARGET = make_views(2, 3, 16, 24), make_views(2, 2, 16, 24, seed=1)
FRAME = CanonicalFrame.estimate(CONTEXT.camera_to_world)


def transcription(network: EfficientLVSM) -> UpstreamStep:
    theirs = UpstreamNetwork(network.config)
    theirs.load_state_dict(to_published(network.state_dict()))
    return UpstreamStep(theirs, learning_rate=1e-3, dtype=None)


def rendered(step: UpstreamStep) -> Tensor:
    size = torch.tensor([CONTEXT.width, CONTEXT.height] * 2)
    cameras = [(FRAME.apply(v.camera_to_world), v.intrinsics * size) for v in (CONTEXT, TARGET)]
    return step.render(CONTEXT.rgb.permute(0, 1, 4, 2, 3), *cameras).permute(0, 1, 3, 4, 2)


def test_the_render_is_the_official_algorithms():
    network = random_network(CONFIG)
    with torch.no_grad():
        found, expected = network(CONTEXT, TARGET, FRAME), rendered(transcription(network))
    assert expected.std() > 0.05 and (found - expected).abs().max() < 2e-5


def test_gradients_are_the_official_algorithms():
    network = random_network(CONFIG)
    step = transcription(network)
    (network(CONTEXT, TARGET, FRAME) - TARGET.rgb).square().mean().backward()
    (rendered(step) - TARGET.rgb).square().mean().backward()
    gradients, _ = from_published({name: p.grad for name, p in step.network.named_parameters()})
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("small", ["queries and keys", "tokens"])
def test_eps_is_the_official_codes_where_it_matters(small):
    """With activations about as small as its square root; another eps in the transcription is another render."""
    network = random_network(CONFIG)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if small == "tokens" and name.endswith(("tokenizer.weight", "to_out.weight", "mlp.2.weight")):
                parameter.mul_(1e-3)
            if small == "queries and keys" and name.endswith(("to_q.weight", "to_kv.weight", "to_qkv.weight")):
                parameter.mul_(2e-3)
            if small == "queries and keys" and name.endswith("to_out.weight"):
                parameter.mul_(500)  # values were made small with them
        found, step = network(CONTEXT, TARGET, FRAME), transcription(network)
        assert (found - rendered(step)).abs().max() < 2e-5
        for other in (1e-6, 1e-2):
            for module in step.network.modules():
                if hasattr(module, "eps"):
                    module.eps = other
            assert (found - rendered(step)).abs().max() > 2e-4, other


def test_keys_and_values_of_each_layer_come_from_the_encoders_same_layer():
    network = random_network(CONFIG)
    with torch.no_grad():
        tokens = network._context_tokens(CONTEXT, FRAME).flatten(0, 1)
        memory = network.encode(CONTEXT, FRAME)
        for layer, (encoder, decoder) in enumerate(zip(network.context_blocks, network.target_blocks)):
            tokens = encoder(tokens)
            expected = decoder.keys_values(tokens.unflatten(0, (2, 3)).flatten(1, 2))
            for found, wanted in zip(memory.read(layer), expected):
                assert torch.allclose(found, wanted, atol=1e-5), layer
        last = network.context_blocks[-1].mlp[2].weight
        last.mul_(2)
        changed = network.encode(CONTEXT, FRAME)
    moved = [(a[1] - b[1]).abs().max() for a, b in zip(*([m.read(i) for i in range(3)] for m in (memory, changed)))]
    assert moved[0] == moved[1] == 0 and moved[2] > 1e-2


def test_camera_matrices_are_made_in_fp32_under_autocast():
    """They multiply focal lengths and poses; made in bf16, and not only rounded to it, most entries would be off."""
    network = random_network(replace(CONFIG, camera_encoding="prope"))
    network.autocast_dtype = torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as within encode and decode
        found = network._camera_encoding(CONTEXT, FRAME)
    pose = FRAME.apply(CONTEXT.camera_to_world).double()
    lift = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    lift[..., 0, 0], lift[..., 1, 1] = CONTEXT.intrinsics[..., 0], CONTEXT.intrinsics[..., 1]
    lift[..., :2, 2] = CONTEXT.intrinsics[..., 2:] - 0.5
    expected = lift @ torch.linalg.inv(pose)
    for matrix, wanted in (
        (found.output_matrix, expected.mT),
        (found.query_matrix, expected),
        (found.key_matrix, torch.linalg.inv(expected).mT),
    ):
        block = matrix[:, 0, :, :4, :4]
        assert block.dtype == torch.bfloat16
        wanted = wanted.to(torch.bfloat16)
        same = torch.isclose(block.float(), wanted.float(), rtol=1e-6, atol=1e-5)
        assert same.float().mean() > 0.98
