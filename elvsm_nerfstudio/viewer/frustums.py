"""Frustums of a scene's context candidates in nerfstudio's viewer: coloured where in use, grey where not."""

from __future__ import annotations

import colorsys
import math

import torch
import viser.transforms as vtf
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from torch import Tensor, nn

from elvsm_nerfstudio.viewer.context_pool import ContextPool

USED, UNUSED = (255, 150, 30), (130, 130, 130)
THUMBNAIL = 100
"""Longest side of the photo in a frustum, in pixels."""

Colour = tuple[int, int, int]


def view_colour(position: int) -> Colour:
    """A colour for each candidate; neighbours in the list get very different ones."""
    hue = position * (math.sqrt(5) - 1) / 2 % 1
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.75, 0.95))


class Frustums:
    """nerfstudio draws the views that are context at the start; this takes them over and adds the other candidates."""

    def __init__(self, viewer: Viewer, pool: ContextPool):
        self._viewer, self._pool = viewer, pool
        others = [frame for frame in pool.frames if frame not in pool.context]
        # nerfstudio numbers the views that it draws in their order.
        self._number = {frame: number for number, frame in enumerate((*pool.context, *others))}
        self._drawn: dict[int, Colour] = {}
        limit, frames = viewer.config.max_num_display_images, pool.frames
        self._limit = len(frames) if limit < 0 else min(limit, len(frames))
        self._spread = [frames[i * len(frames) // self._limit] for i in range(self._limit)]

    def clear(self) -> None:
        """Removes all frustums, those that nerfstudio has drawn too."""
        handles, self._viewer.camera_handles = self._viewer.camera_handles, {}
        self._viewer.original_c2w = {}
        for handle in handles.values():
            handle.remove()

    def draw(self, used: dict[int, Tensor], by_view: bool) -> None:
        """Draws those that have changed: of at most nerfstudio's --viewer.max-num-display-images, views in use first.

        Args:
            used: images of the views in use.
            by_view: in the colours of ``view_colour`` instead of all in one.
        """
        # init_scene draws its own frustums over ours, and sets this when it is done.
        if not hasattr(self._viewer, "train_state"):
            return
        first = list(used)[: self._limit]
        visible = {*first, *[frame for frame in self._spread if frame not in used][: self._limit - len(first)]}
        for position, frame in enumerate(self._pool.frames):
            if frame not in visible:
                self._remove(frame)
                continue
            colour = UNUSED if frame not in used else view_colour(position) if by_view else USED
            if self._drawn.get(frame) != colour:
                self._draw(position, frame, colour, used.get(frame))
                self._drawn[frame] = colour

    def _remove(self, frame: int) -> None:
        if self._drawn.pop(frame, None) is None:
            return
        viewer, number = self._viewer, self._number[frame]
        viewer.camera_handles[number].remove()
        viewer.camera_handles = {n: handle for n, handle in viewer.camera_handles.items() if n != number}
        viewer.original_c2w = {n: pose for n, pose in viewer.original_c2w.items() if n != number}

    def _draw(self, position: int, frame: int, colour: Colour, rgb: Tensor | None) -> None:
        viewer, camera = self._viewer, self._pool.cameras[position]
        pose = camera.camera_to_worlds.cpu().numpy()
        number = self._number[frame]
        handle = viewer.viser_server.scene.add_camera_frustum(
            name=f"/cameras/camera_{number:05d}",
            fov=2 * math.atan(float(camera.cy) / float(camera.fy)),
            aspect=float(camera.width) / float(camera.height),
            scale=viewer.config.camera_frustum_scale,
            color=colour,
            image=None if rgb is None else _thumbnail(rgb),
            wxyz=(vtf.SO3.from_matrix(pose[:3, :3]) @ vtf.SO3.from_x_radians(math.pi)).wxyz,
            position=pose[:3, 3] * VISER_NERFSTUDIO_SCALE_RATIO,
            visible=viewer.hide_images.visible,  # the button that hides them is there while they are not hidden
        )

        @handle.on_click
        def _(event) -> None:
            with event.client.atomic():
                event.client.camera.position = event.target.position
                event.client.camera.wxyz = event.target.wxyz

        # Replaced as a whole: another thread may be walking through it.
        viewer.camera_handles = {**viewer.camera_handles, number: handle}
        viewer.original_c2w = {**viewer.original_c2w, number: pose}


def _thumbnail(rgb: Tensor):
    scale = min(1.0, THUMBNAIL / max(rgb.shape[:2]))
    size = [max(1, round(side * scale)) for side in rgb.shape[:2]]
    small = nn.functional.interpolate(rgb.permute(2, 0, 1)[None].float(), size, mode="area")[0].permute(1, 2, 0)
    return (small.clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
