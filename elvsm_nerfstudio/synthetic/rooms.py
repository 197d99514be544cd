"""Walks through furnished rooms, a stand-in for RealEstate10K that can be made anywhere."""

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

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elvsm_nerfstudio.files import remove_partial, whole
from elvsm_nerfstudio.synthetic.furniture import SPLITS, CatalogueObject, InputError, prepare_furniture, read_furniture
from elvsm_nerfstudio.synthetic.object_renderer import NoGLContextError
from elvsm_nerfstudio.synthetic.object_scene import image_name, random_generator, write_json
from elvsm_nerfstudio.synthetic.realestate10k_chunks import SequenceOfFrames, write_chunks
from elvsm_nerfstudio.synthetic.room_layout import RoomPlan, plan_room
from elvsm_nerfstudio.synthetic.room_mesh import build_room
from elvsm_nerfstudio.synthetic.room_renderer import RoomRenderer, draw_lighting

COLLECTION_FORMAT = "elvsm-scenes/1"
SCENE_FORMAT = "elvsm-rooms/1"
"""Goes up when the pictures or poses of a room change for the same settings."""
CONTEXT_GAP = (45, 59)
"""Frames from the first to the second context view of the evaluation index."""
NUM_TARGET_VIEWS = 3
SCENES_PER_CHUNK = 16
SHEET_ROOMS, SHEET_FRAMES, SHEET_WIDTH = 12, 4, 192
VIDEO_ROOMS = 4

console = Console(stderr=True)


@dataclass
class RoomOptions:
    """Renders walks through furnished rooms into a collection of nerfstudio scenes."""

    output: Path
    """Folder for the scenes. May hold rooms of an earlier run with the same settings; those are kept."""
    resolution: tuple[int, int] = (128, 128)
    """Height and width of the pictures in pixels."""
    num_rooms: int = 100
    """Rooms, all splits together. A smaller set is part of a larger one with as many val and test rooms."""
    num_val_rooms: int = 5
    """How many of them are of the validation split."""
    num_test_rooms: int = 10
    """How many of them are of the test split."""
    chunks: Path | None = None
    """Folder for the same scenes as RealEstate10K chunks; not written if not given."""
    seed: int = 0
    """Seed of rooms, furniture, light and walks."""
    num_workers: int | None = None
    """Processes that render; as many as there are CPU cores if not given."""
    furniture_cache: Path | None = None
    """Folder for the downloaded furniture; elvsm-nerfstudio/furniture in the user's cache folder if not given."""


@dataclass(frozen=True)
class Room:
    """A room to be made."""

    name: str
    split: str


def list_rooms(args: RoomOptions) -> list[Room]:
    """Test rooms first, then val, then train: more rooms leave the held-out ones as they are."""
    splits = ["test"] * args.num_test_rooms + ["val"] * args.num_val_rooms
    splits += ["train"] * (args.num_rooms - len(splits))
    return [Room(f"room_{index:05d}", split) for index, split in enumerate(splits)]


def check_numbers(args: RoomOptions) -> None:
    """Refuses numbers that can lead to nothing, before anything is downloaded."""
    held_out = args.num_val_rooms + args.num_test_rooms
    checks = (
        ("--resolution", min(args.resolution), 16, ""),
        ("--num-val-rooms", args.num_val_rooms, 0, ""),
        ("--num-test-rooms", args.num_test_rooms, 0, ""),
        ("--num-rooms", args.num_rooms, held_out + 1, ", one more than the held-out rooms"),
        ("--num-workers", args.num_workers, 1, ""),
    )
    for option, found, least, reason in checks:
        if found is not None and found < least:
            raise InputError(f"{option}: found {found}; expected at least {least}{reason}. Give a larger number.")


# ---------------------------------------------------------------------------------------------------------------------
# One room
# ---------------------------------------------------------------------------------------------------------------------

_renderer: RoomRenderer | None = None


def end_with_parent() -> None:
    """Without this, a kill -9 of the first process would leave the others waiting for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(resolution: tuple[int, int]) -> None:
    """Runs in each rendering process when it starts."""
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one sees to the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    # The processes are the parallelism; more threads of llvmpipe in each of them would only compete.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    _renderer = RoomRenderer(resolution)


def render_room(room: Room, args: RoomOptions, furniture: list[CatalogueObject]) -> tuple[Room, int, str | None]:
    """Makes one room; returns its number of frames, or what went wrong."""
    try:
        rng = random_generator(args.seed, room.name, "room")
        plan = plan_room(rng, furniture)
        mesh = build_room(rng, plan)
        _renderer.set_room(plan, draw_lighting(rng, plan))
        height, width = args.resolution
        focal = width / 2 / math.tan(math.radians(plan.walk.field_of_view_degrees) / 2)
        pictures = _renderer.render(mesh, plan.walk.poses, focal)[..., :3]
        write_room(args.output, room, plan, pictures, focal, made_with(args))
    except Exception as error:  # a broken model must not end the run, whatever it makes its reader raise
        return room, 0, f"{type(error).__name__}: {error}"
    return room, len(pictures), None


def made_with(args: RoomOptions) -> dict:
    """What a room's pictures depend on besides its name and split."""
    return {"format": SCENE_FORMAT, "resolution": list(args.resolution), "seed": args.seed}


