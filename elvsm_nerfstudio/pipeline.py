"""Ties data and model together: primes the context, walks scenes in evaluation, loads checkpoints strictly."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from elvsm_nerfstudio.data.datamanager import EvaluationScene, ViewSetDataManager, ViewSetDataManagerConfig
from elvsm_nerfstudio.evaluation.floors import copy_nearest
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json
from elvsm_nerfstudio.model import EfficientLVSMModel, EfficientLVSMModelConfig
from elvsm_nerfstudio.nn.published_weights import check_state


@dataclass
class EfficientLVSMPipelineConfig(VanillaPipelineConfig):
    """View sets and a network that renders them."""

    _target: type = field(default_factory=lambda: EfficientLVSMPipeline)
    """target class to instantiate"""
    datamanager: ViewSetDataManagerConfig = field(default_factory=ViewSetDataManagerConfig)
    """View sets from one or many scenes."""
    model: EfficientLVSMModelConfig = field(default_factory=EfficientLVSMModelConfig)
    """The network."""


@dataclass
class ImageResult:
    """One evaluated target."""

    image: str
    metrics: dict[str, float]
    render_ms: float
    rgb: Tensor


class EfficientLVSMPipeline(VanillaPipeline):
    """nerfstudio's tools ask a model for single cameras; this pipeline sees to it that the model has its context."""

    config: EfficientLVSMPipelineConfig
    datamanager: ViewSetDataManager

    def __init__(
        self,
        config: EfficientLVSMPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler=None,
    ):
        size, patch = config.datamanager.image_size, config.model.network.patch_size
        if any(side % patch or side <= 0 for side in size):
            raise ValueError(
                f"--pipeline.datamanager.image-size {size[0]} {size[1]}: expected multiples of the patch size {patch} "
                "(--pipeline.model.network.patch-size)"
            )
        super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)
        # Without targets in the canonical frame there is no need to decode them all.
        max_targets = None if config.model.canonical_frame == "context+target" else 1
        self.model.set_context(self.datamanager.shown_scene(max_targets).views)

    @property
    def model(self) -> EfficientLVSMModel:
        return super().model

    # Training

    def get_train_loss_dict(self, step: int):
        outputs, losses, metrics = super().get_train_loss_dict(step)
        metrics["skipped_scenes"] = torch.tensor(float(sum(self.datamanager.skipped_scenes.values())))
        return outputs, losses, metrics

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        def log_optimizer(step: int) -> None:
            for name, optimizer in attributes.optimizers.optimizers.items():
                writer.put_scalar(f"gradient_norm/{name}", optimizer.gradient_norm, step)
                writer.put_scalar(f"skipped_steps/{name}", optimizer.skipped_steps, step)

        log = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], log_optimizer)
        return super().get_training_callbacks(attributes) + [log]

    # Evaluation

    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        with self._evaluating():
            views, batch = self.datamanager.next_eval(step)
            outputs = self.model(views)
            metrics = self.model.get_metrics_dict(outputs, batch)
            return outputs, self.model.get_loss_dict(outputs, batch, metrics), metrics

    @torch.no_grad()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of one evaluated scene's first target, and its sheet: context, targets, predictions."""
        with self._evaluating():
            config = self.datamanager.config
            scene = self.datamanager.evaluation_scene(
                step % len(self.datamanager.eval_entries), config.num_target_views
            )
            results, _ = self._evaluate_scene(scene)
            height, width = results[0].rgb.shape[:2]
            return {**results[0].metrics, "num_rays": height * width}, {"views": _scene_sheet(scene, results)}

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, float]:
        """Metrics over every target of every scene of the evaluated split.

        Means are per image (``psnr``) and per scene, i.e. of the scenes' means (``psnr_per_scene``). Times are not
        among them, so that the same evaluation gives the same result; they are written beside it, with a row for
        every image, where ns-eval says where to write. ``psnr_copy_nearest`` is the floor: what the image of the
        nearest context view scores as it is.

        Args:
            output_path: folder for pictures: each scene's sheet and each prediction, lossless.
            get_std: adds the standard deviation over images.
        """
        rows: list[dict[str, Any]] = []
        encode_ms: list[float] = []
        render_ms: list[float] = []
        with self._evaluating(), _progress("Evaluating scenes") as progress:
            count = len(self.datamanager.eval_entries)
            self._evaluate_scene(self.datamanager.evaluation_scene(0, max_targets=1))  # warm-up, not timed
            for index in progress.track(range(count)):
                scene = self.datamanager.evaluation_scene(index)
                results, milliseconds = self._evaluate_scene(scene)
                encode_ms.append(milliseconds)
                render_ms += [result.render_ms for result in results]
                context_views = scene.views.context.num_views
                rows += [
                    {"scene": scene.name, "image": r.image, "context_views": context_views, **r.metrics}
                    for r in results
                ]
                if output_path is not None:
                    write_image(output_path / f"{scene.name}.png", _scene_sheet(scene, results))
                    for result in results:
                        write_image(output_path / "predictions" / scene.name / f"{result.image}.png", result.rgb)

        timing = {
            "encode_ms_per_scene": _spread(encode_ms),
            "render_ms_per_image": _spread(render_ms),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }
        for path in filter(None, (_ns_eval_output(), output_path and output_path / "metrics.json")):
            write_json(path.with_suffix(".images.json"), {"images": rows, "timing": timing})
            CONSOLE.print(f"Metrics of every image, and times: {path.with_suffix('.images.json')}")
        return _average(rows, list(results[0].metrics), get_std)

    def _evaluate_scene(self, scene: EvaluationScene) -> tuple[list[ImageResult], float]:
        """Renders and scores each target of a scene; also the time in ms to encode its context."""
        context, frame = scene.views.context, self.model.frame_of(scene.views)
        memory, encode_ms = self._timed(lambda: self.model.network.encode(context, frame))
        floor = copy_nearest(context, scene.views.target)[0]
        results = []
        for index, name in enumerate(scene.target_names):
            camera = scene.cameras[index : index + 1]
            outputs, render_ms = self._timed(lambda camera=camera: self.model.render(memory, camera))
            batch = {"image": scene.views.target.rgb[0, index]}
            metrics, _ = self.model.get_image_metrics_and_images(outputs, batch)
            metrics["psnr_copy_nearest"] = float(psnr(floor[index], batch["image"]))
            results.append(ImageResult(name, metrics, render_ms, outputs["rgb"]))
        return results, encode_ms

    def _timed(self, function) -> tuple[Any, float]:
        self._synchronise()
        start = time.perf_counter()
        result = function()
        self._synchronise()
        return result, (time.perf_counter() - start) * 1e3

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    # Checkpoints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: Optional[bool] = None):
        """Loads a run's weights.

        Raises:
            ValueError: listing what is missing, unexpected or misshaped. (nerfstudio would silently load what fits.)
        """
        prefix = "_model."
        model_state = {
            k[len(prefix) :].removeprefix("module."): v for k, v in state_dict.items() if k.startswith(prefix)
        }
        try:
            check_state(self.model, model_state)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint is of another architecture than this config ({self.config.model.network}): {error}"
            ) from None
        self.model.load_state_dict(model_state)


