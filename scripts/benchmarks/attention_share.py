"""Attention's share of the network's FLOPs against the number of context views: where its kernel matters.

    python -m scripts.benchmarks.attention_share

Counted on the meta device at the paper's size, so that nothing is computed and it is the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from scripts.benchmarks.measurements import on_meta
from scripts.benchmarks.methods import Scene

IMAGE_SIZES = 256, 512
VIEWS = 1, 2, 4, 8, 16, 32, 64


def share(run: Callable[[], Any]) -> float:
    """Of the FLOPs of a run, those of attention: the products of queries and keys, and of scores and values."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    # On the meta device attention is its two batched products; linear layers are products of two matrices. Rays are
    # batched too: not a thousandth of it at the paper's size.
    return counts[torch.ops.aten.bmm] / sum(counts.values())


def main() -> None:
    """Prints the table."""
    with on_meta():
        with torch.device("meta"):
            network = EfficientLVSMConfig().build()
        network.chunk_tokens = sys.maxsize  # groups of views cost the same, and fewer of them are counted faster
        print("| pixels | encoding any view |" + "".join(f" a frame from {views} |" for views in VIEWS))
        print("|---|---|" + "---|" * len(VIEWS))
        for size in IMAGE_SIZES:
            scene = Scene.make(max(VIEWS), size, "meta", 1)
            found = [share(partial(network.encode, scene.first(1), scene.frame))]
            for views in VIEWS:
                memory = network.encode(scene.first(views), scene.frame)
                found.append(share(partial(network.decode, memory, scene.path)))
            print(f"| {size} x {size} |" + "".join(f" {100 * x:.0f} % |" for x in found), flush=True)


if __name__ == "__main__":
    main()
