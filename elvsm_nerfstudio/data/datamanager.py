"""View sets for nerfstudio: many scenes to train on, one scene at a time to look at."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import (
    DataManager,
    VanillaDataManager,
    VanillaDataManagerConfig,
)
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from torch.nn import Parameter

from elvsm_nerfstudio.data.augmentations import Augmentation
from elvsm_nerfstudio.data.chunks import is_chunk_folder
from elvsm_nerfstudio.data.evaluation_views import EvaluationIndex, ViewRule, choose_evaluation_views
from elvsm_nerfstudio.data.images import Background, DataError, ImageSpec
from elvsm_nerfstudio.data.samples import Sample, StepBatches, TrainingSamples, read_sample, training_batches
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection, SceneEntry
from elvsm_nerfstudio.data.view_dataset import PathLoader, ViewDataset
from elvsm_nerfstudio.data.view_samplers import (
    AngularGroupSampler,
    BoundedGapSampler,
    FarthestPointSampler,
    FrameChoice,
    NearestViewSampler,
    RandomViewSampler,
    ViewSampler,
    mix_seed,
)
from elvsm_nerfstudio.notices import warn, warn_once
from elvsm_nerfstudio.views import ViewSet

MIN_CROPPED_SHARE = 0.05
"""Share of the images from which on it is said that it is cut away."""


@dataclass
class ViewSetDataManagerConfig(VanillaDataManagerConfig):
    """Samples view sets, context and target views of one scene, from one or many scenes."""

    _target: type = field(default_factory=lambda: ViewSetDataManager)
    """target class to instantiate"""
    data: Optional[Path] = None
    """A scene (folder or transforms.json), a scenes.json or the folder that holds one, RealEstate10K chunks, lists of
    posed-JSON scenes, or a folder of scenes."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=NerfstudioDataParserConfig)
    """Every scene goes through this dataparser."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width to which images are resized and centre-cropped; multiples of the patch size."""
    scenes_per_batch: int = 2
    """Scenes in a training batch, on each device."""
    num_context_views: Union[int, tuple[int, int]] = 2
    """Context views of a scene. Two numbers: each training step draws one between them, and where evaluation has no
    index it takes the larger."""
    num_target_views: int = 6
    """Target views of a scene in training."""
    view_sampler: Literal["random", "bounded-gap", "angular-groups", "farthest-point", "nearest"] = "random"
    """How training chooses views: anywhere in the scene; the ends of a stretch of a video, with targets between them;
    one context view from each side of an object; context spread out over the scene; or all near to one another."""
    frame_gap: tuple[int, int] = (25, 192)
    """Shortest and longest stretch, in frames, of 'bounded-gap'."""
    frame_gap_warmup_steps: int = 0
    """Steps in which the longest stretch grows from the shortest."""
    targets_include_context: bool = True
    """Whether a training target may be one of the context views (as upstream). Never so in evaluation."""
    background: Background = "white"
    """Colour behind transparent pixels."""
    lens_augmentation: bool = False
    """Whether training sees scenes through many lenses: windows of the images, of other focal lengths, principal points
    and aspects, with exact intrinsics (data/lenses.py). Wants images larger than --pipeline.datamanager.image-size."""
    mirror_augmentation: bool = False
    """Whether training sees half of the scenes mirrored, images and cameras."""
    colour_augmentation: bool = False
    """Whether training sees half of the scenes in other colours: channels exchanged, each a little brighter or darker.
    White and black stay as they are."""
    seed: int = 0
    """Fixes, with the step and the rank, every scene and view that training sees."""
    num_workers: int = 4
    """Processes that decode training images; 0 decodes in the training process."""
    evaluation_index: Optional[Path] = None
    """JSON with the context and target frames of each evaluated scene. Without it, the evaluation_index.json beside
    scenes.json if there is one, else views spread by the cameras."""
    index_may_miss_scenes: bool = False
    """Whether the evaluation index may name scenes that the data do not have: for those who have a part of a data set.
    The result says how many are missing."""
    eval_num_target_views: Optional[int] = None
    """Targets of a scene where evaluation has no index, spread over its held-out frames; all of them if absent."""
    context_frames: Optional[tuple[int, ...]] = None
    """Frames of a single capture that are its context in evaluation, renders and the viewer, numbered in order of the
    file names; chosen by the cameras if absent."""
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

    def find_data(self, config: Path) -> None:
        """Finds a run's data also from another working directory, by the folders that its config.yml lies in.

        Raises:
            DataError: where they are gone.
        """
        for name, option in {"data": "--data DATA", "evaluation_index": "--evaluation-index FILE"}.items():
            path = getattr(self, name)
            if path is not None and str(path) != ".":
                setattr(self, name, _found(Path(path), config, option))

    @property
    def images(self) -> ImageSpec:
        """How training and rendering read images."""
        return ImageSpec(self.image_size, self.background)

    @property
    def context_view_bounds(self) -> tuple[int, int]:
        """Smallest and largest number of context views."""
        number = self.num_context_views
        return (number, number) if isinstance(number, int) else tuple(number)

    def check(self) -> None:
        """Raises DataError for numbers that cannot be, naming their option."""
        smallest, largest = self.context_view_bounds
        for option, number, expected, right in (
            ("num-context-views", self.num_context_views, "one number of at least 1, or the smallest and the largest",
             1 <= smallest <= largest),
            ("num-target-views", self.num_target_views, "at least 1", self.num_target_views >= 1),
            ("eval-num-target-views", self.eval_num_target_views, "at least 1",
             self.eval_num_target_views is None or self.eval_num_target_views >= 1),
            ("scenes-per-batch", self.scenes_per_batch, "at least 1", self.scenes_per_batch >= 1),
            ("num-workers", self.num_workers, "at least 0", self.num_workers >= 0),
            ("context-frames", self.context_frames, "at least one frame", self.context_frames != ()),
        ):  # fmt: skip
            if not right:
                given = number if isinstance(number, int) else " ".join(map(str, number))
                raise DataError(f"--pipeline.datamanager.{option} {given}: expected {expected}")

    def training_sampler(self) -> ViewSampler:
        """The view sampler that the options describe."""
        targets = self.num_target_views, self.targets_include_context
        if self.view_sampler == "bounded-gap":
            return BoundedGapSampler(*targets, *self.frame_gap, warmup_steps=self.frame_gap_warmup_steps)
        samplers = {
            "random": RandomViewSampler,
            "angular-groups": AngularGroupSampler,
            "farthest-point": FarthestPointSampler,
            "nearest": NearestViewSampler,
        }
        return samplers[self.view_sampler](*targets)


