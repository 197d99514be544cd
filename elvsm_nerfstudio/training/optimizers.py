"""AdamW as the paper trains with it, Muon for whoever wants to train faster, and schedules in Python floats.

nerfstudio has neither, no hook to skip a step, and its schedulers leave numpy scalars in checkpoints that torch
2.6 and later refuse to read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from jaxtyping import Bool, Float
from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from elvsm_nerfstudio.training.muon import MuonAndAdamW

FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which torch has AdamW as one fused kernel."""
COUNTS = ("skipped_steps", "nonfinite_steps", "skips_in_a_row")


class Guarded(Optimizer):
    """Clips the global gradient norm of an optimiser, and skips steps whose gradient cannot be trusted.

    A step is skipped, and counted, where the norm is not finite (as after a NaN loss) or above ``skip_norm``. The
    counts are part of the state dict. Stands before the optimiser among a class's bases.

    On a GPU nothing waits for the norm: it is judged and counted there, and the optimiser gets the verdict as
    ``found_inf``, as from a gradient scaler. Only whoever asks for a count or the norm waits.

    Args:
        clip_norm: gradients are scaled down to this global norm.
        skip_norm: norm from which on the step is left out.
        max_skips_in_a_row: so many skipped steps one after another are an error; on a GPU one that is noticed within
            as many steps more.
    """

    found_inf: Optional[Float[Tensor, ""]] = None
    """1 where the optimiser shall leave the step out, 0 where not; None where that is known before it is called."""

    def __init__(self, params, clip_norm: float, skip_norm: float, max_skips_in_a_row: int, **kwargs):
        super().__init__(params, **kwargs)
        self.clip_norm, self.skip_norm, self.max_skips_in_a_row = clip_norm, skip_norm, max_skips_in_a_row
        self._steps = 0
        self.surely_skipped = False
        """Whether the last step was left out, as far as that is known without waiting for a GPU."""
        self._norm = torch.zeros(())
        self._counts = torch.zeros(len(COUNTS), dtype=torch.long)

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self._norm)

    @property
    def counts(self) -> dict[str, int]:
        """``skipped_steps``, for either reason; ``nonfinite_steps``, those whose norm was not finite; and
        ``skips_in_a_row``, up to the last step."""
        return dict(zip(COUNTS, self._counts.tolist()))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state, also where another kind of device or an older version of this class left it.

        Raises:
            ValueError: for a state of Muon in place of AdamW, or the reverse.
        """
        groups, ours = state_dict["param_groups"], self.param_groups
        found, expected = ("momentum" in groups[0], "momentum" in ours[0])
        if found != expected:
            raise ValueError(
                f"--optimizers.network.optimizer.muon {expected}: found the state of a run with {found}; expected the "
                "same. To take that run's weights alone, give --pipeline.model.checkpoint in place of --load-dir"
            )
        groups = [{**group, "fused": own["fused"]} if "fused" in own else group for group, own in zip(groups, ours)]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        self._counts = torch.tensor([state_dict.get("counts", {}).get(name, 0) for name in COUNTS])

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._steps += 1
        skip = self._judge(torch.nn.utils.get_total_norm(gradients))
        if skip.device.type == "cuda":
            self.found_inf = skip.float()
        else:
            self.surely_skipped = bool(skip)
        if self.surely_skipped or (self.found_inf is not None and self._steps % self.max_skips_in_a_row == 0):
            self._check_counts()
        if self.surely_skipped:
            return None
        if gradients:
            clip = (self.clip_norm / (self._norm.double() + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(gradients, clip)
        loss = super().step(closure)
        # Fused kernels do not count as changes; WeightsWatch, by which memories are encoded anew, must see them.
        for group in self.param_groups:
            for p in group["params"]:
                torch.autograd.graph.increment_version(p)
        return loss

    def _judge(self, norm: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether a step with this gradient norm is to be skipped; counts it."""
        finite = norm.isfinite()
        skip = ~finite | (norm > self.skip_norm)
        total, nonfinite, row = self._counts.to(norm.device, non_blocking=True).unbind()
        self._counts = torch.stack([total + skip, nonfinite + ~finite, (row + 1) * skip])
        self._norm = norm
        return skip

    def _check_counts(self) -> None:
        """Raises RuntimeError where too many steps in a row were skipped."""
        skips = self.counts["skips_in_a_row"]
        if skips >= self.max_skips_in_a_row:
            raise RuntimeError(
                f"{skips} steps in a row were skipped: gradient norm {self.gradient_norm}, expected finite and at most "
                f"{self.skip_norm}. Lower the learning rate or look at the data."
            )


