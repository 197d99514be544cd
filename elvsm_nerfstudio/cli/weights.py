"""Lists the weights that have a name, and which of them are in the cache.

    elvsm weights

Every option that takes weights takes these names, e.g. `elvsm run --weights efficient-lvsm-256 --data DATA` and
`ns-train efficient-lvsm --pipeline.model.checkpoint efficient-lvsm-256 --data DATA`, and any other file on the Hugging
Face Hub as hf://OWNER/REPO/FILE or hf://OWNER/REPO/FILE@REVISION. They are downloaded when first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.nn.named_weights import PRETRAINED, PRETRAINED_METHOD, PUBLISHED, weights_path


@dataclass
class WeightsOptions:
    """Nothing to choose."""


def main(args: list[str]) -> None:
    """Command line."""
    parse(WeightsOptions, "weights", __doc__, args)
    rows = [_row(PRETRAINED, f"{PRETRAINED_METHOD}, comes with this package", "Apache-2.0", weights_path(PRETRAINED))]
    for name, published in PUBLISHED.items():
        rows.append(_row(name, f"{published.about}; {published.source}", published.licence, published.source.cached()))
    print("\n\n".join(rows))


def _row(name: str, about: str, licence: str, file: Optional[Path]) -> str:
    size = "not downloaded yet" if file is None else f"{file.stat().st_size / 1e6:,.0f} MB, {file}"
    return f"{name}\n    {about}\n    licence: {licence}\n    {size}"
