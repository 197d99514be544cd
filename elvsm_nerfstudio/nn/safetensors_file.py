"""Writing safetensors: whole or not at all, never half a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors under a temporary name, has them put on the disk, and renames.

    Raises:
        OSError: where the file cannot be written; what was there before is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors writes for its user alone; these files are passed on like others
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
