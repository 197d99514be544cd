"""Training samples: view sets of scenes in an order that (seed, rank, step) fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Optional

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.scenes import Scene, SceneCollection, SceneEntry
from elvsm_nerfstudio.data.view_samplers import FrameChoice, ViewSampler, draw_num_context_views, mix_seed
from elvsm_nerfstudio.views import ViewSet

MAX_ATTEMPTS = 32
"""Scenes that may fail one after another before a sample gives up."""
PREFETCHED_BATCHES = 2
"""Batches that each worker makes ahead."""


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
    def collate(samples: list[Sample], rgb: Optional[UInt8[Tensor, "scene view height width 3"]] = None) -> Sample:
        """Samples of equally many views as one; ``rgb`` is their images, where they lie together already."""
        return Sample(
            rgb=torch.stack([sample.rgb for sample in samples]) if rgb is None else rgb,
            cameras=torch.stack([sample.cameras for sample in samples]),
            num_context_views=samples[0].num_context_views,
            failures=[failure for sample in samples for failure in sample.failures],
        )

    def clone(self) -> Sample:
        """The same in memory of its own."""
        return replace(self, rgb=self.rgb.clone(), cameras=self.cameras.clone())

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


def read_sample(
    scene: Scene,
    choice: FrameChoice,
    spec: ImageSpec,
    out: Optional[UInt8[Tensor, "view height width 3"]] = None,
) -> Sample:
    """Decodes the images of a choice of frames, into ``out`` where it is given."""
    index = [*choice.context, *choice.target]
    distortion = scene.cameras.distortion_params
    cameras = (
        scene.cameras.camera_to_worlds[index].flatten(1),
        scene.cropped_intrinsics(spec)[index],
        torch.zeros(len(index), 6) if distortion is None else distortion[index],
        scene.cameras.camera_type[index],
    )
    rgb = scene.read_images(index, spec, out)
    return Sample(rgb, torch.cat(cameras, dim=-1).float(), len(choice.context), failures=[])


class SharedBuffers:
    """Shared memory that a worker decodes into, a few pieces by turns.

    Sending a batch in shared memory of its own costs a page fault for every 4 kB: a fifth of the time that it takes to
    decode 256 px PNGs.
    """

    def __init__(self, count: int):
        self._buffers: list[Optional[Tensor]] = [None] * count
        self._turn = 0

    def next(self, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
        """The next piece; what it held before is overwritten."""
        size = math.prod(shape)
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return buffer[:size].view(shape)


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
        # A worker has PREFETCHED_BATCHES under way and may begin the next while the last is being copied.
        self._buffers = SharedBuffers(PREFETCHED_BATCHES + 2)

    def __getitems__(self, ks: list[int]) -> Sample:
        """The samples of a batch, all of one training step, collated."""
        views = self._count(ks[0]) + self.sampler.num_target_views
        shape = (len(ks), views, *self.spec.size, 3)
        in_worker = get_worker_info() is not None
        rgb = self._buffers.next(shape) if in_worker else torch.empty(shape, dtype=torch.uint8)
        return Sample.collate([self._sample(k, images) for k, images in zip(ks, rgb)], rgb)

    def __getitem__(self, k: int) -> Sample:
        return self._sample(k)

    def _count(self, k: int) -> int:
        return draw_num_context_views(self.num_context_views, self.seed, k // self.samples_per_step)

    def _sample(self, k: int, out: Optional[UInt8[Tensor, "view height width 3"]] = None) -> Sample:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 1, k))
        step, count = k // self.samples_per_step, self._count(k)
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
                sample = read_sample(scene, choice, self.spec, out)
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


def training_batches(samples: TrainingSamples, batches: StepBatches, num_workers: int, pin: bool) -> Iterator[Sample]:
    """Collated batches in order, decoded in worker processes (or in this one, with none).

    Args:
        pin: into page-locked memory, so that copies to a GPU need not wait.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        pin_memory=pin,
    )
    for batch in loader:
        # Out of the worker's buffer, before it is used again.
        yield batch.clone() if num_workers and not pin else batch


def _as_it_is(batch: Sample) -> Sample:
    return batch
