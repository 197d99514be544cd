"""The types that flow through the package: posed images of scenes.

Everything is batched ``[scene, view, ...]`` and channels come last. Cameras are OpenCV: +X right, +Y down,
+Z forward, camera-to-world; pixel centres lie at +0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """V posed views of each of S scenes, all of one size H x W.

    Directions are kept in the camera's own frame, so that a change of world frame touches only the poses,
    and any central camera (distorted, fisheye) is described exactly.
    """

    camera_to_world: Float[Tensor, "scene view 4 4"]
    """OpenCV camera-to-world."""
    directions: Float[Tensor, "scene view height width 3"]
    """Unit ray direction of every pixel centre, in the OpenCV camera frame."""
    intrinsics: Float[Tensor, "scene view 4"]
    """fx, fy, cx, cy, normalised: fx and cx by the width, fy and cy by the height."""
    rgb: Optional[Float[Tensor, "scene view height width 3"]] = None
    """Colours in [0, 1]; absent for views that are only to be rendered."""

    def __post_init__(self) -> None:
        lead = self.directions.shape[:2]
        if self.camera_to_world.shape != (*lead, 4, 4) or self.intrinsics.shape != (*lead, 4):
            raise ValueError(
                f"Views: directions are {tuple(self.directions.shape)}, so camera_to_world must be {(*lead, 4, 4)} and "
                f"intrinsics {(*lead, 4)}; found {tuple(self.camera_to_world.shape)} and {tuple(self.intrinsics.shape)}"
            )
        if self.rgb is not None and self.rgb.shape != self.directions.shape:
            raise ValueError(f"Views: rgb is {tuple(self.rgb.shape)}, directions are {tuple(self.directions.shape)}")

    @property
    def num_scenes(self) -> int:
        return self.directions.shape[0]

    @property
    def num_views(self) -> int:
        return self.directions.shape[1]

    @property
    def height(self) -> int:
        return self.directions.shape[2]

    @property
    def width(self) -> int:
        return self.directions.shape[3]

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        # Nothing would wait for a copy on its way back from a GPU.
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def select(self, indices: Sequence[int] | slice) -> Views:
        """The views with these positions, in this order, of every scene."""
        index = indices if isinstance(indices, slice) else list(indices)
        return self._map(lambda x: x[:, index])

    def scenes(self, count: int) -> Views:
        """The views of the first scenes."""
        return self._map(lambda x: x[:count])

    def split_scenes(self, num_scenes: int) -> Views:
        """The views of a single scene, dealt out in order to several scenes of equally many views."""
        return self._map(lambda x: x[0].unflatten(0, (num_scenes, -1)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Views:
        rgb = None if self.rgb is None else change(self.rgb)
        return Views(change(self.camera_to_world), change(self.directions), change(self.intrinsics), rgb)


@dataclass(frozen=True)
class ViewSet:
    """Context views, from which a scene is known, and target views, which are to be rendered."""

    context: Views
    target: Views

    def to(self, device: torch.device | str) -> ViewSet:
        return ViewSet(self.context.to(device), self.target.to(device))
