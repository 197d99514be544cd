"""One scene: its cameras, and its images as they are read, resized and cropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Optional, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from PIL import Image
from torch import Tensor

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras
from elvsm_nerfstudio.data.images import (
    DataError,
    ImageSpec,
    Window,
    decode_image,
    downscaled_copy,
    duplicates,
    fit_image,
    is_cut_out,
    reductions,
)
from elvsm_nerfstudio.data.realestate10k_dataparser import ENCODED_IMAGES
from elvsm_nerfstudio.geometry import resize_and_crop_intrinsics

AnyImage = TypeVar("AnyImage", np.ndarray, Image.Image)


@dataclass(frozen=True)
class Scene:
    """Posed images of one scene: cameras at the original image size, images still on disk."""

    name: str
    outputs: DataparserOutputs
    """All frames, in natural order of their file names (2 before 10); of chunks and posed JSONs in their own order."""
    train_frames: tuple[int, ...]
    """Frames to train on, and to take context views from."""
    eval_frames: tuple[int, ...]
    """Frames held out as evaluation targets; all frames where the scene itself is held out."""
    val_frames: Optional[tuple[int, ...]] = None
    """Frames that a training is validated on instead, where the dataparser has such."""
    _packed_cameras: dict[ImageSpec, Float[Tensor, "frame 25"]] = field(default_factory=dict, repr=False)
    _reductions: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _kept: KeptImages = field(default_factory=lambda: KeptImages(0), repr=False)

    @property
    def cameras(self) -> Cameras:
        return self.outputs.cameras

    @cached_property
    def train_poses(self) -> Float[Tensor, "frame 3 4"]:
        """Camera-to-world of the train frames, OpenGL axes."""
        return self.cameras.camera_to_worlds[list(self.train_frames)]

    @property
    def num_frames(self) -> int:
        return len(self.outputs.image_filenames)

    @cached_property
    def frame_names(self) -> list[str]:
        """What to call the frames: the names of their files, with their number where folders have the same ones."""
        stems = [file.stem for file in self.outputs.image_filenames]
        if not duplicates(stems):
            return stems
        return [f"{frame:05d}_{stem}" for frame, stem in enumerate(stems)]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        return [tuple(size) for size in torch.cat([self.cameras.height, self.cameras.width], dim=-1).tolist()]

    @cached_property
    def intrinsics(self) -> Float[Tensor, "frame 4"]:
        """fx, fy, cx, cy in pixels of the images as they are on disk."""
        cameras = self.cameras
        return torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)

    @cached_property
    def is_cut_out(self) -> bool:
        """Whether the images (the first stands for all) show something before a transparent background."""
        file, content = self._file(0)
        reduction = self._reduction(0, 0.0)
        return is_cut_out(file if reduction == 1 else downscaled_copy(file, reduction), content, self._mask(0))

    def packed_cameras(self, spec: ImageSpec) -> Float[Tensor, "frame 25"]:
        """Cameras of every frame, of the images that ``read_images`` gives, packed (``pack_cameras``); made once."""
        if spec not in self._packed_cameras:
            resized = torch.tensor([spec.resized(size) for size in self.sizes])
            cropped = resize_and_crop_intrinsics(self.intrinsics, torch.tensor(self.sizes), resized, spec.size)
            (fx, fy, cx, cy), (height, width) = cropped[..., None].unbind(-2), spec.size
            cameras = dataclasses.replace(self.cameras, fx=fx, fy=fy, cx=cx, cy=cy, height=height, width=width)
            self._packed_cameras[spec] = pack_cameras(cameras)
        return self._packed_cameras[spec]

    def cropped_cameras(self, frames: Sequence[int], spec: ImageSpec) -> Cameras:
        """Cameras [frame] of the images that ``read_images`` gives."""
        cameras = unpack_cameras(self.packed_cameras(spec)[list(frames)])
        if self.cameras.distortion_params is None:
            cameras.distortion_params = None
        return cameras

    def read_images(
        self,
        frames: Sequence[int],
        spec: ImageSpec,
        out: Optional[UInt8[Tensor, "frame height width 3"]] = None,
        windows: Optional[Sequence[Window]] = None,
    ) -> UInt8[Tensor, "frame height width 3"]:
        """Images of some frames, resized and cropped; a frame that comes twice is decoded once.

        Args:
            out: where to put them; new memory if absent.
            windows: the part of each frame to show, in place of the middle.

        Raises:
            DataError: naming an image that cannot be used.
        """
        images = torch.empty(len(frames), *spec.size, 3, dtype=torch.uint8) if out is None else out
        pixels, first = images.numpy(), {}
        for i, frame in enumerate(frames):
            if frame in first and windows is None:
                pixels[i] = pixels[first[frame]]
                continue
            pixels[i] = self._view(frame, spec, None if windows is None else windows[i])
            first[frame] = i
        return images

    def _view(self, frame: int, spec: ImageSpec, window: Optional[Window]) -> UInt8[np.ndarray, "height width 3"]:
        size = self.sizes[frame]
        if window is None:
            resized = spec.resized(size)
            ratio = max(resized[0] / size[0], resized[1] / size[1])
            return self._kept.get((frame, spec), lambda: fit_image(self._picture(frame, spec, ratio), size, spec))
        ratio = max(spec.size[0] / (window.bottom - window.top), spec.size[1] / (window.right - window.left))
        picture = self._kept.get(
            (frame, spec.background, self._reduction(frame, ratio)), lambda: self._picture(frame, spec, ratio)
        )
        return fit_image(picture, size, spec, window)

    def _picture(self, frame: int, spec: ImageSpec, ratio: float) -> Image.Image:
        file, content = self._file(frame)
        reduction = self._reduction(frame, ratio)
        file = file if reduction == 1 else downscaled_copy(file, reduction)
        return decode_image(file, self.sizes[frame], spec.background, content, self._mask(frame), reduction)

    def _reduction(self, frame: int, ratio: float) -> int:
        """Of the copy to read where an image is resized by some ratio: the smallest that need not be enlarged."""
        if frame not in self._reductions:
            file, content = self._file(frame)
            self._reductions[frame] = (1,) if content is not None else reductions(file, self.sizes[frame])
        there = self._reductions[frame]
        return max((reduction for reduction in there if reduction * ratio <= 1), default=there[0])

    def _mask(self, frame: int) -> Optional[Path]:
        masks = self.outputs.mask_filenames
        return None if masks is None else masks[frame]

    def _file(self, frame: int) -> tuple[Path, Optional[bytes]]:
        """A frame's image file, and its content where it is no file of its own."""
        encoded = self.outputs.metadata.get(ENCODED_IMAGES)
        file = self.outputs.image_filenames[frame]
        try:
            return file, None if encoded is None else encoded[frame]
        except OSError as error:
            raise DataError(f"image {file} cannot be read ({error})") from error


class KeptImages:
    """Decoded images in memory, within a bound: what a capture is trained on comes again at every step."""

    def __init__(self, max_bytes: int):
        self.left = max_bytes
        self._images: dict[Hashable, np.ndarray | Image.Image] = {}

    def get(self, key: Hashable, make: Callable[[], AnyImage]) -> AnyImage:
        """A kept image, or a new one, which is kept as long as there is room."""
        if key in self._images:
            return self._images[key]
        image = make()
        num_bytes = image.nbytes if isinstance(image, np.ndarray) else 3 * image.width * image.height
        if num_bytes <= self.left:
            self._images[key] = image
            self.left -= num_bytes
        return image
