"""The furniture of Debian's package `sweethome3d-furniture`: getting it, reading its catalogues, choosing from it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from elvsm_nerfstudio.files import remove_partial, whole

PACKAGE = "sweethome3d-furniture"
CATALOGUE = "PluginFurnitureCatalog.properties"
TOP = "dropOnTopElevation"

SPLITS = ("train", "val", "test")
HELD_OUT_SHARE = 60 / 820
"""Share of the validation split, and of the test split."""


class InputError(ValueError):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class CatalogueObject:
    """One model of a furniture library."""

    name: str
    """Scene name: unique, and safe as a folder name."""
    title: str
    category: str
    creator: str
    library: str
    licence: str
    model: Path
    """The OBJ file."""
    rotation: tuple[float, ...]
    """Row-major 3x3 rotation that sets the model upright, applied to the coordinates of the OBJ file."""
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Real width (left to right), depth (front to back) and height in metres; zeros if the catalogue has none."""
    elevation: float = 0.0
    """Metres from the floor to its lower end."""
    top: float | None = None
    """Metres from its lower end to the surface that things are put on, where that is not its upper end."""

    @property
    def split(self) -> str:
        """train, val or test. Depends on nothing but the name."""
        position = hash_fraction(self.name)
        if position < HELD_OUT_SHARE:
            return "val"
        return "test" if position < 2 * HELD_OUT_SHARE else "train"

    def as_json(self) -> dict[str, str]:
        """What the catalogue says about the object; CC-BY asks for the creator and the licence."""
        return {key: getattr(self, key) for key in ("title", "category", "library", "licence", "creator")}


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    # This prefix puts 63 of the 820 objects into val and 59 into test.
    return int.from_bytes(hashlib.sha256(f"elvsm/{text}".encode()).digest()[:6], "big") / 2**48


def user_cache(name: str) -> Path:
    """A folder of ours in the user's cache folder; the package's own would bring torch along."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elvsm-nerfstudio" / name


def prepare_furniture(cache: Path | None) -> Path:
    """Downloads and unpacks the furniture unless that was done before, by default into the user's cache folder.

    Returns:
        The folder that holds one folder per library.
    """
    cache = cache or user_cache("furniture")
    libraries = cache / "libraries"
    if libraries.is_dir():
        return libraries
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--furniture-cache: found {cache}, which cannot be made a folder ({error.strerror}); expected a folder "
            "that can be written to. Choose another one."
        ) from error
    remove_partial(cache)
    packages = sorted(cache.glob(f"{PACKAGE}_*.deb"))
    unpack_furniture(packages[-1] if packages else download_furniture(cache), libraries)
    return libraries


def download_furniture(cache: Path) -> Path:
    """Downloads the package with apt-get, which needs no rights, and returns the file."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise InputError(
            f"--furniture-cache: found no furniture in {cache} and no apt-get and dpkg-deb to fetch it with; expected "
            f"a Debian or Ubuntu system. Make the folder {cache / 'libraries'} on such a system with this script, and "
            "copy it here."
        )
    print(f"Downloading {PACKAGE} (120 MB) to {cache}", file=sys.stderr)
    command = ["apt-get", "download", PACKAGE]
    with TemporaryDirectory(dir=cache, prefix=".", suffix=".partial") as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0 and os.geteuid() == 0:
            print("apt-get does not find the package; running apt-get update", file=sys.stderr)
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise InputError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()}\nIf the package is unknown, run `sudo apt-get "
                "update` (on Ubuntu also `sudo add-apt-repository universe`) and start again. Or put the package file "
                f"into {cache} by hand."
            )
        downloaded = next(Path(folder).glob("*.deb"))
        return downloaded.replace(cache / downloaded.name)


def unpack_furniture(package: Path, libraries: Path) -> None:
    """Unpacks the package, and the libraries in it, into the folder `libraries`, which appears when all is done."""
    print(f"Unpacking {package.name} (377 MB)", file=sys.stderr)
    with TemporaryDirectory(dir=libraries.parent, prefix=".", suffix=".partial") as folder, whole(libraries) as partial:
        done = subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, text=True)
        archives = sorted(Path(folder).glob("usr/share/sweethome3d/furniture/*.sh3f"))
        if done.returncode != 0 or not archives:
            cause = done.stderr.strip() or "there is no *.sh3f in it"
            raise InputError(
                f"--furniture-cache: found {package}, which cannot be unpacked ({cause}); "
                f"expected Debian's package {PACKAGE}. Delete the file, and start again to download it."
            )
        for archive in archives:
            with zipfile.ZipFile(archive) as content:
                content.extractall(partial / archive.stem)


