#!/usr/bin/env python
"""Makes a multi-view data set of objects: 820 pieces of furniture, each rendered from many known cameras.

The models come from Debian's package `sweethome3d-furniture` (CC0 and CC-BY 3.0; `scenes.json` names licence and
creator of each). Every object becomes one nerfstudio scene, `<output>/<name>/transforms.json` and `images/*.png`;
`scenes.json` lists the scenes with their split, `evaluation_index.json` says which views of a test scene are given and
which are to be predicted, and `contact_sheet.png` shows a part of it all.

    python scripts/make_object_scenes.py --output data/objects --resolution 128 --views-per-object 24

A run that was stopped, by whatever means, goes on where it was when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INSTALL_HINT = 'pip install "elvsm-nerfstudio[objects]"'

try:
    import numpy as np
    import tyro
    from object_renderer import EmbreeRenderer, GLRenderer, NoGLContextError, ObjectMesh, Renderer, load_object
    from PIL import Image
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    sys.exit(f"error: the Python package '{error.name}' is missing. Install it: {INSTALL_HINT}")

PACKAGE = "sweethome3d-furniture"
CATALOGUE = "PluginFurnitureCatalog.properties"
COLLECTION_FORMAT = "elvsm-scenes/1"
SCENE_FORMAT = "elvsm-objects/1"
"""Goes up when the pictures or poses of a scene change for the same settings."""

SPLITS = ("train", "val", "test")
HELD_OUT_SHARE = 60 / 820
"""Share of the validation split, and of the test split."""

FIELD_OF_VIEW_DEGREES = 50.0
ELEVATION_RANGE_DEGREES = (-10.0, 60.0)
FRAME_MARGIN = 0.05
"""Share of the half picture that stays free on each side."""
MIN_DISTANCE = 1.5
"""In radii of the bounding sphere: a rod seen along its axis would otherwise pull the camera right up to it."""

NUM_CONTEXT_VIEWS = 4
NUM_TARGET_VIEWS = 4
PNG_COMPRESSION = 1

SHEET_COLUMNS, SHEET_ROWS = 12, 8
SHEET_CELL = 128

console = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """Prints a line as it is: paths may hold brackets, and a log file is no place to wrap lines at 80 characters."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class InputError(Exception):
    """Something the user can put right; the message says how."""


def default_furniture_cache() -> Path:
    """The folder for the downloaded furniture, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "elvsm-nerfstudio" / "furniture"


@dataclass
class Args:
    """Renders the furniture of Debian's package sweethome3d-furniture into a collection of nerfstudio scenes."""

    output: Path
    """Folder for the scenes. May hold scenes of an earlier run with the same settings; those are kept."""
    resolution: int = 128
    """Width and height of the pictures in pixels."""
    views_per_object: int = 24
    """Pictures of each object."""
    num_objects: int | None = None
    """How many objects to render, all splits together; all of them if not given. A smaller set is part of a larger."""
    num_val_objects: int | None = None
    """How many of them are of the validation split; in proportion if not given."""
    num_test_objects: int | None = None
    """How many of them are of the test split; in proportion if not given."""
    seed: int = 0
    """Seed of the cameras. The split does not depend on it."""
    libraries: tuple[str, ...] = ()
    """Furniture libraries to take objects from, for example BlendSwap-CC-0 Scopia; all of them if not given."""
    renderer: Literal["auto", "moderngl", "embreex"] = "auto"
    """auto takes moderngl (OpenGL), and embreex (ray casting on the CPU, slower) only where there is no OpenGL."""
    num_workers: int | None = None
    """Processes that render; as many as there are CPU cores if not given."""
    furniture_cache: Path | None = None
    """Folder for the downloaded furniture; elvsm-nerfstudio/furniture in the user's cache folder if not given."""


