"""The context frames of one scene, and views between them that a network of this package renders."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Optional

import torch
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.nn.functional import interpolate

from elvsm_nerfstudio.cameras import in_pixels, views_from_cameras
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.view_dataset import ViewDataset
from elvsm_nerfstudio.geometry import nearest_views
from elvsm_nerfstudio.notices import say, warn
from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManager, ContextFramesDataManagerConfig
from elvsm_nerfstudio.splatting.initial_points import InitialPoints
from elvsm_nerfstudio.splatting.rendered_cameras import place_cameras
from elvsm_nerfstudio.splatting.rendered_steps import SHARE, RenderedSteps, falls_until, rates_for, trust
from elvsm_nerfstudio.splatting.rendered_views import RenderedViews, leave_out, render_views
from elvsm_nerfstudio.splatting.rendering_weights import load_renderer


@dataclass
class RenderedViewsDataManagerConfig(ContextFramesDataManagerConfig):
    """The context frames of one scene, and views between them that Efficient-LVSM renders."""

    _target: type = field(default_factory=lambda: RenderedViewsDataManager)
    """target class to instantiate"""
    weights: str = "pretrained"
    """Weights of the network that renders: a name (see `elvsm weights`), a file of weights, or a run (its folder, its
    config.yml or one of its checkpoints)."""
    num_rendered_views: int = 24
    """Views that are rendered, before training. Their cameras follow from those of the context frames alone: around the
    place that they look at, or between neighbours and a little beside."""
    rendered_image_size: Optional[tuple[int, int]] = None
    """Height and width at which the network reads the context frames and renders. If absent, what it was trained at,
    where that is known (of weights by name and of runs), else --pipeline.datamanager.image-size. Renders with more
    pixels than the context frames are reduced to as many."""
    rendered_share: Optional[float] = None
    """Share of the first training steps that take a rendered view. If absent, it follows from how well the network
    predicts each context frame from the others: no step takes one where a copy of another frame predicts it as well,
    and this is said."""
    rendered_end: Optional[float] = None
    """Where the share of rendered views, which falls linearly, reaches zero, as a share of the training; above 1, it
    does not get there. If absent, 8 / number of context views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, highest in (
            ("rendered-share", self.rendered_share, 1.0),
            ("rendered-end", self.rendered_end, float("inf")),
        ):
            if value is not None and not 0 < value <= highest:
                raise DataError(
                    f"--pipeline.datamanager.{option} {value:g}: expected a number above 0"
                    f"{' and up to 1' if highest == 1 else ''}"
                )
        if self.num_rendered_views < 1:
            raise DataError(
                f"--pipeline.datamanager.num-rendered-views {self.num_rendered_views}: expected at least 1; without "
                "rendered views the method is splatfacto-sparse"
            )


