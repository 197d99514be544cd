"""Starts console programs in processes that are forked from one that has imported them already.

Importing nerfstudio and torch takes longer than most of what tests let a program do. Programs that start by themselves
are in test_wheel, test_quickstart and test_viewer_browser.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from elvsm_nerfstudio.programs import report_errors_plainly

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [*(f"nerfstudio.scripts.{name}" for name in ("train", "eval", "render")), "elvsm_nerfstudio.cli.show"]
)


def run(command: Sequence[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a program of this environment, given by its name and arguments, prints, and how it ends."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _FORKED.Process(target=_program, args=(list(command), str(cwd), environment, str(out), str(err)))
        process.start()
        process.join()
        printed = (path.read_text() if path.exists() else "" for path in (out, err))
        return subprocess.CompletedProcess(command, process.exitcode or 0, *printed)


def _program(command: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as ever
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    report_errors_plainly()  # which goes by the program's name, and was imported under another
    (point,) = entry_points(group="console_scripts", name=command[0])
    try:
        sys.exit(point.load()())
    except Exception:  # multiprocessing would print it without the hook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
