"""Blocks that torch.compile makes one graph of, and frames that are captured: the same results, few graphs, and a way
back where it fails."""

import gc
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from conftest import make_views
from test_network import random_network

from elvsm_nerfstudio.model import EfficientLVSMModelConfig
from elvsm_nerfstudio.nn.compiled import CapturedFrames, Compiler
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMEncoderDecoderConfig
from elvsm_nerfstudio.training.ema import WeightAverage
from elvsm_nerfstudio.viewer.attention_maps import decode_with_attention
from elvsm_nerfstudio.views import ViewSet

SIZES = dict(width=32, num_layers=2, head_dim=16)
PLAIN = EfficientLVSMConfig(**SIZES)
PROPE = EfficientLVSMConfig(**SIZES, camera_encoding="prope", ray_frame="camera")
LVSM = LVSMEncoderDecoderConfig(**SIZES, num_latents=5)


class Graphs(list):
    """A back end that keeps graphs and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def without_code_of_other_tests():
    torch._dynamo.reset()


def results(network, context, target) -> list[torch.Tensor]:
    """What the network renders, and gradients."""
    network.zero_grad()
    rgb = network(context, target)
    rgb.square().mean().backward()
    return [rgb.detach(), *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize(
    "config, dtype, checkpointing, backend",
    [
        (PLAIN, None, True, "aot_eager"),
        (PROPE, torch.bfloat16, True, "eager"),
        pytest.param(LVSM, None, False, "eager", marks=pytest.mark.slow),
        pytest.param(PROPE, None, False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(PLAIN, torch.bfloat16, False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(PLAIN, None, False, "inductor", marks=pytest.mark.slow),
        pytest.param(PROPE, torch.bfloat16, True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_render_and_learn_as_they_are(config, dtype, checkpointing, backend):
    torch.manual_seed(0)
    network = config.build()
    network.gradient_checkpointing = checkpointing
    views = make_views(2, 3, 16, 24), make_views(2, 2, 16, 24, seed=1)
    exact = results(network, *views)
    network.autocast_dtype = dtype
    names, expected, token = list(network.state_dict()), results(network, *views), network.weights_token()
    network.compiler = Compiler(required=True, backend=backend)
    found = results(network, *views)
    assert list(network.state_dict()) == names and network.weights_token() is token
    assert (found[0] - expected[0]).norm() <= (1e-5 if dtype is None else 2e-2) * expected[0].norm()
    for mine, theirs, true in zip(found, expected, exact):
        # In bf16 both round, each in places of its own: compiled code may be twice as far from fp32 as eager code is.
        bound = 1e-5 * theirs.norm() if dtype is None else 2 * (theirs - true).norm()
        assert (mine - true).norm() <= bound


@pytest.mark.parametrize("config, gradients", [(PROPE, True), (PLAIN, False)])
def test_two_graphs_of_each_call_are_enough_for_one_to_six_context_views(config, gradients):
    network, graphs = random_network(config), Graphs()
    network.compiler = Compiler(required=True, backend=graphs)
    with torch.set_grad_enabled(gradients):
        for number in (2, 1, 3, 4, 5, 6):
            network(make_views(1, number, 16, 24), make_views(1, 2, 16, 24, seed=1))
    assert len(graphs) <= 2 * 3  # all layers share those of encoder, decoder, and keys and values


@torch.no_grad()
def test_frames_of_any_size_from_any_memory_are_few_graphs():
    network, graphs = random_network(PROPE), Graphs()
    first, second = make_views(1, 3, 16, 24), make_views(1, 2, 16, 24, seed=2)
    targets = [make_views(1, 1, *size, seed=1) for size in ((16, 24), (24, 32), (32, 24))]

    def renders() -> list[torch.Tensor]:
        memory = network.encode(first)
        grown = network.append(memory, second)
        return [network.decode(m, t) for m in (memory, grown, grown.drop([1]), grown.select([4])) for t in targets]

    expected = renders()
    network.compiler = Compiler(required=True, backend=graphs)
    for mine, theirs in zip(renders(), expected):
        assert (mine - theirs).abs().max() < 1e-5
    assert len(graphs) == 4  # encoder, keys and values, and the decoder with those in a piece of the store or gathered


def test_without_a_compiler_that_works_blocks_run_as_they_are():
    def broken(graph, inputs):
        raise OSError("no compiler here")

    network = random_network(PLAIN)
    views = make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)
    expected = results(network, *views)
    network.compiler = Compiler(required=False, backend=broken)
    with pytest.warns(UserWarning, match="are not compiled.*no compiler here") as said:
        found = results(network, *views)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else nullcontext():
        results(network, *views)
    network.compiler = Compiler(required=True, backend=broken)
    with pytest.raises(RuntimeError, match="no compiler here"):
        results(network, *views)


@torch.no_grad()
def test_errors_of_a_computation_are_not_the_compilers():
    network, graphs = random_network(PLAIN), Graphs()
    network.compiler = Compiler(backend=graphs)

    def interrupt(module, inputs):
        raise ValueError("another frame")

    hook = network.target_blocks[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(ValueError, match="another frame"):
        network(make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1))
    hook.remove()
    assert network.compiler.failure is None


@torch.no_grad()
def test_hooks_are_called_and_copies_have_their_own_weights():
    network, graphs = random_network(PLAIN), Graphs()
    context, target = make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)
    expected, attention = decode_with_attention(network, network.encode(context), target)
    network.compiler = Compiler(required=True, backend=graphs)
    seen = []
    network.target_blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    network.target_blocks[1].mlp[2].register_forward_hook(lambda *_: seen.append("part"))
    assert torch.equal(network(context, target), expected) and sorted(seen) == ["block", "part"]
    found = decode_with_attention(network, network.encode(context), target)
    assert torch.equal(found[0], expected) and torch.equal(found[1], attention)
    copy = deepcopy(network)
    for parameter in copy.parameters():
        parameter.mul_(1.1)
    assert (copy(context, target) - expected).abs().max() > 1e-4
    assert torch.equal(network(context, target), expected) and graphs


def test_prefixes_are_no_graphs():
    network, graphs = random_network(PLAIN), Graphs()
    views = make_views(1, 3, 16, 24), make_views(1, 3, 16, 24, seed=1)
    expected = network(*views, prefixes=[1, 3, 2])
    network.compiler = Compiler(required=True, backend=graphs)
    for prefixes in ([2, 2, 1], [3, 3, 3], [1, 2, 3], [1, 3, 2]):
        found = network(*views, prefixes=prefixes)
    assert torch.equal(found, expected) and len(graphs) == 2  # of the encoder


def test_a_models_option_is_for_all_its_networks():
    def model(compile: bool | None):
        config = EfficientLVSMModelConfig(network=PLAIN, compile=compile)
        return config.setup(scene_box=None, num_train_data=1).to("cpu")

    assert model(None).network.compiler is model(False).network.compiler is None
    compiled = model(True)
    compiler = compiled.network.compiler
    assert compiler.required and WeightAverage(compiled.network, 0.5).network.compiler is compiler


def test_after_warming_up_frames_are_not_compiled():
    model = EfficientLVSMModelConfig(network=PLAIN).setup(scene_box=None, num_train_data=1).to("cpu").eval()
    graphs = Graphs()
    model.network.compiler = Compiler(required=True, backend=graphs)
    model.set_context(ViewSet(make_views(1, 2, 16, 24), make_views(1, 1, 16, 24)))
    model.warm_up()
    number = len(graphs)
    model.edit_context(make_views(1, 3, 16, 24, seed=1), [5, 6, 7], drop=[1])
    with torch.no_grad():
        model.rendering_network.decode(model.memory(), make_views(1, 1, 32, 40, seed=3))
    assert number == len(graphs) > 0


def test_nothing_of_the_compiler_is_imported_before_it_is_used():
    code = "import sys, elvsm_nerfstudio.nn.weights; print([n for n in sys.modules if n.startswith('torch._dynamo')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    without = "import sys, torch; print([n for n in sys.modules if n.startswith('torch._dynamo')])"
    assert found == subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=True).stdout


# CUDA graphs of frames


class Captures(list):
    """Captures by keeping what was run, which is run again where a graph would be replayed."""

    def __call__(self, run):
        self.append(run)
        result = run()
        return lambda: result.copy_(run()), result


def capturing(config) -> tuple:
    network, captures = (config.build() if config is LVSM else random_network(config)), Captures()
    network.captured_frames = CapturedFrames(captures)
    return network, captures


@pytest.mark.parametrize("config", [PLAIN, PROPE, LVSM])
@torch.no_grad()
def test_captured_frames_are_of_their_own_cameras(config):
    network, captures = capturing(config)
    memory = network.encode(make_views(1, 3, 16, 24))
    targets = [make_views(1, 1, 16, 24, seed=seed) for seed in range(1, 6)]
    expected = [network._decode(memory, target) for target in targets]
    found = [network.decode(memory, target) for target in targets]
    assert all(map(torch.equal, found, expected)) and len(captures) == 1
    assert not torch.equal(found[2], found[3])


@torch.no_grad()
def test_a_graph_is_of_one_memory_and_one_shape_of_targets():
    network, captures = capturing(PROPE)
    network.captured_frames = CapturedFrames(captures, limit=2)
    memory = network.encode(make_views(1, 3, 16, 24))

    def number_after(memory, *shape: int) -> int:
        for seed in (1, 2, 3):
            target = make_views(1, *shape, seed=seed)
            assert torch.equal(network.decode(memory, target), network._decode(memory, target))
        return len(captures)

    first, wider, several = (1, 16, 24), (1, 16, 32), (2, 16, 24)
    assert number_after(memory, *first) == 1 and number_after(memory, *wider) == 2
    assert number_after(memory, *first) == 2 and number_after(memory.select(memory.ids), *first) == 2
    fewer, more = memory.drop([1]), network.append(memory, make_views(1, 1, 16, 24, seed=7))
    assert number_after(fewer, *first) == 3 and number_after(more, *first) == 4
    assert number_after(memory, *wider) == 4
    assert number_after(memory, *several) == 5, "in place of the first shape, as there are two at most"
    assert number_after(memory, *first) == 6


@torch.no_grad()
def test_other_weights_are_other_graphs():
    network, captures = capturing(PLAIN)
    context, target = make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)

    def frames(dtype) -> list[torch.Tensor]:
        network.autocast_dtype = dtype
        memory = network.encode(context)
        return [network.decode(memory, target) for _ in range(3)]

    before = [frames(None), frames(torch.bfloat16)]
    old = network.encode(context)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        network.decode(old, target)
    after = [frames(None), frames(torch.bfloat16)]
    assert len(captures) == 4
    for found in (*before, *after):
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len({float(found[0].mean()) for found in (*before, *after)}) == 4
    assert (deepcopy(network).captured_frames is not network.captured_frames) and len(captures) == 4


@torch.no_grad()
def test_graphs_go_with_their_memory():
    network, replays = random_network(PLAIN), []

    def capture(run):
        result = run()

        def replay():  # as a graph does, it holds no tensors
            pass

        replays.append(weakref.ref(replay))
        return replay, result

    network.captured_frames = CapturedFrames(capture)
    memory, target = network.encode(make_views(1, 2, 16, 24)), make_views(1, 1, 16, 24, seed=1)
    network.decode(memory, target)
    network.decode(memory, target)
    assert len(replays) == 1 and replays[0]() is not None
    del memory
    gc.collect()
    assert replays[0]() is None


def test_frames_that_cannot_be_captured_are_rendered_as_they_are():
    network, tried = random_network(PLAIN), []

    def broken(run):
        tried.append(run)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\n\nmore of it")

    network.captured_frames = CapturedFrames(broken)
    context, target = make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)
    with torch.no_grad():
        memory = network.encode(context)
        expected = network._decode(memory, target)
        network.decode(memory, target)
        with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted") as said:
            assert torch.equal(network.decode(memory, target), expected)
        assert len(said) == 1 and "\n" not in str(said[0].message)
        with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else nullcontext():
            assert torch.equal(network.decode(memory, target), expected)
    assert len(tried) == 1


def test_gradients_and_nearest_views_are_not_captured():
    network, captures = capturing(PLAIN)
    context, target = make_views(1, 3, 16, 24), make_views(1, 1, 16, 24, seed=1)
    for _ in range(3):
        network(context, target).mean().backward()
    with torch.no_grad():
        memory = network.encode(context)
        for _ in range(3):
            network.decode(memory, target, nearest_views=2)
    assert not captures


def test_frames_captured_in_inference_mode_are_replayed_outside_of_it():
    network, captures = capturing(PROPE)
    context, targets = make_views(1, 2, 16, 24), [make_views(1, 1, 16, 24, seed=seed) for seed in (1, 2)]
    with torch.inference_mode():
        memory = network.encode(context)
        for _ in range(2):
            network.decode(memory, targets[0])
    with torch.no_grad():
        assert torch.equal(network.decode(memory, targets[1]), network._decode(memory, targets[1]))
    assert len(captures) == 1
