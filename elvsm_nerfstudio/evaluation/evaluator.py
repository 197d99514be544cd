"""Scores a method on scenes, as a protocol says."""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils import comms
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from elvsm_nerfstudio.data.datamanager import EvaluationScene, ViewSetDataManager
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.scenes import SceneEntry
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.metrics import image_metrics, mean_over_areas
from elvsm_nerfstudio.evaluation.protocols import Protocol
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json
from elvsm_nerfstudio.evaluation.results import Fingerprint, averages, code_version, plot_against_views, spread
from elvsm_nerfstudio.notices import say
from elvsm_nerfstudio.programs import ns_eval_output

TimedFrames = Callable[[Cameras], Iterator[tuple[Tensor, float]]]
"""Renders cameras [frame]: the image [height, width, 3] of each, and the ms that it took."""


@typing.runtime_checkable
class Scored(typing.Protocol):
    """A method that is scored."""

    @property
    def device(self) -> torch.device: ...

    @property
    def record(self) -> dict[str, Any]:
        """How it renders, for the result."""
        ...

    def frames_per_call(self, height: int, width: int) -> int:
        """Cameras of this size that are rendered in one call."""
        ...

    def renders(self, scene: EvaluationScene, protocol: Protocol) -> Iterator[tuple[int, TimedFrames, Optional[float]]]:
        """Numbers of context views, what renders from that many of the scene's context views, and the time in ms that
        it took to encode them, for methods that do."""
        ...


@dataclass
class ImageResult:
    """One target, rendered from some number of context views."""

    image: str
    context_views: int
    metrics: dict[str, float]
    """With ``_copy_nearest`` and ``_mean_of_context``: what the baselines score."""
    encode_ms: Optional[float]
    render_ms: float
    rgb: Tensor


@dataclass
class Evaluation:
    """The outcome: averages for each number of context views (None for the only one), and a row for every image."""

    by_views: dict[Optional[int], dict[str, float]]
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    """What was evaluated: protocol, data and their fingerprint, code. No times, no machine: equal evaluations of equal
    weights have equal records."""
    timing: dict[str, Any]
    context: dict[str, list[str]]
    """The photos that were context, in their order, of each scene that this process walked."""

    def report(self, pictures: Optional[Path]) -> dict[str, Any]:
        """The averages; in ns-eval with the record of what was evaluated.

        Times are not among them, so that the same evaluation gives the same result; they are written beside it, with a
        row for every image, where ns-eval says where to write, and into the folder of pictures. So is a plot where
        several numbers of context views were scored.
        """
        several = len(self.by_views) > 1
        averages = {"by_context_views": self.by_views} if several else next(iter(self.by_views.values()))
        details = {"record": self.record, "timing": self.timing, "context": self.context, "images": self.rows}
        output = ns_eval_output()
        paths = list(dict.fromkeys(filter(None, (output, pictures and pictures / "metrics.json"))))
        for path in paths:
            write_json(path.with_suffix(".images.json"), details)
            if several:
                plot_against_views(path.with_suffix(".png"), self.record["protocol"]["name"], self.by_views)
        if paths:
            say(f"Metrics of every image, and times: {_listed(paths, '.images.json')}")
            if several:
                say(f"Plot: {_listed(paths, '.png')}")
        return {**averages, "record": self.record} if output else averages


def _listed(paths: list[Path], suffix: str) -> str:
    return " and ".join(str(path.with_suffix(suffix)) for path in paths)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A block in which a module is in evaluation mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def configured_protocol(
    datamanager: ViewSetDataManager, canonical_frame: typing.Literal["context", "context+target"] = "context"
) -> Protocol:
    """The evaluation that the run's own options describe."""
    return Protocol(
        name="as configured",
        description="views, size, background and canonical frame of the run's own options",
        views=datamanager.evaluation_views,
        context_views=(),
        background=datamanager.config.background,
        canonical_frame=canonical_frame,
    )