def write_room(output: Path, room: Room, plan: RoomPlan, pictures: np.ndarray, focal: float, settings: dict) -> None:
    """Writes a room's scene, a folder which appears when it is complete."""
    poses = plan.walk.poses.tolist()
    frames = [{"file_path": image_name(i), "transform_matrix": pose} for i, pose in enumerate(poses)]
    height, width = pictures.shape[1:3]
    furniture = {piece.item.name: piece.item.as_json() for piece in plan.furniture}
    content = {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": focal,
        "fl_y": focal,
        "cx": width / 2,
        "cy": height / 2,
        "made_with": settings,
        "room": {"split": room.split, "kind": plan.kind, "size": plan.size, "furniture": furniture},
        "frames": frames,
    }
    shutil.rmtree(output / room.name, ignore_errors=True)
    with whole(output / room.name) as partial:
        (partial / "images").mkdir(parents=True)
        for frame, picture in zip(frames, pictures, strict=True):
            Image.fromarray(picture).save(partial / frame["file_path"], compress_level=1)
        write_json(partial / "transforms.json", content)


def is_finished(output: Path, room: Room, settings: dict) -> bool:
    """Whether the room is there as a whole; one that was made with other settings is an error."""
    file = output / room.name / "transforms.json"
    if not file.exists():
        return False
    try:
        content = json.loads(file.read_text())
        found = {**content["made_with"], "split": content["room"]["split"]}
    except (ValueError, KeyError, TypeError):
        found = None
    wanted = {**settings, "split": room.split}
    if found != wanted:
        raise InputError(
            f"--output: found {file.parent} made with {found}; asked for {wanted}. Choose another --output, or delete "
            "that folder."
        )
    return all((output / room.name / frame["file_path"]).exists() for frame in content["frames"])


# ---------------------------------------------------------------------------------------------------------------------
# All rooms
# ---------------------------------------------------------------------------------------------------------------------


