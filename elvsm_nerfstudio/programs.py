"""Which of nerfstudio's programs is running, and how its user is told what is wrong.

The programs tell a method nothing of themselves: neither where they write, nor which config.yml they have read.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PosixPath, WindowsPath
from types import TracebackType
from typing import Any, Optional

import yaml

_PACKAGE = Path(__file__).parent
_MODULES = {
    "nerfstudio.scripts.train": "ns-train",
    "elvsm_nerfstudio.launch": "ns-train",
    "nerfstudio.scripts.eval": "ns-eval",
    "nerfstudio.scripts.render": "ns-render",
    "nerfstudio.scripts.exporter": "ns-export",
    "nerfstudio.scripts.viewer.run_viewer": "ns-viewer",
}


def running_program() -> Optional[str]:
    """'ns-train' (by torchrun, too), 'ns-eval', 'ns-render', 'ns-export' or 'ns-viewer'; None in all other programs."""
    name = Path(sys.argv[0]).stem
    if name in _MODULES.values():
        return name
    return _MODULES.get(getattr(sys.modules["__main__"].__spec__, "name", None))  # of python -m


def subcommand() -> str:
    """What follows the name of the running program: 'interpolate' of ns-render interpolate."""
    return sys.argv[1] if len(sys.argv) > 1 else ""


def config_being_read() -> Optional[Path]:
    """The config.yml that nerfstudio's ``eval_setup`` has read, for whoever is called from there."""
    return next(_locals_of("eval_setup", "config_path"), None)


def ns_eval_output() -> Optional[Path]:
    """Where ns-eval will write its JSON, for whoever is called from there; None in other programs."""
    evaluations = (program for program in _locals_of("main", "self") if type(program).__name__ == "ComputePSNR")
    return next((evaluation.output_path for evaluation in evaluations), None)


def _locals_of(function: str, variable: str) -> Iterator[Any]:
    """A variable of the functions of some name that are running, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and variable in frame.f_locals:
            yield frame.f_locals[variable]
        frame = frame.f_back


def read_paths_of_other_systems() -> None:
    """Lets a config.yml be read where it was not written: of Windows on Linux, and the reverse."""
    other = PosixPath if os.name == "nt" else WindowsPath

    def construct(loader: yaml.Loader, node: yaml.Node) -> Path:
        return Path(*loader.construct_sequence(node))

    yaml.Loader.add_constructor(f"tag:yaml.org,2002:python/object/apply:pathlib.{other.__name__}", construct)


def report_errors_plainly() -> None:
    """Has nerfstudio's programs end without a traceback where their user can put right what is wrong.

    That is what this package raises as ``ValueError`` or ``OSError``; all else is a fault and keeps its traceback.
    """
    usual = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
        if isinstance(error, (ValueError, OSError)) and _raised_here(traceback):
            print(f"error: {error}", file=sys.stderr)
        else:
            usual(kind, error, traceback)

    if running_program() is not None:
        sys.excepthook = report


def _raised_here(traceback: Optional[TracebackType]) -> bool:
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return _PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents
