"""Weights that are rounded once for inference, and not in every frame."""

from copy import deepcopy

import pytest
import torch
from conftest import make_views
from torch import nn

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.rounded import RoundedCopy

SIZES = dict(width=32, num_layers=2, head_dim=16)
CONFIGS = [
    EfficientLVSMConfig(**SIZES, init_std=0.1),
    EfficientLVSMConfig(**SIZES, init_std=0.1, camera_encoding="prope", ray_frame="camera"),
    LVSMEncoderDecoderConfig(**SIZES, init_std=0.1, num_latents=5),
]


def images(network) -> list[torch.Tensor]:
    first, second, target = make_views(1, 3, 16, 24), make_views(1, 1, 16, 24, seed=1), make_views(1, 2, 16, 24, seed=2)
    with torch.no_grad():
        memory = network.append(network.encode(first), second)
        return [network.decode(memory, target), network.decode(memory, target, nearest_views=2)]


def rounding_every_time(network, monkeypatch) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(RoundedCopy, "of", lambda self, module, *rest: module)
        return images(network)


@pytest.mark.parametrize("config", CONFIGS)
def test_images_are_autocasts_bit_for_bit_also_after_the_weights_have_changed(config, monkeypatch):
    network = config.build()
    network.autocast_dtype = torch.bfloat16
    before = images(network)
    assert all(map(torch.equal, before, rounding_every_time(network, monkeypatch)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    after = images(network)
    assert all(map(torch.equal, after, rounding_every_time(network, monkeypatch)))
    assert not torch.equal(before[0], after[0])
    network.autocast_dtype = None
    exact = images(network)
    assert not torch.equal(exact[0], after[0]) and (exact[0] - after[0]).abs().max() < 0.05


def test_the_copy_is_made_once_and_is_nobodys():
    network = CONFIGS[0].build()
    network.autocast_dtype = torch.bfloat16
    names, number = list(network.state_dict()), len(list(network.modules()))
    images(network)
    assert network._inference(network.weights_token()) is network, "where there may be gradients"
    with torch.no_grad():
        kept = network._inference(network.weights_token())
    images(network)
    with torch.no_grad():
        assert network._inference(network.weights_token()) is kept is not network
    assert list(network.state_dict()) == names and len(list(network.modules())) == number
    linear = [module.weight for module in kept.modules() if isinstance(module, nn.Linear)]
    assert all(x.dtype == torch.bfloat16 for x in linear)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    assert deepcopy(network)._rounded._kept is None
    network(make_views(1, 1, 16, 24), make_views(1, 1, 16, 24)).mean().backward()
    assert network._rounded._kept is None, "training has no use for it"


@torch.no_grad()
def test_hooks_and_replaced_parts_are_the_networks(monkeypatch):
    network = CONFIGS[0].build()
    network.autocast_dtype = torch.bfloat16
    images(network)
    seen = []
    network.target_blocks[0].mlp[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = rounding_every_time(network, monkeypatch)
    seen.clear()
    assert torch.equal(images(network)[0], expected[0]) and set(seen) == {torch.bfloat16}
    network.target_blocks[0].mlp[2] = nn.Sequential(network.target_blocks[0].mlp[2], nn.Linear(32, 32))
    assert torch.equal(images(network)[0], rounding_every_time(network, monkeypatch)[0])
    assert not torch.equal(images(network)[0], expected[0])
