"""Options of `elvsm compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from elvsm_nerfstudio.data.images import Background


@dataclass
class CompareOptions:
    """Options."""

    data: Path
    """A scene, or a collection whose test split is compared on: anything that ns-train takes."""
    methods: tuple[str, ...]
    """Rows of the table: methods of this package, splatfacto-sparse and splatfacto-lvsm among them, on machines with
    CUDA also nerfstudio's own splatfacto, the baselines copy-nearest and mean-of-context, or names of your own for what
    --runs brings."""
    output: Path
    """Folder for everything."""
    runs: tuple[str, ...] = ()
    """NAME=PATH for each trained method: the folder of a run, its config.yml or one of its checkpoints, or, for names
    of registered methods, a file of weights. Absent for efficient-lvsm-plus-tiny, and for splatfacto-lvsm, which
    renders with them: 'pretrained', the weights that come with this package."""
    context_views: tuple[int, ...] = (4,)
    """Numbers of context views to compare with, each with the same targets."""
    num_target_views: int = 8
    """Targets of a scene, spread over its held-out frames."""
    num_scenes: Optional[int] = None
    """Only so many scenes of the collection, the first ones."""
    scenes: tuple[str, ...] = ()
    """Only these scenes of the collection."""
    split: Optional[Path] = None
    """JSON with context and target frames, in the field's format; chosen by the cameras if absent."""
    image_size: Optional[tuple[int, int]] = None
    """Height and width of all images; the size that the runs were trained for if absent, 128 x 128 without any."""
    background: Background = "white"
    """Colour behind transparent pixels."""
    dataparser: Optional[str] = None
    """How --data is read where it is not in nerfstudio's own format: blender-data, colmap, ..."""
    finetune: tuple[str, ...] = ()
    """Networks among --methods that get a second row, "NAME (fine-tuned)": trained on, on each scene's context views
    alone."""
    finetune_minutes: float = 5.0
    """For how long."""
    splat_iterations: int = 500
    """Optimisation steps of splatfacto-sparse and splatfacto-lvsm."""
    backend: Literal["auto", "gsplat", "cpu"] = "auto"
    """What rasterizes for these: gsplat's CUDA kernels, ours for CPUs, or whichever works."""
    num_videos: int = 1
    """Scenes, the first ones, to make a video of: all methods side by side on a way through the context cameras."""
    video_frames: int = 72
    """Frames of a video, at 24 a second."""
    video_image_size: Optional[tuple[int, int]] = None
    """Height and width of what each method renders for a video; those of the photos if absent."""
    video_context_views: Optional[int] = None
    """Which of the numbers of context views videos are of; the largest if absent."""
    title: Optional[str] = None
    """Title of the page and the table."""
    beside: str = "nothing"
    """What else ran on the machine; goes into the result."""
