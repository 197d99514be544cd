"""Attention in bf16 on a CPU: ours, in blocks of plain matrix products, against PyTorch's fused one.

    python -m scripts.benchmarks.attention_cpu --page docs/benchmarks.md

Both run in turns in one process and on one thread, and what is measured is processor time, which other work on the
machine stretches little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from elvsm_nerfstudio.evaluation.report import table_row
from elvsm_nerfstudio.evaluation.timing import processor
from elvsm_nerfstudio.nn.kernels import HAS_AMX, _InBlocks
from scripts.benchmarks.pages import part_of_this_processor, write_part

SHAPES = {
    "64 px: 24 views, each to itself": (24, 4, 64, 64),
    "64 px: a frame from 8 views": (1, 4, 64, 512),
    "128 px: a frame from 8 views": (1, 4, 256, 2048),
    "128 px: 24 frames, each from 8 views": (24, 4, 256, 2048),
    "256 px: a view to itself": (1, 12, 1024, 1024),
    "256 px: 8 views, each to itself": (8, 12, 1024, 1024),
    "256 px: a frame from 8 views": (1, 12, 1024, 8192),
}
"""Sequences, heads, queries, keys, in patches of 8 pixels; heads have 64 channels."""


def seconds(function: Callable[..., Tensor], inputs: list[Tensor], gradients: bool) -> float:
    """Of a call, and the way back where gradients are wanted."""
    begun = time.process_time()
    with torch.set_grad_enabled(gradients):
        out = function(*inputs)
    if gradients:
        torch.autograd.grad(out, inputs, out)
    return time.process_time() - begun


def ratios(shape: tuple[int, int, int, int], gradients: bool, turns: int) -> list[float]:
    """PyTorch's time over that of blocks, turn by turn, in order of size."""
    sequences, heads, queries, keys = shape
    # Tokens before heads, as they lie in memory.
    inputs = [torch.randn(sequences, tokens, heads, 64).bfloat16().transpose(1, 2) for tokens in (queries, keys, keys)]
    inputs = [x.requires_grad_(gradients) for x in inputs]
    both = F.scaled_dot_product_attention, _InBlocks.apply
    found = [[seconds(function, inputs, gradients) for function in both] for _ in range(turns + 1)]
    return sorted(theirs / blocks for theirs, blocks in found[1:])


def table(shapes: Mapping[str, tuple[int, int, int, int]], turns: int) -> str:
    """Medians, in brackets the middle half."""
    lines = [table_row(["PyTorch's time over that of blocks", "alone", "with gradients"]), table_row(["---"] * 3)]
    for name, shape in track(shapes.items(), description="Attention"):
        cells = []
        for gradients in (False, True):
            found = ratios(shape, gradients, turns)
            quarter = len(found) // 4
            cells.append(f"{statistics.median(found):.2f} ({found[quarter]:.2f} to {found[-1 - quarter]:.2f})")
        lines.append(table_row([name, *cells]))
    amx = "with" if HAS_AMX else "without"
    about = f"{processor(torch.device('cpu'))}, {amx} AMX, torch {torch.__version__}, 1 thread, {turns} turns"
    return "\n".join([*lines, "", about])


@dataclass
class Args:
    """Options."""

    page: Optional[Path] = None
    """Markdown page into which the table is written, between <!-- attention-cpu --> and its end; on processors with
    AMX, <!-- attention-cpu-amx -->."""
    beside: str = "unknown"
    """What else ran on the machine, for the record."""


def main(args: Args, turns: int = 8) -> None:
    """Measures, prints the table, and writes it into the page."""
    torch.set_num_threads(1)
    found = f"{table(SHAPES, turns)}; beside: {args.beside}."
    print(found)
    if args.page is not None:
        write_part(args.page, part_of_this_processor(args.page, "attention-cpu"), found)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
