"""View sets for nerfstudio: many scenes to train on, one scene at a time to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import (
    DataManager,
    VanillaDataManager,
    VanillaDataManagerConfig,
)
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from nerfstudio.utils.rich_utils import CONSOLE
from torch.nn import Parameter
from torch.utils.data import DataLoader

from elvsm_nerfstudio.data.evaluation_views import EvaluationIndex, choose_evaluation_views
from elvsm_nerfstudio.data.images import Background, DataError
from elvsm_nerfstudio.data.samples import Sample, StepBatches, TrainingSamples, read_sample
from elvsm_nerfstudio.data.scenes import Scene, SceneCollection, SceneEntry
from elvsm_nerfstudio.data.view_samplers import FrameChoice, RandomViewSampler
from elvsm_nerfstudio.views import ViewSet


@dataclass
class ViewSetDataManagerConfig(VanillaDataManagerConfig):
    """Samples view sets, context and target views of one scene, from one or many scenes."""

    _target: type = field(default_factory=lambda: ViewSetDataManager)
    """target class to instantiate"""
    data: Optional[Path] = None
    """A scene (folder or transforms.json), a scenes.json or the folder that holds one, or a folder of scenes."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=NerfstudioDataParserConfig)
    """Every scene goes through this dataparser."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width to which images are resized and centre-cropped; multiples of the patch size."""
    scenes_per_batch: int = 2
    """Scenes in a training batch, on each device."""
    num_context_views: int = 2
    """Context views of a scene, in training and where evaluation has no index."""
    num_target_views: int = 6
    """Target views of a scene in training."""
    targets_include_context: bool = True
    """Whether a training target may be one of the context views (as upstream). Never so in evaluation."""
    background: Background = "white"
    """Colour behind transparent pixels."""
    seed: int = 0
    """Fixes, with the step and the rank, every scene and view that training sees."""
    num_workers: int = 4
    """Processes that decode training images; 0 decodes in the training process."""
    evaluation_index: Optional[Path] = None
    """JSON with the context and target frames of each evaluated scene. Without it, the evaluation_index.json beside
    scenes.json if there is one, else views spread by the cameras."""
    eval_num_target_views: Optional[int] = None
    """Targets of a scene where evaluation has no index, spread over its held-out frames; all of them if absent."""
    scene: Optional[str] = None
    """Scene that the viewer and ns-render show; the first of the evaluated split if absent."""

    # Inherited, and without meaning here: hidden from --help.
    masks_on_gpu: Annotated[bool, tyro.conf.Suppress] = False
    images_on_gpu: Annotated[bool, tyro.conf.Suppress] = False
    train_num_rays_per_batch: Annotated[int, tyro.conf.Suppress] = 1024
    train_num_images_to_sample_from: Annotated[int, tyro.conf.Suppress] = -1
    train_num_times_to_repeat_images: Annotated[int, tyro.conf.Suppress] = -1
    eval_num_rays_per_batch: Annotated[int, tyro.conf.Suppress] = 1024
    eval_num_images_to_sample_from: Annotated[int, tyro.conf.Suppress] = -1
    eval_num_times_to_repeat_images: Annotated[int, tyro.conf.Suppress] = -1
    eval_image_indices: Annotated[Optional[tuple[int, ...]], tyro.conf.Suppress] = (0,)
    camera_res_scale_factor: Annotated[float, tyro.conf.Suppress] = 1.0
    patch_size: Annotated[int, tyro.conf.Suppress] = 1
    pixel_sampler: Annotated[Any, tyro.conf.Suppress] = None


