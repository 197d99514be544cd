"""A multi-view data set of furniture, each piece rendered from many known cameras."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elvsm_nerfstudio.files import remove_partial, whole
from elvsm_nerfstudio.synthetic.furniture import (
    SPLITS,
    CatalogueObject,
    InputError,
    hash_fraction,
    prepare_furniture,
    read_furniture,
    select_objects,
)
from elvsm_nerfstudio.synthetic.object_renderer import EmbreeRenderer, GLRenderer, NoGLContextError, Renderer
from elvsm_nerfstudio.synthetic.object_scene import (
    NUM_CONTEXT_VIEWS,
    NUM_TARGET_VIEWS,
    Settings,
    evaluation_views,
    image_name,
    random_generator,
    view_directions,
    write_json,
    write_scene,
)

INSTALL_HINT = 'pip install "elvsm-nerfstudio[objects]"'
COLLECTION_FORMAT = "elvsm-scenes/1"
SHEET_COLUMNS, SHEET_ROWS = 12, 8
SHEET_CELL = 128

console = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """Prints a line as it is: paths may hold brackets, and a log file is no place to wrap lines at 80 characters."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@dataclass
class ObjectOptions:
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
    splits: tuple[Literal["train", "val", "test"], ...] = SPLITS
    """Of those, the splits to render, for example test alone; the pictures are those of the whole set."""
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
    """Writes scenes.json, and evaluation_index.json where there are test scenes.

    Args:
        items: complete scenes, sorted by name.
    """
    index = {
        item.name: evaluation_views(
            view_directions(settings.seed, item.name, settings.views_per_object),
            random_generator(settings.seed, item.name, "evaluation"),
        )
        for item in items
        if item.split == "test"
    }
    if index:
        write_json(output / "evaluation_index.json", index)
    else:
        (output / "evaluation_index.json").unlink(missing_ok=True)
    collection = {
        "format": COLLECTION_FORMAT,
        "evaluation_index": "evaluation_index.json" if index else None,
        "resolution": settings.resolution,
        "views_per_object": settings.views_per_object,
        "seed": settings.seed,
        "scenes": [{"name": item.name, "path": item.name, "split": item.split, **item.as_json()} for item in items],
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
    # Not evaluation.report.sheet: importing it brings torch, and it has no resizing.
    shown = sheet_objects(items)
    cell = min(resolution, SHEET_CELL)
    rows = math.ceil(len(shown) / SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * cell, rows * cell), "white")
    for position, item in enumerate(shown):
        with Image.open(output / item.name / image_name(0)) as picture:
            on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        corner = (position % SHEET_COLUMNS * cell, position // SHEET_COLUMNS * cell)
        sheet.paste(on_white.resize((cell, cell), Image.Resampling.BOX), corner)
    with whole(output / "contact_sheet.png") as partial:
        sheet.save(partial, format="PNG")


def sheet_objects(items: list[CatalogueObject]) -> list[CatalogueObject]:
    """Up to a sheet full: a quarter of val, a quarter of test, the rest of train, in an order that looks random."""
    room = SHEET_COLUMNS * SHEET_ROWS
    in_order = sorted(items, key=lambda item: hash_fraction(f"contact sheet/{item.name}"))
    train, val, test = ([item for item in in_order if item.split == split] for split in SPLITS)
    held_out = val[: room // 4] + test[: room // 4]
    shown = held_out + train[: room - len(held_out)]
    return [item for item in in_order if item in shown]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def check_numbers(args: ObjectOptions) -> None:
    """Refuses numbers that can lead to nothing, before anything is downloaded."""
    check_at_least(
        ("--num-val-objects", args.num_val_objects, 0, ""), ("--num-test-objects", args.num_test_objects, 0, "")
    )
    check_rendering(args.resolution, args.views_per_object, args.num_workers)


def check_rendering(resolution: int, views_per_object: int, num_workers: int | None) -> None:
    """The same for what all collections of objects have."""
    least_views = NUM_CONTEXT_VIEWS + NUM_TARGET_VIEWS
    check_at_least(
        ("--resolution", resolution, 8, ""),
        ("--views-per-object", views_per_object, least_views, ", as the evaluation index takes that many"),
        ("--num-workers", num_workers, 1, ""),
    )


def check_at_least(*checks: tuple[str, int | None, int, str]) -> None:
    """Raises InputError for numbers (option, number, least one, why) that are too small."""
    for option, found, least, reason in checks:
        if found is not None and found < least:
            raise InputError(f"{option}: found {found}; expected at least {least}{reason}. Give a larger number.")


def make_object_scenes(args: ObjectOptions) -> None:
    """The whole of it: furniture, scenes, files about all scenes."""
    check_numbers(args)
    make_folder(args.output)
    libraries = prepare_furniture(args.furniture_cache)
    furniture = read_furniture(libraries, args.libraries)
    selected = select_objects(furniture, args.num_objects, args.num_val_objects, args.num_test_objects)
    items = [item for item in selected if item.split in args.splits]
    if not items:
        raise InputError(
            f"--splits: found {' '.join(args.splits)}, of which there is no object among the {len(selected)} selected. "
            "Name other splits, or select more objects."
        )
    settings = Settings(args.resolution, args.views_per_object, args.seed, choose_renderer(args.renderer))
    make_collection(args.output, items, settings, args.num_workers or os.cpu_count() or 1)


def make_folder(output: Path) -> None:
    """Makes the folder of a collection."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output: found {output}, which cannot be made a folder ({error.strerror}). Choose another one."
        ) from error


def make_collection(output: Path, items: list[CatalogueObject], settings: Settings, num_workers: int) -> None:
    """Renders those objects that are not there yet, and writes the files about all of them.

    Args:
        items: sorted by name.
    """
    finished = find_finished(output, settings)
    to_render = [item for item in items if item.name not in finished]
    remove_partial(output)
    for item in to_render:
        shutil.rmtree(output / item.name, ignore_errors=True)
    num_finished = len(items) - len(to_render)
    started = time.monotonic()
    failures = render_scenes(to_render, output, settings, num_workers, num_finished)
    seconds = time.monotonic() - started

    complete = [item for item in items if item.name not in failures]
    report_failures(output, items, failures)
    if not complete:
        raise InputError("No object could be rendered.")
    write_contact_sheet(output, complete, settings.resolution)
    write_collection(output, complete, settings)

    num_images = (len(to_render) - len(failures)) * settings.views_per_object
    counts = ", ".join(f"{sum(item.split == split for item in complete)} {split}" for split in SPLITS)
    say(f"{len(complete)} objects ({counts}) in {output}")
    say(
        f"{num_images} images rendered in {seconds:.1f} s, {num_images / max(seconds, 1e-9):.0f} images/s "
        f"with {num_workers} processes; {num_finished} objects were there already"
    )