def _found(path: Path, config: Path, option: str) -> Path:
    for place in (path, *(folder / path for folder in config.resolve().parents)):
        if place.exists() or is_chunk_folder(place.parent):
            return place
    raise DataError(
        f"{config} needs {path}, which is neither there nor in a folder above the run. If it was moved: elvsm run "
        f"--from-run {shlex.quote(str(config))} {option}"
    )


@dataclass(frozen=True)
class EvaluationScene:
    """One scene as evaluation sees it."""

    name: str
    views: ViewSet
    cameras: Cameras
    """nerfstudio cameras of the targets, [target], on the CPU: a model that renders them checks them there."""
    context_names: tuple[str, ...]
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
        config.check()
        if config.data is None:
            config.data = config.dataparser.data
        if config.data == Path():
            raise DataError("no data: name a scene or a collection with --data")
        self.collection = SceneCollection.open(Path(config.data), config.dataparser)
        self.test_split = "val" if test_mode == "val" else "test"
        self.train_entries = self.collection.split("train")
        self.eval_entries = self.collection.split(self.test_split)
        if not self.eval_entries and test_mode == "val":
            raise DataError(f"{config.data} has no scene in its val split; give one to it in scenes.json")
        self.evaluation_index = read_index(config, self.collection)
        self.missing_scenes: list[str] = []
        """Scenes that the evaluation index names and the data do not have."""
        if self.evaluation_index is not None and self.test_split == "test" and self.eval_entries:
            self.missing_scenes = self.evaluation_index.missing(self.eval_entries)
            listed = self.evaluation_index.listed(self.eval_entries, config.index_may_miss_scenes)
            left_out = len(self.eval_entries) - len(listed)
            if left_out:
                warn(f"{left_out} test scenes are not in {self.evaluation_index.path}: left out")
            if self.missing_scenes:
                warn(f"{len(self.missing_scenes)} scenes of {self.evaluation_index.path} are not in the data: left out")
            self.eval_entries = listed
        if self.evaluation_index is not None and not self.collection.whole_scenes:
            self.collection.hold_out({name: choice.target for name, choice in self.evaluation_index.choices.items()})
        self.skipped_scenes: dict[str, int] = {}
        self._batches: Optional[Iterator[Sample]] = None
        self._next_step = -1
        self.seconds_waited = 0.0
        """For training batches, since whoever logs it last set it back."""
        self.views: Optional[ViewSet] = None
        """The last training batch."""
        self._show(self._entry_to_show())
        DataManager.__init__(self)

    # What nerfstudio's tools look at

    def _show(self, entry: SceneEntry) -> None:
        scene = self.collection.load(entry)
        choice = choose_evaluation_views(scene, self.evaluation_index, self._shown_views)
        self.shown, self.shown_frames = entry, choice
        _say_what_is_cropped(scene, self.config.images)
        self.train_dataparser_outputs = scene.outputs
        self.train_dataset = ViewDataset(scene, choice.context, self.config.images)
        self.eval_dataset = ViewDataset(scene, choice.target, self.config.images)

    def show(self, scene: str, image_size: Optional[tuple[int, int]] = None) -> None:
        """Shows another scene.

        Args:
            image_size: to which images are resized and cropped from now on; as before if absent.

        Raises:
            DataError: where there is none of that name, or it cannot be read.
        """
        size = image_size or self.config.image_size
        if (scene, size) != (self.shown.name, self.config.image_size):
            self.config.image_size = size
            self._show(self._entry(scene))
            self.setup_eval()

    @property
    def evaluation_views(self) -> ViewRule:
        """How evaluation without a protocol, renders and the viewer choose views.

        Videos that are trained on in stretches are also evaluated on one, of the mean length.
        """
        config = self.config
        count = config.context_view_bounds[1] if config.context_frames is None else len(config.context_frames)
        stretches = self.collection.whole_scenes and config.view_sampler == "bounded-gap"
        gap = sum(config.frame_gap) // 2 if stretches else None
        return ViewRule(count, config.eval_num_target_views, frame_gap=gap, context_frames=config.context_frames)

    @property
    def _shown_views(self) -> ViewRule:
        # Which views there are, and whether targets are among the context, is a matter of scores: none are given here.
        return replace(self.evaluation_views, targets_may_be_context=True, allow_fewer=True)

    def shown_scene(self, max_targets: Optional[int] = None) -> EvaluationScene:
        """Context and targets of the scene that the viewer and ns-render show."""
        return self._views(self.collection.load(self.shown), self.shown_frames, self.config.images, max_targets)

    def setup_train(self) -> None:
        if self.test_mode == "val" and not self.train_entries:
            raise DataError(f"{self.config.data} has no scene in its train split; give one to it in scenes.json")
        if self.test_mode == "val" and not self.collection.whole_scenes:
            # Better now than at the first evaluation.
            choose_evaluation_views(self.collection.load(self.shown), self.evaluation_index, self.evaluation_views)

    def setup_eval(self) -> None:
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(self.eval_dataset, device=self.device)
        self.eval_dataloader = PathLoader(self.eval_dataset, device=self.device)

    def get_datapath(self) -> Path:
        return self.collection.root

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        return {}

    # Training

    def next_train(self, step: int) -> tuple[ViewSet, dict[str, Any]]:
        """The batch of a step: the same one whether training came here in one go or was resumed."""
        if step != self._next_step or self._batches is None:
            self._batches = self._training_batches(step)
        self._next_step = step + 1
        start = time.perf_counter()
        sample = next(self._batches)
        self.seconds_waited += time.perf_counter() - start
        self._report(sample.failures)
        self.views = views = sample.view_set(self.device)
        return views, {"image": views.target.rgb}

    @property
    def _rank(self) -> int:
        # nerfstudio passes the rank within the machine only.
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else self.local_rank

    def generator(self, step: int) -> torch.Generator:
        """For what else a training step draws at random: fixed by seed, rank and step."""
        return torch.Generator().manual_seed(mix_seed(self.config.seed, 4, step * self.world_size + self._rank))

    def _training_batches(self, first_step: int) -> Iterator[Sample]:
        config = self.config
        samples = TrainingSamples(
            self.collection,
            self.train_entries,
            config.training_sampler(),
            config.images,
            config.seed,
            config.context_view_bounds,
            samples_per_step=config.scenes_per_batch * self.world_size,
            lens_augmentation=config.lens_augmentation,
            augmentation=Augmentation(config.mirror_augmentation, config.colour_augmentation),
        )
        if not self.collection.whole_scenes:
            samples[first_step * samples.samples_per_step]  # what is wrong with a capture is better raised here
        batches = StepBatches(first_step, config.scenes_per_batch, self._rank, self.world_size)
        return training_batches(samples, batches, config.num_workers, torch.device(self.device).type == "cuda")

    def _report(self, failures: list[str]) -> None:
        for failure in failures:
            if failure not in self.skipped_scenes:
                warn(f"Skipped: {failure}")
            self.skipped_scenes[failure] = self.skipped_scenes.get(failure, 0) + 1

    def get_train_rays_per_batch(self) -> int:
        height, width = self.config.image_size
        return self.config.scenes_per_batch * self.config.num_target_views * height * width

    def get_eval_rays_per_batch(self) -> int:
        height, width = self.config.image_size
        return self.config.num_target_views * height * width

    # Evaluation

    def next_eval(self, step: int) -> tuple[ViewSet, dict[str, Any]]:
        """A step's evaluated scene, with as many targets as in training."""
        views = self.scene_of_step(step).views
        return views, {"image": views.target.rgb}

    def scene_of_step(self, step: int) -> EvaluationScene:
        """One of the evaluated scenes that can be used, with as many targets as in training.

        Raises:
            DataError: where none can.
        """
        # Steps come in hundreds: modulo the number of scenes they would give a few of them again and again.
        first, count = mix_seed(0, 5, step), len(self.eval_entries)
        for i in range(count):
            entry = self.eval_entries[(first + i) % count]
            scene = self.usable_scene(entry, max_targets=self.config.num_target_views)
            if scene is not None:
                return scene
        raise DataError(f"no {self.test_split} scene of {self.config.data} can be used; the reasons are above")

    def usable_scene(
        self,
        entry: SceneEntry,
        rule: Optional[ViewRule] = None,
        images: Optional[ImageSpec] = None,
        max_targets: Optional[int] = None,
    ) -> Optional[EvaluationScene]:
        """As ``evaluation_scene``; in training, which must not end by it, None for one that cannot be used: reported
        like scenes to train on."""
        try:
            return self.evaluation_scene(entry, rule, images, max_targets)
        except DataError as error:
            if self.test_split == "test":
                raise
            self._report([str(error)])
            return None

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """One target of the scene that is shown."""
        return self.fixed_indices_eval_dataloader.get_camera(step % len(self.eval_dataset))

    def evaluation_scene(
        self,
        entry: SceneEntry,
        rule: Optional[ViewRule] = None,
        images: Optional[ImageSpec] = None,
        max_targets: Optional[int] = None,
    ) -> EvaluationScene:
        """Context and targets of a scene as evaluation sees them.

        Args:
            rule, images: a protocol's; as configured if absent.
            max_targets: only the first targets, where a look is enough.

        Raises:
            DataError: evaluation leaves nothing out, so anything unreadable stops it.
        """
        scene = self.collection.load(entry)
        choice = choose_evaluation_views(scene, self.evaluation_index, rule or self.evaluation_views)
        return self._views(scene, choice, images or self.config.images, max_targets)

    def _views(
        self, scene: Scene, choice: FrameChoice, images: ImageSpec, max_targets: Optional[int]
    ) -> EvaluationScene:
        choice = FrameChoice(choice.context, choice.target[:max_targets])
        return EvaluationScene(
            name=scene.name,
            views=Sample.collate([read_sample(scene, choice, images)]).view_set(self.device),
            cameras=scene.cropped_cameras(choice.target, images),
            context_names=tuple(scene.frame_names[frame] for frame in choice.context),
            target_names=tuple(scene.frame_names[frame] for frame in choice.target),
        )

    def _entry_to_show(self) -> SceneEntry:
        if self.config.scene is None:
            if not self.eval_entries:
                warn_once("no test split", f"{self.config.data} has no test split: a scene of another one is shown.")
            return next(iter((*self.eval_entries, *self.collection.split("val"), *self.train_entries)))
        return self._entry(self.config.scene)

    def _entry(self, name: str) -> SceneEntry:
        for entry in (*self.eval_entries, *self.collection.entries):
            if entry.name == name:
                return entry
        raise DataError(
            f"--pipeline.datamanager.scene {name}: {self.config.data} has no such scene; it has "
            f"{', '.join(entry.name for entry in (self.eval_entries or self.collection.entries)[:5])}, ..."
        )


def read_index(config: ViewSetDataManagerConfig, collection: SceneCollection) -> Optional[EvaluationIndex]:
    """The evaluation index that the options name, or the one that lies beside a collection.

    Raises:
        DataError: for one that cannot be read.
    """
    if config.evaluation_index is not None:
        return EvaluationIndex.read(config.evaluation_index)
    beside = collection.root / "evaluation_index.json"
    return EvaluationIndex.read(beside) if collection.whole_scenes and beside.exists() else None


def _say_what_is_cropped(scene: Scene, images: ImageSpec) -> None:
    height, width = scene.sizes[0]
    resized = images.resized((height, width))
    share = 1 - images.size[0] * images.size[1] / (resized[0] * resized[1])
    if share >= MIN_CROPPED_SHARE:
        warn_once(
            "crop",
            f"Images of {width}x{height} (scene {scene.name}) are cropped to {images.size[1]}x{images.size[0]}: "
            f"{share:.0%} of each is cut away. Other aspects: --pipeline.datamanager.image-size HEIGHT WIDTH; "
            "docs/data.md says what they cost.",
        )
