"""A CUDA device that is not there: its tensors lie on the CPU, and meet CPU tensors only where CUDA lets them.

A CPU tensor mixed into work on a GPU is an error that no machine without a GPU shows. Here tensors of ``cuda:0`` wrap
CPU tensors: every operation is computed on those, with real values, and refuses what CUDA refuses. What is above it
(modules, autograd's graph, autocast) takes the tensors for CUDA's.

Not noticed: kernels that CUDA lacks, how it rounds, streams, pinned memory, and whatever goes by without torch's
dispatcher (``data_ptr()``). A number on the CPU, a tensor of no dimensions, passes in all pointwise operations, though
a few take it only in some of their places. Only the thread that pretends can make tensors on the device. Gradients are
those of ``backward()`` alone: their hooks are not called, and what a graph has saved stays until the graph is gone.
There are no generators of random numbers on the device, and no compiler for it: what is compiled runs as it is.

Runs with torch 2.12 and 2.14 as pip brings them; not where torch was built without CUDA (``+cpu``): autograd asks for
the guard of the device's kind, which such a build lacks ("PyTorch is not linked with support for cuda devices").
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Optional
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scripts.benchmarks.measurements import is_launch

CUDA = torch.device("cuda:0")

without_a_gpu = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(),
    reason="a torch built without CUDA takes no gradients there; on a true device there is test_gpu.py",
)

aten = torch.ops.aten
ACROSS = {aten._to_copy, aten.copy_, aten._foreach_copy_}
"""Operations that take tensors of any devices."""
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Their indices may lie on the CPU, whatever is indexed."""
WITH_NUMBERS = INDEXING | {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
"""Beside pointwise operations, those that take numbers on the CPU."""


WAITS = {
    *(aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2),
    *(aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.histc, aten.repeat_interleave),
    *(aten.linalg_inv, aten.linalg_solve, aten.linalg_cholesky, aten.linalg_eigh, aten._linalg_check_errors),
}
"""Operations for which CUDA waits, as the size of a result or whether there is one depends on numbers."""

_waits: list[list[str]] = []
"""Where waits are noted at present."""


@contextmanager
def waits() -> Iterator[list[str]]:
    """Lists what within the block waits for the device: the operation, and the line of the code that asked for it.

    Waits are what gives numbers to the CPU, what makes tensors of sizes that numbers decide, and copies to the device
    that are not ``non_blocking``, as those of ``new_tensor`` and of indices on the CPU.
    """
    found: list[str] = []
    _waits.append(found)
    try:
        yield found
    finally:
        _waits.remove(found)


_launches: list[list[tuple[str, Tensor]]] = []
"""Where launches are noted at present."""


@contextmanager
def launches() -> Iterator[list[tuple[str, Tensor]]]:
    """Lists what within the block is launched on the device: operations, views apart, and their first tensors."""
    found: list[tuple[str, Tensor]] = []
    _launches.append(found)
    try:
        yield found
    finally:
        _launches.remove(found)


def _note_launch(func, tensors: Sequence[Tensor]) -> None:
    if is_launch(func) and any(isinstance(x, PretendedTensor) for x in tensors):
        for found in _launches:
            found.append((str(func.overloadpacket), tensors[0]))


def _note_wait(operation: object) -> None:
    if _waits:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        for found in _waits:
            found.append(f"{operation}: {frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")


def _waiting(func, args, kwargs, tensors: Sequence[Tensor]) -> bool:
    """Whether CUDA waits in an operation."""
    operation, here = func.overloadpacket, [isinstance(x, PretendedTensor) for x in tensors]
    if operation is aten._to_copy:
        there = (kwargs.get("device") or args[0].device).type == "cuda"
        return not there if here[0] else there and not kwargs.get("non_blocking")
    if operation in (aten.copy_, aten._foreach_copy_):
        return any(here) and not all(here) and not any(args[2:]) and not kwargs.get("non_blocking")
    if operation in INDEXING:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        return here[0] and any(not isinstance(x, PretendedTensor) or x.dtype == torch.bool for x in indices)
    return operation in WAITS and any(here)


class PretendedTensor(Tensor):
    """Says that it is on ``cuda:0``; ``held`` is the CPU tensor that it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, held.shape, **layout, dtype=held.dtype, device=CUDA)
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What goes by without the dispatcher.

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PretendedTensor({self.held})"

    def tolist(self):
        _note_wait("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        _note_wait("numpy")
        return self.held.numpy(force=True)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol):  # a file of it is loaded onto the CPU
        return self.held.__reduce_ex__(protocol)


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """``cuda`` is a device within the block, an H100 by name, with bf16 and a gigabyte of free memory."""
    stand_ins = {
        "torch.autograd.backward": _backward,
        # Parameters of a module that is moved stay the same objects, as they do on the way to a true device.
        "torch.nn.modules.module.is_traceable_wrapper_subclass": lambda parameter: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.compile": lambda function, **options: function,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_device_name": lambda device=None: "a pretended H100",
        "torch.cuda.synchronize": lambda device=None: None,
        "torch.cuda.memory_reserved": lambda device=None: 0,
        "torch.cuda.memory_allocated": lambda device=None: 0,
        "torch.cuda.mem_get_info": lambda device=None: (2**30, 2**30),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()  # one that does not look for a driver
        # torch.tensor(..., device="cuda") makes a CPU tensor and moves it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Device())
        yield CUDA


class _Device(TorchDispatchMode):
    """Catches what makes tensors on the device."""

    def __init__(self) -> None:
        super().__init__()
        # With a mode of this kind torch leaves CUDA alone, as for its own fake tensors.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operation goes through what would keep the compiler out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if not types and not kwargs.get("device"):
            return func(*args, **kwargs)  # of the CPU alone
        return _run(func, args, kwargs)


def _run(func, args, kwargs):
    """An operation on the tensors held; its results are where CUDA would have them."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    device = kwargs.get("device")
    on_cuda = device.type == "cuda" if device else any(isinstance(x, PretendedTensor) for x in tensors)
    _check_devices(func, args, kwargs, tensors)
    _note_launch(func, tensors)
    if _waits and _waiting(func, args, kwargs, tensors):
        _note_wait(func)
    if on_cuda and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if func.overloadpacket is aten._fused_sdp_choice:
        return 0  # attention of plain operations: the CPU's kernel for it is not CUDA's
    if device and on_cuda:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(_held, args), tree_map(_held, kwargs)
    try:
        results = func(*held_args, **held_kwargs)
    except NotImplementedError:  # by a kernel that CUDA has and a CPU has not
        results = decomposition_table[func](*held_args, **held_kwargs)
    if not on_cuda:
        return results
    given = {id(_held(x)): x for x in tensors}  # what is written to comes back as it is

    def wrapped(x):
        return PretendedTensor(x) if isinstance(x, Tensor) and id(x) not in given else given.get(id(x), x)

    return tree_map(wrapped, results)


def _held(x):
    return x.held if isinstance(x, PretendedTensor) else x


def _check_devices(func, args, kwargs, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError where tensors of both devices meet that CUDA does not let meet.

    Also for copies to the CPU that CUDA would hand out before they are there.
    """
    operation = func.overloadpacket
    others = [x for x in tensors if not isinstance(x, PretendedTensor)]
    if operation is aten._to_copy and not others and kwargs.get("non_blocking"):
        if (kwargs.get("device") or CUDA).type == "cpu":
            raise RuntimeError("a copy from cuda:0 to the CPU that nobody waits for")
    if len(others) in (0, len(tensors)) or operation in ACROSS:
        return
    if operation in INDEXING and isinstance(args[0], PretendedTensor):
        indices = {id(index) for index in tree_leaves(args[1])}
        others = [x for x in others if id(x) not in indices]
    numbers = torch.Tag.pointwise in func.tags or operation in WITH_NUMBERS or "_foreach_" in str(func)
    written = [x for x, of in zip(args, func._schema.arguments) if of.alias_info and of.alias_info.is_write]
    written = {id(x) for x in tree_leaves(written)}
    if any(x.ndim or not numbers or id(x) in written for x in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {CUDA} and cpu! ({func})"
        )


# Autograd: its engine would look for CUDA's streams.

_true_backward = torch.autograd.backward


def _backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Optional[Tensor] = None,
    retain_graph: Optional[bool] = None,
    create_graph: bool = False,
    **others: Any,
) -> None:
    """``torch.autograd.backward`` of one tensor: nodes compute, and gradients between them are checked, as there."""
    if not isinstance(tensors, PretendedTensor):
        return _true_backward(tensors, grad_tensors, retain_graph, create_graph, **others)
    if create_graph or any(others.values()):
        raise NotImplementedError(f"pretended CUDA: create_graph {create_graph}, {others}")
    received: dict[Node, dict[int, Tensor]] = {tensors.grad_fn: {}}
    received[tensors.grad_fn][tensors.output_nr] = torch.ones_like(tensors) if grad_tensors is None else grad_tensors
    with torch.no_grad():
        for node in _in_order(tensors.grad_fn):
            for (following, place), gradient in _gradients(node, received.pop(node, {})):
                wanted = following._input_metadata[place]
                if gradient.device != wanted.device:
                    raise RuntimeError(f"{node} returned a gradient on {gradient.device}, expected {wanted.device}")
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                sums = received.setdefault(following, {})
                sums[place] = sums[place] + gradient if place in sums else gradient


def _gradients(node: Node, received: dict[int, Tensor]) -> list[tuple[tuple[Node, int], Tensor]]:
    """What a node makes of what it has received, and the edges along which that goes."""
    if not received:
        return []
    gradients = [received.get(place) for place in range(len(node._input_metadata))]
    edges = node.next_functions
    if not isinstance(node, BackwardCFunction):
        found = node(*gradients)
    else:  # an autograd.Function: it gets zeros in place of nothing, and has an answer for what is no tensor, too
        zeros = (torch.zeros(of.shape, dtype=of.dtype, device=of.device) for of in node._input_metadata)
        found = node.apply(*(zero if gradient is None else gradient for zero, gradient in zip(zeros, gradients)))
        found = found if isinstance(found, tuple) else (found,)
        found = tuple(x for x, needed in zip(found, node.needs_input_grad) if needed)
        edges = [edge for edge in edges if edge[0] is not None]
    found = found if isinstance(found, tuple) else (found,)
    return [(edge, x) for edge, x in zip(edges, found) if edge[0] is not None and x is not None]


def _in_order(root: Node) -> list[Node]:
    """All nodes from the root on, each after those that lead to it."""
    order, seen, path = [], {root}, [(root, iter(root.next_functions))]
    while path:
        node, edges = path[-1]
        following = next((n for n, _ in edges if n is not None and n not in seen), None)
        if following is None:
            order.append(node)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(following.next_functions)))
    return order[::-1]
