"""Writes a run's weights alone, without optimiser and data, as safetensors.

    elvsm export --load-config outputs/.../config.yml --output weights.safetensors --dtype fp16

    elvsm export --load-config outputs/.../config.yml --output weights.safetensors --push OWNER/REPO

The file also holds the network's config. ``ns-train METHOD --pipeline.model.checkpoint weights.safetensors`` starts
from it, ``elvsm run --weights weights.safetensors --data DATA`` makes a run of it for other data. ``--push`` also puts
it on the Hugging Face Hub, from where ``hf://OWNER/REPO/weights.safetensors`` takes it; log in with ``hf auth login``
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.nn.named_weights import push
from elvsm_nerfstudio.runs import DType, export_weights, model_card


@dataclass
class ExportOptions:
    """Options."""

    load_config: Path
    """config.yml of the run."""
    output: Path
    """The .safetensors file to write."""
    dtype: DType = "fp32"
    """Of the weights in the file. bf16 and fp16 halve it and round them, fp16 to eight times as many values."""
    push: Optional[str] = None
    """OWNER/REPO on the Hugging Face Hub, to which the file and a model card are uploaded; it is made if there is none.
    A README.md that is there stays."""
    private: bool = False
    """Whether a repository that --push makes is for you alone."""


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(ExportOptions, "export", __doc__, args)
    export_weights(options.load_config, options.output, options.dtype)
    print(options.output)
    if options.push is not None:
        card = model_card(options.load_config, options.push, options.output)
        print(push(options.push, [options.output], card, options.private))
