"""The variants of scripts/study/run.py: one table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

REFERENCE = "paper-exact"
"""What the others are compared with."""

SAME_FOR_ALL = {
    "pipeline.datamanager.scenes-per-batch": "6",
    "pipeline.datamanager.num-target-views": "6",
}
"""Batch of the plus recipe, so that a variant differs in what it tests alone. Ours."""
ADAMW = {"optimizers.network.optimizer.muon": "False", "optimizers.network.optimizer.lr": "1e-3"}
MUON = {"optimizers.network.optimizer.muon": "True", "optimizers.network.optimizer.lr": "3e-3"}
"""Learning rates are ours."""
SQUARED_ERROR = {"pipeline.model.psnr-loss": "False"}
PSNR_LOSS = {"pipeline.model.psnr-loss": "True"}
CANONICAL_RAYS = {"pipeline.model.network.ray-frame": "canonical"}
CAMERA_RAYS = {"pipeline.model.network.ray-frame": "camera"}
ONE_LENS = {"pipeline.datamanager.lens-augmentation": "False"}
"""All rows see the collection through its own lens, as they are scored."""


@dataclass(frozen=True)
class Variant:
    """A row of the study."""

    name: str
    tests: str
    """What the row differs by from the others, for the report."""
    method: str
    """Name of the method, as ns-train takes it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of ns-train, without the leading dashes; several values of one option with blanks between them."""


def _paper(name: str, tests: str, **options: str) -> Variant:
    """A variant of efficient-lvsm-tiny, trained with AdamW; options of the pipeline, dots and dashes as underscores."""
    return Variant(name, tests, "efficient-lvsm-tiny", {**ADAMW, **_pipeline(options)})


def _plus(name: str, tests: str, **options: str) -> Variant:
    """A variant of efficient-lvsm-plus-tiny, trained as it is but through one lens; options as above."""
    plus = {**MUON, **PSNR_LOSS, **CAMERA_RAYS, **ONE_LENS}
    return Variant(name, tests, "efficient-lvsm-plus-tiny", {**plus, **_pipeline(options)})


def _pipeline(options: Mapping[str, str]) -> dict[str, str]:
    return {f"pipeline.{option}".replace("__", ".").replace("_", "-"): value for option, value in options.items()}


VARIANTS = (
    _paper(REFERENCE, "the paper: rays in the tokens alone, 4 context views"),
    _paper("prope", "relative camera encoding, still 4 context views", model__network__camera_encoding="prope"),
    Variant(
        "plus-adamw",
        "prope, and 1 to 8 context views",
        "efficient-lvsm-plus-tiny",
        {**ADAMW, **SQUARED_ERROR, **CANONICAL_RAYS, **ONE_LENS},
    ),
    Variant(
        "plus-muon",
        "prope, 1 to 8 context views, Muon",
        "efficient-lvsm-plus-tiny",
        {**MUON, **SQUARED_ERROR, **CANONICAL_RAYS, **ONE_LENS},
    ),
    Variant(
        "plus-canonical-rays",
        "prope, 1 to 8 context views, Muon, the loss on PSNR",
        "efficient-lvsm-plus-tiny",
        {**MUON, **PSNR_LOSS, **CANONICAL_RAYS, **ONE_LENS},
    ),
    _plus("plus", "the same with rays in each camera's own frame"),
    _plus(
        "plus-prefix",
        "plus with one encoding of 8 context views, each target from a random number of the first ones",
        model__prefix_loss="True",
        datamanager__num_context_views="8 8",
    ),
    _plus("plus-mirrors", "plus with mirrored scenes", datamanager__mirror_augmentation="True"),
    _plus("plus-colours", "plus with scenes in other colours", datamanager__colour_augmentation="True"),
    _paper(
        "paper-exact-repa",
        "the paper's REPA, with a teacher that is not its: a ViT-S fine-tuned for saliency",
        model__repa__teacher="saliency-vit-s",
        model__repa__image_size="112",
    ),
    Variant(
        "lvsm-decoder-only",
        "LVSM of equal parameters, 4 context views, its own clipping of gradients",
        "lvsm-decoder-only-tiny",
        ADAMW,
    ),
)


def find_variants(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, in the table's order; all without any name.

    Raises:
        ValueError: for an unknown one, naming the nearest.
    """
    known = [variant.name for variant in VARIANTS]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"--variants {name}: no such variant; did you mean {nearest}? There are {', '.join(known)}"
            )
    return [variant for variant in VARIANTS if not names or variant.name in names]
