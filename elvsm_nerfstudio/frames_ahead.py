"""Frames of a path, several in one call, for a program that asks for one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras
from elvsm_nerfstudio.nn.memory import SceneMemory

Images = Float[Tensor, "frame height width 3"]


class FramesAhead:
    """Keeps frames that were rendered together with one that was asked for.

    ns-render asks for a path's frames one by one. Each camera is a slice of the path's, and a slice in torch knows the
    tensor that it is of: the poses to come are known, and that their lens will be this camera's is a guess. A frame is
    only given to a camera that is exactly the one that it was rendered for; after a wrong guess all are rendered alone.

    Args:
        render: renders cameras [frame] of one size from a memory.
    """

    def __init__(self, render: Callable[[SceneMemory, Cameras], Images]):
        self._render = render
        self._memory: Optional[SceneMemory] = None
        self._frames: deque[tuple[list[float], Tensor]] = deque()
        self._alone = False

    def frame(
        self, memory: SceneMemory, camera: Cameras, upcoming: Float[Tensor, "pose 3 4"]
    ) -> Float[Tensor, "height width 3"]:
        """The frame of a camera [1] on the CPU, of which ``upcoming`` are the poses that will be asked for after it."""
        (asked,) = pack_cameras(camera).tolist()
        if memory is not self._memory:
            self._memory, self._frames, self._alone = memory, deque(), False
        if not self._frames or self._frames[0][0] != asked:
            self._alone = self._alone or bool(self._frames)
            cameras = camera if self._alone or not len(upcoming) else _with_poses(camera, upcoming)
            self._frames = deque(zip(pack_cameras(cameras).tolist(), self._render(memory, cameras)))
        return self._frames.popleft()[1]


def upcoming_poses(camera: Cameras, count: int) -> Float[Tensor, "pose 3 4"]:
    """At most so many poses that follow a camera [1] in the cameras that it is a slice of, on the CPU."""
    pose = camera.camera_to_worlds
    path = pose._base
    if path is None or path.shape[1:] != (3, 4) or not path.is_contiguous() or pose.shape != (1, 3, 4):
        return torch.empty(0, 3, 4)
    following = (pose.storage_offset() - path.storage_offset()) // 12 + 1
    return path[following : following + count].cpu()


def _with_poses(camera: Cameras, poses: Float[Tensor, "pose 3 4"]) -> Cameras:
    """The camera, and others with the same lens."""
    numbers = pack_cameras(camera).repeat(1 + len(poses), 1)
    numbers[1:, :12] = poses.flatten(1)
    return unpack_cameras(numbers)
