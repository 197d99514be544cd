"""nerfstudio's exponential schedule in Python floats.

Its own leaves numpy scalars in checkpoints, which torch 2.6 and later refuse to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
