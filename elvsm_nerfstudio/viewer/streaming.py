"""Follows a scene whose views arrive one by one: times, PSNR, and a video."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Optional

import mediapy
import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras
from elvsm_nerfstudio.data.datamanager import ViewSetDataManager
from elvsm_nerfstudio.data.evaluation_views import choose_evaluation_views
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.view_geometry import farthest_point_views
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.report import write_image, write_json
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import timed
from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.model import EfficientLVSMModel
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.training.run_config import read_run_config, require_network
from elvsm_nerfstudio.viewer.stream_views import View, WatchedFolder, replayed

console = Console()
PANEL, GAP, CAPTION = 400, 12, 28
"""Pixels: side of each of the three panels, white around them, height of the line of text above."""
COLOURS = {"append": "#d95f02", "render": "#1f77b4"}


@dataclass
class StreamOptions:
    """Options."""

    load_config: Path
    """The run's config.yml."""
    output: Path
    """Video to write; the JSON and the PNG are called the same."""
    data: Optional[Path] = None
    """Other data than the run's: anything that ns-train takes."""
    num_views: Optional[int] = None
    """Views to show, spread over those there are; all of them if absent. While watching: stop after as many."""
    num_targets: int = 2
    """Fixed target cameras: held-out views of the scene; while watching, the frames that arrive next after those that
    fix the canonical frame."""
    order: Literal["capture", "farthest-point"] = "capture"
    """Order in which a scene's views are replayed: that of their file names, or each the farthest from those before."""
    first_views: int = 2
    """Views whose cameras fix the canonical frame; nothing is encoded before they are there."""
    watch: Optional[Path] = None
    """Folder with a transforms.json (or where one will be) that grows."""
    idle_seconds: float = 30.0
    """How long to watch without any news."""
    fps: float = 2.0
    """Views per second in the video."""


@dataclass(frozen=True)
class Step:
    """What one view brought."""

    view: str
    num_views: int
    append_ms: float
    """Encoding the view into the memory."""
    render_ms: float
    """Rendering a target from it: the mean of all, of which as many as pay are rendered in one call."""
    psnr: list[float]
    """PSNR of each target, in dB."""
    memory_bytes: int


class Stream:
    """Appends views to one memory and renders the targets after each.

    Args:
        first: views whose cameras fix the canonical frame.
        targets: held-out views.
    """

    def __init__(self, model: EfficientLVSMModel, first: Sequence[View], targets: Sequence[View]):
        self.model, self.targets = model, list(targets)
        self.cameras = unpack_cameras(torch.cat([pack_cameras(target.camera) for target in targets]))
        cameras = torch.cat([view.as_context().camera_to_world for view in first], dim=1)
        self.frame = CanonicalFrame.estimate(cameras)
        self.memory: Optional[SceneMemory] = None
        self.renders: Sequence[Float[Tensor, "height width 3"]] = ()
        """Of the targets, from all views so far."""
        self.add(first[0])  # warm-up
        self.add(first[0])
        self.memory = None

    @torch.no_grad()
    def add(self, view: View) -> Step:
        """Takes in a view and renders all targets."""
        network, context = self.model.network, view.as_context()
        memory = self.memory

        def append() -> SceneMemory:
            return network.encode(context, self.frame) if memory is None else network.append(memory, context)

        self.memory, append_ms = timed(self.model.device, append)
        self.renders, times = zip(*self.model.timed_frames(self.memory, self.cameras))
        return Step(
            view=view.name,
            num_views=self.memory.num_views,
            append_ms=append_ms,
            render_ms=statistics.mean(times),
            psnr=[float(psnr(render, target.rgb)) for render, target in zip(self.renders, self.targets)],
            memory_bytes=self.memory.num_bytes,
        )


# Pictures


