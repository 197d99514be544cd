"""Weights rounded once for inference, where autocast would round them in every call."""

from __future__ import annotations

import copy
from typing import Any, Optional, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class RoundedCopy:
    """Keeps a copy of a module with rounded weights for as long as its weights stay as they are.

    It is no part of the module: state dicts, optimisers, and copies of the module do not have it.
    """

    def __init__(self) -> None:
        self._kept: Optional[tuple[tuple[Any, ...], nn.Module]] = None

    def __reduce__(self):
        return RoundedCopy, ()

    def of(self, module: Module, dtype: torch.dtype, weights: object) -> Module:
        """The copy in a dtype.

        Args:
            weights: the same object for as long as the weights are the same.
        """
        made_for = weights, dtype, next(module.parameters()).device
        kept = self._kept
        if kept is None or kept[0] != made_for:
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                kept = made_for, rounded(module, dtype)
            self._kept = kept  # one statement: another thread sees both or neither
        return kept[1]  # pyright: ignore[reportReturnType]

    def forget(self) -> None:
        """Frees the copy."""
        self._kept = None


def rounded(module: Module, dtype: torch.dtype) -> Module:
    """A module that shares everything with another one, hooks too, but the weights that autocast would round.

    These are the fp32 weights of linear layers and, off the CPU, the gains of norms (``kernels.rms_norm``).
    """
    mirror = copy.copy(module)
    mirror._modules = {n: None if part is None else rounded(part, dtype) for n, part in module._modules.items()}
    linear, norm = isinstance(module, nn.Linear), isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    mirror._parameters = {
        name: nn.Parameter(p.to(dtype), requires_grad=False)
        if p is not None and p.dtype == torch.float32 and (linear or norm and p.device.type != "cpu")
        else p
        for name, p in module._parameters.items()
    }
    return mirror
