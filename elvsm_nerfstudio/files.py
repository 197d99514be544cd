"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole(path: Path, partial: Optional[Path] = None, suffix: str = "", durable: bool = False) -> Iterator[Path]:
    """A name to write a file or a folder under, which takes the place of ``path`` when the block is done.

    Nobody sees half of it, no two processes write the same, and where the block fails nothing of it stays.

    Args:
        partial: the name, in the same folder as ``path``; one that nobody else has if absent.
        suffix: what that ends with, for writers that go by it.
        durable: whether the file is put on the disk before it is renamed, so that it outlives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers that share a folder have the same process ids.
    partial = partial or path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial{suffix}")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise
    if durable and os.name == "posix":  # elsewhere folders cannot be opened
        _sync(path.parent)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left of what ``whole`` should have put into a folder, where no other one writes."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, whole or not at all.

    Raises:
        OSError: where the file cannot be written; what was there before is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with whole(path, durable=True) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, dict(metadata))
            temporary.chmod(mode)  # safetensors writes for its user alone; these files are passed on like others
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