# ---------------------------------------------------------------------------------------------------------------------
# The furniture
# ---------------------------------------------------------------------------------------------------------------------


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

    @property
    def split(self) -> str:
        """train, val or test. Depends on nothing but the name."""
        position = hash_fraction(self.name)
        if position < HELD_OUT_SHARE:
            return "val"
        return "test" if position < 2 * HELD_OUT_SHARE else "train"


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only. The prefix puts 63 of the 820 objects into val, 59 into test."""
    return int.from_bytes(hashlib.sha256(f"elvsm/{text}".encode()).digest()[:6], "big") / 2**48


def prepare_furniture(cache: Path) -> Path:
    """Downloads and unpacks the furniture unless that was done before.

    Returns:
        The folder that holds one folder per library.
    """
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
    say(f"Downloading {PACKAGE} (120 MB) to {cache}")
    partial = cache / ".download.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    command = ["apt-get", "download", PACKAGE]
    done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
    if done.returncode != 0 and os.geteuid() == 0:
        say("apt-get does not find the package; running apt-get update")
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}\n"
            "If the package is unknown, run `sudo apt-get update` (on Ubuntu also `sudo add-apt-repository universe`) "
            f"and start again. Or put the package file into {cache} by hand."
        )
    downloaded = next(partial.glob("*.deb"))
    package = cache / downloaded.name
    os.replace(downloaded, package)
    shutil.rmtree(partial)
    return package


def unpack_furniture(package: Path, libraries: Path) -> None:
    """Unpacks the package, and the libraries in it, into the folder `libraries`, which appears when all is done."""
    say(f"Unpacking {package.name} (377 MB)")
    partial = libraries.with_name(".libraries.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    done = subprocess.run(["dpkg-deb", "-x", package, partial / "package"], capture_output=True, text=True)
    archives = sorted(partial.glob("package/usr/share/sweethome3d/furniture/*.sh3f"))
    if done.returncode != 0 or not archives:
        cause = done.stderr.strip() or "there is no *.sh3f in it"
        raise InputError(
            f"--furniture-cache: found {package}, which cannot be unpacked ({cause}); "
            f"expected Debian's package {PACKAGE}. Delete the file, and start again to download it."
        )
    for archive in archives:
        with zipfile.ZipFile(archive) as content:
            content.extractall(partial / "libraries" / archive.stem)
    os.rename(partial / "libraries", libraries)
    shutil.rmtree(partial)


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
    for before, after in zip(objects, objects[1:], strict=False):
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


# ---------------------------------------------------------------------------------------------------------------------
# Choosing objects and cameras
# ---------------------------------------------------------------------------------------------------------------------


def select_objects(objects: list[CatalogueObject], args: Args) -> list[CatalogueObject]:
    """Takes as many objects of each split as the options ask for, in the order of their names' hash.

    Small sets hold at least one object of each split that the libraries have, and are part of the larger ones.
    """
    pools = {split: [item for item in objects if item.split == split] for split in SPLITS}
    total = len(objects) if args.num_objects is None else args.num_objects
    if not len(SPLITS) <= total <= len(objects):
        raise InputError(
            f"--num-objects: found {total}; expected {len(SPLITS)} to {len(objects)}, the objects of the chosen "
            "libraries. Change it, or choose other --libraries."
        )

    def share(split: str) -> int:
        return min(len(pools[split]), max(1, round(total * len(pools[split]) / len(objects))))

    num_val = share("val") if args.num_val_objects is None else args.num_val_objects
    num_test = share("test") if args.num_test_objects is None else args.num_test_objects
    num_train = len(pools["train"]) if args.num_objects is None else total - num_val - num_test
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


def random_generator(seed: int, name: str, purpose: str) -> np.random.Generator:
    """Random numbers that depend on these three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def view_directions(seed: int, name: str, num_views: int) -> np.ndarray:
    """[views, 3] unit vectors from the object to its cameras: azimuth and elevation are uniform in their ranges."""
    uniform = random_generator(seed, name, "cameras").uniform(size=(num_views, 2))
    low, high = np.radians(ELEVATION_RANGE_DEGREES)
    azimuth, elevation = 2 * np.pi * uniform[:, 0], low + (high - low) * uniform[:, 1]
    return np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1
    )


def focal_length(resolution: int) -> float:
    """In pixels."""
    return resolution / 2 / math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2))


def fitted_poses(mesh: ObjectMesh, directions: np.ndarray) -> np.ndarray:
    """Cameras that look at the origin, as near as they can be without cropping the object.

    Args:
        mesh: the object, its bounding box centred on the origin.
        directions: [views, 3] unit vectors from the origin to the cameras.

    Returns:
        [views, 4, 4] camera-to-world, OpenGL axes (+X right, +Y up, -Z forward), world +Z up.
    """
    points = mesh.positions.reshape(-1, 3)
    half_extent = math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2)) * (1 - FRAME_MARGIN)
    nearest = MIN_DISTANCE * float(np.linalg.norm(points, axis=-1).max())
    poses = np.tile(np.eye(4), (len(directions), 1, 1))
    for pose, backward in zip(poses, directions, strict=True):
        right = np.cross([0.0, 0.0, 1.0], backward)
        right /= np.linalg.norm(right)
        pose[:3, :3] = np.stack([right, np.cross(backward, right), backward], axis=-1)
        in_camera = points @ pose[:3, :3].astype(np.float32)
        # A point is inside the frame if |x| and |y| are at most half_extent * (distance - z).
        fits = np.abs(in_camera[:, :2]).max(axis=-1) / half_extent + in_camera[:, 2]
        pose[:3, 3] = max(float(fits.max()), nearest) * backward
    return poses


