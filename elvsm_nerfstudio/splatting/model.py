"""splatfacto on a few views, with or without CUDA: nerfstudio's model, with the rasterizer put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel, SplatfactoModelConfig
from torch import Tensor
from torch.nn.functional import avg_pool2d

from elvsm_nerfstudio.evaluation.metrics import image_metrics
from elvsm_nerfstudio.geometry import opengl_to_opencv
from elvsm_nerfstudio.notices import say
from elvsm_nerfstudio.splatting.cpu_rasterizer import rasterization
from elvsm_nerfstudio.splatting.lens import PinholeView, is_pinhole
from elvsm_nerfstudio.splatting.rasterization import Backend, choose_backend

AREA = 4
"""Pixels a side of the areas whose mean colours count in rendered views. Ours."""


@dataclass
class SparseSplatfactoModelConfig(SplatfactoModelConfig):
    """splatfacto, and what renders it."""

    _target: type = field(default_factory=lambda: SparseSplatfactoModel)
    """target class to instantiate"""
    backend: Backend = "auto"
    """What renders: gsplat's CUDA kernels, or our own rasterizer, the same pictures without CUDA. 'auto' takes gsplat
    on CUDA devices."""
    background_color: Literal["random", "black", "white"] = "white"
    """Colour behind everything; that of the images' transparent pixels."""
    num_downscales: int = 0
    """Halvings of the resolution that training begins with; none, small images have nothing to lose."""

    # The data manager's initial points take their place.
    random_init: Annotated[bool, tyro.conf.Suppress] = False
    num_random: Annotated[int, tyro.conf.Suppress] = 1000
    random_scale: Annotated[float, tyro.conf.Suppress] = 1.0


class SparseSplatfactoModel(SplatfactoModel):
    """nerfstudio's splatfacto and gsplat's densification strategy as they are.

    Its own: the choice of the rasterizer; where that is not gsplat, the call of it; lenses that are no pinholes;
    metrics from evaluation/metrics.py instead of networks that want to be downloaded.
    """

    config: SparseSplatfactoModelConfig

    def populate_modules(self) -> None:
        self.backend = choose_backend(self.config.backend, self.kwargs["device"])
        say(f"Rasterizer: {self.backend} on {self.kwargs['device']}")
        if self.backend == "cpu" and self.config.use_bilateral_grid:
            raise ValueError("--pipeline.model.use-bilateral-grid True needs --pipeline.model.backend gsplat")
        points = self.seed_points
        # Given colours too, splatfacto would move them to a CUDA device.
        self.seed_points = None if points is None else (points[0], points[1][:0])
        with _without_lpips():
            super().populate_modules()
        if points is not None:
            rgb = points[1].float() / 255
            colors = RGB2SH(rgb) if self.config.sh_degree > 0 else torch.logit(rgb, eps=1e-10)
            self.gauss_params["features_dc"] = torch.nn.Parameter(colors)
        self._lenses: dict[tuple, PinholeView] = {}

    # Rendering

    def get_outputs(self, camera: Cameras) -> dict[str, Any]:
        """Renders one camera [1] of any lens that looks forward.

        Returns:
            splatfacto's outputs: ``rgb`` [height, width, 3], ``accumulation``, ``background``, and ``depth`` except in
            training.
        """
        # Some dataparsers give poses in double precision, which gsplat does not take.
        camera = replace(camera, camera_to_worlds=camera.camera_to_worlds.float())
        if is_pinhole(camera):
            return self._render_pinhole(camera)
        view = self._pinhole_view(camera)
        outputs = self._render_pinhole(view.camera(camera))
        sampled = {
            name: view.seen_by_lens(outputs[name])
            for name in ("rgb", "depth", "accumulation")
            if outputs[name] is not None
        }
        background = outputs["background"]
        if background.ndim == 3:
            background = background[0, 0].expand_as(sampled["rgb"])
        return {**outputs, **sampled, "background": background}

    def _render_pinhole(self, camera: Cameras) -> dict[str, Any]:
        return super().get_outputs(camera) if self.backend == "gsplat" else self._render_without_cuda(camera)

    def _render_without_cuda(self, camera: Cameras) -> dict[str, Any]:
        """What splatfacto does with a camera, which sends tensors to CUDA and compiles as it goes."""
        config = self.config
        camera.rescale_output_resolution(1 / self._get_downscale_factor())
        intrinsics = camera.get_intrinsics_matrices().to(self.device)
        width, height = int(camera.width.item()), int(camera.height.item())
        camera.rescale_output_resolution(self._get_downscale_factor())
        self.last_size = (height, width)

        gaussians: dict[str, Tensor] = dict(self.gauss_params.items())
        if self.crop_box is not None and not self.training:
            kept = self.crop_box.within(self.means).flatten()
            if not kept.any():
                return self.get_empty_outputs(width, height, self.background_color)
            gaussians = {name: values[kept] for name, values in gaussians.items()}
        colors = torch.cat([gaussians["features_dc"][:, None], gaussians["features_rest"]], dim=1)
        degree = None
        if config.sh_degree > 0:
            degree = min(self.step // config.sh_degree_interval, config.sh_degree)
        else:
            colors = colors[:, 0].sigmoid()
        pose = self.camera_optimizer.apply_to_camera(camera) if self.training else camera.camera_to_worlds
        with_depth = config.output_depth_during_training or not self.training
        image, alpha, self.info = rasterization(
            means=gaussians["means"],
            quats=gaussians["quats"],
            scales=gaussians["scales"].exp(),
            opacities=gaussians["opacities"].sigmoid()[:, 0],
            colors=colors,
            viewmats=_world_to_camera(pose.to(self.device)),
            Ks=intrinsics,
            width=width,
            height=height,
            packed=False,
            render_mode="RGB+ED" if with_depth else "RGB",
            sh_degree=degree,
            absgrad=self.strategy.absgrad,
            rasterize_mode=config.rasterize_mode,
        )
        if self.training:
            self.strategy.step_pre_backward(
                self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info
            )
        image, alpha = image[0], alpha[0]
        background = self._get_background_color()
        depth = None
        if with_depth:
            depth = torch.where(alpha > 0, image[..., 3:], image[..., 3:].detach().max())
        return {
            "rgb": (image[..., :3] + (1 - alpha) * background).clamp(0, 1),
            "depth": depth,
            "accumulation": alpha,
            "background": background if self.training else background.expand(height, width, 3),
        }

    def _pinhole_view(self, camera: Cameras) -> PinholeView:
        lens = (camera.fx, camera.fy, camera.cx, camera.cy, camera.height, camera.width, camera.camera_type)
        numbers = torch.cat([part.flatten().float() for part in (*lens, camera.distortion_params) if part is not None])
        key = tuple(numbers.tolist())
        if key not in self._lenses:
            self._lenses[key] = PinholeView.of(camera)
        return self._lenses[key]

    # Training

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: Optional[dict[str, Tensor]] = None
    ) -> dict[str, Tensor]:
        """splatfacto's, with the difference to photos replaced by ``rendered_view_loss`` for a rendered view."""
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        if "confidence" in batch:
            losses["main_loss"] = rendered_view_loss(outputs["rgb"], batch["image"], batch["confidence"])
        return losses

    # Scores and checkpoints

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        truth = self.composite_with_background(self.get_gt_img(batch["image"]), outputs["background"])
        return image_metrics(outputs["rgb"], truth), {"img": torch.cat([truth, outputs["rgb"]], dim=1)}

    def load_state_dict(self, state: dict[str, Tensor], **kwargs):
        """Loads any number of Gaussians.

        splatfacto puts new parameters in place of the old ones, which the optimizers of a resumed training would not
        know of; here they stay the same objects.
        """
        parameters = dict(self.gauss_params.items())
        result = super().load_state_dict(state, **kwargs)
        for name, parameter in parameters.items():
            parameter.data = self.gauss_params[name].data
            self.gauss_params[name] = parameter
        return result


