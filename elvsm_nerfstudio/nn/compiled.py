"""torch.compile for blocks: what a block does in a call is one graph, which all layers of a network share. And CUDA
graphs of whole frames.

What is compiled is the code of a block's methods. The block itself stays the module that it is, with its names in the
state dict, its hooks and its place in other modules.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elvsm_nerfstudio.nn.camera_encoding import CameraEncoding
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.views import Views

Decode = Callable[[SceneMemory, Views], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a function once for its kernels' sake: what launches them all again, and where its result will then be."""
Method = TypeVar("Method", bound=Callable[..., Any])


class Block(nn.Module):
    """A layer of a network, whose ``compilable`` methods go through its compiler, if it has one."""

    compiler: Optional[Compiler] = None


def compilable(*shapes: str) -> Callable[[Method], Method]:
    """A method of a block that can be compiled.

    Args:
        shapes: of its first inputs, a word for each dimension. ``context`` are sizes that grow with the context views,
            for which a graph holds whatever they are; ``view`` and ``token`` are sizes of targets, for which it does
            without gradients, as frames of all sizes are rendered, while training mostly sees one; others are fixed.
    """
    words = [shape.split() for shape in shapes]
    always = [[place for place, word in enumerate(shape) if word == "context"] for shape in words]
    rendering = [[place for place, word in enumerate(shape) if word in ("context", "view", "token")] for shape in words]

    def wrapped(method: Method) -> Method:
        @functools.wraps(method)
        def call(block: Block, *inputs: Any) -> Any:
            if block.compiler is None or torch.compiler.is_compiling():
                return method(block, *inputs)
            return block.compiler.run(method, block, inputs, always if torch.is_grad_enabled() else rendering)

        return call  # pyright: ignore[reportReturnType]

    return wrapped


class Compiler:
    """Compiles blocks when they are first called.

    What hooks of a block's parts would see is not there in compiled code, so a block that has such hooks runs as it
    is; hooks of the block itself are called. So it does with prefixes, which are others in every step.

    Args:
        required: whether it is an error if a block cannot be compiled. Else a warning gives the reason, and from then
            on all blocks run as they are.
        backend: of torch.compile.
    """

    def __init__(self, required: bool = False, backend: str | Callable[..., Any] = "inductor"):
        self.required, self.backend = required, backend
        self.failure: Optional[str] = None
        """Why blocks run as they are."""
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._tried: set[tuple[Callable[..., Any], bool]] = set()

    def run(self, method: Callable[..., Any], block: Block, inputs: Sequence[Any], varying: list[list[int]]) -> Any:
        """``method(block, *inputs)``, compiled.

        Args:
            varying: of the first inputs the dimensions of which a graph shall not depend on the size.
        """
        if self.failure is not None or _has_hooks(block) or any(isinstance(x, Sequence) for x in inputs):
            return method(block, *inputs)
        if method not in self._compiled:
            self._compiled[method] = torch.compile(method, fullgraph=True, backend=self.backend)
        for x, dimensions in _varying(inputs, varying):
            for dimension in dimensions:
                torch._dynamo.maybe_mark_dynamic(x, dimension)
        call = method, torch.is_grad_enabled()
        try:
            with nullcontext() if call in self._tried else _gradients_compiled_at_once():
                result = self._compiled[method](block, *inputs)
            self._tried.add(call)
            return result
        except Exception as error:
            if self.required or not _of_the_compiler(error):
                raise
            self.failure = _in_a_line(error)
        warnings.warn(f"blocks are not compiled by torch.compile, but run as they are: {self.failure}", stacklevel=2)
        return method(block, *inputs)


def _varying(inputs: Sequence[Any], varying: list[list[int]]) -> Iterator[tuple[Tensor, list[int]]]:
    yield from zip(inputs, varying)
    for encoding in inputs:
        if isinstance(encoding, CameraEncoding):
            yield from ((x, [2]) for x in (encoding.query_matrix, encoding.key_matrix, encoding.output_matrix))
            if not torch.is_grad_enabled():
                yield from ((x, [0]) for x in (encoding.rotation.cos, encoding.rotation.sin))


