"""Checkpoints on disk: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from elvsm_nerfstudio.files import whole

PARTIAL = "step-0.partial"
"""What a checkpoint is called until it is complete. nerfstudio takes what stands between the first '-' and the first
'.' of every name in the folder for a step, and loads the largest: 0 never is."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or read; the message says what to do."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where nerfstudio looks for the checkpoint of a step."""
    return folder / f"step-{step:09d}.ckpt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest one last."""
    return sorted(folder.glob("step-*.ckpt"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step-"))


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, has it put on the disk, reads it back, and renames it.

    Raises:
        CheckpointError: what was there before is as it was.
    """
    try:
        with whole(path, path.with_name(PARTIAL), durable=True) as partial:
            with partial.open("wb") as file:
                torch.save(state, file)
            damage = _damage(partial)
            if damage is None:
                torch.load(partial, map_location="cpu", weights_only=True, mmap=True)
            else:
                raise OSError(f"read back, it is damaged ({damage})")
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        # torch reports a file that cannot be written in its own words; what the system said is behind that.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = list_checkpoints(path.parent)
        raise CheckpointError(
            f"checkpoint {path} could not be written: {reason}; {readable(shutil.disk_usage(_existing(path)).free)} "
            f"are free there. " + (f"The one before, {kept[-1]}, is intact." if kept else "There is none before it.")
        ) from error


def find_checkpoint(folder: Path, step: Optional[int] = None) -> Path:
    """The checkpoint of a step, or the latest one, in a folder.

    Raises:
        CheckpointError: saying what is there instead.
    """
    found = list_checkpoints(folder)
    wanted = checkpoint_path(folder, step) if step is not None else None
    if not found or (wanted is not None and wanted not in found):
        steps = ", ".join(str(step_of(path)) for path in found)
        raise CheckpointError(
            f"{folder} holds no checkpoint (step-*.ckpt)"
            if not found
            else f"{folder} holds no checkpoint of step {step}; it has those of {steps}"
        )
    return wanted or found[-1]


def check_checkpoint(path: Path) -> None:
    """Reads every byte of a checkpoint and compares the checksums: torch itself would load spoilt weights.

    Raises:
        CheckpointError: naming a checkpoint that is truncated or spoilt, and how to take the one before.
    """
    reason = _damage(path)
    if reason is None:
        return
    whole = last_whole_checkpoint(path.parent, before=path)
    if whole is None:
        raise CheckpointError(f"checkpoint {path} is damaged ({reason}), and there is no whole one before it")
    move = shlex.join(["mv", str(path), str(path.parent.parent)])
    raise CheckpointError(
        f"checkpoint {path} is damaged ({reason}). The one before, {whole}, is whole. To use it: in ns-train "
        f"--load-checkpoint {shlex.quote(str(whole))} in place of what is given; for ns-eval, ns-render and ns-viewer "
        f"first move the damaged one away: {move}"
    )


def last_whole_checkpoint(folder: Path, before: Optional[Path] = None) -> Optional[Path]:
    """The latest checkpoint of a folder, of those before another one, that is not damaged; None where there is none."""
    found = [path for path in list_checkpoints(folder) if before is None or path < before]
    return next((path for path in reversed(found) if _damage(path) is None), None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; no pickled code is executed.

    Raises:
        CheckpointError: as ``check_checkpoint``, and where there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    check_checkpoint(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def check_folder(folder: Path, option: str) -> None:
    """Makes a folder and writes a little into it, so that what is wrong with it is known now.

    Raises:
        CheckpointError: naming the folder and the option that chose it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise CheckpointError(f"{option}: {folder} cannot be written to: {error}") from error


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises CheckpointError where a folder's disk has less room than needed, in bytes."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {readable(free)} are free on its disk, {readable(needed)} are needed for {purpose}. Make room "
            "or choose another --output-dir"
        )


def checkpoint_bytes(parameters: Iterable[Tensor], copies: int) -> int:
    """About the size of a checkpoint that holds each parameter so many times: with AdamW, itself and two moments."""
    return copies * sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def readable(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB"


def _damage(path: Path) -> Optional[str]:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{readable(path.stat().st_size)}; {error or type(error).__name__}"
    return None if spoilt is None else f"the checksum of {spoilt} is wrong"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
