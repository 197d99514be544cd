"""Weights by name: those that come with the package, those that the authors published, and any on the Hugging Face Hub.

Downloads are the work of ``huggingface_hub``: its cache, its progress bar, its tokens, ``HF_HUB_OFFLINE`` and
``HF_ENDPOINT``. It is imported where it is needed.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Optional

PRETRAINED = "pretrained"
"""What stands for them wherever a file of weights is asked for. A file of that name is given by its absolute path."""
PRETRAINED_METHOD = "efficient-lvsm-plus-tiny"
PRETRAINED_FILE = f"{PRETRAINED_METHOD}.safetensors"
PRETRAINED_IMAGE_SIZE = 128
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "assets", _PACKAGE.parent / "assets")
"""Where they lie: in an installed package, and in a checkout (pyproject.toml maps one to the other)."""


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of models on the Hugging Face Hub."""

    repository: str
    """OWNER/NAME"""
    file: str
    """Path in the repository."""
    revision: Optional[str] = None
    """Branch, tag or commit; main if absent."""

    def __str__(self) -> str:
        return f"hf://{self.repository}/{self.file}" + (f"@{self.revision}" if self.revision else "")

    @property
    def page(self) -> str:
        """Of the repository, for a browser."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository}"

    def cached(self) -> Optional[Path]:
        """The file in the cache of ``huggingface_hub``, if it was downloaded before."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class Published:
    """Weights that their authors published."""

    source: HubFile
    about: str
    """Network, training data and what it is for."""
    licence: str
    method: str
    """Whose other options fit them."""
    image_size: int
    """Height and width in pixels that they were trained with."""


_EFFICIENT = "MIT by its README, CC BY-NC-SA 4.0 by its LICENSE.md: take the stricter"
_LVSM = "CC BY-NC-SA 4.0"


def _efficient(file: str, about: str, size: int) -> Published:
    source = HubFile("Ayakaee/efficient-lvsm", file)
    return Published(source, f"Efficient-LVSM, 199 M parameters, {about}", _EFFICIENT, "efficient-lvsm", size)


def _lvsm(file: str, kind: str, parameters: str, size: int) -> Published:
    about = f"LVSM {kind}, {parameters} parameters, RealEstate10K, {size}x{size}"
    return Published(HubFile("coast01/LVSM", file), about, _LVSM, f"lvsm-{kind}", size)


PUBLISHED = {
    "efficient-lvsm-256": _efficient("efficient_lvsm_res256.pt", "RealEstate10K, 256x256", 256),
    "efficient-lvsm-512": _efficient("efficient_lvsm_res512.pt", "RealEstate10K, 512x512", 512),
    "efficient-lvsm-incremental-demo": _efficient(
        "efficient_lvsm_inc_demo.pt", "of the authors' demo of views that arrive one by one", 256
    ),
    "lvsm-decoder-only-256": _lvsm("scene_decoder_only_256.pt", "decoder-only", "171 M", 256),
    "lvsm-encoder-decoder-256": _lvsm("scene_encoder_decoder_256.pt", "encoder-decoder", "173 M", 256),
    "lvsm-decoder-only-512": _lvsm("lvsm_scene_decoder_only_res512.pt", "decoder-only", "171 M", 512),
    "lvsm-encoder-decoder-512": _lvsm("lvsm_scene_encoder_decoder_res512.pt", "encoder-decoder", "173 M", 512),
}
"""By the names that stand for them wherever a file of weights is asked for."""
_PART = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(rf"hf:/{{1,2}}({_PART}/{_PART})/([^@]+?)(?:@([\w./-]+))?")  # pathlib makes one slash of two


def weights_path(weights: Path | str) -> Path:
    """The file that is meant, downloaded if need be.

    Args:
        weights: ``pretrained``, a name of ``PUBLISHED``, ``hf://OWNER/REPO/FILE[@REVISION]``, or a path, which is
            itself.

    Raises:
        ValueError: for an unknown name, and where the file cannot be had, with the reason and what helps.
    """
    text = str(weights)
    if text == PRETRAINED:
        return _packaged()
    if text in PUBLISHED:
        return _downloaded(PUBLISHED[text].source, text)
    if text.startswith("hf:/"):
        return _downloaded(_hub_file(text), text)
    path = Path(weights)
    if not path.suffix and path.name == text and not path.exists():
        names = [PRETRAINED, *PUBLISHED]
        close = difflib.get_close_matches(text, names, n=1)
        raise ValueError(
            f"{text}: found neither weights of that name nor a file"
            + (f"; did you mean {close[0]}? " if close else ". ")
            + f"Expected {', '.join(names)}, hf://OWNER/REPO/FILE or a path. `elvsm weights` says what they are"
        )
    return path


def short_name(weights: Path | str) -> str:
    """A name for what is made of some weights: theirs, or their file's without its ending."""
    text = str(weights)
    return text if text in PUBLISHED else Path(_hub_file(text).file if text.startswith("hf:/") else text).stem


def trained_image_size(weights: Path | str) -> Optional[tuple[int, int]]:
    """(height, width) of the images that weights with a name were trained with; None for others, which do not say."""
    sizes = {PRETRAINED: PRETRAINED_IMAGE_SIZE, **{name: known.image_size for name, known in PUBLISHED.items()}}
    size = sizes.get(str(weights))
    return None if size is None else (size, size)