class Evaluator:
    """Walks the evaluated scenes, every one of them; nothing is left out, so anything unreadable stops it, but for the
    val scenes of a training, which are reported and left out. Where several processes train together, each walks its
    share of the scenes, and all get the results of all."""

    def __init__(self, method: Scored, datamanager: ViewSetDataManager, protocol: Protocol):
        self.method, self.datamanager, self.protocol = method, datamanager, protocol
        self.images = protocol.images(datamanager.config.image_size)
        if protocol.scored_size is not None and any(map(operator.lt, self.images.size, protocol.scored_size)):
            raise DataError(
                f"--pipeline.protocol {protocol.name}: found images of {_by(self.images.size)} pixels; expected "
                f"{_by(protocol.scored_size)} or more, the size that it scores at (--pipeline.datamanager.image-size)"
            )

    def run(self, pictures: Optional[Path], get_std: bool) -> Evaluation:
        """Scores every scene.

        Args:
            pictures: folder for each scene's sheet and each prediction, lossless.
            get_std: adds the standard deviation over images.
        """
        results: list[tuple[str, ImageResult]] = []
        fingerprint = Fingerprint()
        among_context = 0
        if not self.datamanager.eval_entries:
            raise DataError(
                f"{self.datamanager.config.data} has no scene in its {self.datamanager.test_split} split; give one to "
                "it in scenes.json"
            )
        rank, ranks = comms.get_rank(), comms.get_world_size()
        entries, context = self.datamanager.eval_entries[rank::ranks], {}
        with _progress("Evaluating scenes") as progress:
            for entry in progress.track(entries):
                scene = self.scene(entry)
                if scene is None:
                    continue
                if not results:
                    self.score(self.scene(entry, max_targets=1))  # warm-up, not timed
                fingerprint.add(scene.name, (*scene.context_names, *scene.target_names), scene.views)
                context[scene.name] = list(scene.context_names)
                among_context += len(set(scene.context_names) & set(scene.target_names))
                scored = self.score(scene)
                if pictures is not None:
                    self._write_pictures(pictures, scene, scored)
                for result in scored:
                    result.rgb = torch.empty(0)  # rows are kept, pictures are not
                results += [(scene.name, result) for result in scored]

        if ranks > 1:
            results, among_context = self._gathered(results, among_context)
        if not results:
            raise DataError("none of the evaluated scenes can be used; the reasons are above")
        rows = [
            {"scene": scene, "image": r.image, "context_views": r.context_views, **r.metrics} for scene, r in results
        ]
        index = self.datamanager.evaluation_index
        names = list(results[0][1].metrics)
        counts = self.protocol.context_views if len(self.protocol.context_views) > 1 else (None,)
        groups = {count: [row for row in rows if count in (None, row["context_views"])] for count in counts}
        return Evaluation(
            by_views={count: averages(group, names, get_std) for count, group in groups.items()},
            rows=rows,
            record={
                "protocol": {**self.protocol.as_json(self.datamanager.config.image_size), "metrics": names},
                "data": {
                    "path": str(self.datamanager.config.data),
                    "split": self.datamanager.test_split,
                    "num_scenes": len({scene for scene, _ in results}),
                    "index": index and str(index.path),
                    "null_entries_of_the_index": index and index.num_null,
                    "scenes_of_the_index_that_are_missing": index and len(self.datamanager.missing_scenes),
                    "targets_that_are_context": among_context,
                    "fingerprint": fingerprint.hexdigest() if ranks == 1 else None,
                },
                "rendering": self.method.record,
                "code": code_version(),
            },
            timing={
                "encode_ms": "of one appended view" if self.protocol.one_memory else "of all context views",
                "by_context_views": {
                    str(count): {
                        name: spread([getattr(r, name) for _, r in results if r.context_views == count])
                        for name in ("encode_ms", "render_ms")
                        if getattr(results[0][1], name) is not None
                    }
                    for count in sorted({r.context_views for _, r in results})
                },
                "device": str(self.method.device),
                "frames_per_call": self.method.frames_per_call(*self.images.size),
                "threads": torch.get_num_threads(),
            },
            context=context,
        )

    def _gathered(
        self, results: list[tuple[str, ImageResult]], among_context: int
    ) -> tuple[list[tuple[str, ImageResult]], int]:
        """The results of all processes in the order of one that walks all scenes, and the sum of the other number."""
        parts: list[Any] = [None] * comms.get_world_size()
        torch.distributed.all_gather_object(parts, (results, among_context))
        place = {entry.name: index for index, entry in enumerate(self.datamanager.eval_entries)}
        everything = [result for part, _ in parts for result in part]
        return sorted(everything, key=lambda result: place[result[0]]), sum(number for _, number in parts)

    def scene(self, entry: SceneEntry, max_targets: Optional[int] = None) -> Optional[EvaluationScene]:
        """A scene with the protocol's views and images; None for a val scene that cannot be used."""
        return self.datamanager.usable_scene(entry, self.protocol.views, self.images, max_targets)

    def score(self, scene: EvaluationScene) -> list[ImageResult]:
        """Renders and scores each target of a scene from each number of context views."""
        results = []
        for count, timed_frames, encode_ms in self.method.renders(scene, self.protocol):
            context = scene.views.context.select(range(count))
            baselines = {name: baseline(context, scene.views.target)[0] for name, baseline in BASELINES.items()}
            for index, (rgb, render_ms) in enumerate(timed_frames(scene.cameras)):
                truth = scene.views.target.rgb[0, index]
                metrics = self._metrics(rgb, truth)
                for baseline, of_baseline in baselines.items():
                    metrics |= {f"{k}_{baseline}": v for k, v in self._metrics(of_baseline[index], truth).items()}
                results.append(ImageResult(scene.target_names[index], count, metrics, encode_ms, render_ms, rgb))
        return results

    def _metrics(
        self, prediction: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]
    ) -> dict[str, float]:
        """At the size that the protocol scores at."""
        size = self.protocol.scored_size
        if size is None:
            return image_metrics(prediction, truth)
        return image_metrics(*(mean_over_areas(image, size) for image in (prediction, truth)))

    def sheet(self, scene: EvaluationScene, results: list[ImageResult]) -> Tensor:
        """Rows: context, targets, predictions, one row of those for each number of context views."""
        counts = sorted({result.context_views for result in results})
        predictions = [[r.rgb for r in results if r.context_views == count] for count in counts]
        views = scene.views
        return sheet([list(views.context.rgb[0]), list(views.target.rgb[0]), *predictions])

    def _write_pictures(self, folder: Path, scene: EvaluationScene, results: list[ImageResult]) -> None:
        write_image(folder / f"{scene.name}.png", self.sheet(scene, results))
        several = len(self.protocol.context_views) > 1
        for result in results:
            kind = f"predictions_{result.context_views}_views" if several else "predictions"
            write_image(folder / kind / scene.name / f"{result.image}.png", result.rgb)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _progress(description: str) -> Progress:
    columns = TextColumn(f"[green]{description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=CONSOLE, transient=True)
