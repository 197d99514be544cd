"""Telling one set of weights from another: cheaply within a process, by content across files."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


class WeightsWatch:
    """Hands out a token that stays the same object for as long as a module's weights do.

    It looks at which tensors the parameters are, their dtypes and PyTorch's own count of changes, not at their
    values: 0.1 ms for 200 parameters, nothing to wait for on a GPU. Like autograd it does not see what is written
    through ``parameter.data``. A copied module gets a token of its own.
    """

    def __init__(self) -> None:
        self._seen: tuple[list[tuple], object] = ([], object())

    def token(self, module: nn.Module) -> object:
        found = [(p, p._version, p.dtype) for p in _parameters(module)]
        seen, token = self._seen
        same = len(found) == len(seen) and all(
            p is q and version == old_version and dtype == old_dtype
            for (p, version, dtype), (q, old_version, old_dtype) in zip(found, seen)
        )
        if not same:
            token = object()
            self._seen = (found, token)  # one statement: another thread sees both or neither
        return token


def fingerprint(module: nn.Module, *settings: object) -> str:
    """A hash of a module's weights and of whatever else decides what it computes; the same on every device.

    It reads all weights: about half a second for 200 million parameters.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    # A fifth of the time of module.parameters(), which also names them and looks for duplicates.
    parameters, modules = [], [module]
    while modules:
        current = modules.pop()
        parameters += current._parameters.values()
        modules += current._modules.values()
    return [parameter for parameter in parameters if parameter is not None]