def _has_hooks(block: nn.Module) -> bool:
    """Whether somebody looks into a part of a block."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or _has_hooks(part)
        for part in block._modules.values()
        if part is not None
    )


def _of_the_compiler(error: Exception) -> bool:
    # What cannot be compiled, or not once more for other sizes, raises many types of error, which differ by version. Of
    # others, torch.utils.checkpoint's end of a computation and torch's lack of memory have to get through.
    return type(error).__module__.startswith(("torch._", "triton"))


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())


def _gradients_compiled_at_once() -> AbstractContextManager[Any]:
    """In which the code for gradients is compiled with the rest, not when they are first wanted, which is elsewhere."""
    from torch._functorch import config

    name = "force_non_lazy_backward_lowering"  # younger than the oldest torch that we run with
    return config.patch(name, True) if hasattr(config, name) else nullcontext()


def capture_cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Captures what a function launches, on the current GPU."""
    graph = torch.cuda.CUDAGraph()
    # What other threads do on the GPU meanwhile, a training's, is no fault of this one.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


@dataclass(frozen=True)
class _Frame:
    """A captured frame: the cameras that it reads, and where its picture will be."""

    decode: Decode  # holds the weights, which the graph reads where they lie
    target: Views
    replay: Callable[[], None]
    result: Tensor


class CapturedFrames:
    """Renders frames by CUDA graphs, whose launches cost the CPU nothing.

    A graph is of one memory and one shape of targets. It reads keys and values where the memory has them, as a memory
    never changes: other weights or views come with another memory, and with it go its graphs. Cameras are copied to
    where the graph reads them. The first frame of a shape is rendered as it is, the second is captured, so that what
    changes with every frame (a stream's memory) costs no captures.

    Args:
        capture: how; tests have no GPU.
        limit: graphs kept for a memory, each of which has memory of its own for what is computed on the way.
    """

    def __init__(self, capture: Capture = capture_cuda_graph, limit: int = 8):
        self._capture, self._limit = capture, limit
        self.failure: Optional[str] = None
        """Why frames are rendered without."""
        self._lock = threading.Lock()  # several browsers render at once
        self._frames: WeakKeyDictionary[SceneMemory, dict[tuple[Any, ...], Optional[_Frame]]] = WeakKeyDictionary()

    def __reduce__(self):
        return CapturedFrames, (self._capture, self._limit)

    def render(self, decode: Decode, memory: SceneMemory, target: Views) -> Tensor:
        """``decode(memory, target)``, replayed where it has been captured.

        Args:
            decode: the same for as long as weights and precision are the same.
        """
        if self.failure is not None:
            return decode(memory, target)
        shape = tuple(target.directions.shape)
        with self._lock:
            frames = self._frames.setdefault(memory, {})
            if shape not in frames:
                while len(frames) >= self._limit:
                    del frames[next(iter(frames))]
                frames[shape] = None
                return decode(memory, target)
            frame = frames[shape]
            try:
                if frame is None or frame.decode != decode:
                    frames[shape] = frame = self._captured(decode, memory, target)
                for mine, given in zip(_cameras(frame.target), _cameras(target)):
                    mine.copy_(given)
                frame.replay()
                return frame.result.clone()  # the next frame is written to the same place
            except RuntimeError as error:
                self.failure = _in_a_line(error)
                self._frames.clear()
        warnings.warn(f"frames are rendered without CUDA graphs: {self.failure}", stacklevel=2)
        return decode(memory, target)

    def _captured(self, decode: Decode, memory: SceneMemory, target: Views) -> _Frame:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could not be written to
            cameras = Views(
                *(torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) for x in _cameras(target))
            )
            # What is made on a first call, such as code for these strides, is none of the graph.
            decode(memory, cameras)
            replay, result = self._capture(lambda: decode(memory, cameras))
        return _Frame(decode, cameras, replay, result)


def _cameras(views: Views) -> tuple[Tensor, Tensor, Tensor]:
    return views.camera_to_world, views.directions, views.intrinsics