class ViewDataset(InputDataset):
    """Some frames of a scene, resized, cropped and composited as the network gets them, for nerfstudio's tools."""

    def __init__(self, scene: Scene, frames: tuple[int, ...], config: ViewSetDataManagerConfig):
        outputs = DataparserOutputs(
            image_filenames=[scene.outputs.image_filenames[frame] for frame in frames],
            cameras=scene.cropped_cameras(frames, config.image_size),
            scene_box=scene.outputs.scene_box,
            dataparser_transform=scene.outputs.dataparser_transform,
            dataparser_scale=scene.outputs.dataparser_scale,
        )
        super().__init__(outputs)
        self._scene, self._frames, self._config = scene, frames, config

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        frame = self._frames[image_idx]
        return self._scene.read_images([frame], self._config.image_size, self._config.background)[0].numpy()


@dataclass(frozen=True)
class EvaluationScene:
    """One scene as evaluation sees it."""

    name: str
    views: ViewSet
    cameras: Cameras
    """nerfstudio cameras of the targets, [target]."""
    target_names: tuple[str, ...]


class ViewSetDataManager(VanillaDataManager):
    """Training batches of view sets, and evaluation scene by scene.

    ``train_dataset`` and ``eval_dataset`` are the context and target views of the scene that is shown: nerfstudio's
    viewer and ns-render look at one scene at a time, never at the pool to train on.
    """

    config: ViewSetDataManagerConfig

    def __init__(
        self,
        config: ViewSetDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs,
    ):
        self.config, self.device, self.test_mode = config, device, test_mode
        self.world_size, self.local_rank = world_size, local_rank
        if config.data is None:
            config.data = config.dataparser.data
        if config.data == Path():
            raise DataError("no data: name a scene or a collection with --data")
        self.collection = SceneCollection.open(Path(config.data), config.dataparser)
        self.test_split = "val" if test_mode == "val" else "test"
        self.train_entries = self.collection.split("train")
        self.eval_entries = self.collection.split(self.test_split)
        if not self.eval_entries:
            raise DataError(f"{config.data} has no scene in its {self.test_split} split; give one to it in scenes.json")
        self.evaluation_index = self._read_index()
        if self.evaluation_index is not None and self.test_split == "test":
            listed = self.evaluation_index.listed(self.eval_entries)
            left_out = len(self.eval_entries) - len(listed)
            if left_out:
                CONSOLE.print(f"[bold yellow]{left_out} test scenes are not in {self.evaluation_index.path}: left out")
            self.eval_entries = listed
        self.skipped_scenes: dict[str, int] = {}
        self._batches: Optional[Iterator[Sample]] = None
        self._next_step = -1
        self._show(self._entry_to_show())
        DataManager.__init__(self)

    # What nerfstudio's tools look at

    def _show(self, entry: SceneEntry) -> None:
        scene, choice = self.scene_and_choice(entry)
        self.shown = entry
        self.train_dataparser_outputs = scene.outputs
        self.train_dataset = ViewDataset(scene, choice.context, self.config)
        self.eval_dataset = ViewDataset(scene, choice.target, self.config)

    def setup_train(self) -> None:
        if self.test_mode == "val" and not self.train_entries:
            raise DataError(f"{self.config.data} has no scene in its train split; give one to it in scenes.json")

    def setup_eval(self) -> None:
        loader = FixedIndicesEvalDataloader(self.eval_dataset, device=self.device)
        self.eval_dataloader = self.fixed_indices_eval_dataloader = loader

    def get_datapath(self) -> Path:
        return self.collection.root

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        return {}

    # Training

    def next_train(self, step: int) -> tuple[ViewSet, dict[str, Any]]:
        """The batch of a step: the same one whether training came here in one go or was resumed."""
        if step != self._next_step or self._batches is None:
            self._batches = iter(self._training_loader(step))
        self._next_step = step + 1
        sample = next(self._batches)
        self._report(sample.failures)
        views = sample.view_set(self.device)
        return views, {"image": views.target.rgb}

    def _training_loader(self, first_step: int) -> DataLoader:
        config = self.config
        sampler = RandomViewSampler(config.num_context_views, config.num_target_views, config.targets_include_context)
        if not self.collection.whole_scenes:
            frames = len(self.collection.load(self.train_entries[0]).train_frames)
            if frames < sampler.num_frames:
                raise DataError(
                    f"{config.data} has {frames} frames to train on; expected at least {sampler.num_frames}: "
                    f"{config.num_context_views} context (--pipeline.datamanager.num-context-views) and "
                    f"{config.num_target_views} target views (--pipeline.datamanager.num-target-views)"
                )
        # nerfstudio passes the rank within the machine only.
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else self.local_rank
        samples = TrainingSamples(
            self.collection, self.train_entries, sampler, config.image_size, config.background, config.seed
        )
        return DataLoader(
            samples,
            batch_sampler=StepBatches(first_step, config.scenes_per_batch, rank, self.world_size),
            collate_fn=Sample.collate,
            num_workers=config.num_workers,
            pin_memory=torch.device(self.device).type == "cuda",
        )

    def _report(self, failures: list[str]) -> None:
        for failure in failures:
            if failure not in self.skipped_scenes:
                CONSOLE.print(f"[bold yellow]Skipped: {failure}")
            self.skipped_scenes[failure] = self.skipped_scenes.get(failure, 0) + 1

    def get_train_rays_per_batch(self) -> int:
        height, width = self.config.image_size
        return self.config.scenes_per_batch * self.config.num_target_views * height * width

    def get_eval_rays_per_batch(self) -> int:
        height, width = self.config.image_size
        return self.config.num_target_views * height * width

    # Evaluation

    def next_eval(self, step: int) -> tuple[ViewSet, dict[str, Any]]:
        """One evaluated scene, with as many targets as in training; steps walk through all scenes."""
        views = self.evaluation_scene(step % len(self.eval_entries), self.config.num_target_views).views
        return views, {"image": views.target.rgb}

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """One target of the scene that is shown."""
        return self.eval_dataloader.get_camera(step % len(self.eval_dataset))

    def evaluation_scene(self, index: int, max_targets: Optional[int] = None) -> EvaluationScene:
        """Context and targets of an evaluated scene; only the first targets where a look is enough.

        Raises:
            DataError: evaluation leaves nothing out, so anything unreadable stops it.
        """
        return self._evaluation_scene(self.eval_entries[index], max_targets)

    def shown_scene(self, max_targets: Optional[int] = None) -> EvaluationScene:
        """Context and targets of the scene that the viewer and ns-render show."""
        return self._evaluation_scene(self.shown, max_targets)

    def _evaluation_scene(self, entry: SceneEntry, max_targets: Optional[int]) -> EvaluationScene:
        scene, choice = self.scene_and_choice(entry)
        choice = FrameChoice(choice.context, choice.target[:max_targets])
        sample = read_sample(scene, choice, self.config.image_size, self.config.background)
        return EvaluationScene(
            name=entry.name,
            views=Sample.collate([sample]).view_set(self.device),
            cameras=scene.cropped_cameras(choice.target, self.config.image_size).to(self.device),
            target_names=tuple(scene.frame_name(frame) for frame in choice.target),
        )

    def scene_and_choice(self, entry: SceneEntry) -> tuple[Scene, FrameChoice]:
        scene = self.collection.load(entry)
        choice = choose_evaluation_views(
            scene, self.evaluation_index, self.config.num_context_views, self.config.eval_num_target_views
        )
        return scene, choice

    def _entry_to_show(self) -> SceneEntry:
        if self.config.scene is None:
            return self.eval_entries[0]
        for entry in (*self.eval_entries, *self.collection.entries):
            if entry.name == self.config.scene:
                return entry
        raise DataError(
            f"--pipeline.datamanager.scene {self.config.scene}: {self.config.data} has no such scene; it has "
            f"{', '.join(entry.name for entry in self.eval_entries[:5])}, ..."
        )

    def _read_index(self) -> Optional[EvaluationIndex]:
        if self.config.evaluation_index is not None:
            return EvaluationIndex.read(self.config.evaluation_index)
        beside = self.collection.root / "evaluation_index.json"
        return EvaluationIndex.read(beside) if self.collection.whole_scenes and beside.exists() else None
