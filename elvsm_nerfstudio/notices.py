"""Lines for the user: names of files and texts of errors in them are no markup, whatever brackets they hold."""

from __future__ import annotations

from nerfstudio.utils.rich_utils import CONSOLE

_said: set[str] = set()


def say(text: str, style: str = "") -> None:
    """Prints a line as it is."""
    CONSOLE.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints what a user should know although the program goes on."""
    say(text, "bold yellow")


def warn_once(kind: str, text: str) -> None:
    """Warns unless something of this kind was said in this process, or before it was forked."""
    if kind not in _said:
        _said.add(kind)
        warn(text)
