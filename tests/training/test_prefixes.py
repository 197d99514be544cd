"""One encoding of all context views, targets rendered from prefixes of it."""

from copy import deepcopy

import pytest
import torch
from conftest import make_views, tiny_pipeline
from test_camera_encoding import PROPE
from test_network import SMALL, random_network
from tiny_training import gradients, tiny_trainer

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.model import EfficientLVSMModelConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig
from elvsm_nerfstudio.training.prefixes import Prefixes
from elvsm_nerfstudio.views import ViewSet

LENGTHS = (2, 4, 1, 2, 3)


def one_by_one(network, context, target, frame, lengths) -> torch.Tensor:
    """Each target from an encoding of its own views alone."""
    images = [
        network(context.select(slice(0, length)), target.select([index]), frame) for index, length in enumerate(lengths)
    ]
    return torch.cat(images, dim=1)


def outputs_and_gradients(network, render) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    rgb = render()
    weights = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(0))
    (rgb * weights).sum().backward()
    return rgb.detach(), {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("config", [SMALL, PROPE], ids=["plain", "prope"])
def test_each_target_is_rendered_as_from_its_own_prefix_alone(config, checkpointing):
    # In fp64, as the sums are in another order, which some processors round by more than the bound in fp32.
    network = random_network(config).double()
    for tokenizer in (network.context_tokenizer, network.target_tokenizer):
        tokenizer.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    network.gradient_checkpointing = checkpointing
    context, target = make_views(2, 4, 16, 24), make_views(2, 5, 24, 16, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    rgb, found = outputs_and_gradients(network, lambda: network(context, target, frame, LENGTHS))
    expected, wanted = outputs_and_gradients(network, lambda: one_by_one(network, context, target, frame, LENGTHS))
    assert torch.allclose(rgb, expected, atol=1e-5)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(found[name], gradient, atol=1e-5 * gradient.abs().max().item()), name
    whole = network(context, target, frame).detach()
    from_all = torch.tensor([length == 4 for length in LENGTHS])
    assert torch.allclose(rgb[:, from_all], whole[:, from_all], atol=1e-5)
    assert ((rgb - whole).abs().amax(dim=(0, 2, 3, 4))[~from_all] > 1e-2).all()


def test_bf16_is_as_from_the_prefix_alone_up_to_rounding():
    network = random_network(PROPE)
    network.autocast_dtype = torch.bfloat16
    context, target = make_views(1, 4, 16, 16), make_views(1, 5, 16, 16, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    rgb, found = outputs_and_gradients(network, lambda: network(context, target, frame, LENGTHS))
    expected, wanted = outputs_and_gradients(network, lambda: one_by_one(network, context, target, frame, LENGTHS))
    assert (rgb - expected).abs().max() < 0.02
    for name, gradient in wanted.items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_a_single_context_view_has_one_prefix():
    network = random_network(PROPE)
    context, target = make_views(2, 1, 16, 16), make_views(2, 3, 16, 16, seed=1)
    prefixes = Prefixes.draw(1, 3, torch.Generator().manual_seed(0))
    assert prefixes == Prefixes(order=(0,), lengths=(1, 1, 1))
    assert torch.equal(network(context, target, prefixes=prefixes.lengths), network(context, target))


def test_without_gradients_it_is_the_same():
    network = random_network(SMALL)
    network.chunk_tokens = 1  # a view at a time
    context, target = make_views(2, 4, 16, 16), make_views(2, 5, 16, 16, seed=1)
    expected = network(context, target, prefixes=LENGTHS)
    with torch.no_grad():
        assert torch.allclose(network(context, target, prefixes=LENGTHS), expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 2), (1, 0, 2), (1, 5, 2)], ids=["too few", "none", "too many views"])
def test_prefixes_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"prefixes \[1.*expected one of 1 to 4 context views for each of 3 targets"):
        random_network()(make_views(1, 4, 16, 16), make_views(1, 3, 16, 16), prefixes=lengths)


def test_lengths_are_uniform_and_orders_are_all_there():
    generator = torch.Generator().manual_seed(0)
    drawn = [Prefixes.draw(4, 3, generator) for _ in range(2000)]
    for target in range(3):
        counts = torch.bincount(torch.tensor([prefixes.lengths[target] for prefixes in drawn]), minlength=5)
        assert counts[0] == 0 and (counts[1:] - 500).abs().max() < 80  # about four standard deviations
    assert {prefixes.order[0] for prefixes in drawn} == {0, 1, 2, 3}
    assert all(sorted(prefixes.order) == [0, 1, 2, 3] for prefixes in drawn)
    assert any(len(set(prefixes.lengths)) > 1 for prefixes in drawn)


