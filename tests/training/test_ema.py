"""Averaged weights: their arithmetic, and that they are what is rendered, saved and taken up again."""

import pytest
import torch
from conftest import make_views
from tiny_training import no_writers_are_left, tiny_trainer  # noqa: F401

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.weights import read_weights
from elvsm_nerfstudio.training.checkpoints import read_checkpoint
from elvsm_nerfstudio.training.ema import WeightAverage


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_average_is_the_recursion_of_its_docstring():
    torch.manual_seed(0)
    network = EfficientLVSMConfig(width=32, num_layers=1, head_dim=16).build()
    average = WeightAverage(network, decay=0.15)
    expected = weights(network)
    assert all(torch.equal(expected[name], p) for name, p in weights(average.network).items())
    tokens = [average.network.weights_token()]
    for decay in (1 / 10, 0.15, 0.15):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        average.update(network)
        expected = {name: decay * expected[name] + (1 - decay) * p for name, p in weights(network).items()}
        tokens.append(average.network.weights_token())
    for name, p in weights(average.network).items():
        assert torch.allclose(p, expected[name], atol=1e-6), name
    assert average.updates == 3 and len(set(map(id, tokens))) == 4
    assert not any(p.requires_grad for p in average.network.parameters())
    with pytest.raises(ValueError, match="--ema-decay 1.0: expected between 0 and 1"):
        WeightAverage(network, decay=1.0)


def test_averaged_weights_are_rendered_saved_and_resumed(tmp_path, collection):
    options = dict(ema_decay=0.5, max_num_iterations=4)
    trainer = tiny_trainer(tmp_path, collection, **options)
    model = trainer.pipeline.model
    for step in range(2):
        trainer.pipeline.train()
        trainer.train_iteration(step)
        before = weights(trainer.average.network)
    # A step that was skipped is none.
    trainer.optimizers.optimizers["network"].skip_norm = 0.0
    trainer.train_iteration(2)
    assert all(torch.equal(before[name], p) for name, p in weights(trainer.average.network).items())
    assert trainer.average.updates == 2

    trainer.pipeline.eval()
    context, target = make_views(1, 2, 16, 16), make_views(1, 1, 16, 16, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    raw, averaged = model.network(context, target, frame), trainer.average.network(context, target, frame)
    assert (raw - averaged).abs().max() > 1e-5
    memory = model.memory()
    assert memory.weights is trainer.average.network.weights_token()
    trainer.average.update(model.network)
    assert model.memory() is not memory

    trainer.save_checkpoint(2)
    path = trainer.checkpoint_dir / "step-000000002.ckpt"
    exported = read_weights(path).state
    trained = read_checkpoint(path)["average"]["trained"]
    for name, p in weights(model.network).items():
        assert torch.equal(exported[name], trainer.average.network.state_dict()[name])
        assert torch.equal(trained[name], p) and not torch.equal(trained[name], exported[name])

    resumed = tiny_trainer(tmp_path, collection, load_checkpoint=path, **options)
    assert resumed._start_step == 3 and resumed.average.updates == 3
    plain = tiny_trainer(tmp_path, collection, load_checkpoint=path, max_num_iterations=4)
    assert plain.average is None
    for name, p in weights(model.network).items():
        assert torch.equal(resumed.pipeline.model.network.state_dict()[name], p)
        assert torch.equal(plain.pipeline.model.network.state_dict()[name], p)
        assert torch.equal(resumed.average.network.state_dict()[name], exported[name])
    late = tiny_trainer(tmp_path, collection, load_dir=_without_average(plain), **options)
    assert late.average.updates == 0
    assert all(torch.equal(late.average.network.state_dict()[name], p) for name, p in weights(model.network).items())


def _without_average(trainer):
    trainer.save_checkpoint(2)
    return trainer.checkpoint_dir
