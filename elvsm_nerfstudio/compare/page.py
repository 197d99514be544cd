"""A comparison as one page that needs no network: its numbers inside, its pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from elvsm_nerfstudio.compare.plots import method_colours
from elvsm_nerfstudio.compare.scoring import COSTS, METRICS
from elvsm_nerfstudio.evaluation.report import write_text

PARTS = {"/*STYLE*/": "page.css", "/*SCRIPT*/": "page.js"}


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the page. Pictures are found by the layout that `elvsm compare` describes."""
    content = {
        "result": result,
        "colours": method_colours(result["methods"]),
        "metrics": [
            {"key": key, "label": label, "unit": unit, "higher": higher, "digits": digits}
            for key, (label, unit, higher, digits) in METRICS.items()
            if key in result["metrics"]
        ],
        "costs": [{"key": key, "label": label, "unit": unit} for key, (label, unit) in COSTS.items()],
    }
    page = _part("page.html")
    for mark, name in PARTS.items():
        page = page.replace(mark, _part(name))
    # "</script>" in a name or an error would end the element that holds the JSON.
    page = page.replace("/*CONTENT*/", json.dumps(content, allow_nan=False).replace("<", "\\u003c"))
    write_text(path, page)


def _part(name: str) -> str:
    return (files("elvsm_nerfstudio.compare") / name).read_text("utf8")
