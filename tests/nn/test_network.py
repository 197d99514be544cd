"""The network: parity with the official implementation, and what must not change its result."""

import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_views, need_shared
from test_geometry import move_world

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig

SMALL = EfficientLVSMConfig(width=64, num_layers=3, head_dim=16)


def random_network(config: EfficientLVSMConfig = SMALL, seed: int = 0) -> EfficientLVSM:
    torch.manual_seed(seed)
    network = EfficientLVSM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # gains of 1 and tiny weights would hide mistakes
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture
def network() -> EfficientLVSM:
    return random_network()


def parity(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "elvsm_nerfstudio.cli", "check", *arguments], capture_output=True, text=True
    )


def test_parity_with_the_official_implementation():
    result = parity(str(need_shared("parity/recorded_a.npz")))
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("c2w_normalized", "ray moment", "render\n", "render_incremental_1", "render_incremental_2"):
        assert name in result.stdout
    assert result.stdout.count("gradient") == 20


def test_parity_script_notices_a_difference(tmp_path):
    recorded = dict(np.load(need_shared("parity/recorded_a.npz")))
    recorded["render"] = recorded["render"] + 1e-4
    np.savez(tmp_path / "off.npz", **recorded)
    result = parity(str(tmp_path / "off.npz"))
    assert result.returncode == 1
    failed = [line.split(")  ")[1] for line in result.stdout.splitlines() if "FAIL" in line]
    assert failed == ["render", "render, view after view"]


def test_parity_script_refuses_what_is_no_recording(tmp_path):
    np.savez(tmp_path / "other.npz", image=np.zeros(1))
    for fixture in (tmp_path / "other.npz", tmp_path / "missing.npz"):
        result = parity(str(fixture))
        assert result.returncode == 1 and result.stderr.startswith("error: ") and fixture.name in result.stderr


def test_paper_size_has_199_million_parameters():
    with torch.device("meta"):
        network = EfficientLVSM(EfficientLVSMConfig())
    assert sum(p.numel() for p in network.parameters()) == 199_070_208


def test_order_of_context_views_does_not_matter(network):
    context, target = make_views(2, 4, 16, 24), make_views(2, 2, 16, 24, seed=1)
    with torch.no_grad():
        assert torch.allclose(network(context, target), network(context.select([2, 0, 3, 1]), target), atol=1e-5)


def test_world_frame_does_not_matter(network):
    context, target = make_views(1, 3, 16, 16), make_views(1, 2, 16, 16, seed=1)
    moved_context, moved_target = (
        replace(views, camera_to_world=move_world(views.camera_to_world)) for views in (context, target)
    )
    with torch.no_grad():
        assert torch.allclose(network(context, target), network(moved_context, moved_target), atol=2e-5)


def test_target_views_do_not_see_each_other(network):
    context, target = make_views(1, 2, 16, 16), make_views(1, 3, 16, 16, seed=1)
    with torch.no_grad():
        memory = network.encode(context)
        together = network.decode(memory, target)
        alone = network.decode(memory, target.select([1]))
    assert torch.allclose(together[:, 1:2], alone, atol=1e-6)


def test_scenes_of_a_batch_do_not_see_each_other(network):
    context, target = make_views(2, 2, 16, 16), make_views(2, 1, 16, 16, seed=1)
    one = [replace(v, **{k: getattr(v, k)[1:] for k in ("camera_to_world", "directions", "intrinsics", "rgb")})
           for v in (context, target)]  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(network(context, target)[1:], network(*one), atol=1e-6)


def test_co_refinement_reads_every_layer_of_the_encoder(network):
    """The context features of each layer, not only the last, move the result."""
    context, target = make_views(1, 2, 16, 16), make_views(1, 1, 16, 16, seed=1)
    with torch.no_grad():
        memory = network.encode(context)
        whole = network.decode(memory, target)
        for layer in range(SMALL.num_layers):
            without = network.encode(context)
            without.store.layers[layer][1].zero_()  # the values
            assert (network.decode(without, target) - whole).abs().max() > 1e-3


def test_bf16_stays_close_to_fp32(network):
    context, target = make_views(1, 2, 16, 16), make_views(1, 1, 16, 16, seed=1)
    with torch.no_grad():
        exact = network(context, target)
        network.autocast_dtype = torch.bfloat16
        memory = network.encode(context)
        rounded = network.decode(memory, target)
    assert memory.dtype == torch.bfloat16 and memory.frame.axes.dtype == torch.float32
    assert rounded.dtype == torch.float32
    assert 1e-6 < (rounded - exact).abs().max() < 0.05


def test_initialisation_is_scaled_by_depth():
    torch.manual_seed(0)
    network = EfficientLVSM(EfficientLVSMConfig(width=256, num_layers=2))
    for blocks, attention in ((network.context_blocks, "attention"), (network.target_blocks, "self_attention")):
        for layer, block in enumerate(blocks):
            std = getattr(block, attention).to_qkv.weight.std().item()
            assert std == pytest.approx(0.02 / (2 * (layer + 1)) ** 0.5, rel=0.02)
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    wide = EfficientLVSM(EfficientLVSMConfig(width=256, num_layers=2, init_std=0.05))
    assert wide.target_blocks[1].mlp[0].weight.std().item() == pytest.approx(0.05 / 2, rel=0.02)
    official = EfficientLVSM(EfficientLVSMConfig(width=256, num_layers=2, context_init="torch"))
    bound = official.context_blocks[0].attention.to_qkv.weight.abs().max().item()
    assert bound == pytest.approx(1 / 256**0.5, rel=0.01)  # torch's uniform default


def test_configs_from_before_an_option_are_as_without_it():
    """A run's config.yml holds the options that there were."""
    old = EfficientLVSMConfig.__new__(EfficientLVSMConfig)
    younger = ("camera_encoding",)
    old.__dict__.update({name: value for name, value in vars(SMALL).items() if name not in younger})
    assert yaml.load(yaml.dump(old), Loader=yaml.Loader) == SMALL
    assert old.describe() == SMALL.describe() and asdict(old) == asdict(SMALL)
    assert list(old.build().state_dict()) == list(random_network().state_dict())


def test_sizes_that_do_not_fit_are_refused(network):
    context = make_views(1, 2, 16, 16)
    with pytest.raises(ValueError, match="20x16; expected multiples of the patch size 8"):
        network(context, make_views(1, 1, 20, 16))
    with pytest.raises(ValueError, match="need rgb"):
        network.encode(replace(context, rgb=None))
    with pytest.raises(ValueError, match="width 100 is not a multiple of head_dim 64"):
        EfficientLVSM(EfficientLVSMConfig(width=100))
