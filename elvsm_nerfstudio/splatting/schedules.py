"""Learning rates: nerfstudio's exponential schedule in Python floats, and rates that are multiplied.

Its own schedule leaves numpy scalars in checkpoints, which torch 2.6 and later refuse to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.schedulers import ExponentialDecayScheduler, ExponentialDecaySchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass
class FloatExponentialDecaySchedulerConfig(ExponentialDecaySchedulerConfig):
    """Exponential decay of the learning rate."""

    _target: type = field(default_factory=lambda: FloatExponentialDecayScheduler)
    """target class to instantiate"""


class FloatExponentialDecayScheduler(ExponentialDecayScheduler):
    """The same rates as nerfstudio's, as Python floats."""

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        schedule = super().get_scheduler(optimizer, lr_init).lr_lambdas[0]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        return LambdaLR(optimizer, lr_lambda=lambda step: float(schedule(step)))


def multiply_rates(optimizers: Optimizers, factors: Mapping[str, float]) -> None:
    """Multiplies the learning rates that a config asks for, schedules included.

    A training that goes on from a checkpoint has them multiplied already: nothing happens then.

    Args:
        factors: by the names of the config's optimizers.
    """
    for name, factor in factors.items():
        rate, schedule = factor * optimizers.config[name]["optimizer"].lr, optimizers.schedulers.get(name)
        share = 1.0
        if schedule is not None:
            schedule.base_lrs = [rate for _ in schedule.base_lrs]
            share = schedule.lr_lambdas[0](schedule.last_epoch)
        for group in optimizers.optimizers[name].param_groups:
            group["initial_lr"], group["lr"] = rate, rate * share
