"""The way from photos, a video or a capture to a video of new views."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional, Union

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image, ImageOps

from elvsm_nerfstudio.compare.path import largest_gap, path_through
from elvsm_nerfstudio.data.datamanager import ViewSetDataManager
from elvsm_nerfstudio.data.images import DataError, is_cut_out
from elvsm_nerfstudio.data.parsing import suitable_dataparser
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SCENE_MARKERS, SceneCollection
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.evaluation.timing import timed
from elvsm_nerfstudio.model import EfficientLVSMModel
from elvsm_nerfstudio.nn.named_weights import PUBLISHED, trained_image_size
from elvsm_nerfstudio.poses.capture import PoseOptions, PoseReport, make_capture
from elvsm_nerfstudio.poses.photos import check_source, find_photos, is_video
from elvsm_nerfstudio.poses.video import video_size
from elvsm_nerfstudio.runs import RunOptions, config_for_weights, make_and_open_run, network_methods
from elvsm_nerfstudio.show.expectations import expectations, has_relative_encoding, whole_size
from elvsm_nerfstudio.show.film import enlarged, write_gif, write_mp4
from elvsm_nerfstudio.show.picture_sheet import Row, to_image, write_sheet
from elvsm_nerfstudio.stages import Stages
from elvsm_nerfstudio.views import Views

MIN_CONTEXT_VIEWS = 4
"""Of networks that were trained with fewer: two photos of a whole capture have little in common."""
REPORT = "show.json"
SHEET_COLUMNS = 6
SURROUNDED = 2.1
"""Radians: where no gap between neighbouring context cameras, seen from above, is wider, they stand all around."""
GIF_WIDTH, GIF_FPS = 480, 12
"""Pixels and frames a second of an animation, which has no compression to speak of."""


@dataclass
class ShowOptions:
    """What is shown, by what, and where to."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of photos, video, or capture: a folder with transforms.json or transforms_train.json, or with a COLMAP
    model in sparse, sparse/0 or colmap/sparse/0 and its photos in images."""
    weights: Union[str, Path] = "pretrained"
    """A name that `elvsm weights` lists, hf://OWNER/REPO/FILE, or a file."""
    output: Optional[Path] = None
    """Folder for all that is made; outputs/NAME-show if absent."""
    num_context_views: Optional[int] = None
    """Photos that the network gets, chosen so that they are spread out; as many as it was trained with, but at least
    4, if absent."""
    image_size: Optional[tuple[int, int]] = None
    """Height and width of what the network gets and renders. If absent: whole photos at the height it was trained
    for where its camera encoding is relative, and else the middle of each photo at the size it was trained for."""
    seconds: float = 4.0
    """Duration of the video."""
    fps: int = 24
    """Frames a second of the video."""
    gif: bool = False
    """Also writes an animation, which is larger than the video and can be shown where videos cannot."""
    poses: Annotated[PoseOptions, tyro.conf.arg(name="")] = field(default_factory=PoseOptions)
    """For photos and videos without cameras."""


@dataclass(frozen=True)
class Shown:
    """What was made; all but the run's weights and the capture."""

    folder: Path
    config: Path
    """The run's config.yml."""
    poses: Optional[PoseReport]
    """What finding the cameras gave; absent where the capture had them."""
    report: dict[str, Any]
    """The content of show.json."""