def rendered_view_loss(
    rgb: Float[Tensor, "height width 3"],
    rendered: Float[Tensor, "height width 3"],
    confidence: Float[Tensor, "height width 1"],
    area: int = AREA,
) -> Float[Tensor, ""]:
    """Difference to a view that a network has rendered.

    A network that regresses paints a blur where it is not sure, but its mean is about right: of the squared error of
    the package's weights on validation objects, from 4 views, half is left in the means of 4 x 4 pixels. So Gaussians
    follow a render in the means of small areas, and take what is finer from photos.
    """
    difference, weight = ((rgb - rendered).permute(2, 0, 1)[None], confidence.permute(2, 0, 1)[None])
    means = avg_pool2d(difference * weight, area, ceil_mode=True, count_include_pad=False)
    return means.abs().mean()


def _world_to_camera(pose: Float[Tensor, "camera 3 4"]) -> Float[Tensor, "camera 4 4"]:
    """gsplat's view matrices of nerfstudio's OpenGL camera-to-world."""
    pose = opengl_to_opencv(pose)
    rotation = pose[:, :3, :3].transpose(1, 2)
    matrix = torch.eye(4, device=pose.device).repeat(len(pose), 1, 1)
    matrix[:, :3, :3], matrix[:, :3, 3:] = rotation, -rotation @ pose[:, :3, 3:]
    return matrix


@contextmanager
def _without_lpips() -> Iterator[None]:
    """splatfacto builds a network for a metric as it is made, and downloads its weights; not within this block.

    The class is stood in for while one model is being made, and then it is as it was.
    """
    from torchmetrics.image import lpip

    original = lpip.LearnedPerceptualImagePatchSimilarity
    lpip.LearnedPerceptualImagePatchSimilarity = lambda normalize: None
    try:
        yield
    finally:
        lpip.LearnedPerceptualImagePatchSimilarity = original
