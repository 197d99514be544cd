"""Fits Gaussians to the context frames of a scene, and says what was done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from elvsm_nerfstudio.evaluation.metrics import image_metrics
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json
from elvsm_nerfstudio.evaluation.results import averages, code_version
from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManager, ContextFramesDataManagerConfig
from elvsm_nerfstudio.splatting.model import SparseSplatfactoModel, SparseSplatfactoModelConfig

FIT_RECORD = "fit.json"
"""What a training leaves in its run's folder: how it was fitted, and how long that took."""


@dataclass
class SparseSplatfactoPipelineConfig(VanillaPipelineConfig):
    """Context frames and Gaussians."""

    _target: type = field(default_factory=lambda: SparseSplatfactoPipeline)
    """target class to instantiate"""
    datamanager: ContextFramesDataManagerConfig = field(default_factory=ContextFramesDataManagerConfig)
    """Which frames of which scene, and where Gaussians begin."""
    model: SparseSplatfactoModelConfig = field(default_factory=SparseSplatfactoModelConfig)
    """splatfacto."""


class SparseSplatfactoPipeline(VanillaPipeline):
    """nerfstudio's pipeline, with our metrics and a record of the fit."""

    config: SparseSplatfactoPipelineConfig
    datamanager: ContextFramesDataManager

    def __init__(self, config: SparseSplatfactoPipelineConfig, *args, **kwargs):
        behind, images = config.model.background_color, config.datamanager.background
        if behind not in ("random", images):
            raise ValueError(
                f"--pipeline.model.background-color {behind}: the images are composited on {images} "
                "(--pipeline.datamanager.background); expected the same"
            )
        super().__init__(config, *args, **kwargs)
        self.prepared: dict[str, Any] = {}
        """What the training began with; kept in checkpoints, as a trained run does not prepare it again."""

    @property
    def model(self) -> SparseSplatfactoModel:
        return super().model

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        started: list[float] = []
        trainer = attributes.trainer
        self.datamanager.plan(trainer._start_step + trainer.config.max_num_iterations)
        self.prepared = self.datamanager.record()

        def start(step: int) -> None:
            if not started:
                started.append(time.perf_counter())

        def write(step: int) -> None:
            memory = {}
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
                memory["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.model.device)
            seconds = time.perf_counter() - started[0]
            path = trainer.base_dir / FIT_RECORD
            spent = self.datamanager.seconds | {"optimisation": seconds}
            write_json(path, self.record() | memory | {
                "seconds": {what: round(count, 3) for what, count in spent.items()},
                "iterations": step + 1,
                "seed": self.datamanager.config.seed,
            })  # fmt: skip
            CONSOLE.print(f"{self.model.num_points} Gaussians fitted in {seconds:.1f} s: {path}")

        return [
            TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], start),
            *super().get_training_callbacks(attributes),
            TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], write),
        ]

    def record(self) -> dict[str, Any]:
        """What renders what, for a result file."""
        scene = self.datamanager.shown_scene(max_targets=1)
        return {
            "backend": self.model.backend,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "scene": scene.name,
            "context": list(scene.context_names),
            "image_size": list(self.datamanager.config.image_size),
            "gaussians": self.model.num_points,
            "code": code_version(),
            **self.prepared,
        }

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Metrics over every target of the scene; in ns-eval with a record of what rendered them.

        Args:
            output_path: folder for pictures: the scene's sheet and each prediction, lossless.
            get_std: adds the standard deviation over images.
        """
        was_training = self.training
        self.eval()
        scene = self.datamanager.shown_scene()
        truths, predictions, rows = scene.views.target.rgb[0], [], []
        for index, name in enumerate(track(scene.target_names, "Evaluating targets", console=CONSOLE, transient=True)):
            rgb = self.model.get_outputs_for_camera(scene.cameras[index : index + 1])["rgb"]
            rows.append({"scene": scene.name, "image": name, **image_metrics(rgb, truths[index])})
            if output_path is not None:
                predictions.append(rgb)
                write_image(output_path / "predictions" / scene.name / f"{name}.png", rgb)
        if output_path is not None:
            pictures = sheet([list(scene.views.context.rgb[0]), list(truths), predictions])
            write_image(output_path / f"{scene.name}.png", pictures)
        self.train(was_training)
        result: dict[str, Any] = averages(rows, [name for name in rows[0] if name not in ("scene", "image")], get_std)
        # The trainer logs numbers alone.
        return result if step is not None else {**result, "record": self.record(), "images": rows}

    def get_extra_state(self) -> dict[str, Any]:
        return self.prepared

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: Optional[bool] = None):
        """Loads a run's Gaussians; what does not fit is an error. (nerfstudio would silently load what fits.)"""
        self.prepared = state_dict.get("_extra_state", {})  # runs of earlier versions have none
        prefix = "_model."
        state = {k[len(prefix) :].removeprefix("module."): v for k, v in state_dict.items() if k.startswith(prefix)}
        self.model.load_state_dict(state, strict=True)
