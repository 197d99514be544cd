"""What a user should know about data that can be used nevertheless."""

from __future__ import annotations

from nerfstudio.utils.rich_utils import CONSOLE

_said: set[str] = set()


def say_once(kind: str, text: str) -> None:
    """Prints a notice unless one of this kind was printed in this process, or before it was forked."""
    if kind not in _said:
        _said.add(kind)
        say(text)


def say(text: str) -> None:
    """Prints a notice; what file names and errors hold is not markup."""
    CONSOLE.print(text, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