def _scene_sheet(scene: EvaluationScene, results: list[ImageResult]) -> Tensor:
    """Three rows: context, targets, predictions."""
    views = scene.views
    return sheet([list(views.context.rgb[0]), list(views.target.rgb[0]), [result.rgb for result in results]])


def _average(rows: list[dict[str, Any]], metrics: list[str], get_std: bool) -> dict[str, float]:
    averages: dict[str, float] = {}
    for name in metrics:
        scenes: dict[str, list[float]] = {}
        for row in rows:
            scenes.setdefault(row["scene"], []).append(row[name])
        values = [row[name] for row in rows]
        averages[name] = statistics.fmean(values)
        if get_std:
            averages[f"{name}_std"] = statistics.pstdev(values)
        averages[f"{name}_per_scene"] = statistics.fmean(map(statistics.fmean, scenes.values()))
    return {**averages, "num_images": float(len(rows)), "num_scenes": float(len(scenes))}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _progress(description: str) -> Progress:
    columns = TextColumn(f"[green]{description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=CONSOLE, transient=True)


def _ns_eval_output() -> Optional[Path]:
    """Where the running ns-eval will write its JSON, which it does not tell the pipeline; None in other programs."""
    if Path(sys.argv[0]).stem not in ("ns-eval", "eval"):
        return None
    import tyro
    from nerfstudio.scripts.eval import ComputePSNR

    return tyro.cli(ComputePSNR, args=sys.argv[1:]).output_path