def evaluation_views(directions: np.ndarray, generator: np.random.Generator) -> dict[str, list[int]]:
    """Context views far apart from each other, beginning with view 0, and random target views among the others.

    Args:
        directions: [views, 3] unit vectors from the object to its cameras.
        generator: chooses the target views.

    Returns:
        {"context": frame numbers, "target": frame numbers}, disjoint.
    """
    context = [0]
    while len(context) < NUM_CONTEXT_VIEWS:
        closeness = (directions @ directions[context].T).max(axis=1)
        closeness[context] = np.inf
        context.append(int(closeness.argmin()))
    others = np.setdiff1d(np.arange(len(directions)), context)
    target = np.sort(generator.choice(others, size=NUM_TARGET_VIEWS, replace=False))
    return {"context": context, "target": target.tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing one scene
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the pictures and poses of a scene depend on, besides the object."""

    resolution: int
    views_per_object: int
    seed: int
    renderer: str

    def as_json(self) -> dict:
        """As it stands in transforms.json under "made_with"."""
        return {"format": SCENE_FORMAT, **vars(self)}


def partial_folder(output: Path, item: CatalogueObject) -> Path:
    """Where a scene is kept until it is complete."""
    return output / f".{item.name}.partial"


def image_name(index: int) -> str:
    """File name of a picture, relative to the scene's folder."""
    return f"images/{index:03d}.png"


def write_scene(item: CatalogueObject, output: Path, settings: Settings, renderer: Renderer) -> None:
    """Renders one object into `<output>/<name>`, a folder which appears when the scene is complete."""
    mesh = load_object(item.model, np.reshape(item.rotation, (3, 3)))
    poses = fitted_poses(mesh, view_directions(settings.seed, item.name, settings.views_per_object))
    focal = focal_length(settings.resolution)
    pictures = renderer.render(mesh, poses, focal)
    if not pictures[..., 3].any():
        raise ValueError(f"nothing can be seen of {item.model.name}")

    partial = partial_folder(output, item)
    (partial / "images").mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(partial / image_name(index), compress_level=PNG_COMPRESSION)
    write_json(partial / "transforms.json", scene_json(item, settings, focal, poses))
    os.rename(partial, output / item.name)


def scene_json(item: CatalogueObject, settings: Settings, focal: float, poses: np.ndarray) -> dict:
    """The content of a scene's transforms.json, in nerfstudio's format."""
    side = settings.resolution
    return {
        "camera_model": "OPENCV",
        "w": side,
        "h": side,
        "fl_x": focal,
        "fl_y": focal,
        "cx": side / 2,
        "cy": side / 2,
        "made_with": settings.as_json(),
        "object": describe_object(item),
        "frames": [
            {"file_path": image_name(index), "transform_matrix": pose.tolist()} for index, pose in enumerate(poses)
        ],
    }


def describe_object(item: CatalogueObject) -> dict[str, str]:
    """What the catalogue says about the object; CC-BY asks for the creator and the licence."""
    return {
        "title": item.title,
        "category": item.category,
        "library": item.library,
        "licence": item.licence,
        "creator": item.creator,
    }


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that is either the old one or the new one, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering many scenes
# ---------------------------------------------------------------------------------------------------------------------


def find_finished(output: Path, settings: Settings) -> set[str]:
    """The names of the complete scenes in the output folder. One that was made with other settings is an error."""
    finished = set()
    for transforms in sorted(output.glob("*/transforms.json")):
        scene = transforms.parent
        made_with = read_made_with(transforms)
        if made_with != settings.as_json():
            raise InputError(
                f"--output: found the scene {scene} made with {describe_settings(made_with)}; asked for "
                f"{describe_settings(settings.as_json())}. Choose another --output, or delete that folder."
            )
        images = {f"images/{image.name}" for image in scene.glob("images/*.png")}
        if images == {image_name(index) for index in range(settings.views_per_object)}:
            finished.add(scene.name)
    return finished


def read_made_with(transforms: Path) -> dict | None:
    """The settings a scene was made with; None if the file does not say so in a readable way."""
    try:
        return json.loads(transforms.read_text()).get("made_with")
    except (ValueError, AttributeError):
        return None


def describe_settings(settings: dict | None) -> str:
    """Settings in words, for an error message."""
    return "unknown settings" if settings is None else ", ".join(f"{key}={settings[key]}" for key in sorted(settings))


def choose_renderer(requested: str) -> str:
    """moderngl or embreex; tries whether there is OpenGL where that matters."""
    if requested != "embreex":
        try:
            renderer = GLRenderer(resolution=8)
            say(f"Rendering with OpenGL on {renderer.describe()}")
            renderer.release()
            return "moderngl"
        except ImportError as error:
            raise InputError(
                f"--renderer: found {requested}, which needs the Python package '{error.name}', and that is missing. "
                f"Install it: {INSTALL_HINT}"
            ) from error
        except NoGLContextError as error:
            if requested == "moderngl":
                raise InputError(
                    f"--renderer: found moderngl, but there is no OpenGL 3.3 to be had from EGL ({error}). Install "
                    "Mesa's software renderer (Debian: libegl1 libgl1-mesa-dri), or take --renderer embreex."
                ) from error
            say(
                f"WARNING: no OpenGL 3.3 to be had from EGL ({error}). Rendering with embreex instead, "
                "two to four times slower. On Debian, libegl1 and libgl1-mesa-dri bring OpenGL without a GPU.",
                style="bold red",
            )
    try:
        import embreex  # noqa: F401
    except ImportError as error:
        raise InputError(f"--renderer embreex: the Python package is missing. Install it: {INSTALL_HINT}") from error
    return "embreex"


class Worker:
    """One rendering process: its renderer is made once, as an OpenGL context is costly."""

    renderer: Renderer

    @classmethod
    def start(cls, renderer_name: str, resolution: int) -> None:
        """Runs in each process when it starts."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one sees to the others
        threading.Thread(target=cls._end_with_parent, daemon=True).start()
        # The processes are the parallelism; more threads of llvmpipe in each of them would only compete.
        os.environ.setdefault("LP_NUM_THREADS", "1")
        cls.renderer = GLRenderer(resolution) if renderer_name == "moderngl" else EmbreeRenderer(resolution)

    @staticmethod
    def _end_with_parent() -> None:
        # Without this, a kill -9 of the first process would leave the others waiting for work forever.
        multiprocessing.parent_process().join()
        os._exit(1)

    @classmethod
    def render(cls, item: CatalogueObject, output: Path, settings: Settings) -> str | None:
        """Renders one scene; returns what went wrong, or None."""
        try:
            write_scene(item, output, settings, cls.renderer)
        except Exception as error:  # a broken model must not end the run, whatever it makes its reader raise
            return f"{type(error).__name__}: {error}"
        return None


def render_scenes(
    items: list[CatalogueObject], output: Path, settings: Settings, num_workers: int, num_finished: int
) -> dict[str, str]:
    """Renders the objects in several processes. Returns {scene name: what went wrong} for those that failed."""
    failures: dict[str, str] = {}
    if not items:
        return failures
    executor = ProcessPoolExecutor(
        max_workers=min(num_workers, len(items)),
        mp_context=multiprocessing.get_context("spawn"),  # an OpenGL context does not survive a fork
        initializer=Worker.start,
        initargs=(settings.renderer, settings.resolution),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    try:
        with Progress(*columns, console=console) as progress:
            total = num_finished + len(items)
            bar = progress.add_task("objects", total=total, completed=num_finished, rate=0.0)
            futures = {executor.submit(Worker.render, item, output, settings): item for item in items}
            for num_done, future in enumerate(as_completed(futures), start=1):
                failure = future.result()
                if failure is not None:
                    failures[futures[future].name] = failure
                rate = num_done * settings.views_per_object / (time.monotonic() - started)
                progress.update(bar, advance=1, rate=rate)
    except BrokenProcessPool as error:
        raise InputError(
            "A rendering process died, most likely of too little memory. The finished scenes are kept: start the same "
            "command again, with a smaller --num-workers if need be."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# Files about all scenes
# ---------------------------------------------------------------------------------------------------------------------


def write_collection(output: Path, items: list[CatalogueObject], settings: Settings) -> None:
    """Writes scenes.json and evaluation_index.json for complete scenes, which are sorted by name."""
    index = {
        item.name: evaluation_views(
            view_directions(settings.seed, item.name, settings.views_per_object),
            random_generator(settings.seed, item.name, "evaluation"),
        )
        for item in items
        if item.split == "test"
    }
    write_json(output / "evaluation_index.json", index)
    collection = {
        "format": COLLECTION_FORMAT,
        "evaluation_index": "evaluation_index.json",
        "resolution": settings.resolution,
        "views_per_object": settings.views_per_object,
        "seed": settings.seed,
        "scenes": [
            {"name": item.name, "path": item.name, "split": item.split, **describe_object(item)} for item in items
        ],
    }
    write_json(output / "scenes.json", collection)


def report_failures(output: Path, items: list[CatalogueObject], failures: dict[str, str]) -> None:
    """Lists the objects that could not be rendered, on the screen and in failures.json; no failures, no file."""
    path = output / "failures.json"
    if not failures:
        path.unlink(missing_ok=True)
        return
    models = {item.name: item.model for item in items}
    write_json(path, {name: {"model": str(models[name]), "error": failures[name]} for name in sorted(failures)})
    say(f"{len(failures)} objects could not be rendered and were left out (also in {path}):", style="bold red")
    for name in sorted(failures):
        say(f"  {name}: {failures[name]}")


def write_contact_sheet(output: Path, items: list[CatalogueObject], resolution: int) -> None:
    """Writes contact_sheet.png: the first view of some objects of each split, on white."""
    shown = sheet_objects(items)
    cell = min(resolution, SHEET_CELL)
    rows = math.ceil(len(shown) / SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * cell, rows * cell), "white")
    for position, item in enumerate(shown):
        with Image.open(output / item.name / image_name(0)) as picture:
            on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        corner = (position % SHEET_COLUMNS * cell, position // SHEET_COLUMNS * cell)
        sheet.paste(on_white.resize((cell, cell), Image.Resampling.BOX), corner)
    partial = output / ".contact_sheet.png.partial"
    sheet.save(partial, format="PNG")
    os.replace(partial, output / "contact_sheet.png")


def sheet_objects(items: list[CatalogueObject]) -> list[CatalogueObject]:
    """Up to a sheet full: a quarter of val, a quarter of test, the rest of train, in an order that looks random."""
    room = SHEET_COLUMNS * SHEET_ROWS
    in_order = sorted(items, key=lambda item: hash_fraction(f"contact sheet/{item.name}"))
    held_out = [item for split in ("val", "test") for item in [i for i in in_order if i.split == split][: room // 4]]
    train = [item for item in in_order if item.split == "train"][: room - len(held_out)]
    return [item for item in in_order if item in held_out or item in train]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def check_numbers(args: Args) -> None:
    """Refuses numbers that can lead to nothing, before anything is downloaded."""
    least_views = NUM_CONTEXT_VIEWS + NUM_TARGET_VIEWS
    checks = (
        ("--resolution", args.resolution, 8, ""),
        ("--views-per-object", args.views_per_object, least_views, ", as the evaluation index takes that many"),
        ("--num-workers", args.num_workers, 1, ""),
        ("--num-val-objects", args.num_val_objects, 0, ""),
        ("--num-test-objects", args.num_test_objects, 0, ""),
    )
    for option, found, least, reason in checks:
        if found is not None and found < least:
            raise InputError(f"{option}: found {found}; expected at least {least}{reason}. Give a larger number.")


def make_object_scenes(args: Args) -> None:
    """The whole of it: furniture, scenes, files about all scenes."""
    check_numbers(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output: found {args.output}, which cannot be made a folder ({error.strerror}). Choose another one."
        ) from error
    libraries = prepare_furniture(args.furniture_cache or default_furniture_cache())
    furniture = read_furniture(libraries, args.libraries)
    items = select_objects(furniture, args)
    settings = Settings(args.resolution, args.views_per_object, args.seed, choose_renderer(args.renderer))

    finished = find_finished(args.output, settings)
    to_render = [item for item in items if item.name not in finished]
    for item in furniture:
        shutil.rmtree(partial_folder(args.output, item), ignore_errors=True)
    for item in to_render:
        shutil.rmtree(args.output / item.name, ignore_errors=True)
    num_workers = args.num_workers or os.cpu_count() or 1
    started = time.monotonic()
    failures = render_scenes(to_render, args.output, settings, num_workers, len(items) - len(to_render))
    seconds = time.monotonic() - started

    complete = [item for item in items if item.name not in failures]
    report_failures(args.output, items, failures)
    if not complete:
        raise InputError("No object could be rendered.")
    write_contact_sheet(args.output, complete, settings.resolution)
    write_collection(args.output, complete, settings)

    num_images = (len(to_render) - len(failures)) * settings.views_per_object
    counts = ", ".join(f"{sum(item.split == split for item in complete)} {split}" for split in SPLITS)
    say(f"{len(complete)} objects ({counts}) in {args.output}")
    say(
        f"{num_images} images rendered in {seconds:.1f} s, {num_images / max(seconds, 1e-9):.0f} images/s "
        f"with {num_workers} processes; {len(items) - len(to_render)} objects were there already"
    )


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        make_object_scenes(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The finished scenes are kept: start the same command again to go on.")


if __name__ == "__main__":
    main()
