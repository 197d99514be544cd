"""Scores weights through other lenses than the one that a collection was rendered with.

    python -m scripts.release.lenses --weights pretrained --data data/objects128 --output lenses.json

writes the scores as JSON and prints them as a table: PSNR beside that of the render through the collection's own lens
on the same pixels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.nn.weights import load_network
from scripts.release.lens_scores import lens_scores, lens_table


@dataclass
class Args:
    """Options."""

    weights: str
    """'pretrained' or a file of weights."""
    data: Path
    """A collection of `elvsm data objects` whose pictures are larger than --size."""
    output: Path
    """JSON to write."""
    size: int = 64
    """Height and width that the network gets."""


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        scores = lens_scores(load_network(args.weights).eval(), args.data, args.size)
        write_json(args.output, {"weights": args.weights, "lenses": scores})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(lens_table(scores))


if __name__ == "__main__":
    main()