class GuardedAdamW(Guarded, torch.optim.AdamW):
    """AdamW, guarded."""


class GuardedMuon(Guarded, MuonAndAdamW):
    """Muon for matrices and AdamW for all else, guarded."""


@dataclass
class AdamWOptimizerConfig(OptimizerConfig):
    """AdamW with weight decay on matrices only, clipping and skipping (paper recipe); or Muon in its place."""

    _target: type = GuardedAdamW
    lr: float = 4e-4
    """Learning rate at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors (norm gains) have none."""
    muon: bool = False
    """Trains matrices with Muon (training/muon.py) and the rest with AdamW: the same quality in fewer steps, each of
    which takes a little longer (docs/experiments.md). Wants two to four times AdamW's learning rate."""
    momentum: float = 0.95
    """Momentum of Muon; AdamW has none."""
    max_norm: Annotated[Optional[float], tyro.conf.Suppress] = None
    """nerfstudio's own clipping stays off: it would hide what skip_norm looks at."""
    clip_norm: float = 5.0
    """Global gradient norm to which gradients are clipped."""
    skip_norm: float = 50.0
    """A step whose gradient norm is above this, or not finite, is skipped and counted."""
    max_skips_in_a_row: int = 50
    """Skipped steps in a row after which training stops with an error."""

    def setup(self, params) -> GuardedAdamW | GuardedMuon:
        params = list(params)
        common = {
            "lr": self.lr,
            "eps": self.eps,
            "betas": self.betas,
            "clip_norm": self.clip_norm,
            "skip_norm": self.skip_norm,
            "max_skips_in_a_row": self.max_skips_in_a_row,
            # On a CPU core half the time of torch's default, and the same bits with any number of threads.
            "fused": all(p.device.type in FUSED_DEVICES for p in params),
        }
        if self.muon:
            return GuardedMuon(params, momentum=self.momentum, weight_decay=self.weight_decay, **common)
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        return GuardedAdamW([group for group in groups if group["params"]], **common)


@dataclass
class WarmupSchedulerConfig(SchedulerConfig):
    """Linear warm-up, then constant (paper) or cosine down to a floor, where it stays."""

    _target: type = field(default_factory=lambda: WarmupScheduler)
    """target class to instantiate"""
    warmup_steps: int = 3000
    """Optimiser steps in which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    max_steps: Optional[int] = None
    """Optimiser step at which the cosine reaches its floor: the run's length in optimiser steps (iterations over the
    accumulated ones) if absent; anything else is refused."""
    final_factor: float = 0.0
    """The cosine's floor, as a fraction of the learning rate."""

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the full one."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        assert self.max_steps is not None  # the trainer has set it
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupScheduler(Scheduler):
    """Builds the torch scheduler of a WarmupSchedulerConfig."""

    config: WarmupSchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        if self.config.decay == "cosine" and self.config.max_steps is None:
            raise ValueError("scheduler: decay 'cosine' needs max-steps, which only this package's trainer fills in")
        config = self.config
        # A plain function: torch stores nothing of it in checkpoints.
        return LambdaLR(optimizer, lr_lambda=lambda step: config.factor(step))
