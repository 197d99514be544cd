import math
from copy import deepcopy

import pytest
import torch

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.training.muon import mark_hidden, orthogonalized
from elvsm_nerfstudio.training.optimizers import AdamWOptimizerConfig, WarmupSchedulerConfig


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]


def test_equals_torch_adamw_with_decay_on_matrices_only():
    ours, theirs = parameters(), parameters()
    optimizer = AdamWOptimizerConfig(lr=0.1).setup(params=ours)
    groups = [{"params": theirs[:1], "weight_decay": 0.05}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.full_like(mine, 0.3 * (step - 1))
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other, atol=1e-7)


def test_gradients_are_clipped_to_a_global_norm():
    params = parameters()
    optimizer = AdamWOptimizerConfig(clip_norm=1.0).setup(params=params)
    params[0].grad, params[1].grad = torch.full((4, 3), 3.0), torch.full((3,), 4.0)
    norm = math.sqrt(12 * 9 + 3 * 16)
    optimizer.step()
    assert optimizer.gradient_norm == pytest.approx(norm)
    assert torch.allclose(params[0].grad, torch.full((4, 3), 3.0 / norm), atol=1e-5)


@pytest.mark.parametrize("muon", [False, True])
def test_a_step_is_a_change_of_weights(muon):
    """Fused AdamW does not count its writes, and a memory encoded before would be taken for a current one."""
    network = EfficientLVSMConfig(width=32, num_layers=1, head_dim=16).build()
    mark_hidden(network)
    optimizer = AdamWOptimizerConfig(muon=muon).setup(params=network.parameters())
    for p in network.parameters():
        p.grad = torch.full_like(p, 0.01)
    before, versions = network.weights_token(), [p._version for p in network.parameters()]
    optimizer.step()
    assert network.weights_token() is not before
    assert all(p._version > version for p, version in zip(network.parameters(), versions))
    after = network.weights_token()
    for p in network.parameters():
        p.grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.counts["skipped_steps"] == 1 and network.weights_token() is after


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e3])
def test_untrustworthy_steps_are_skipped_counted_and_stopped(bad):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamWOptimizerConfig(max_skips_in_a_row=3).setup(params=params)

    def step(value: float) -> None:
        for p in params:
            p.grad = torch.full_like(p, value)
        optimizer.step()

    step(bad)
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and not optimizer.state
    step(0.1)
    nonfinite = 0 if math.isfinite(bad) else 1
    assert optimizer.counts == {"skipped_steps": 1, "nonfinite_steps": nonfinite, "skips_in_a_row": 0}
    assert not torch.equal(params[0], before[0])
    step(bad)
    step(bad)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped: gradient norm"):
        step(bad)


def test_schedule_warms_up_and_stays_or_follows_a_clamped_cosine():
    constant = WarmupSchedulerConfig(warmup_steps=10)
    assert [constant.factor(s) for s in (0, 4, 9, 10, 10**6)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = WarmupSchedulerConfig(warmup_steps=10, decay="cosine", max_steps=110, final_factor=0.1)
    assert cosine.factor(60) == pytest.approx(0.55)
    assert cosine.factor(110) == pytest.approx(0.1) and cosine.factor(500) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="needs max-steps"):
        WarmupSchedulerConfig(decay="cosine").setup().get_scheduler(torch.optim.SGD(parameters(), lr=1.0), 1.0)


def test_schedulers_state_is_read_back_without_pickled_code(tmp_path):
    optimizer = AdamWOptimizerConfig(lr=1e-3).setup(params=parameters())
    scheduler = WarmupSchedulerConfig(warmup_steps=4).setup().get_scheduler(optimizer, 1e-3)
    optimizer.step()
    scheduler.step()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["scheduler"]["_last_lr"] == [5e-4, 5e-4]


