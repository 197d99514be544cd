"""Kernels that a GPU is given for one frame from a kept memory, counted without a GPU.

    python -m scripts.benchmarks.launches --page docs/benchmarks.md

Tensors say that they are on an H100 and have no values. What runs as it is counts by its operators, views apart; of
compiled blocks those kernels count into which torch.compile's inductor fuses them for that GPU. Inner parts of torch
2.14 with CUDA, as pip brings it on Linux, are stood in for; other versions may lack some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
import tyro
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from elvsm_nerfstudio.evaluation.report import table_row
from elvsm_nerfstudio.nn.compiled import Compiler
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.network import SceneNetwork
from scripts.benchmarks.measurements import is_launch
from scripts.benchmarks.methods import Scene
from scripts.benchmarks.pages import write_part

NETWORKS = {
    "efficient-lvsm": (EfficientLVSMConfig(), 120),
    "efficient-lvsm-plus": (EfficientLVSMConfig(camera_encoding="prope", ray_frame="camera"), 150),
}
"""Networks of the paper's size, and how many kernels a compiled frame of theirs was aimed to have at most."""
IMAGE_SIZE, CONTEXT_VIEWS = 256, 2
GPU = torch.device("cuda:0")

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten._scaled_dot_product_flash_attention}


class H100(NamedTuple):
    """What inductor asks of a GPU."""

    name: str = "H100"
    multi_processor_count: int = 132
    major: int = 9
    minor: int = 0
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    warp_size: int = 32


class Launches(TorchDispatchMode):
    """Counts kernels within its block."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        """Matrix products and attention."""
        self.others = 0

    @property
    def all(self) -> int:
        return self.products + self.others

    def note(self, is_product: bool) -> None:
        self.products, self.others = self.products + is_product, self.others + (not is_product)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if is_launch(function):
            self.note(function.overloadpacket in PRODUCTS)
        return function(*args, **(kwargs or {}))


class _Fused(BaseException):
    """Ends a compilation once its kernels are known."""


def fused_kernels(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[bool]:
    """The kernels that inductor makes of a graph: for each, whether it is a matrix product or attention."""
    from torch._inductor import compile_fx, config, ir

    found: list[bool] = []

    def note(nodes: list[Any]) -> list[Any]:
        nodes = [x.node for x in nodes if type(x).__name__ != "NopKernelSchedulerNode"]
        found.extend(isinstance(node, ir.ExternKernel) for node in nodes if not isinstance(node, ir.MultiOutput))
        raise _Fused

    # Constants would be folded by computing with them on the GPU.
    with config.patch(_post_fusion_custom_pass=note, joint_graph_constant_folding=False):
        try:
            compile_fx.compile_fx(graph, list(inputs))
        except _Fused:
            return found
    raise RuntimeError("inductor came to an end without fusing anything")


@contextmanager
def on_a_pretended_gpu() -> Iterator[None]:
    """In which tensors on ``cuda:0`` have shapes and dtypes, but no values, and inductor compiles for an H100."""
    import torch._inductor.scheduler  # noqa: F401, whose name for has_triton is stood in for

    interface = "torch._dynamo.device_interface.CudaInterface"
    stand_ins = {
        f"{interface}.get_device_properties": lambda device=None: H100(),
        f"{interface}.Worker.get_device_properties": lambda device=None: H100(),
        f"{interface}.get_compute_capability": lambda device=None: 90,
        f"{interface}.is_bf16_supported": lambda including_emulation=True: True,
        "torch._inductor.scheduler.has_triton": lambda *device: True,
        "torch.cuda.get_device_properties": lambda device=None: H100(),
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.mem_get_info": lambda device=None: (2**40, 2**40),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        # Which of its kernels attention takes is a question to the GPU.
        "torch.nn.functional.scaled_dot_product_attention": (
            lambda queries, keys, values: aten._scaled_dot_product_flash_attention(queries, keys, values)[0]
        ),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        torch._C._ensureCUDADeviceGuardSet()  # one that looks for no driver
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield


def of_a_frame(config: EfficientLVSMConfig, image_size: int, compiled: bool) -> Launches:
    """Kernels of a frame from ``CONTEXT_VIEWS`` views in bf16."""
    found = Launches()

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kernels = fused_kernels(graph, inputs)

        def run(*args: Any) -> Any:
            for is_product in kernels:
                found.note(is_product)
            return graph(*args)

        return run

    class Counted(Compiler):
        def run(self, *args: Any) -> Any:
            with _pop_mode_temporarily():  # operators within a graph are none of their own
                return super().run(*args)

    with on_a_pretended_gpu():
        scene = Scene.make(CONTEXT_VIEWS, image_size, GPU, 1)
        network = on_gpu(config.build())
        network.autocast_dtype = torch.bfloat16
        memory = network.encode(scene.first(CONTEXT_VIEWS), scene.frame)
        network.compiler = Counted(required=True, backend=backend) if compiled else None
        with found:
            network.decode(memory, scene.path)  # rounds weights, and compiles
            found.products = found.others = 0
            network.decode(memory, scene.path)
    return found


def on_gpu(network: SceneNetwork) -> SceneNetwork:
    """A network with its parameters there: fake ones refuse ``Module.to``."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(GPU), requires_grad=False)
    return network


def table(networks: Mapping[str, tuple[EfficientLVSMConfig, int]], image_size: int) -> str:
    """A row for each network: kernels of its frame as it is, compiled, and what was aimed at."""
    head = "a frame of", "as it is", "compiled", "matrix products and attention among them", "aimed at, compiled"
    lines = [table_row(head), table_row(["---"] * len(head))]
    for name, (config, goal) in networks.items():
        eager, compiled = (of_a_frame(config, image_size, compile) for compile in (False, True))
        lines.append(table_row([name, eager.all, compiled.all, compiled.products, f"at most {goal}"]))
    return "\n".join(lines)


@dataclass
class Args:
    """Options."""

    page: Optional[Path] = None
    """Markdown page into which the table is written, between <!-- launches --> and its end."""


def main(args: Args) -> None:
    """Counts, prints the table, and writes it into the page."""
    found = table(NETWORKS, IMAGE_SIZE)
    print(found)
    if args.page is not None:
        write_part(args.page, "launches", found)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
