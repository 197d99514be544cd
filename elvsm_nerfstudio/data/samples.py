"""Training samples: view sets of scenes in an order that (seed, rank, step) fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.scenes import Scene, SceneCollection, SceneEntry
from elvsm_nerfstudio.data.view_samplers import FrameChoice, ViewSampler, draw_num_context_views, mix_seed
from elvsm_nerfstudio.views import ViewSet

MAX_ATTEMPTS = 32
"""Scenes that may fail one after another before a sample gives up."""


@dataclass
class Sample:
    """Context and then target images of one scene (or, collated, of several), with their cameras."""

    rgb: UInt8[Tensor, "*scene view height width 3"]
    cameras: Float[Tensor, "*scene view 23"]
    """Camera-to-world (3x4, row major, OpenGL axes), fx, fy, cx, cy in pixels, six distortion parameters and the type
    of each camera; in one piece, since every tensor takes its time on the way from a worker."""
    num_context_views: int
    failures: list[str]
    """What was wrong with scenes that were skipped on the way to this sample."""

    @property
    def camera_to_worlds(self) -> Float[Tensor, "*scene view 3 4"]:
        return self.cameras[..., :12].unflatten(-1, (3, 4))

    @property
    def intrinsics(self) -> Float[Tensor, "*scene view 4"]:
        return self.cameras[..., 12:16]

    @staticmethod
    def collate(samples: list[Sample]) -> Sample:
        # default_collate stacks into shared memory where this is a worker.
        return Sample(
            rgb=default_collate([sample.rgb for sample in samples]),
            cameras=default_collate([sample.cameras for sample in samples]),
            num_context_views=samples[0].num_context_views,
            failures=[failure for sample in samples for failure in sample.failures],
        )

    def pin_memory(self) -> Sample:
        """Called by the loader, so that copies to the GPU need not wait."""
        return replace(self, rgb=self.rgb.pin_memory(), cameras=self.cameras.pin_memory())

    def view_set(self, device: torch.device | str) -> ViewSet:
        """The collated sample as context and target views on a device; rays are made there."""
        scenes, _, height, width, _ = self.rgb.shape
        poses, focal, distortion, kind = (
            self.cameras.flatten(0, 1).to(device, non_blocking=True).split((12, 4, 6, 1), -1)
        )
        cameras = Cameras(
            camera_to_worlds=poses.unflatten(-1, (3, 4)),
            fx=focal[:, 0:1],
            fy=focal[:, 1:2],
            cx=focal[:, 2:3],
            cy=focal[:, 3:4],
            height=height,
            width=width,
            distortion_params=distortion,
            camera_type=kind.long(),
        )
        rgb = self.rgb.flatten(0, 1).to(device, non_blocking=True).float() / 255
        views = views_from_cameras(cameras, patch_size=1, rgb=rgb).split_scenes(scenes)
        context = self.num_context_views
        return ViewSet(views.select(slice(0, context)), views.select(slice(context, None)))


def read_sample(scene: Scene, choice: FrameChoice, spec: ImageSpec) -> Sample:
    """Decodes the images of a choice of frames; a frame that is context and target is decoded once."""
    frames = (*choice.context, *choice.target)
    unique = list(dict.fromkeys(frames))
    images = scene.read_images(unique, spec)
    if len(unique) < len(frames):
        images = images[[unique.index(frame) for frame in frames]]
    index = list(frames)
    distortion = scene.cameras.distortion_params
    cameras = (
        scene.cameras.camera_to_worlds[index].flatten(1),
        scene.cropped_intrinsics(spec)[index],
        torch.zeros(len(index), 6) if distortion is None else distortion[index],
        scene.cameras.camera_type[index],
    )
    return Sample(images, torch.cat(cameras, dim=-1).float(), len(choice.context), failures=[])


class TrainingSamples(Dataset):
    """Sample k of an endless sequence, made from (seed, k) alone.

    Epoch by epoch every scene comes once, in an order shuffled by (seed, epoch). A scene that cannot be used is
    replaced by one drawn from (seed, k), and reported in the sample; a single scene raises its DataError.

    Args:
        num_context_views: smallest and largest number; each training step draws its own, the same on all ranks.
        samples_per_step: scenes that all ranks together see in a step.
    """

    def __init__(
        self,
        collection: SceneCollection,
        entries: list[SceneEntry],
        sampler: ViewSampler,
        spec: ImageSpec,
        seed: int,
        num_context_views: tuple[int, int],
        samples_per_step: int,
    ):
        self.collection, self.entries, self.sampler = collection, entries, sampler
        self.spec, self.seed = spec, seed
        self.num_context_views, self.samples_per_step = num_context_views, samples_per_step
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, k: int) -> Sample:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 1, k))
        step = k // self.samples_per_step
        count = draw_num_context_views(self.num_context_views, self.seed, step)
        index = self._scene_in_epoch(k)
        failures: list[str] = []
        while len(failures) < MAX_ATTEMPTS:
            try:
                scene = self.collection.load(self.entries[index])
                try:
                    choice = self.sampler(scene.train_frames, scene.train_poses, count, generator, step)
                except ValueError as error:
                    raise DataError(
                        f"scene {scene.name} ({self.entries[index].path}) has {error}; see --pipeline.datamanager."
                        "num-context-views, num-target-views and view-sampler"
                    ) from error
                sample = read_sample(scene, choice, self.spec)
            except DataError as error:
                if len(self.entries) == 1:
                    raise
                failures.append(str(error))
                index = int(torch.randint(len(self.entries), (), generator=generator))
            else:
                sample.failures = failures
                return sample
        raise DataError(f"{MAX_ATTEMPTS} scenes in a row could not be used; the last: {failures[-1]}")

    def _scene_in_epoch(self, k: int) -> int:
        epoch, position = divmod(k, len(self.entries))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
            self._order = torch.randperm(len(self.entries), generator=generator).tolist()
            self._epoch = epoch
        return self._order[position]


@dataclass
class StepBatches(Sampler):
    """Endless batches of sample numbers from a step on; ranks take disjoint numbers."""

    first_step: int
    batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1
