"""The frames that may become context while a scene is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from elvsm_nerfstudio.data.datamanager import ViewSetDataManager
from elvsm_nerfstudio.data.samples import Sample, read_sample
from elvsm_nerfstudio.data.view_samplers import FrameChoice
from elvsm_nerfstudio.views import Views


@dataclass(frozen=True)
class ContextPool:
    """Candidates for the context of one scene; their images stay on disk until asked for."""

    frames: tuple[int, ...]
    """Numbers of the frames in the scene, ascending."""
    names: tuple[str, ...]
    """What to call them, all different."""
    cameras: Cameras
    """As the network gets their images, [frame]."""
    context: tuple[int, ...]
    """The frames that are context to begin with, in their order."""
    read: Callable[[int], Views]
    """The view of a frame; DataError where it cannot be read."""

    @property
    def poses(self) -> Float[Tensor, "frame 3 4"]:
        """Camera-to-world, OpenGL axes."""
        return self.cameras.camera_to_worlds

    @staticmethod
    def of_shown_scene(datamanager: ViewSetDataManager) -> ContextPool:
        """What the scene that is shown has to offer.

        Of a capture its train frames; of a scene that belongs to one split as a whole all frames but the targets that
        an evaluation index names (targets that are merely what is left of a scene are no reason to keep a frame out).
        """
        scene = datamanager.collection.load(datamanager.shown)
        context, targets = datamanager.shown_frames.context, datamanager.shown_frames.target
        index = datamanager.evaluation_index
        listed = index is not None and scene.name in index.choices
        kept_out = set(targets) if listed or not datamanager.collection.whole_scenes else set()
        frames = tuple(sorted(set(scene.train_frames) - kept_out | set(context)))
        names = tuple(scene.frame_names[frame] for frame in frames)
        images = datamanager.config.images

        def read(frame: int) -> Views:
            sample = read_sample(scene, FrameChoice((frame,), ()), images)
            return Sample.collate([sample]).view_set(datamanager.device).context

        return ContextPool(frames, names, scene.cropped_cameras(frames, images), context, read)
