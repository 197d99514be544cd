"""Ties data and model together: primes the context, walks scenes in evaluation, loads checkpoints strictly."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import comms, writer
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from elvsm_nerfstudio.data.datamanager import ViewSetDataManager, ViewSetDataManagerConfig
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.lenses import SIDE_MULTIPLE
from elvsm_nerfstudio.evaluation.evaluator import Evaluator, configured_protocol, evaluating
from elvsm_nerfstudio.evaluation.protocols import Protocol, find_protocol
from elvsm_nerfstudio.evaluation.report import sheet, write_json
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.model import EfficientLVSMModel, EfficientLVSMModelConfig
from elvsm_nerfstudio.nn.named_weights import trained_image_size
from elvsm_nerfstudio.nn.published_weights import check_state
from elvsm_nerfstudio.nn.weights import load_network
from elvsm_nerfstudio.notices import warn
from elvsm_nerfstudio.programs import running_program, subcommand
from elvsm_nerfstudio.training.repa import PROJECTORS
from elvsm_nerfstudio.training.run_config import image_size_of_checkpoint, network_of_checkpoint
from elvsm_nerfstudio.viewer.context_pool import ContextPool
from elvsm_nerfstudio.viewer.panel import FOLDER, ContextControls


@dataclass
class EfficientLVSMPipelineConfig(VanillaPipelineConfig):
    """View sets and a network that renders them."""

    _target: type = field(default_factory=lambda: EfficientLVSMPipeline)
    """target class to instantiate"""
    datamanager: ViewSetDataManagerConfig = field(default_factory=ViewSetDataManagerConfig)
    """View sets from one or many scenes."""
    model: EfficientLVSMModelConfig = field(default_factory=EfficientLVSMModelConfig)
    """The network."""
    compress_gradients: bool = False
    """Whether several GPUs exchange gradients in bf16: half the traffic, where the network is slow."""
    protocol: Optional[str] = None
    """How ns-eval scores: 're10k-2view-256', 'objects-4view', 'wide-range', 'incremental' or another one of
    evaluation/protocols.py; by the run's own options if absent."""


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
        if config.datamanager.lens_augmentation and SIDE_MULTIPLE % patch:
            raise ValueError(
                f"--pipeline.datamanager.lens-augmentation True: found patch size {patch} "
                f"(--pipeline.model.network.patch-size); expected a divisor of {SIDE_MULTIPLE}, of which the sides "
                "of its images are multiples"
            )
        if test_mode != "val":
            config = replace(config, model=config.model.without_training())
        if running_program() == "ns-export" and subcommand() != "cameras":
            raise ValueError(
                f"ns-export {subcommand()}: this method renders images and knows neither depths nor densities; it has "
                "nothing to export but cameras. For points or a mesh train a method with geometry on the same data, "
                "e.g. ns-train splatfacto-sparse"
            )
        # An unknown name is an error now and not after the training.
        self._protocol = None if config.protocol is None else find_protocol(config.protocol)
        # nerfstudio's own DDP looks for unused parameters in every step, and keeps gradients twice.
        super().__init__(config, device, test_mode, 1, local_rank, grad_scaler)
        self.world_size = self.datamanager.world_size = world_size
        if world_size > 1:
            self._model = self._distributed()
        number = len(self.datamanager.eval_dataset)
        if (running_program(), subcommand(), number) == ("ns-render", "interpolate", 1) and "train" not in sys.argv:
            raise ValueError(
                f"ns-render interpolate goes from one held-out photo to the next, and scene "
                f"{self.datamanager.shown.name} has one. Give --pose-source train: from one context view to the next"
            )
        if test_mode != "val":
            # ns-render makes data managers of other splits from this config, for the cameras of the scene shown here.
            self.datamanager.config.scene = self.datamanager.shown.name
        shown = self.datamanager.shown.name
        scenes = list(dict.fromkeys([shown, *(entry.name for entry in self.datamanager.eval_entries)]))
        controls = ContextControls(self.model, self._show(shown), scenes, shown, self._show, self._use_weights)
        # Found there by the viewer; without one they do nothing.
        self.add_module(FOLDER, controls.elements)

    def _show(self, scene: str, image_size: Optional[tuple[int, int]] = None) -> ContextPool:
        """Shows a scene: gives the model its context, and tells what else may be context.

        Args:
            image_size: (height, width) of the images from now on; as before if absent.

        Raises:
            DataError: where it cannot be read; the one before is still shown.
        """
        before = self.datamanager.shown.name, self.datamanager.config.image_size
        # Without targets in the canonical frame there is no need to decode them all.
        max_targets = None if self.config.model.canonical_frame == "context+target" else 1
        try:
            self.datamanager.show(scene, image_size)
            pool = ContextPool.of_shown_scene(self.datamanager)
            self.model.set_context(self.datamanager.shown_scene(max_targets).views, pool.context)
        except DataError:
            self.datamanager.show(*before)
            raise
        return pool

    def _use_weights(self, weights: str) -> ContextPool:
        """Renders the scene with other weights, of any network, at the image size that they were trained with; where
        neither a name nor a run tells it, as before.

        Raises:
            ValueError, OSError, MemoryError, RuntimeError: where they cannot be used; the ones before still are.
        """
        network = load_network(weights, network_of_checkpoint(weights))
        before, shown = (self.model.network, self.datamanager.config.image_size), self.datamanager.shown.name
        pool = self._show(shown, trained_image_size(weights) or image_size_of_checkpoint(weights))
        try:
            self.model.use_network(network)
            self.model.memory()
            self.model.warm_up()
        except Exception:
            self.model.use_network(before[0])
            self._show(shown, before[1])
            raise
        return pool

    @property
    def model(self) -> EfficientLVSMModel:
        return super().model

    def _distributed(self) -> DistributedDataParallel:
        # An empty tensor of nerfstudio's, by which models know their device: the one parameter that nothing uses.
        self.model.device_indicator_param.requires_grad_(False)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        distributed = DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)
        if self.config.compress_gradients:
            distributed.register_comm_hook(None, bf16_compress_hook)
        return distributed

    # Training

    def get_train_loss_dict(self, step: int):
        self.model.generator = self.datamanager.generator(step)
        outputs, losses, metrics = super().get_train_loss_dict(step)
        metrics["skipped_scenes"] = torch.tensor(float(sum(self.datamanager.skipped_scenes.values())))
        return outputs, losses, metrics

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        def log_optimizer(step: int) -> None:
            for name, optimizer in attributes.optimizers.optimizers.items():
                writer.put_scalar(f"gradient_norm/{name}", optimizer.gradient_norm, step)
                counts = optimizer.counts
                writer.put_scalar(f"skipped_steps/{name}", counts["skipped_steps"], step)
                writer.put_scalar(f"nonfinite_steps/{name}", counts["nonfinite_steps"], step)

        def list_skipped(step: int) -> Optional[Path]:
            skipped = self.datamanager.skipped_scenes
            if not skipped or not comms.is_main_process():
                return None
            path = attributes.trainer.base_dir / "skipped_scenes.json"
            write_json(path, dict(sorted(skipped.items(), key=lambda item: -item[1])))
            return path

        def summarise_skipped(step: int) -> None:
            path, skipped = list_skipped(step), self.datamanager.skipped_scenes
            if path is not None:
                warn(
                    f"{sum(skipped.values())} samples came from another scene than planned, for "
                    f"{len(skipped)} reasons: {path}"
                )

        after_step, after_training = (
            [TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
            [TrainingCallbackLocation.AFTER_TRAIN],
        )
        ours = [
            TrainingCallback(
                after_step, log_optimizer, update_every_num_iters=attributes.trainer.config.logging.steps_per_log
            ),
            TrainingCallback(after_step, list_skipped, update_every_num_iters=500),
            TrainingCallback(after_training, summarise_skipped),
        ]
        return super().get_training_callbacks(attributes) + ours

    # Evaluation

    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        with evaluating(self):
            views, batch = self.datamanager.next_eval(step)
            outputs = self.model(views)
            metrics = self.model.get_metrics_dict(outputs, batch)
            return outputs, self.model.get_loss_dict(outputs, batch, metrics), metrics

    @torch.no_grad()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of one evaluated scene's first target, and a picture of the scene.

        Its rows are context, targets, predictions, and how far each colour is off: absolute, black is right.
        """
        with evaluating(self):
            evaluator = Evaluator(ScoredNetwork(self.model), self.datamanager, self._configured_protocol())
            scene = self.datamanager.scene_of_step(step)
            results = evaluator.score(scene)
            height, width = results[0].rgb.shape[:2]
            context, targets = (list(views.rgb[0]) for views in (scene.views.context, scene.views.target))
            predictions = [result.rgb for result in results]
            errors = [(prediction - target).abs() for prediction, target in zip(predictions, targets)]
            picture = sheet([context, targets, predictions, errors])
            return {**results[0].metrics, "num_rays": height * width}, {"views": picture}

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Metrics over every target of every scene of the evaluated split.

        Means are per image (``psnr``) and per scene, i.e. of the scenes' means (``psnr_per_scene``). Those that end in
        ``_copy_nearest`` and ``_mean_of_context`` are baselines: what the image of the nearest context view, and the
        mean of all of them, score as they are. In ns-eval a protocol with several numbers of context views gives such
        averages for each, under ``by_context_views``. See ``Evaluation.report``.

        Args:
            output_path: folder for pictures: each scene's sheet and each prediction, lossless.
            get_std: adds the standard deviation over images.
        """
        protocol = self._protocol if self.datamanager.test_split == "test" else None
        with evaluating(self):
            evaluator = Evaluator(ScoredNetwork(self.model), self.datamanager, protocol or self._configured_protocol())
            return evaluator.run(output_path, get_std).report(output_path)

    def _configured_protocol(self) -> Protocol:
        return configured_protocol(self.datamanager, self.config.model.canonical_frame)

    # Checkpoints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: Optional[bool] = None):
        """Loads a run's weights; outside of training without the projectors of REPA.

        Raises:
            ValueError: listing what is missing, unexpected or misshaped. (nerfstudio would silently load what fits.)
        """
        prefix = "_model."
        model_state = {
            k[len(prefix) :].removeprefix("module."): v for k, v in state_dict.items() if k.startswith(prefix)
        }
        if self.test_mode != "val":
            model_state = {k: v for k, v in model_state.items() if not k.startswith(PROJECTORS)}
        try:
            check_state(self.model, model_state)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint is of another architecture than this config ({self.config.model.network}): {error}"
            ) from None
        self.model.load_state_dict(model_state)