def read_furniture(libraries: Path, wanted: tuple[str, ...]) -> list[CatalogueObject]:
    """Reads the catalogues of the wanted libraries (all if none is named); the objects are sorted by name."""
    found = sorted(catalogue.parent.name for catalogue in libraries.glob(f"*/{CATALOGUE}"))
    if not found:
        raise InputError(
            f"--furniture-cache: found no */{CATALOGUE} in {libraries}; expected the unpacked furniture libraries. "
            "Delete that folder, and start again to unpack them anew."
        )
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise InputError(
            f"--libraries: found {', '.join(unknown)}; expected some of {', '.join(found)}. Correct the names."
        )
    objects = [item for library in wanted or found for item in read_catalogue(libraries / library)]
    objects.sort(key=lambda item: item.name)
    for before, after in pairwise(objects):
        if before.name == after.name:
            raise InputError(f"--libraries: {before.model} and {after.model} both get the scene name {after.name}.")
    return objects


def read_catalogue(library: Path) -> list[CatalogueObject]:
    """Reads a library's catalogue: lines `property#number=value`, and `license=...` for all of them."""
    properties = read_properties(library / CATALOGUE)
    licence = " ".join(properties.get("license", "unknown").split())
    objects = []
    for key, model in properties.items():
        if not key.startswith("model#"):
            continue
        number = key.removeprefix("model#")
        rotation = properties.get(f"modelRotation#{number}", "1 0 0 0 1 0 0 0 1")
        objects.append(
            CatalogueObject(
                name=scene_name(library.name, model),
                title=properties.get(f"name#{number}", ""),
                category=properties.get(f"category#{number}", ""),
                creator=properties.get(f"creator#{number}", ""),
                library=library.name,
                licence=licence,
                model=library / model.lstrip("/"),
                rotation=tuple(float(value) for value in rotation.split()),
                size=tuple(float(properties.get(f"{side}#{number}", 0)) / 100 for side in ("width", "depth", "height")),
                elevation=float(properties.get(f"elevation#{number}", 0)) / 100,
                top=float(properties[f"{TOP}#{number}"]) / 100 if f"{TOP}#{number}" in properties else None,
            )
        )
    return objects


def read_properties(path: Path) -> dict[str, str]:
    r"""Reads a Java properties file: Latin-1, \uXXXX and \x escapes, lines that go on after a final backslash."""
    text = re.sub(r"\\\r?\n[ \t]*", "", path.read_text(encoding="latin-1"))
    properties = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "!")):
            properties[key.strip()] = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", _unescape, value.strip())
    return properties


def _unescape(match: re.Match) -> str:
    return chr(int(match[1], 16)) if match[1] else match[2]


def scene_name(library: str, model: str) -> str:
    """The scene name of a model, given its path in the library.

    The libraries keep a model in /<library>/<model>/<model>.obj, so parts that say nothing new are left out.
    """
    path = re.sub(r"\.obj$", "", model.strip("/"), flags=re.IGNORECASE)
    slugs: list[str] = []
    for part in (library, *path.split("/")):
        slug = re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")
        if slug not in slugs[-1:]:
            slugs.append(slug)
    return "-".join(slugs)


def select_objects(
    objects: list[CatalogueObject], num_objects: int | None, num_val: int | None, num_test: int | None
) -> list[CatalogueObject]:
    """Takes that many objects, of each split in the order of their names' hash; see the options of the script.

    Small sets hold at least one object of each split that the libraries have, and are part of the larger ones.
    """
    pools = {split: [item for item in objects if item.split == split] for split in SPLITS}
    total = len(objects) if num_objects is None else num_objects
    if not len(SPLITS) <= total <= len(objects):
        raise InputError(
            f"--num-objects: found {total}; expected {len(SPLITS)} to {len(objects)}, the objects of the chosen "
            "libraries. Change it, or choose other --libraries."
        )

    def share(split: str) -> int:
        return min(len(pools[split]), max(1, round(total * len(pools[split]) / len(objects))))

    num_val = share("val") if num_val is None else num_val
    num_test = share("test") if num_test is None else num_test
    num_train = len(pools["train"]) if num_objects is None else total - num_val - num_test
    selected = []
    for split, count in zip(SPLITS, (num_train, num_val, num_test), strict=True):
        if not (1 if split == "train" else 0) <= count <= len(pools[split]):
            raise InputError(
                f"--num-objects, --num-val-objects, --num-test-objects: found {num_train} train, {num_val} val and "
                f"{num_test} test objects; the chosen libraries hold {len(pools['train'])}, {len(pools['val'])} and "
                f"{len(pools['test'])}, and at least one must be of train. Change the numbers or --libraries."
            )
        selected += sorted(pools[split], key=lambda item: hash_fraction(item.name))[:count]
    return sorted(selected, key=lambda item: item.name)
