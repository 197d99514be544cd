"""The LVSM baselines: parity, what must not change their results, and every tool with them as with Efficient-LVSM."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_NETWORK, make_views, need_shared, run_cli, tiny_pipeline, write_collection
from nerfstudio.cameras.cameras import Cameras
from test_network import parity

from elvsm_nerfstudio.evaluation.evaluator import Evaluator
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.memory import MemoryFileError, load_memory
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork

DECODER_ONLY = LVSMDecoderOnlyConfig(width=64, num_layers=3, head_dim=16)
ENCODER_DECODER = LVSMEncoderDecoderConfig(width=64, num_layers=2, head_dim=16, num_latents=10)
TARGET = make_views(1, 2, 16, 16, seed=9)


def random_network(config: NetworkConfig, seed: int = 0) -> SceneNetwork:
    torch.manual_seed(seed)
    network = config.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # gains of 1 and tiny weights would hide mistakes
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture(params=[DECODER_ONLY, ENCODER_DECODER], ids=["decoder-only", "encoder-decoder"])
def config(request) -> NetworkConfig:
    return request.param


@pytest.fixture
def network(config):
    """Without gradients, as for rendering; the tests of gradients make their own."""
    with torch.no_grad():
        yield random_network(config)


def count_encodings(network: SceneNetwork) -> list[int]:
    """Tokens of a sequence that the encoder reads, a number for each time it does."""
    lengths: list[int] = []
    network.encoder_blocks[0].register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    return lengths


# The network


def test_parity_with_the_official_implementations():
    fixtures = [
        need_shared(f"parity/recorded_{name}.npz") for name in ("a", "lvsm_decoder_only", "lvsm_encoder_decoder")
    ]
    result = parity(*map(str, fixtures))
    assert result.returncode == 0, result.stdout + result.stderr
    lvsm = result.stdout.split(str(fixtures[1]))[1]
    assert lvsm.count("  render\n") == 2 and lvsm.count("  render, view after view\n") == 2


def test_parity_script_fails_where_one_of_several_fixtures_is_off(tmp_path):
    recorded = dict(np.load(need_shared("parity/recorded_lvsm_encoder_decoder.npz")))
    latents = recorded["state/n_light_field_latent"]
    np.savez(tmp_path / "off.npz", **{**recorded, "state/n_light_field_latent": latents * 1.01})
    result = parity(str(tmp_path / "off.npz"), str(need_shared("parity/recorded_lvsm_decoder_only.npz")))
    assert result.returncode == 1
    off, fine = result.stdout.split("decoder_only.npz")
    assert off.count("FAIL") == 2 and "FAIL" not in fine and "ok" in fine


def test_order_of_context_views_does_not_matter(network):
    context, target = make_views(2, 4, 16, 24), make_views(2, 2, 16, 24, seed=1)
    assert torch.allclose(network(context, target), network(context.select([2, 0, 3, 1]), target), atol=1e-5)


def test_target_views_do_not_see_each_other(network):
    context, target = make_views(2, 2, 16, 16), make_views(2, 3, 16, 16, seed=1)
    memory = network.encode(context)
    together, alone = network.decode(memory, target), network.decode(memory, target.select([1]))
    assert torch.allclose(together[:, 1:2], alone, atol=1e-6)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


def test_scenes_of_a_batch_do_not_see_each_other(network):
    context, target = make_views(2, 2, 16, 16), make_views(2, 1, 16, 16, seed=1)
    memory = network.encode(context)
    second = network.decode(memory.scene(1), replace_scene(target, 1))
    assert torch.allclose(network.decode(memory, target)[1:], second, atol=1e-6)
    assert torch.allclose(network(replace_scene(context, 1), replace_scene(target, 1)), second, atol=1e-6)


def replace_scene(views, scene: int):
    names = ("camera_to_world", "directions", "intrinsics", "rgb")
    return replace(views, **{name: getattr(views, name)[scene : scene + 1] for name in names})


def test_every_context_view_and_every_weight_moves_the_result(config):
    network = random_network(config)
    context = make_views(1, 3, 16, 16)
    context = replace(context, rgb=context.rgb.clone().requires_grad_())
    network(context, TARGET).square().mean().backward()
    assert (context.rgb.grad.abs().amax(dim=(0, 2, 3, 4)) > 1e-6).all()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_bf16_stays_close_to_fp32(network):
    context = make_views(1, 2, 16, 16)
    exact = network(context, TARGET)
    network.autocast_dtype = torch.bfloat16
    memory = network.encode(context)
    rounded = network.decode(memory, TARGET)
    assert memory.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in memory.derived.values())
    assert 1e-6 < (rounded - exact).abs().max() < 0.05


def test_sizes_that_do_not_fit_are_refused(network, config):
    context = make_views(1, 2, 16, 16)
    with pytest.raises(ValueError, match="20x16; expected multiples of the patch size 8"):
        network(context, make_views(1, 1, 20, 16))
    with pytest.raises(ValueError, match="16x20; expected multiples of the patch size 8"):
        network.encode(make_views(1, 1, 16, 20))
    with pytest.raises(ValueError, match="need rgb"):
        network.encode(replace(context, rgb=None))
    with pytest.raises(ValueError, match="width 100 is not a multiple of head_dim 16"):
        replace(config, width=100).build()


def test_initialisation_is_scaled_by_depth(config):
    torch.manual_seed(0)
    network = replace(config, width=256, num_layers=2).build()
    streams = [network.decoder_blocks] + ([network.encoder_blocks] if config is ENCODER_DECODER else [])
    for blocks in streams:
        for layer, block in enumerate(blocks):
            expected = pytest.approx(0.02 / (2 * (layer + 1)) ** 0.5, rel=0.02)
            assert block.attention.to_qkv.weight.std().item() == expected
            assert block.mlp[2].weight.std().item() == expected
    for name in ("context_tokenizer.weight", "head.weight", "latents"):
        if name in network.state_dict():
            assert network.state_dict()[name].std().item() == pytest.approx(0.02, rel=0.05)


# The memory


def test_views_that_come_and_go_equal_encoding_what_is_left(network):
    views, large = make_views(1, 4, 16, 16), make_views(1, 1, 24, 16, seed=1)
    frame = CanonicalFrame.estimate(views.camera_to_world)
    memory = network.encode(views.select([0, 1]), frame)
    memory = network.append(memory, views.select([2, 3]))
    assert memory.ids == (0, 1, 2, 3)
    assert torch.allclose(network.decode(memory, TARGET), network(views, TARGET, frame), atol=1e-5)
    memory = network.append(memory.drop([1]), large, ids=[7])
    expected = network.append(network.encode(views.select([0, 2, 3]), frame), large)
    assert torch.allclose(network.decode(memory, TARGET), network.decode(expected, TARGET), atol=1e-5)
    left = memory.select([3, 0])
    fresh = network.encode(views.select([0, 3]), frame)
    for same in (left, fresh.select([1, 0]), network.append(fresh.select([0]), views.select([3]), ids=[1])):
        assert torch.allclose(network.decode(same, TARGET), network.decode(fresh, TARGET), atol=1e-5)


def test_encoding_in_groups_equals_encoding_at_once(network):
    views = make_views(2, 5, 16, 16)
    target = make_views(2, 1, 16, 16, seed=1)
    expected = network(views, target)
    network.chunk_tokens = 9
    assert torch.allclose(network(views, target), expected, atol=1e-6)


def test_targets_from_the_nearest_views_alone(network):
    views = make_views(1, 4, 16, 16)
    memory = network.encode(views)
    rendered = network.decode(memory, TARGET, nearest_views=2)
    for index, ids in enumerate(memory.nearest(TARGET.camera_to_world, 2)[0]):
        chosen = network.encode(views.select(ids), memory.frame)
        assert torch.allclose(rendered[:, index : index + 1], network.decode(chosen, TARGET.select([index])), atol=1e-5)


def test_a_memory_of_other_weights_is_refused(network):
    memory = network.encode(make_views(1, 2, 16, 16))
    with pytest.raises(ValueError, match="encoded by other weights"):
        random_network(network.config).decode(memory, TARGET)
    network.head.weight.mul_(2)
    with pytest.raises(ValueError, match="encoded by other weights"):
        network.decode(memory, TARGET)


def test_latents_are_made_once_for_all_targets_and_again_when_views_change():
    network, views = random_network(ENCODER_DECODER), make_views(1, 4, 16, 16)
    lengths = count_encodings(network)
    with torch.no_grad():
        memory = network.encode(views.select([0, 1, 2]))
        assert lengths == [10 + 3 * 4]  # in encode, so that its time is not taken for that of rendering
        for _ in range(3):
            network.decode(memory, TARGET)
        assert memory.select([0, 1, 2]) is memory and len(lengths) == 1
        memory = network.append(memory, views.select([3]))
        network.decode(memory, TARGET)
        assert lengths[1:] == [10 + 4 * 4]
        dropped = memory.drop([1])
        assert len(lengths) == 2
        for _ in range(2):
            network.decode(dropped, TARGET)
        assert lengths[2:] == [10 + 3 * 4]
        network.decode(memory, TARGET)
        assert len(lengths) == 3
    (latents,) = memory.derived.values()
    assert latents.shape == (1, 10, 64) and memory.num_bytes == 4 * 64 * (4 * 4 + 10)
    assert latents.untyped_storage().nbytes() == latents.nbytes


def test_decoder_only_encoding_only_tokenizes():
    network = random_network(DECODER_ONLY)
    network.decoder_blocks[0].register_forward_hook(lambda *_: pytest.fail("a block ran"))
    with torch.no_grad():
        memory = network.encode(make_views(1, 3, 16, 16))
    assert memory.num_bytes == 4 * 64 * 3 * 4 and memory.derived == {}


def test_gradients_flow_through_every_operation(config):
    views = make_views(1, 4, 16, 16)
    frame = CanonicalFrame.estimate(views.camera_to_world)

    def gradient(make) -> torch.Tensor:
        network = random_network(config)
        network.decode(make(network), TARGET).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    def piecewise(network):
        memory = network.encode(views.select([3, 0, 2, 1]), frame).drop([0])
        with torch.no_grad():
            network.decode(memory, TARGET)  # leaves nothing behind that stops gradients
        return memory

    expected = gradient(lambda network: network.encode(views.select([0, 1, 2]), frame))
    assert torch.allclose(gradient(piecewise), expected, atol=1e-5 * float(expected.abs().max()))


def test_gradients_reach_the_encoder_when_the_tokenizer_is_frozen():
    network = random_network(ENCODER_DECODER)
    network.context_tokenizer.requires_grad_(False)
    network(make_views(1, 2, 16, 16), TARGET).mean().backward()
    assert network.encoder_blocks[0].attention.to_qkv.weight.grad.abs().max() > 0


def test_a_memory_made_without_gradients_is_a_constant(config):
    network = random_network(config)
    with torch.inference_mode():
        memory = network.encode(make_views(1, 3, 16, 16))
        inside = network.decode(memory, TARGET)
    for same in (memory, memory, memory.select([2, 1, 0])):
        rendered = network.decode(same, TARGET)
        rendered.sum().backward()
        assert torch.allclose(rendered, inside, atol=1e-5)
    assert network.decoder_blocks[0].mlp[0].weight.grad.abs().max() > 0
    assert network.context_tokenizer.weight.grad is None
    if config is ENCODER_DECODER:
        assert network.encoder_blocks[0].mlp[0].weight.grad is None and network.latents.grad is None


def test_a_memory_comes_back_from_a_file(network, tmp_path):
    views = make_views(2, 3, 16, 16)
    target = make_views(2, 1, 16, 16, seed=1)
    memory = network.encode(views).drop([1])
    memory.save(tmp_path / "memory.safetensors")
    again = random_network(network.config)
    loaded = load_memory(tmp_path / "memory.safetensors", again)
    assert loaded.ids == (0, 2)
    assert torch.equal(again.decode(loaded, target), network.decode(memory, target))
    other = random_network(replace(network.config, num_layers=1))
    with pytest.raises(MemoryFileError, match="another architecture"):
        load_memory(tmp_path / "memory.safetensors", other)


# The methods


METHODS = ["lvsm_decoder_only_tiny", "lvsm_encoder_decoder_tiny"]


@pytest.mark.parametrize("method", [name.removesuffix("_tiny") for name in METHODS])
def test_recipe_is_that_of_lvsm(method):
    from elvsm_nerfstudio import method_configs

    spec = getattr(method_configs, method)
    optimizer, scheduler = (spec.config.optimizers["network"][part] for part in ("optimizer", "scheduler"))
    assert (optimizer.lr, optimizer.clip_norm, optimizer.skip_norm) == (4e-4, 1.0, 5.0)
    assert (scheduler.warmup_steps, scheduler.decay, scheduler.max_steps) == (3000, "cosine", None)
    ours = method_configs.efficient_lvsm.config
    assert ours.optimizers["network"]["optimizer"].clip_norm == 5.0
    assert spec.config.pipeline.datamanager == ours.pipeline.datamanager
    network = ours.pipeline.model.network
    assert replace(spec.config.pipeline.model, network=network) == ours.pipeline.model


@pytest.mark.parametrize("method", METHODS)
def test_trained_evaluated_and_rendered_in_process(method, collection):
    pipeline = tiny_pipeline(collection, method=method)
    model = pipeline.model
    optimizer = torch.optim.AdamW(model.get_param_groups()["network"], lr=1e-3)
    losses = []
    for step in range(3):
        _, loss, _ = pipeline.get_train_loss_dict(step)
        loss["mse"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss["mse"].item())
    assert np.isfinite(losses).all()

    pipeline.eval()
    results = pipeline.get_average_eval_image_metrics()
    assert results["num_scenes"] == 2 and results["psnr"] > 3
    poses = pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[:1]
    camera = Cameras(poses, fx=20.0, fy=20.0, cx=10.0, cy=12.0, height=19, width=21)
    model.config.render_size = "native"
    rgb = model.get_outputs_for_camera(camera)["rgb"]
    assert rgb.shape == (19, 21, 3) and torch.equal(model.get_outputs_for_camera(camera)["rgb"], rgb)
    model.edit_context(drop=[0])
    assert (model.get_outputs_for_camera(camera)["rgb"] - rgb).abs().max() > 1e-5

    again = tiny_pipeline(collection, method=method)
    again.load_state_dict(pipeline.state_dict())
    again.model.config.render_size = "native"
    assert torch.equal(again.model.get_outputs_for_camera(camera)["rgb"], rgb)
    other = tiny_pipeline(collection)
    with pytest.raises(ValueError, match="checkpoint is of another architecture than this config"):
        other.load_state_dict(pipeline.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_views_added_one_by_one_in_evaluation_equal_all_at_once(method, tmp_path):
    pipeline = tiny_pipeline(write_collection(tmp_path, "train train train val test", num_frames=12), method=method)
    protocol = replace(find_protocol("incremental"), image_size=(16, 16))
    scores = []
    for changes in ({}, dict(context_views=(8,), one_memory=False)):
        evaluator = Evaluator(ScoredNetwork(pipeline.model), pipeline.datamanager, replace(protocol, **changes))
        with torch.no_grad():
            scores.append(evaluator.score(evaluator.scene(pipeline.datamanager.eval_entries[0])))
    one_by_one, at_once = scores
    assert sorted({result.context_views for result in one_by_one}) == list(range(1, 9))
    for result, expected in zip(one_by_one[-len(at_once) :], at_once):
        assert result.image == expected.image and torch.allclose(result.rgb, expected.rgb, atol=1e-5)


def test_nerfstudios_programs_take_an_lvsm_as_any_other_method(tmp_path, collection):
    run_cli(
        "ns-train", "lvsm-decoder-only-tiny", *TINY_NETWORK, "--data", str(collection), "--machine.device-type", "cpu",
        "--vis", "tensorboard", "--max-num-iterations", "2", "--experiment-name", "e", "--timestamp", "run",
        cwd=tmp_path,
    )  # fmt: skip
    load = "--load-config", "outputs/e/lvsm-decoder-only-tiny/run/config.yml"
    run_cli("ns-eval", *load, "--output-path", "result.json", cwd=tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["results"]["num_images"] == 6
    run_cli("ns-render", "dataset", *load, "--output-path", "renders", "--image-format", "png", "--split", "test",
            cwd=tmp_path)  # fmt: skip
    assert len(list((tmp_path / "renders/test/rgb").glob("*.png"))) == 3