class RenderedViewsDataManager(ContextFramesDataManager):
    """Trains on the context frames and, in a share of the steps, on rendered views.

    A trained run is evaluated and rendered without the network.
    """

    config: RenderedViewsDataManagerConfig

    def __init__(
        self,
        config: RenderedViewsDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs,
    ):
        self.rendered: Optional[RenderedViews] = None
        self.steps = RenderedSteps(0.0)
        self._rates: dict[str, float] = {}
        super().__init__(config, device, test_mode, world_size, local_rank, **kwargs)

    def _make_initial_points(self) -> InitialPoints:
        start = time.perf_counter()
        # What is drawn for a network's weights, before they are loaded, must not move what Gaussians start with: where
        # no render is used, the fit is that of splatfacto-sparse.
        with torch.random.fork_rng(devices=[]):
            self._first_share, self._record = self._render()
        self.seconds["rendered_views"] = time.perf_counter() - start
        return super()._make_initial_points()

    def _rendered_for_points(self) -> Optional[tuple[Cameras, Tensor]]:
        if self._first_share == 0:
            return None
        size = self.config.image_size
        images = interpolate(self.rendered.images.cpu().permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
        return in_pixels(self.rendered.cameras.to("cpu"), *size), images.permute(0, 2, 3, 1)

    def _render(self) -> tuple[float, dict[str, Any]]:
        """Renders the views; returns the share of the first steps that takes them, and a record."""
        config = self.config
        renderer = load_renderer(config.weights, self.device)
        network = renderer.network
        size = config.rendered_image_size or renderer.image_size or config.image_size
        context, cameras = self._context_at(size, network.config.patch_size)
        left_out = leave_out(network, context)
        placed = place_cameras(cameras.camera_to_worlds, config.num_rendered_views, config.seed)
        nearest = nearest_views(cameras.camera_to_worlds, placed.poses, 1).squeeze(-1)
        cameras = replace(cameras[nearest], camera_to_worlds=placed.poses)
        self.rendered = render_views(network, context, cameras).in_at_most(config.image_size)

        trusted = trust(left_out and left_out.gain(context.num_views), context.num_views)
        share = SHARE * trusted if config.rendered_share is None else config.rendered_share
        say(f"{len(cameras)} views rendered {placed.arrangement}, {size[0]} x {size[1]}, with {config.weights}")
        if left_out is None:
            warn("One context frame leaves none to try the weights on: they are trusted")
        else:
            say(
                f"Context frames predicted from the others: {left_out.network:.2f} dB by {config.weights}, "
                f"{left_out.mean:.2f} by their mean, {left_out.nearest:.2f} by the nearest of them, "
                f"{left_out.colour:.2f} by their mean colour"
            )
        if share == 0:
            warn(
                f"{config.weights} does not know scenes like {self.shown.name}: its renders are not used. "
                "Other weights: --pipeline.datamanager.weights; to use them all the same: "
                "--pipeline.datamanager.rendered-share 0.5"
            )
        return share, {
            "weights": config.weights,
            "file": renderer.file.name,
            "network": network.architecture,
            "fingerprint": network.fingerprint(),
            "image_size": list(size),
            "views": len(cameras),
            "cameras": placed.arrangement,
            "left_out_psnr": left_out and asdict(left_out),
            "trust": trusted,
            "mean_confidence": float(self.rendered.confidence.mean()),
        }

    def _context_at(self, size: tuple[int, int], patch_size: int):
        """The context frames as the network reads them."""
        config = self.config
        if size[0] % patch_size or size[1] % patch_size:
            raise DataError(
                f"--pipeline.datamanager.rendered-image-size: found {size[0]} {size[1]}; expected multiples of "
                f"{patch_size}, the patches of {config.weights}"
            )
        scene = self.collection.load(self.shown)
        frames = self.shown_frames.context
        photos = ViewDataset(scene, frames, ImageSpec(size, config.background))
        rgb = torch.stack([photos.get_image_float32(index) for index in range(len(frames))])
        cameras = photos.cameras.to(self.device)
        return views_from_cameras(cameras, patch_size, rgb.to(self.device)), cameras

    def plan(self, steps: int) -> None:
        end = self.config.rendered_end or falls_until(len(self.context_images))
        self.steps = RenderedSteps(self._first_share, end * steps)
        self._rates = rates_for(steps) if self._first_share > 0 else {}
        taken = self.steps.before(steps)
        self._record["steps"], self._record["share_of_steps"] = taken, taken / steps
        self._record["rates"] = self._rates

    def rates(self) -> dict[str, float]:
        return self._rates

    def record(self) -> dict[str, Any]:
        return {**super().record(), "rendered_views": self._record}

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A context frame or a rendered view; context frames come as without the others."""
        before = self.steps.before(step)
        if self.steps.before(step + 1) == before:
            return super().next_train(step - before)
        index = before % len(self.rendered.images)
        batch = {"image": self.rendered.images[index], "confidence": self.rendered.confidence[index]}
        return self.rendered.cameras[index : index + 1], batch