def render_rooms(rooms: list[Room], args: RoomOptions, furniture: dict[str, list[CatalogueObject]]) -> int:
    """Renders rooms in several processes and returns the number of pictures.

    Raises:
        InputError: naming the first room that failed.
    """
    num_workers = min(args.num_workers or os.cpu_count() or 1, len(rooms))
    columns = (
        TextColumn("rooms"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    num_images, started = 0, time.monotonic()
    executor = ProcessPoolExecutor(
        max_workers=num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # an OpenGL context does not survive a fork
        initializer=start_worker,
        initargs=(args.resolution,),
    )
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("rooms", total=len(rooms), rate=0.0)
            futures = [executor.submit(render_room, room, args, furniture[room.split]) for room in rooms]
            for future in as_completed(futures):
                room, count, failure = future.result()
                if failure is not None:
                    raise InputError(f"{room.name} could not be made: {failure}")
                num_images += count
                progress.update(bar, advance=1, rate=num_images / (time.monotonic() - started))
    except BrokenProcessPool as error:
        raise InputError(
            "A rendering process died, most likely of too little memory. The finished rooms are kept: start the same "
            "command again, with a smaller --num-workers if need be."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return num_images


def read_room(output: Path, room: Room) -> SequenceOfFrames:
    """A finished room as a sequence of frames."""
    content = json.loads((output / room.name / "transforms.json").read_text())
    return SequenceOfFrames(
        key=room.name,
        image_files=[output / room.name / frame["file_path"] for frame in content["frames"]],
        poses=np.array([frame["transform_matrix"] for frame in content["frames"]]),
        intrinsics=(
            content["fl_x"] / content["w"],
            content["fl_y"] / content["h"],
            content["cx"] / content["w"],
            content["cy"] / content["h"],
        ),
    )


def evaluation_views(rng: np.random.Generator, num_frames: int) -> dict[str, list[int]]:
    """Two context frames some way apart, and target frames strictly between them."""
    gap = int(rng.integers(CONTEXT_GAP[0], min(CONTEXT_GAP[1], num_frames - 1) + 1))
    first = int(rng.integers(0, num_frames - gap))
    inside = rng.choice(np.arange(first + 1, first + gap), size=NUM_TARGET_VIEWS, replace=False)
    return {"context": [first, first + gap], "target": sorted(inside.tolist())}


def write_collection(args: RoomOptions, rooms: list[Room]) -> None:
    """Writes scenes.json and evaluation_index.json."""
    index, credits = {}, {}
    for room in rooms:
        content = json.loads((args.output / room.name / "transforms.json").read_text())
        credits.update(content["room"]["furniture"])
        if room.split == "test":
            rng = random_generator(args.seed, room.name, "evaluation")
            index[room.name] = evaluation_views(rng, len(content["frames"]))
    write_json(args.output / "evaluation_index.json", index)
    scenes = [{"name": room.name, "path": room.name, "split": room.split} for room in rooms]
    collection = {
        "format": COLLECTION_FORMAT,
        "evaluation_index": "evaluation_index.json",
        "made_with": made_with(args),
    }
    write_json(args.output / "scenes.json", {**collection, "furniture": credits, "scenes": scenes})
    if args.chunks is not None:
        for split in SPLITS:
            sequences = (read_room(args.output, room) for room in rooms if room.split == split)
            if any(room.split == split for room in rooms):
                write_chunks(args.chunks / split, sequences, SCENES_PER_CHUNK)
        write_json(args.chunks / "evaluation_index.json", index)


def write_contact_sheet(output: Path, rooms: list[Room]) -> None:
    """Writes contact_sheet.png: some frames of some rooms of all splits, a row for each two."""
    shown = sorted({round(i) for i in np.linspace(0, len(rooms) - 1, SHEET_ROOMS)})
    rows = []
    for room in (rooms[i] for i in shown):
        files = read_room(output, room).image_files
        row = []
        for index in np.linspace(0, len(files) - 1, SHEET_FRAMES).round().astype(int):
            with Image.open(files[index]) as picture:
                size = SHEET_WIDTH, round(SHEET_WIDTH * picture.height / picture.width)
                row.append(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)))
        rows.append(np.concatenate(row, axis=1))
    half = -(-len(rows) // 2)
    columns = [rows[:half], rows[half:] + [np.full_like(rows[0], 255)] * (2 * half - len(rows))]
    sheet = np.concatenate([np.concatenate(column) for column in columns if column], axis=1)
    with whole(output / "contact_sheet.png") as partial:
        Image.fromarray(sheet).save(partial, format="PNG")


def write_video(output: Path, rooms: list[Room]) -> None:
    """Writes walkthrough.mp4, walks through some rooms one after another; without ffmpeg there is none."""
    import mediapy

    frames = []
    for room in rooms[:VIDEO_ROOMS]:
        for file in read_room(output, room).image_files:
            with Image.open(file) as picture:
                even = picture.width // 2 * 2, picture.height // 2 * 2
                frames.append(np.asarray(picture.crop((0, 0, *even))))
    if shutil.which("ffmpeg") is None:
        console.print("No walkthrough.mp4: the program ffmpeg is missing")
        return
    with whole(output / "walkthrough.mp4", suffix=".mp4") as partial:
        mediapy.write_video(partial, frames, fps=20)


def make_room_scenes(args: RoomOptions) -> None:
    """The whole of it."""
    check_numbers(args)
    for option, folder in (("--output", args.output), ("--chunks", args.chunks)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{option}: found {folder}, which cannot be made a folder ({error.strerror}). Choose another one."
            ) from error
    try:
        RoomRenderer((16, 16)).release()
    except NoGLContextError as error:
        raise InputError(
            f"There is no OpenGL 3.3 to be had from EGL ({error}), which rooms need. Install Mesa's software renderer "
            "(Debian: libegl1 libgl1-mesa-dri)."
        ) from error
    objects = read_furniture(prepare_furniture(args.furniture_cache), ())
    furniture = {split: [item for item in objects if item.split == split] for split in SPLITS}
    rooms = list_rooms(args)
    to_render = [room for room in rooms if not is_finished(args.output, room, made_with(args))]
    remove_partial(args.output)
    started = time.monotonic()
    num_images = render_rooms(to_render, args, furniture) if to_render else 0
    seconds = time.monotonic() - started
    write_contact_sheet(args.output, rooms)
    write_video(args.output, rooms)
    write_collection(args, rooms)
    console.print(
        f"{len(rooms)} rooms in {args.output}; {num_images} images rendered in {seconds:.1f} s, "
        f"{num_images / max(seconds, 1e-9):.0f} images/s; {len(rooms) - len(to_render)} rooms were there already",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