def show(options: ShowOptions, say: Callable[[str], None]) -> Shown:
    """Goes all the way; what an earlier call wrote to the same folder is replaced.

    Args:
        say: told what to expect before anything is computed, in plain text.

    Raises:
        ValueError, OSError: where the photos, the weights or the capture cannot be used.
    """
    source, output = options.source, options.output or Path("outputs") / f"{_name(options.source)}-show"
    if (output / "run").exists() and not (output / REPORT).exists():
        raise DataError(f"{output / 'run'} exists and is not of this program; choose another --output")
    method = _method_of(options.weights)
    network, trained = method.pipeline.model.network, method.pipeline.datamanager.image_size
    scene = open_capture(source) if _is_capture(source) else None
    photo, cut_out = first_photo(source) if scene is None else (_common_size(scene), scene.is_cut_out)
    size = trained
    if options.image_size is not None:
        size = options.image_size
    elif has_relative_encoding(network):
        size = whole_size(photo, trained, network.patch_size)
    for sentence in expectations(str(options.weights), network, photo, size, cut_out):
        say(sentence)

    with Stages(CONSOLE) as stages:
        capture, poses = source, None
        if scene is None:
            capture = output / "capture"
            poses = make_capture(source, capture, options.poses, stages)
        start = time.perf_counter()
        with stages.stage("Weights and photos", 1) as stage:
            shutil.rmtree(output / "run", ignore_errors=True)
            write_json(output / REPORT, {})  # from here on output/run is ours
            bounds = method.pipeline.datamanager.context_view_bounds
            run, pipeline = make_and_open_run(
                RunOptions(
                    weights=options.weights,
                    data=capture.resolve(),
                    dataparser=_dataparser(capture),
                    image_size=size,
                    num_context_views=options.num_context_views or max(MIN_CONTEXT_VIEWS, bounds[1]),
                    output_dir=output,
                    name="run",
                )
            )
            if method.pipeline.datamanager.lens_augmentation:  # such weights render on every grid of patches
                pipeline.model.config.shifted_grids = 4
            stage.advance()
        pictures = _make_pictures(pipeline.model, pipeline.datamanager, options, output, stages)
    report = {
        "source": str(source),
        "weights": str(options.weights),
        "capture": str(capture),
        "run": str(run),
        "size": list(size),
        **pictures,
        "device": str(pipeline.model.device),
        "threads": torch.get_num_threads(),
        "seconds": stages.seconds,
        "seconds_after_poses": round(time.perf_counter() - start, 1),
        "poses": poses and asdict(poses),
    }
    write_json(output / REPORT, report)
    return Shown(output, run, poses, report)


