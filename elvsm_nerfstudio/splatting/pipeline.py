"""Fits Gaussians to the context frames of a scene, says what was done, and scores them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from torch import Tensor

from elvsm_nerfstudio.data.datamanager import EvaluationScene
from elvsm_nerfstudio.evaluation.evaluator import Evaluator, TimedFrames, configured_protocol, evaluating
from elvsm_nerfstudio.evaluation.protocols import PROTOCOLS, Protocol, find_protocol
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import timed
from elvsm_nerfstudio.notices import say
from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManager, ContextFramesDataManagerConfig
from elvsm_nerfstudio.splatting.model import SparseSplatfactoModel, SparseSplatfactoModelConfig
from elvsm_nerfstudio.splatting.schedules import multiply_rates

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
    protocol: Optional[str] = None
    """Fits the context views of a protocol of evaluation/protocols.py that has one number of them, as 'objects-4view',
    and scores its targets; by the other options if absent."""


class SparseSplatfactoPipeline(VanillaPipeline):
    """nerfstudio's pipeline, with our metrics and a record of the fit."""

    config: SparseSplatfactoPipelineConfig
    datamanager: ContextFramesDataManager

    def __init__(self, config: SparseSplatfactoPipelineConfig, *args, **kwargs):
        if config.protocol is not None:
            config = _with_protocol(config)
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
        multiply_rates(attributes.optimizers, self.datamanager.rates())
        self.prepared = {"context": self._context_names(), **self.datamanager.record()}

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
            say(f"{self.model.num_points} Gaussians fitted in {seconds:.1f} s: {path}")

        return [
            TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], start),
            *super().get_training_callbacks(attributes),
            TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], write),
        ]

    def record(self) -> dict[str, Any]:
        """What renders what, for a result file."""
        return {
            "backend": self.model.backend,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "scene": self.datamanager.shown.name,
            "context": self._context_names(),
            "image_size": list(self.datamanager.config.image_size),
            "gaussians": self.model.num_points,
            "code": code_version(),
            **self.prepared,
        }

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Metrics over every target of the scene, and those of the baselines. See ``Evaluation.report``.

        Args:
            output_path: folder for pictures: the scene's sheet and each prediction, lossless.
            get_std: adds the standard deviation over images.
        """
        protocol = self.config.protocol
        protocol = configured_protocol(self.datamanager) if protocol is None else find_protocol(protocol)
        with evaluating(self):
            evaluator = Evaluator(ScoredGaussians(self.model, self.record()), self.datamanager, protocol)
            return evaluator.run(output_path, get_std).report(output_path)

    def _context_names(self) -> list[str]:
        names = self.datamanager.collection.load(self.datamanager.shown).frame_names
        return [names[frame] for frame in self.datamanager.shown_frames.context]

    def get_extra_state(self) -> dict[str, Any]:
        return self.prepared

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: Optional[bool] = None):
        """Loads a run's Gaussians; what does not fit is an error. (nerfstudio would silently load what fits.)"""
        self.prepared = state_dict.get("_extra_state", {})  # runs of earlier versions have none
        fitted = self.prepared.get("context", context := self._context_names())
        if self.test_mode != "val" and fitted != context:
            raise ValueError(
                f"scene {self.datamanager.shown.name}: the options choose the frames {', '.join(context)} as context; "
                f"expected {', '.join(fitted)}, to which the Gaussians were fitted. Fit the others in a new run"
            )
        prefix = "_model."
        state = {k[len(prefix) :].removeprefix("module."): v for k, v in state_dict.items() if k.startswith(prefix)}
        self.model.load_state_dict(state, strict=True)


@dataclass(frozen=True)
class ScoredGaussians:
    """Gaussians as ``Evaluator`` asks for them: fitted to one number of context views."""

    model: SparseSplatfactoModel
    record: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def frames_per_call(self, height: int, width: int) -> int:
        return 1

    def renders(self, scene: EvaluationScene, protocol: Protocol) -> Iterator[tuple[int, TimedFrames, None]]:
        yield scene.views.context.num_views, self._timed_frames, None

    def _timed_frames(self, cameras: Cameras) -> Iterator[tuple[Tensor, float]]:
        for i in range(len(cameras)):
            outputs, ms = timed(self.device, partial(self.model.get_outputs_for_camera, cameras[i : i + 1]))
            yield outputs["rgb"], ms


def _with_protocol(config: SparseSplatfactoPipelineConfig) -> SparseSplatfactoPipelineConfig:
    """The config with the frames and images of its protocol."""
    protocol = find_protocol(config.protocol)
    if len(protocol.context_views) != 1:
        fitting = (name for name, other in PROTOCOLS.items() if len(other.context_views) == 1)
        raise ValueError(
            f"--pipeline.protocol {protocol.name}: Gaussians are fitted to one number of context views, and it scores "
            f"{', '.join(map(str, protocol.context_views))}; expected one of {', '.join(fitting)}. For several numbers "
            "there is `elvsm compare`"
        )
    images = protocol.images(config.datamanager.image_size)
    datamanager = replace(
        config.datamanager, protocol=protocol.name, image_size=images.size, background=images.background
    )
    model = config.model
    if model.background_color != "random":
        model = replace(model, background_color=images.background)
    return replace(config, datamanager=datamanager, model=model)