def draw(
    view: View, renders: Sequence[Tensor], truths: Sequence[Tensor], steps: Sequence[Step], expected: Optional[int]
) -> np.ndarray:
    """A frame of the video, uint8 [height, width, 3].

    Args:
        renders, truths: of the targets, shown one above the other.
        steps: so far; the last is this view's.
        expected: number of views to come in all, where it is known.
    """
    size = (3 * PANEL + 4 * GAP, PANEL + 2 * GAP + CAPTION)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    step, top = steps[-1], GAP + CAPTION
    lefts = [GAP + i * (PANEL + GAP) for i in range(3)]
    of_all = f" of {expected}" if expected else ""
    captions = (
        f"view {step.num_views}{of_all}: {view.name}",
        f"render, truth; mean PSNR {sum(step.psnr) / len(step.psnr):.2f} dB",
        "milliseconds against views",
    )
    for left, caption in zip(lefts, captions):
        pen.text((left, GAP), caption, "black", font=_font(17))
    _paste(canvas, view.rgb, (lefts[0], top, PANEL))
    rows_of = {columns: 2 * math.ceil(len(renders) / columns) for columns in range(1, len(renders) + 1)}
    columns = min(rows_of, key=lambda columns: max(columns, rows_of[columns]))
    side = PANEL // max(columns, rows_of[columns])
    for i, (render, truth, value) in enumerate(zip(renders, truths, step.psnr)):
        corner = lefts[1] + i % columns * side, top + 2 * (i // columns) * side
        _paste(canvas, render, (*corner, side - 2))
        _paste(canvas, truth, (corner[0], corner[1] + side, side - 2))
        pen.text(
            (corner[0] + 5, corner[1] + 4), f"{value:.2f} dB", "white", _font(15), stroke_width=2, stroke_fill="black"
        )
    _plot(pen, (lefts[2], top, lefts[2] + PANEL, top + PANEL), steps, expected)
    return np.asarray(canvas)


def _paste(canvas: Image.Image, rgb: Float[Tensor, "height width 3"], place: tuple[int, int, int]) -> None:
    """Puts an image, enlarged pixel by pixel, into a square (left, top, side)."""
    left, top, side = place
    pixels = (rgb.clamp(0, 1) * 255).round().byte().cpu().numpy()
    scale = side / max(pixels.shape[:2])
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    canvas.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (left, top))


