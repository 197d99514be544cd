"""Muon (Jordan et al. 2024): steps of momentum whose matrices are made orthogonal, so that all directions count alike.

torch.optim.Muon came with torch 2.9, takes one matrix at a time, and cannot share a parameter group with AdamW, which
vectors still need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from elvsm_nerfstudio.nn.layers import ContextBlock, TargetBlock
from elvsm_nerfstudio.nn.network import autocast_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic, from Jordan et al.: steepest at zero, and then anywhere between about 0.7 and 1.2."""
ITERATIONS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update at a learning rate of 1: that of AdamW's updates, so that one learning rate serves both
(Liu et al. 2025, arXiv 2502.16982)."""


def orthogonalized(matrices: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """U V^T of each matrix U S V^T, roughly: its singular values come out between about 0.7 and 1.2.

    Newton-Schulz iterations in bf16 where the device computes in it, else in fp32.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(autocast_dtype("auto", x.device) or torch.float32)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def mark_hidden(network: nn.Module) -> None:
    """Marks the matrices of all blocks, which lead from hidden features to hidden features. Those at the edges, from
    pixels and to pixels, train worse with Muon than with AdamW (docs/experiments.md). A mark, as nerfstudio hands
    optimisers a bare list of parameters."""
    for block in network.modules():
        if isinstance(block, (ContextBlock, TargetBlock)):
            for parameter in block.parameters():
                parameter.is_hidden_matrix = parameter.ndim == 2  # pyright: ignore[reportAttributeAccessIssue]


class MuonAndAdamW(Optimizer):
    """Muon for hidden matrices, and torch's AdamW for all other parameters, as one optimiser with one schedule.

    Args:
        params: all parameters, hidden matrices marked by ``mark_hidden``.
        lr: of both.
        momentum: of Muon, as Nesterov takes it.
        weight_decay: of matrices; vectors have none.
        betas, eps, fused: of AdamW.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, **adamw: Any):
        params = list(params)
        hidden = [p for p in params if getattr(p, "is_hidden_matrix", False)]
        if not hidden:
            raise ValueError("Muon: found no parameter that mark_hidden has marked; expected those of the blocks")
        edges = [p for p in params if p.ndim >= 2 and not getattr(p, "is_hidden_matrix", False)]
        decayed = {"params": edges, "weight_decay": weight_decay}
        others = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
        self._adamw = torch.optim.AdamW([decayed, others], lr=lr, **adamw)
        muon = {"params": hidden, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([muon, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets AdamW see its groups, and keep its state, here."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        group, by_shape = self.param_groups[0], defaultdict(list)
        # Where a GPU alone knows whether the step is to be left out, it goes on with gradients that leave moments as
        # they are, and with changes of nothing.
        skip = getattr(self, "found_inf", None)
        taken = 1.0 if skip is None else 1 - skip
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for (rows, columns), params in by_shape.items():
            moments = [self._moment(p) for p in params]
            gradients = [p.grad for p in params]
            if skip is not None:
                gradients = [torch.where(skip > 0, m, g) for m, g in zip(moments, gradients)]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            updates = shared_out(torch._foreach_lerp(gradients, moments, group["momentum"]), orthogonalized)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * taken)
            size = group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
            torch._foreach_add_(params, list((updates if skip is None else updates * taken).unbind()), alpha=-size)
        self._adamw.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self._adamw.step()

    def _moment(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def shared_out(
    matrices: Sequence[Float[Tensor, "row column"]],
    function: Callable[[Float[Tensor, "some row column"]], Float[Tensor, "some row column"]],
) -> Float[Tensor, "matrix row column"]:
    """A function of each matrix, where several processes hold the same ones: each computes its share for all."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return function(torch.stack(list(matrices)))
    share, last = -(-len(matrices) // ranks), len(matrices) - 1
    first = dist.get_rank() * share
    mine = function(torch.stack([matrices[min(index, last)] for index in range(first, first + share)])).contiguous()
    gathered = mine.new_empty(ranks * share, *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, mine)
    return gathered[: len(matrices)]