def _make_pictures(
    model: EfficientLVSMModel, datamanager: ViewSetDataManager, options: ShowOptions, output: Path, stages: Stages
) -> dict[str, Any]:
    """Writes video and sheet, and returns what the report says of them."""
    scene, shown = datamanager.collection.load(datamanager.shown), datamanager.shown_scene(max_targets=1)
    model.set_context(shown.views)  # to be encoded again, so that the time can be told
    with stages.stage("Context views", 1) as stage:
        memory, encode_ms = timed(model.device, model.memory)
        stage.advance()

    not_given = _not_given(scene, shown.context_names)
    images = datamanager.config.images
    truths, renders = scene.read_images(not_given, images).float() / 255, []
    with stages.stage("Photos not given", len(not_given)) as stage:
        cameras = scene.cropped_cameras(not_given, images)
        for render, _ in model.timed_frames(memory, cameras):
            renders.append(render.cpu())
            stage.advance()
    scores = [round(float(psnr(render, truth)), 2) for render, truth in zip(renders, truths)]

    path, around = film_path(shown.views.context, round(options.seconds * options.fps))
    frames, times = [], []
    rendered = path if around else path[: (len(path) + 1) // 2]
    with stages.stage("Frames of the video", len(rendered)) as stage:
        for rgb, ms in model.timed_frames(memory, rendered):
            frames.append(to_image(rgb))
            times.append(ms)
            stage.advance()
    frames += reversed(frames[: len(path) - len(rendered)])  # the way back shows the same

    with stages.stage("Video and sheet", 2 + options.gif) as stage:
        large = [enlarged(frame) for frame in frames]
        write_mp4(output / "video.mp4", large, options.fps)
        stage.advance()
        rows = [Row("Given to the network", [to_image(rgb) for rgb in shown.views.context.rgb[0][:SHEET_COLUMNS]])]
        if not_given:
            caption = f"Rendered from the photos given, mean PSNR {statistics.mean(scores):.1f} dB"
            rows.append(Row("Photos not given", [to_image(truth) for truth in truths]))
            rows.append(Row(caption, [to_image(render) for render in renders]))
        spread = [frames[i * (len(frames) - 1) // SHEET_COLUMNS] for i in range(SHEET_COLUMNS)]
        write_sheet(output / "sheet.png", [*rows, Row("Frames of the video", spread)])
        stage.advance()
        if options.gif:
            step = max(1, options.fps // GIF_FPS)
            write_gif(output / "video.gif", [_narrow(frame) for frame in large[::step]], options.fps // step)
            stage.advance()
    return {
        "context": list(shown.context_names),
        "way": "around the scene" if around else "along the context views and back",
        "photos_not_given": [scene.frame_names[frame] for frame in not_given],
        "psnr_not_given": scores,
        "encode_ms": round(encode_ms, 1),
        "render_ms": round(statistics.median(times), 1),
        "frames_per_call": model.frames_per_call(*images.size),
        "shifted_grids": model.config.shifted_grids,
    }


def film_path(context: Views, count: int) -> tuple[Cameras, bool]:
    """Cameras of a video: around the scene where the context stands all around it, else along the context and back.

    Returns:
        ``count`` cameras [frame], and whether they go all around.
    """
    views = context.num_views
    if views > 1 and largest_gap(context) < SURROUNDED:
        return path_through(context, count), True
    # The closed path without its way from the last camera to the first, there and back.
    there = (count + 1) // 2
    closed = path_through(context, math.ceil(there * views / max(views - 1, 1)))
    index = torch.arange(count)
    return closed[torch.minimum(index, count - 1 - index)], False


def first_photo(source: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) of the first photo or frame, upright, and whether it has transparent pixels.

    Raises:
        DataError: where there is none that can be read.
    """
    check_source(source)
    if is_video(source):
        return video_size(source), False
    file = find_photos(source)[0]
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            return (upright.height, upright.width), is_cut_out(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"image {file} cannot be read ({error}); replace it, or take it out of the folder") from error


def _method_of(weights: Path | str) -> TrainerConfig:
    """A method's options, with network and image size of the weights; published ones are not downloaded for it."""
    published = PUBLISHED.get(str(weights))
    if published is None:
        return config_for_weights(weights, None)
    method = deepcopy(network_methods()[published.method])
    method.pipeline.datamanager.image_size = trained_image_size(weights)
    return method


def _name(source: Path) -> str:
    if source.is_file():
        return source.stem
    folder = source.resolve()
    return folder.parent.name if folder.name == "images" else folder.name


def _is_capture(source: Path) -> bool:
    return source.suffix == ".json" or any((source / marker).exists() for marker in SCENE_MARKERS)


def _dataparser(capture: Path) -> Optional[DataParserConfig]:
    """None for nerfstudio's own, which is the method's."""
    found = suitable_dataparser(capture)
    return None if isinstance(found, NerfstudioDataParserConfig) else found


def open_capture(capture: Path) -> Scene:
    """The scene of a capture, through the dataparser whose files it has.

    Raises:
        DataError: where it cannot be read, or is a collection of scenes.
    """
    collection = SceneCollection.open(capture, suitable_dataparser(capture) or NerfstudioDataParserConfig())
    if collection.whole_scenes:
        raise DataError(f"{capture} holds many scenes; expected photos, a video or one capture: name one of them")
    return collection.load(collection.entries[0])


def _common_size(scene: Scene) -> tuple[int, int]:
    return Counter(scene.sizes).most_common(1)[0][0]


def _not_given(scene: Scene, context: Sequence[str]) -> list[int]:
    """Frames that are not context, spread over the scene."""
    others = [frame for frame, name in enumerate(scene.frame_names) if name not in context]
    count = min(SHEET_COLUMNS, len(others))
    return [others[i] for i in torch.linspace(0, len(others) - 1, count).round().long().tolist()]


def _narrow(frame: Image.Image) -> Image.Image:
    width = min(GIF_WIDTH, frame.width)
    return frame.resize((width, round(frame.height * width / frame.width)), Image.Resampling.LANCZOS)
