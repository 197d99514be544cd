"""Files from the places that their authors name, checked by their hash."""

from __future__ import annotations

import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from rich.console import Console
from rich.progress import wrap_file

from elvsm_nerfstudio.downloads.pip_download import FetchError
from elvsm_nerfstudio.files import whole

TIMEOUT = 30
"""Seconds without an answer."""


def download(url: str, path: Path, algorithm: str, digest: str) -> None:
    """Downloads a file, whole or not at all.

    Args:
        algorithm: of the hash, as hashlib names it.
        digest: in hexadecimal digits, or their beginning.

    Raises:
        FetchError: where it cannot be had or written, or is another file.
    """
    found = hashlib.new(algorithm)
    try:
        with whole(path) as partial, urlopen(url, timeout=TIMEOUT) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with wrap_file(
                response, size, description=path.name, console=Console(stderr=True), transient=True
            ) as content:
                while block := content.read(1 << 20):
                    found.update(block)
                    file.write(block)
            if not found.hexdigest().startswith(digest):
                raise FetchError(f"{url}: found a file with {algorithm} {found.hexdigest()}, expected {digest}")
    except (OSError, HTTPException) as error:
        raise FetchError(f"{url} cannot be downloaded to {path}: {error}") from error
