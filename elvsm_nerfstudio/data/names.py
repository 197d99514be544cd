"""Names that come with data: of scenes, chunks and files. Results and caches are called after them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elvsm_nerfstudio.data.images import DataError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PLAIN = re.compile(r"(?!\s*\.{0,2}\s*$)(?![A-Za-z]:)[^/\\\x00-\x1f\x7f-\x9f]+")


def check_name(name: Any, where: str) -> str:
    """The name, which is one part of a path: it cannot lead out of the folder that it is used in.

    Raises:
        DataError: for one that is empty, is no string, or has separators, ``..``, a drive or control characters.
    """
    if isinstance(name, str) and _PLAIN.fullmatch(name):
        return name
    raise DataError(
        f"{where}: the name {name!r} cannot be used; expected a plain name without slashes, '..', a drive or control "
        "characters, because files are called after it"
    )


def check_file(name: str, where: str) -> str:
    """A path as data give it, which may lie anywhere but is printed and written to files.

    Raises:
        DataError: for one with control characters.
    """
    if _CONTROL.search(name):
        raise DataError(f"{where}: the name {name!r} has control characters in it; rename it")
    return name


def natural_order(file: Path) -> tuple[list[str | int], str]:
    """Sort key of file names, by which 2 comes before 10."""
    parts = re.split("([0-9]+)", str(file))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(file)