def push(repository: str, files: Sequence[Path], card: str, private: bool = False) -> str:
    """Puts files into a repository of models, which is made if there is none, in one commit; returns its page.

    Args:
        repository: OWNER/NAME.
        card: text of its README.md; one that is there stays.
        private: whether a new repository is for its owner alone.

    Raises:
        ValueError: where that is not possible, with the reason and what helps; nothing is changed then.
    """
    if not re.fullmatch(f"{_PART}/{_PART}", repository):
        raise ValueError(f"{repository}: expected OWNER/NAME, a repository on the Hugging Face Hub")
    import huggingface_hub as hub

    try:
        api = hub.HfApi()
        page = str(api.create_repo(repository, private=private, exist_ok=True))
        operations = [hub.CommitOperationAdd(file.name, file) for file in files]
        if not api.file_exists(repository, "README.md"):
            operations.append(hub.CommitOperationAdd("README.md", card.encode()))
        api.create_commit(repository, operations, commit_message=f"Upload {', '.join(file.name for file in files)}")
    except Exception as error:  # of which library depends on the client's version
        raise ValueError(f"{repository}: {_reason_of_push(error)}") from error
    return page


def _packaged() -> Path:
    for folder in _FOLDERS:
        if (folder / PRETRAINED_FILE).is_file():
            return folder / PRETRAINED_FILE
    raise ValueError(
        f"{PRETRAINED}: found no {PRETRAINED_FILE} in {' or '.join(map(str, _FOLDERS))}; expected the weights that "
        "come with this package. Get its assets/ again (git checkout assets, or install it anew), or name another file"
    )


def _hub_file(address: str) -> HubFile:
    match = _ADDRESS.fullmatch(address)
    if match is None or ".." in Path(match[2]).parts:
        raise ValueError(f"{address}: expected hf://OWNER/REPO/FILE or hf://OWNER/REPO/FILE@REVISION")
    return HubFile(*match.groups())


@cache  # the hub is asked, and the file checked, once
def _downloaded(source: HubFile, name: str) -> Path:
    import huggingface_hub as hub

    licence = next((known.licence for known in PUBLISHED.values() if known.source == source), f"see {source.page}")
    print(f"Weights {name}: {source}\nLicence: {licence}", file=sys.stderr)
    try:
        path = Path(hub.hf_hub_download(source.repository, source.file, revision=source.revision))
    except Exception as error:  # of which library depends on the client's version
        raise ValueError(f"{name}: {_reason(error, source)}") from error
    _check_content(path, name)
    return path


def _check_content(path: Path, name: str) -> None:
    """Compares a large file of the cache with its checksum, which is what the cache calls it; the client compares
    sizes alone."""
    stored = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", stored) and _sha256(path) != stored:
        path.resolve().unlink()
        path.unlink()
        raise ValueError(
            f"{name}: the checksum of the downloaded file is not {stored}, which the server gave for it; the file was "
            "deleted. Give the command again to download it anew"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: BaseException, source: HubFile) -> str:
    """Why something could not be had from the hub, and what helps."""
    from huggingface_hub import constants, errors

    causes, status = _causes(error)
    if isinstance(error, errors.GatedRepoError):
        return f"{source.page} is gated. Accept its terms there, then log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {source.page}, or it is private. Check its name; for a private one log in with "
            "`hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{source.page} has no revision {source.revision}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{source.page} holds no file {source.file} (any more){_listing(source)}"
    if any(isinstance(x, OSError) and x.errno in (errno.ENOSPC, errno.EDQUOT) for x in causes):
        return f"the disk of the cache, {constants.HF_HUB_CACHE}, is full. Make room, or set HF_HOME to another folder"
    by_hand = f"Or download {source.file} from {source.page} by other means and give its path"
    if any(isinstance(x, errors.OfflineModeIsEnabled) for x in causes):
        return f"it is not in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. Unset it once. {by_hand}"
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status}. Try again later. {by_hand}"
    return (
        f"it is not in the cache, and {constants.ENDPOINT} cannot be reached, or broke off ({causes[-1]!r}). Nothing "
        f"half-downloaded is used. Check the network and give the command again. {by_hand}"
    )


def _reason_of_push(error: Exception) -> str:
    from huggingface_hub import constants, errors

    causes, status = _causes(error)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return "may not be written to. Log in with `hf auth login` and a token that may, or set HF_TOKEN"
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status} ({error})"
    return f"{constants.ENDPOINT} cannot be reached, or broke off ({causes[-1]!r})"


def _causes(error: BaseException) -> tuple[list[BaseException], Optional[int]]:
    """An error and those behind it, and the status with which the hub answered, if one of them says it."""
    from huggingface_hub import errors

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answers = [getattr(x, "response", None) for x in causes if isinstance(x, errors.HfHubHTTPError)]
    return causes, next((answer.status_code for answer in answers if answer is not None), None)


def _listing(source: HubFile) -> str:
    """What a repository holds instead of a file."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(source.repository, revision=source.revision).siblings or ()
        found = sorted(file.rfilename for file in files)
    except Exception:  # the message is complete without
        return ""
    close = difflib.get_close_matches(source.file, found, n=1)
    listed = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
    first = f"hf://{source.repository}/{(close or found or ['FILE'])[0]}"
    return f". It holds {listed or 'nothing'}; name one as {first}"
