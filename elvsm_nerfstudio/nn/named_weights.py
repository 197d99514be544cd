"""The weights that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

PRETRAINED = "pretrained"
"""What stands for them wherever a file of weights is asked for. A file of that name is given by its absolute path."""
PRETRAINED_METHOD = "efficient-lvsm-plus-tiny"
PRETRAINED_FILE = f"{PRETRAINED_METHOD}.safetensors"
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "assets", _PACKAGE.parent / "assets")
"""Where they lie: in an installed package, and in a checkout (pyproject.toml maps one to the other)."""


def weights_path(path: Path | str) -> Path:
    """The file that is meant: the path itself, or the package's weights for ``pretrained``.

    Raises:
        ValueError: where the package came without them.
    """
    if Path(path) != Path(PRETRAINED):
        return Path(path)
    for folder in _FOLDERS:
        if (folder / PRETRAINED_FILE).is_file():
            return folder / PRETRAINED_FILE
    raise ValueError(
        f"{PRETRAINED}: found no {PRETRAINED_FILE} in {' or '.join(map(str, _FOLDERS))}; expected the weights that "
        "come with this package. Get its assets/ again (git checkout assets, or install it anew), or name another file"
    )
