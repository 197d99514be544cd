"""Progress bars, one for each stage of a program, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Stage:
    """One bar."""

    progress: Progress
    task: TaskID

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.progress.advance(self.task, count)

    def reach(self, count: int) -> None:
        """So many are done in all."""
        self.progress.update(self.task, completed=count)


class Stages:
    """Bars under one another on a console; a context manager that ends them.

    Args:
        console: rich's own if absent.
        silent: whether nothing is shown.
    """

    def __init__(self, console: Optional[Console] = None, silent: bool = False):
        columns = TextColumn("[green]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, disable=silent)
        self.seconds: dict[str, float] = {}
        """Seconds that each stage took that has ended."""

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A stage of so many steps."""
        start = time.perf_counter()
        yield Stage(self._progress, self._progress.add_task(title, total=total))
        self.seconds[title] = round(time.perf_counter() - start, 2)
