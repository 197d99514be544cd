"""Efficient-LVSM as a nerfstudio model: it holds the context views and renders any camera from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor
from torch.nn import Parameter

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.evaluation.metrics import image_metrics, psnr
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.views import Views, ViewSet


@dataclass
class EfficientLVSMModelConfig(ModelConfig):
    """The network, and how its cameras are normalised."""

    _target: type = field(default_factory=lambda: EfficientLVSMModel)
    """target class to instantiate"""
    enable_collider: Annotated[bool, tyro.conf.Suppress] = False
    """Must stay off: the model takes view sets, not rays. What follows is inherited and means nothing here."""
    collider_params: Annotated[Optional[dict[str, float]], tyro.conf.Suppress] = None
    loss_coefficients: Annotated[dict[str, float], tyro.conf.Suppress] = field(default_factory=dict)
    eval_num_rays_per_chunk: Annotated[int, tyro.conf.Suppress] = 4096
    prompt: Annotated[Optional[str], tyro.conf.Suppress] = None
    network: EfficientLVSMConfig = field(default_factory=EfficientLVSMConfig)
    """Sizes of the network."""
    canonical_frame: Literal["context", "context+target"] = "context"
    """Cameras that fix the canonical frame. 'context' also works where targets are not known, as in the viewer;
    'context+target' is the paper's evaluation protocol."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the transformer: bf16 autocast, or fp32. 'auto' takes bf16 where the device computes in it."""


class RenderOutputs(dict[str, Tensor]):
    """Outputs of a render: ``rgb`` alone.

    nerfstudio's viewer asks for depth (a feed-forward renderer has none) to composite the scene with its widgets;
    it gets a far plane, which does not show up among the outputs.
    """

    def __missing__(self, key: str) -> Tensor:
        if key == "depth":
            return torch.full_like(self["rgb"][..., :1], 1000.0)
        if key == "accumulation":
            return torch.ones_like(self["rgb"][..., :1])
        raise KeyError(key)


class EfficientLVSMModel(Model):
    """Owns the context: ``set_context`` once, then any number of cameras.

    The context is encoded when first needed and kept until it, the weights or the device change. It is no part of
    the state dict.
    """

    config: EfficientLVSMModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        self.network = EfficientLVSM(self.config.network)
        self._context: Optional[tuple[Views, CanonicalFrame]] = None
        self._memory: Optional[tuple[SceneMemory, tuple[int, torch.device]]] = None

    def to(self, *args, **kwargs) -> EfficientLVSMModel:
        super().to(*args, **kwargs)
        self.network.autocast_dtype = autocast_dtype(self.config.precision, self.device)
        return self

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        return {"network": list(self.network.parameters())}

    # Context

    def frame_of(self, views: ViewSet) -> CanonicalFrame:
        """The canonical frame that the config asks for."""
        return canonical_frame(views, self.config.canonical_frame)

    def set_context(self, views: ViewSet) -> None:
        """Sets the context from which ``get_outputs_for_camera`` renders: one scene's context views.

        The targets' cameras matter only where the canonical frame is to be estimated from them too.
        """
        self._context, self._memory = (views.context, self.frame_of(views)), None

    def memory(self) -> SceneMemory:
        """The encoded context, up to date with the weights."""
        if self._context is None:
            raise RuntimeError("the model has no context views: call set_context first")
        state = (sum(parameter._version for parameter in self.network.parameters()), self.device)
        if self._memory is None or self._memory[1] != state:
            context, frame = self._context
            with torch.no_grad():
                encoded = self.network.encode(context.to(self.device), frame.to(self.device))
            # In one statement: the viewer may interrupt a render at any line.
            self._memory = (encoded, state)
        return self._memory[0]

    # Training

    def get_outputs(self, ray_bundle: ViewSet) -> dict[str, Tensor]:
        """Renders the targets of a batch of view sets: ``rgb`` [scene, view, height, width, 3]."""
        views = ray_bundle
        return {"rgb": self.network(views.context, views.target, self.frame_of(views))}

    def get_metrics_dict(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"psnr": psnr(outputs["rgb"].detach(), batch["image"])}

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Any], metrics_dict: Optional[dict[str, Tensor]] = None
    ) -> dict[str, Tensor]:
        return {"mse": (outputs["rgb"] - batch["image"]).square().mean()}

    # Rendering

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: Optional[OrientedBox] = None) -> RenderOutputs:
        """Renders one camera of any central type and any size from the context: ``rgb`` [height, width, 3].

        The viewer's crop box has no meaning for a renderer without geometry and is ignored.
        """
        return self.render(self.memory(), camera)

    @torch.no_grad()
    def render(self, memory: SceneMemory, camera: Cameras) -> RenderOutputs:
        """Renders one camera, of shape () or (1,), from a scene's memory."""
        camera = camera.reshape((1,)).to(self.device)
        target = views_from_cameras(camera, self.config.network.patch_size)
        rgb = self.network.decode(memory, target)[0, 0]
        return RenderOutputs(rgb=rgb[: int(camera.height[0]), : int(camera.width[0])])

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Tensor:
        """The image with an alpha of one: there is nothing to see through."""
        rgb = outputs[output_name]
        return torch.cat([rgb, torch.ones_like(rgb[..., :1])], dim=-1)

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        truth = batch["image"].to(self.device)
        return image_metrics(outputs["rgb"], truth), {"img": torch.cat([truth, outputs["rgb"]], dim=1)}


def canonical_frame(views: ViewSet, cameras: Literal["context", "context+target"]) -> CanonicalFrame:
    """The frame of the context views' cameras, or of those and the target views'."""
    poses = [views.context.camera_to_world]
    if cameras == "context+target":
        poses.append(views.target.camera_to_world)
    return CanonicalFrame.estimate(torch.cat(poses, dim=1))


def autocast_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> Optional[torch.dtype]:
    """The dtype for the transformer's autocast, or None for fp32."""
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:
            precision = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
