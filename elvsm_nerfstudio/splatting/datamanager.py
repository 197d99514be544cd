"""The context frames of one scene for splatfacto: the frames, images and crops that the feed-forward methods see."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from elvsm_nerfstudio.data.datamanager import ViewSetDataManager, ViewSetDataManagerConfig
from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.scenes import SceneEntry
from elvsm_nerfstudio.data.view_samplers import mix_seed
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.notices import say
from elvsm_nerfstudio.splatting.initial_points import (
    Initialization,
    InitialPoints,
    initial_points,
    points_from_file,
)


@dataclass
class ContextFramesDataManagerConfig(ViewSetDataManagerConfig):
    """The context frames of one scene."""

    _target: type = field(default_factory=lambda: ContextFramesDataManager)
    """target class to instantiate"""
    image_size: tuple[int, int] = (128, 128)
    """Height and width to which images are resized and centre-cropped."""
    num_context_views: Union[int, tuple[int, int]] = 4
    """Context views, spread over the scene, where neither context frames nor an evaluation index are given."""
    initial_points: Initialization = "plane-sweep"
    """Where Gaussians begin: on surfaces that the context views agree on, and the rest as 'random'; at random, where
    most views look and none sees the background; or at the points of a file."""
    num_initial_points: int = 2000
    """Gaussians to begin with. Ours: on three validation objects 1000, 2000 and 5000 were within a dB on average."""
    points_file: Optional[Path] = None
    """Point cloud (.ply, .pcd, .xyz) for --initial-points points, in the coordinates of the capture's own cameras. Mind
    that points made from more than the context frames give the baseline what the other methods do not have."""
    seed: int = 0
    """Fixes the order of the context frames and the draw of the points."""

    protocol: Annotated[Optional[str], tyro.conf.Suppress] = None
    """Its frames and images are taken: --pipeline.protocol."""

    # Of training on many scenes, and without meaning here: hidden from --help.
    scenes_per_batch: Annotated[int, tyro.conf.Suppress] = 1
    num_target_views: Annotated[int, tyro.conf.Suppress] = 1
    view_sampler: Annotated[Any, tyro.conf.Suppress] = "random"
    frame_gap: Annotated[tuple[int, int], tyro.conf.Suppress] = (25, 192)
    frame_gap_warmup_steps: Annotated[int, tyro.conf.Suppress] = 0
    targets_include_context: Annotated[bool, tyro.conf.Suppress] = False
    num_workers: Annotated[int, tyro.conf.Suppress] = 0

    def __post_init__(self) -> None:
        if (self.initial_points == "points") != (self.points_file is not None):
            raise DataError(
                f"--pipeline.datamanager.initial-points {self.initial_points} with points-file {self.points_file}; "
                "expected a file with 'points', and none without"
            )

    @property
    def images(self) -> ImageSpec:
        return super().images if self.protocol is None else find_protocol(self.protocol).images(self.image_size)


class ContextFramesDataManager(ViewSetDataManager):
    """One scene: trains on its context frames, one at a time, and evaluates on its targets.

    The points that Gaussians begin at stand where nerfstudio's pipeline looks for a capture's point cloud; the
    capture's own, made from all its frames, is never used.
    """

    config: ContextFramesDataManagerConfig

    def __init__(
        self,
        config: ContextFramesDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs,
    ):
        # Training, evaluation and renders look at the same scene, whatever its split.
        mode = "test" if test_mode == "val" else test_mode
        super().__init__(config, device, mode, world_size, local_rank, **kwargs)
        self.eval_entries = [self.shown]
        self.context_cameras = self.train_dataset.cameras.to(device)
        indices = range(len(self.train_dataset))
        self.context_images = torch.stack([self.train_dataset.get_image_float32(i) for i in indices]).to(device)
        self.initial_points: Optional[InitialPoints] = None
        self.seconds: dict[str, float] = {}
        """What was done before training, and how long it took."""
        metadata = {}
        if test_mode == "val":
            points = self._make_initial_points()
            metadata = {"points3D_xyz": points.xyz, "points3D_rgb": points.rgb}
        self.train_dataparser_outputs = dataclasses.replace(self.train_dataparser_outputs, metadata=metadata)

    def _make_initial_points(self) -> InitialPoints:
        config, start = self.config, time.perf_counter()
        generator = torch.Generator().manual_seed(mix_seed(config.seed, 3, 0))
        if config.initial_points == "points":
            points = points_from_file(
                config.points_file, self.train_dataparser_outputs, config.num_initial_points, generator
            )
        else:
            points = initial_points(
                config.initial_points,
                self.train_dataset.cameras,
                self.context_images.cpu(),
                config.background,
                config.num_initial_points,
                generator,
                self._rendered_for_points(),
            )
        self.initial_points, self.seconds["initial_points"] = points, time.perf_counter() - start
        say(
            f"{len(self.train_dataset)} context frames of {self.shown.name}; initial points: {points.summary} in "
            f"{self.seconds['initial_points']:.1f} s"
        )
        return points

    def _rendered_for_points(self) -> Optional[tuple[Cameras, Tensor]]:
        """Cameras and images, on the CPU and of the context frames' size, to find points by beside the context."""
        return None

    def plan(self, steps: int) -> None:
        """Says how many steps there will be in all."""

    def rates(self) -> dict[str, float]:
        """By what learning rates of the config are multiplied, by their names."""
        return {}

    def record(self) -> dict[str, Any]:
        """What a training begins with, for its record."""
        return {"initial_points": self.initial_points.record}

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A context frame: each once in an epoch, in an order that (seed, epoch) fix."""
        epoch, position = divmod(step, len(self.context_images))
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, 0, epoch))
        index = int(torch.randperm(len(self.context_images), generator=generator)[position])
        camera = self.context_cameras[index : index + 1]
        camera.metadata = {"cam_idx": index}
        return camera, {"image": self.context_images[index], "image_idx": index}

    def next_eval(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A target frame."""
        return self.next_eval_image(step)

    def get_train_rays_per_batch(self) -> int:
        height, width = self.config.image_size
        return height * width

    def get_eval_rays_per_batch(self) -> int:
        return self.get_train_rays_per_batch()

    @property
    def evaluation_views(self) -> ViewRule:
        protocol = self.config.protocol
        if protocol is not None:
            return find_protocol(protocol).views
        return dataclasses.replace(super().evaluation_views, targets_may_be_context=True)

    @property
    def _shown_views(self) -> ViewRule:
        return self.evaluation_views  # what is shown is scored here

    def _entry_to_show(self) -> SceneEntry:
        if self.config.scene is None and self.collection.whole_scenes:
            names = [entry.name for entry in self.eval_entries]
            raise DataError(
                f"{self.config.data} has {len(self.collection.entries)} scenes, and splatting fits one: name it with "
                f"--pipeline.datamanager.scene; the test split has {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}"
            )
        return super()._entry_to_show()
