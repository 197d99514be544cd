"""Tables in pages of docs/, written by the programs that measure."""

from __future__ import annotations

from pathlib import Path

from elvsm_nerfstudio.evaluation.report import write_text
from elvsm_nerfstudio.nn.kernels import HAS_AMX


def part_of_this_processor(page: Path, name: str) -> str:
    """The part of a page for what was measured here: ``name-amx`` on CPUs with AMX, where the page tells them apart."""
    with_amx = f"{name}-amx"
    return with_amx if HAS_AMX and f"<!-- {with_amx} -->" in page.read_text() else name


def write_part(page: Path, name: str, text: str) -> None:
    """Puts text between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a page; the rest stays as it is.

    Raises:
        ValueError: for a page without these lines.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, begun, rest = page.read_text().partition(first)
    _, ended, after = rest.partition(last)
    if not begun or not ended:
        raise ValueError(f"{page}: expected the lines {first.strip()} and {last}, between which the tables stand")
    write_text(page, f"{before}{first}\n{text.strip()}\n\n{last}{after}")
