"""What networks are measured with: times, peak memory, and the matmul rate of the same shapes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WITHOUT_KERNEL = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.detach, aten.lift_fresh),
}
"""Operators that run none on a GPU, though their schemas do not say that they make views."""
MARK_BYTES = 7_777_777
"""Size of an allocation that nothing else makes: where a measurement of memory begins."""


def is_launch(function: Any) -> bool:
    """Whether an operator of aten runs a kernel on a GPU: not if it makes a view, or memory without values."""
    returns = function._schema.returns
    if not any("Tensor" in str(x.type) for x in returns):
        return False
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
    return not is_view and function.overloadpacket not in WITHOUT_KERNEL


@contextmanager
def on_meta() -> Iterator[None]:
    """Lets networks run on the meta device, without gradients: torch.autocast refuses it, and there is no precision to
    choose where nothing is computed."""
    with torch.no_grad(), mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()):
        yield


def peak_bytes(device: torch.device, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> int:
    """The most bytes that a run has allocated at any time, on top of what ``prepare`` left.

    From PyTorch's allocators themselves, buffers inside of kernels included: on CUDA its own statistics, on a CPU
    every allocation and release as the profiler records them. Not seen: scratch space of MKL and oneDNN.
    """
    gc.collect()
    if device.type == "cuda":
        state = prepare()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(state)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = prepare()
        torch.empty(MARK_BYTES, dtype=torch.uint8)
        run(state)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = start = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        if event.nbytes() == -MARK_BYTES:
            start = peak = live
        peak = max(peak, live)
    return peak - start


@dataclass(frozen=True)
class Gemm:
    """A matrix product, or a batch of them: shapes and strides of both operands."""

    shapes: tuple[torch.Size, torch.Size]
    strides: tuple[tuple[int, ...], tuple[int, ...]]


class _GemmRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.gemms: list[Gemm] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (aten.mm.default, aten.bmm.default):
            a, b = args
            self.gemms.append(Gemm((a.shape, b.shape), (a.stride(), b.stride())))
        return function(*args, **(kwargs or {}))


def recorded_gemms(run: Callable[[], Any]) -> list[Gemm]:
    """All matrix products of a run on the meta device, in order; attention is its two."""
    with _GemmRecorder() as recorder:
        run()
    return recorder.gemms


class GemmReplay:
    """The matrix products of a run and nothing else: the rate that the machine reaches at these very shapes.

    Equal products share their operands, and results go where earlier ones were: no time goes into allocation.
    """

    def __init__(self, gemms: list[Gemm], device: torch.device, dtype: torch.dtype):
        self._operands: dict[Gemm, tuple[Tensor, Tensor, Tensor]] = {}
        for gemm in set(gemms):
            a, b = (
                torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
                for shape, stride in zip(gemm.shapes, gemm.strides)
            )
            self._operands[gemm] = (a, b, torch.matmul(a, b))
        self._gemms = gemms

    def __call__(self) -> None:
        for gemm in self._gemms:
            a, b, out = self._operands[gemm]
            torch.matmul(a, b, out=out)
