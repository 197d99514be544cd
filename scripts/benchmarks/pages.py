"""Tables in pages of docs/, written by the programs that measure."""

from __future__ import annotations

from pathlib import Path

from elvsm_nerfstudio.evaluation.report import write_text


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