def test_the_frame_is_that_of_the_first_targets_prefix():
    views = ViewSet(make_views(1, 4, 16, 16), make_views(1, 3, 16, 16, seed=1))
    prefixes = Prefixes(order=(2, 0, 3, 1), lengths=(2, 4, 1))
    ordered = prefixes.ordered(views)
    assert torch.equal(ordered.context.rgb, views.context.rgb[:, [2, 0, 3, 1]])
    assert torch.equal(prefixes.of_frame(ordered).context.rgb, views.context.rgb[:, [2, 0]])
    assert torch.equal(ordered.target.rgb, views.target.rgb)


def test_the_model_trains_on_prefixes_and_evaluates_on_all_views(collection):
    pipeline = tiny_pipeline(collection, "val", num_context_views=4, num_target_views=3)
    model = pipeline.model
    model.config.prefix_loss = True
    views, _ = pipeline.datamanager.next_train(5)
    evaluated = model(views)["rgb"]
    assert torch.equal(evaluated, model.network(views.context, views.target))
    pipeline.train()
    model.generator = pipeline.datamanager.generator(5)
    trained = model(views)["rgb"]
    prefixes = Prefixes.draw(4, 3, pipeline.datamanager.generator(5))
    assert set(prefixes.lengths) != {4}
    context = views.context.select(prefixes.order)
    frame = CanonicalFrame.estimate(context.camera_to_world[:, : prefixes.lengths[0]])
    expected = one_by_one(model.network, context, views.target, frame, prefixes.lengths)
    assert torch.allclose(trained, expected, atol=1e-5)
    assert (trained - evaluated).abs().max() > 1e-2


def test_draws_follow_seed_rank_and_step(collection):
    datamanager = tiny_pipeline(collection, "val").datamanager
    first = [Prefixes.draw(8, 6, datamanager.generator(step)) for step in range(4)]
    assert first == [Prefixes.draw(8, 6, datamanager.generator(step)) for step in range(4)]
    assert len(set(first)) == 4
    datamanager.world_size, datamanager.local_rank = 2, 1
    assert Prefixes.draw(8, 6, datamanager.generator(0)) == first[1]  # ranks 0 and 1 share out what one would take
    datamanager.config.seed += 1
    assert Prefixes.draw(8, 6, datamanager.generator(0)) not in first


def test_a_resumed_run_draws_the_same(tmp_path, collection):
    """Gradients of the third step, whether two others went before in the same process or not."""
    trainer = tiny_trainer(tmp_path / "a", collection)
    trainer.pipeline.model.config.prefix_loss = True
    state = deepcopy(trainer.pipeline.model.network.state_dict())
    for step in range(3):
        trainer.pipeline.model.network.load_state_dict(state)
        trainer.optimizers.zero_grad_all()
        _, losses, _ = trainer.pipeline.get_train_loss_dict(step)
    losses["mse"].backward()
    expected = gradients(trainer)
    other = tiny_trainer(tmp_path / "b", collection)
    other.pipeline.model.config.prefix_loss = True
    other.pipeline.model.network.load_state_dict(state)
    torch.manual_seed(99)
    other.pipeline.get_train_loss_dict(2)[1]["mse"].backward()
    for name, gradient in gradients(other).items():
        assert torch.equal(gradient, expected[name]), name


def test_networks_without_prefixes_are_refused(collection):
    network = LVSMDecoderOnlyConfig(width=32, num_layers=2, head_dim=16).build()
    with pytest.raises(ValueError, match="LVSMDecoderOnly goes through all context again for every target"):
        network(make_views(1, 2, 16, 16), make_views(1, 2, 16, 16), prefixes=(1, 2))
    pipeline = tiny_pipeline(collection, "val", method="lvsm_decoder_only_tiny")
    config = deepcopy(pipeline.config.model)
    config.prefix_loss = True
    with pytest.raises(ValueError, match=r"--pipeline.model.prefix-loss True: found LVSMDecoderOnly \(width 32"):
        config.setup(scene_box=None, num_train_data=1)


def test_runs_from_before_these_options_go_on_without_them():
    old = EfficientLVSMModelConfig.__new__(EfficientLVSMModelConfig)
    younger = ("prefix_loss", "psnr_loss")
    state = {name: value for name, value in vars(EfficientLVSMModelConfig()).items() if name not in younger}
    old.__setstate__(state)
    assert not any(vars(old)[name] for name in younger)
