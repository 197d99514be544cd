import math
from copy import deepcopy

import pytest
import torch

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
    assert optimizer.skipped_steps == 1 and optimizer.skips_in_a_row == 0
    assert optimizer.nonfinite_steps == (0 if math.isfinite(bad) else 1)
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
    assert (resumed.skipped_steps, resumed.nonfinite_steps, older.skipped_steps) == (1, 1, 0)
    assert all(group["fused"] for group in older.param_groups)
    for params, optimizer in ((first, ours), (second, resumed), (third, older)):
        step(optimizer, params, 0.1)
        assert all(torch.equal(mine, other) for mine, other in zip(params, first))
