"""How all verbs read their options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(options: type[T], verb: str, description: str, args: Sequence[str]) -> T:
    """A verb's options; prints its help, or what is wrong, and exits where they are none."""
    return tyro.cli(options, prog=f"elvsm {verb}", description=description, args=args)