def test_state_goes_on_counting_and_reads_what_an_unfused_optimizer_left():
    first, second, third = ([torch.nn.Parameter(p.detach().clone()) for p in parameters()] for _ in range(3))
    ours, resumed, older = (AdamWOptimizerConfig(lr=0.1).setup(params=p) for p in (first, second, third))
    assert all(group["fused"] for group in ours.param_groups)

    def step(optimizer, params, value: float) -> None:
        for p in params:
            p.grad = torch.full_like(p, value)
        optimizer.step()

    for value in (0.3, math.nan, -0.2):
        step(ours, first, value)
    state = deepcopy(ours.state_dict())
    for params, optimizer in ((second, resumed), (third, older)):
        for mine, other in zip(params, first):
            mine.data.copy_(other.data)
        optimizer.load_state_dict(deepcopy(state))
        # As nerfstudio's checkpoints hold it, from before steps were fused and counted.
        state = {
            "state": state["state"],
            "param_groups": [{**group, "fused": None} for group in state["param_groups"]],
        }
    assert resumed.counts == {"skipped_steps": 1, "nonfinite_steps": 1, "skips_in_a_row": 0}
    assert not any(older.counts.values())
    assert all(group["fused"] for group in older.param_groups)
    for params, optimizer in ((first, ours), (second, resumed), (third, older)):
        step(optimizer, params, 0.1)
        assert all(torch.equal(mine, other) for mine, other in zip(params, first))


# Muon


def hidden_and_others() -> tuple[torch.nn.Module, list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """A network, the matrices of its blocks, and all other parameters."""
    torch.manual_seed(0)
    network = EfficientLVSMConfig(width=32, num_layers=1, head_dim=16).build()
    mark_hidden(network)
    named = dict(network.named_parameters())
    hidden = [p for name, p in named.items() if "_blocks." in name and p.ndim == 2]
    assert len(hidden) == 11 and {tuple(p.shape) for p in hidden} >= {(96, 32), (64, 32), (128, 32), (32, 128)}
    return network, hidden, [p for p in named.values() if all(p is not each for each in hidden)]


def test_orthogonalized_matrices_have_singular_values_near_1():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 96, 32), (2, 32, 128)):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        found = left.mT @ orthogonalized(left * torch.logspace(-1, 1, min(shape[1:])) @ right) @ right.mT
        values = found.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.5 and values.max() < 1.3
        assert (found - torch.diag_embed(values)).abs().max() < 0.05
    assert not orthogonalized(torch.zeros(1, 4, 3)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_equals_torchs_beside_adamw():
    (_, mine, my_others), (_, theirs, their_others) = hidden_and_others(), hidden_and_others()
    optimizer = AdamWOptimizerConfig(lr=0.1, muon=True, clip_norm=1e9, skip_norm=1e9).setup([*my_others, *mine])
    muon = torch.optim.Muon(
        theirs, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    decay = [
        {"params": [p for p in their_others if (p.ndim >= 2) == wide], "weight_decay": 0.05 * wide} for wide in (1, 0)
    ]
    adamw = torch.optim.AdamW(decay, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        for pair in zip([*mine, *my_others], [*theirs, *their_others]):
            for p in pair:
                p.grad = torch.randn(pair[0].shape, generator=torch.Generator().manual_seed(step))
        for each in (optimizer, muon, adamw):
            each.step()
    for one, other in zip(my_others, their_others):
        torch.testing.assert_close(one, other)
    for one, other in zip(mine, theirs):
        # torch computes in bf16 anywhere.
        assert (one - other).abs().max() < 0.02 * (4 * 0.1), one.shape


def test_muon_goes_on_from_its_state_and_refuses_adamws():
    first, second = hidden_and_others()[0], hidden_and_others()[0]
    config = AdamWOptimizerConfig(lr=0.1, muon=True, skip_norm=1e9)
    ours, resumed = (config.setup(network.parameters()) for network in (first, second))

    def step(optimizer, network, value: float) -> None:
        for index, p in enumerate(network.parameters()):
            p.grad = value * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        optimizer.step()

    for value in (0.3, math.nan, -0.2):
        step(ours, first, value)
    assert ours.counts["skipped_steps"] == 1
    state = deepcopy(ours.state_dict())
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(state)
    schedule = WarmupSchedulerConfig(warmup_steps=4).setup().get_scheduler(resumed, 0.1)
    assert {group["lr"] for group in resumed.param_groups} == {0.025} and resumed.counts["skipped_steps"] == 1
    for _ in range(3):
        schedule.step()
    for optimizer, network in ((ours, first), (resumed, second)):
        step(optimizer, network, 0.1)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters()))

    plain = AdamWOptimizerConfig().setup(first.parameters())
    with pytest.raises(ValueError, match="muon False: found the state of a run with True"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match="muon True: found the state of a run with False"):
        ours.load_state_dict(plain.state_dict())


def test_muon_wants_marked_matrices():
    with pytest.raises(ValueError, match="no parameter that mark_hidden has marked"):
        AdamWOptimizerConfig(muon=True).setup(parameters())
