"""Writes a run's weights alone, without optimiser and data, as safetensors.

    python scripts/export_weights.py --load-config outputs/.../config.yml --output weights.safetensors --dtype fp16

The file also holds the network's config. ``ns-train METHOD --pipeline.model.checkpoint weights.safetensors`` starts
from it, ``python scripts/make_run.py --checkpoint weights.safetensors --data DATA`` makes a run of it for other data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from make_run import last_checkpoint, read_config

from elvsm_nerfstudio.nn.weights import load_weights, save_weights


@dataclass
class Args:
    """Options."""

    load_config: Path
    """config.yml of the run."""
    output: Path
    """The .safetensors file to write."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights in the file. bf16 and fp16 halve it and round them, fp16 to eight times as many values."""


def export(args: Args) -> None:
    """Writes the last checkpoint's weights.

    Raises:
        ValueError: for a run without weights, weights that the dtype cannot hold, and an output that is not called
            .safetensors.
        OSError: where it cannot be written.
    """
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output {args.output}: expected a name that ends in .safetensors")
    config = read_config(args.load_config, "--load-config").pipeline.model.network
    network = config.build()
    load_weights(network, last_checkpoint(args.load_config))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    save_weights(args.output, network.state_dict(), config, dtypes[args.dtype])


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        export(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(args.output)


if __name__ == "__main__":
    main()
