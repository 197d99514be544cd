"""Writes a run's weights alone, without optimiser and data, as safetensors.

    elvsm export --load-config outputs/.../config.yml --output weights.safetensors --dtype fp16

The file also holds the network's config. ``ns-train METHOD --pipeline.model.checkpoint weights.safetensors`` starts
from it, ``elvsm run --weights weights.safetensors --data DATA`` makes a run of it for other data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.runs import DType, export_weights


@dataclass
class ExportOptions:
    """Options."""

    load_config: Path
    """config.yml of the run."""
    output: Path
    """The .safetensors file to write."""
    dtype: DType = "fp32"
    """Of the weights in the file. bf16 and fp16 halve it and round them, fp16 to eight times as many values."""


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(ExportOptions, "export", __doc__, args)
    export_weights(options.load_config, options.output, options.dtype)
    print(options.output)
