"""Training samples: view sets of scenes in an order that (seed, rank, step) fix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from elvsm_nerfstudio.cameras import unpack_cameras, views_from_cameras
from elvsm_nerfstudio.data.augmentations import AS_IT_IS, NO_AUGMENTATION, Augmentation, Change
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.lenses import Lens, draw_lenses, step_spec, window_intrinsics, window_of
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection, SceneEntry
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
    cameras: Float[Tensor, "*scene view 25"]
    """Packed (``pack_cameras``)."""
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

    def view_set(self, device: torch.device | str) -> ViewSet:
        """The collated sample as context and target views on a device; rays are made there."""
        cameras = unpack_cameras(self.cameras.flatten(0, 1))
        rgb = self.rgb.flatten(0, 1).to(device, non_blocking=True).float() / 255
        views = views_from_cameras(cameras, patch_size=1, rgb=rgb).split_scenes(len(self.rgb))
        context = self.num_context_views
        return ViewSet(views.select(slice(0, context)), views.select(slice(context, None)))


def read_sample(
    scene: Scene,
    choice: FrameChoice,
    spec: ImageSpec,
    out: Optional[UInt8[Tensor, "view height width 3"]] = None,
    lenses: Optional[Sequence[Lens]] = None,
    change: Change = AS_IT_IS,
) -> Sample:
    """Decodes the images of a choice of frames.

    Args:
        out: where to put them; new memory if absent.
        lenses: through which to see each of them, in place of the centre crop.
        change: what else to do to them.
    """
    index = [*choice.context, *choice.target]
    cameras, windows = scene.packed_cameras(spec)[index], None
    if lenses is not None:
        windows = [
            window_of(lens, scene.sizes[frame], spec.size, scene.is_cut_out) for frame, lens in zip(index, lenses)
        ]
        cameras[:, 12:16] = window_intrinsics(scene.intrinsics[index], windows, spec.size)
    rgb = scene.read_images(index, spec, out, windows)
    change.apply(rgb, cameras)
    return Sample(rgb, cameras, len(choice.context), failures=[])


@dataclass
class SharedBatch:
    """A batch that a worker left in shared memory, and the little that goes through the pipe.

    Sending each batch as tensors of its own costs new pages, a file and a message over a socket: as long as it takes to
    decode a third of a batch of 64 px PNGs.
    """

    place: int
    """In which of the ``SharedBuffers``."""
    shape: tuple[int, ...]
    cameras: np.ndarray
    num_context_views: int
    failures: list[str]


class SharedBuffers:
    """Shared memory that workers decode into, each into its own few pieces by turns.

    A worker has PREFETCHED_BATCHES under way and may begin the next while the last is being copied.
    """

    TURNS = PREFETCHED_BATCHES + 2

    def __init__(self, num_workers: int, num_bytes: int):
        memory = torch.empty(num_workers * self.TURNS, num_bytes, dtype=torch.uint8)
        try:
            self._memory = memory.share_memory_()
        except RuntimeError as error:
            raise DataError(
                f"{memory.nbytes / 2**20:.0f} MiB of shared memory for the images of {num_workers} worker processes "
                f"cannot be had ({error}). In Docker, start the container with `--shm-size 2g`; or decode in the "
                "training process, with --pipeline.datamanager.num-workers 0"
            ) from error
        self._turn = 0

    def place(self, worker: int) -> int:
        """The next piece of a worker; what it held before is overwritten."""
        self._turn = (self._turn + 1) % self.TURNS
        return worker * self.TURNS + self._turn

    def images(self, place: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
        """A piece, or the beginning of it, as images."""
        return self._memory[place, : math.prod(shape)].view(shape)


class TrainingSamples(Dataset):
    """Sample k of an endless sequence, made from (seed, k) alone.

    Epoch by epoch every scene comes once, in an order shuffled by (seed, epoch). A scene that cannot be used is
    replaced by one drawn from (seed, k), and reported in the sample; a single scene raises its DataError.

    Args:
        num_context_views: smallest and largest number; each training step draws its own, the same on all ranks.
        samples_per_step: scenes that all ranks together see in a step.
        lens_augmentation: whether scenes are seen through other lenses, and steps in other aspects.
        augmentation: what else is done to scenes.
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
        lens_augmentation: bool = False,
        augmentation: Augmentation = NO_AUGMENTATION,
    ):
        self.collection, self.entries, self.sampler = collection, entries, sampler
        self.spec, self.seed = spec, seed
        self.num_context_views, self.samples_per_step = num_context_views, samples_per_step
        self.lens_augmentation, self.augmentation = lens_augmentation, augmentation
        self._epoch = -1
        self._order: list[int] = []
        self.buffers: Optional[SharedBuffers] = None
        """Where worker processes leave batches."""

    def __getitems__(self, ks: list[int]) -> Sample | SharedBatch:
        """The samples of a batch, all of one training step, collated; from a worker process, handed over."""
        count, spec = self._drawn(ks[0])
        shape = self._shape(len(ks), count, spec)
        worker = get_worker_info()
        if worker is None:
            return self._batch(ks, count, spec, torch.empty(shape, dtype=torch.uint8))
        place = self.buffers.place(worker.id)
        batch = self._batch(ks, count, spec, self.buffers.images(place, shape))
        return SharedBatch(place, shape, batch.cameras.numpy(), batch.num_context_views, batch.failures)

    def largest_batch(self, scenes: int) -> int:
        """Bytes of the images of a batch with as many context views as there can be."""
        return math.prod(self._shape(scenes, self.num_context_views[1], self.spec))

    def _shape(self, scenes: int, num_context_views: int, spec: ImageSpec) -> tuple[int, ...]:
        return scenes, num_context_views + self.sampler.num_target_views, *spec.size, 3

    def _drawn(self, k: int) -> tuple[int, ImageSpec]:
        """What all samples of a step have in common: the number of context views, and how images are read."""
        step = k // self.samples_per_step
        spec = step_spec(self.spec, self.seed, step) if self.lens_augmentation else self.spec
        return draw_num_context_views(self.num_context_views, self.seed, step), spec

    def _batch(
        self, ks: list[int], count: int, spec: ImageSpec, rgb: UInt8[Tensor, "scene view height width 3"]
    ) -> Sample:
        return Sample.collate([self._sample(k, count, spec, images) for k, images in zip(ks, rgb)], rgb)

    def __getitem__(self, k: int) -> Sample:
        return self._sample(k, *self._drawn(k))

    def _sample(
        self, k: int, count: int, spec: ImageSpec, out: Optional[UInt8[Tensor, "view height width 3"]] = None
    ) -> Sample:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 1, k))
        step = k // self.samples_per_step
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
                num_views = len(choice.context) + len(choice.target)
                lenses = draw_lenses(num_views, generator) if self.lens_augmentation else None
                sample = read_sample(scene, choice, spec, out, lenses, self.augmentation.draw(generator))
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
    if num_workers:
        samples.buffers = SharedBuffers(num_workers, samples.largest_batch(batches.batch_size))
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, SharedBatch):
            images = samples.buffers.images(batch.place, batch.shape)
            # Copied out, before the worker comes round to this piece again.
            rgb = images.pin_memory() if pin else images.clone()
            batch = Sample(rgb, torch.from_numpy(batch.cameras), batch.num_context_views, batch.failures)
        yield batch


def _as_it_is(batch: Sample | SharedBatch) -> Sample | SharedBatch:
    return batch
