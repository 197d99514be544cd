"""Frames of a scene as nerfstudio's tools look at them: the viewer, ns-render and its camera paths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from torch import Tensor

from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.scene import Scene


class PathCameras(Cameras):
    """Cameras between which ns-render interpolate makes a path, of frames as large as theirs.

    A path's frames get no size; nerfstudio makes them twice as large as the principal point of these matrices says: of
    64x64 photos 68x66, or an odd number, of which videos are made that players refuse.
    """

    @staticmethod
    def of(cameras: Cameras) -> PathCameras:
        return PathCameras(**{part.name: getattr(cameras, part.name) for part in dataclasses.fields(cameras)})

    def get_intrinsics_matrices(self) -> Float[Tensor, "*camera 3 3"]:
        matrices = super().get_intrinsics_matrices()
        if len(self) == 1:  # no path: a rasterizer asks, and has to draw through the camera's own lens
            return matrices
        matrices[..., :2, 2] = torch.cat([self.width, self.height], dim=-1) / 2
        return matrices


class PathLoader(FixedIndicesEvalDataloader):
    """As nerfstudio's, but for the single camera around which ns-render spiral makes a path: see ``PathCameras``."""

    def get_camera(self, image_idx: int = 0) -> tuple[Cameras, dict[str, Any]]:
        camera, batch = super().get_camera(image_idx)
        camera.cx, camera.cy = camera.width / 2, camera.height / 2
        return camera, batch


class LonePath(type(Path())):
    """Of the only image of a data set: ns-render dataset calls images after their paths in the folder that they share,
    and takes the one image for that folder."""

    def relative_to(self, *other) -> Path:
        return Path(self.name) if other == (Path(self),) else super().relative_to(*other)


class ViewDataset(InputDataset):
    """Some frames of a scene, resized, cropped and composited as the network gets them, for nerfstudio's tools."""

    def __init__(self, scene: Scene, frames: tuple[int, ...], images: ImageSpec):
        files = scene.outputs.image_filenames
        outputs = DataparserOutputs(
            image_filenames=[(LonePath if len(frames) == 1 else Path)(files[frame]) for frame in frames],
            cameras=PathCameras.of(scene.cropped_cameras(frames, images)),
            scene_box=scene.outputs.scene_box,
            dataparser_transform=scene.outputs.dataparser_transform,
            dataparser_scale=scene.outputs.dataparser_scale,
        )
        super().__init__(outputs)
        self._scene, self._frames, self._images = scene, frames, images

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        return self._scene.read_images([self._frames[image_idx]], self._images)[0].numpy()