def _plot(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], steps: Sequence[Step], expected: Optional[int]
) -> None:
    """Both times of every step against the number of views, with the last ones in numbers."""
    left, top, right, bottom = box[0] + 44, box[1] + 56, box[2] - 8, box[3] - 26
    highest = 1.1 * max(max(step.append_ms, step.render_ms) for step in steps)
    last = max(expected or 0, steps[-1].num_views, 2)

    def point(views: float, ms: float) -> tuple[float, float]:
        x = left + (views - 1) / (last - 1) * (right - left)
        return x, bottom - ms / highest * (bottom - top)

    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        pen.line((left, y, right, y), "#dddddd")
        pen.text((left - 6, y), f"{share * highest:.3g}", "black", _font(13), anchor="rm")
    for views in sorted({1, (1 + last) // 2, last}):
        pen.text((point(views, 0)[0], bottom + 6), str(views), "black", _font(13), anchor="ma")
    lines = (("append", "append", box[1]), ("render", "render a target", box[1] + 24))
    for kind, label, y in lines:
        values = [(step.num_views, getattr(step, f"{kind}_ms")) for step in steps]
        pen.line([point(*value) for value in values], COLOURS[kind], width=3)
        for value in values:
            x, height = point(*value)
            pen.ellipse((x - 3, height - 3, x + 3, height + 3), COLOURS[kind])
        pen.text((left, y), f"{label}: {values[-1][1]:.1f} ms", COLOURS[kind], _font(17))


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


# From a run


def load_run(args: StreamOptions) -> tuple[EfficientLVSMModel, ViewSetDataManager]:
    """The run's model and data, as nerfstudio's programs load them."""

    def with_data(config: TrainerConfig) -> TrainerConfig:
        if args.data is not None:
            config.pipeline.datamanager = replace(
                config.pipeline.datamanager, data=args.data, evaluation_index=None, scene=None, context_frames=None
            )
        return config

    # Read here first, or nerfstudio would execute what it names.
    require_network(read_run_config(args.load_config), f"--load-config {args.load_config}")
    _, pipeline, _, _ = eval_setup(args.load_config, test_mode="test", update_config_callback=with_data)
    return pipeline.model, pipeline.datamanager


def scene_to_replay(datamanager: ViewSetDataManager, args: StreamOptions) -> tuple[Scene, list[int], list[int]]:
    """The scene that the run shows, frames to feed in their order, and target frames, none of which is fed."""
    scene = datamanager.collection.load(datamanager.shown)
    rule = replace(datamanager.evaluation_views, num_target_views=args.num_targets, targets_may_be_context=True)
    listed = choose_evaluation_views(scene, datamanager.evaluation_index, rule).target
    targets = [listed[i] for i in _spread(len(listed), args.num_targets)]
    pool = [frame for frame in scene.train_frames if frame not in targets]
    if args.order == "capture":
        return scene, [pool[i] for i in _spread(len(pool), args.num_views)], targets
    chosen = farthest_point_views(scene.cameras.camera_to_worlds[pool], args.num_views or len(pool))
    return scene, [pool[i] for i in chosen], targets


def _spread(available: int, wanted: Optional[int]) -> list[int]:
    count = min(available, wanted or available)
    return torch.linspace(0, available - 1, count, dtype=torch.float64).round().long().tolist()


def stream(args: StreamOptions) -> dict[str, Any]:
    """Writes video, JSON and PNG, and returns what is in the JSON.

    Raises:
        DataError: where too few views arrive, or one of a replayed scene cannot be read.
    """
    if args.first_views < 1 or args.num_targets < 1:
        raise DataError("--first-views and --num-targets: expected at least 1")
    model, datamanager = load_run(args)
    spec, device = datamanager.config.images, model.device
    watched = None
    if args.watch is None:
        scene, frames, held_out = scene_to_replay(datamanager, args)
        source, expected = replayed(scene, frames, spec, device), len(frames)
        targets = list(replayed(scene, held_out, spec, device))
        where = f"scene {scene.name}"
    else:
        watched = WatchedFolder(args.watch, spec, device, args.idle_seconds)
        source, expected, targets = watched.views(), args.num_views, []
        where = f"{args.watch}, watched for {args.idle_seconds:g} s without news"
    waiting = args.num_targets if watched else 0
    early = list(islice(source, args.first_views + waiting))
    if len(early) < args.first_views + waiting:
        unreadable = "".join(f"\n  {reason}" for reason in watched.unreadable.values()) if watched else ""
        raise DataError(
            f"{where}: {len(early)} views arrived; expected at least {args.first_views} to fix the canonical frame"
            + (f" and {waiting} to hold out as targets" if waiting else "")
            + unreadable
        )
    first, targets = early[: args.first_views], targets or early[args.first_views :]
    truths, steps = [target.rgb for target in targets], []
    shape = PANEL + 2 * GAP + CAPTION, 3 * PANEL + 4 * GAP
    columns = TextColumn("[green]Views"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    result = {
        "code": code_version(),
        "source": str(args.watch) if watched else scene.name,
        "order": "arrival" if watched else args.order,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": str(model.network.autocast_dtype or torch.float32).removeprefix("torch."),
        "frames_per_call": min(len(targets), model.frames_per_call(*spec.size)),
        "frame_fixed_by": [view.name for view in first],
        "targets": [view.name for view in targets],
        "unreadable": watched.unreadable if watched else {},
        "steps": [],
    }
    with (
        whole(args.output, suffix=args.output.suffix) as partial,
        mediapy.VideoWriter(partial, shape, fps=args.fps) as video,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=expected)
        follow = Stream(model, first, targets)  # warms up while the encoder of the video starts
        for view in islice(chain(first, source), args.num_views):
            steps.append(follow.add(view))
            picture = draw(view, follow.renders, truths, steps, expected)
            video.add_image(picture)
            result["steps"].append(asdict(steps[-1]))
            write_json(args.output.with_suffix(".json"), result)
            write_image(args.output.with_suffix(".png"), torch.tensor(picture) / 255)
            progress.advance(task)
    write_json(args.output.with_suffix(".json"), result)
    return result
