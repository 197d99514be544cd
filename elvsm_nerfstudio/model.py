"""Efficient-LVSM as a nerfstudio model: it holds the context views and renders any camera from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor
from torch.nn import Parameter

from elvsm_nerfstudio.cameras import (
    can_be_extended,
    extended_cameras,
    in_fewer_pixels,
    on_cpu,
    views_from_cameras,
)
from elvsm_nerfstudio.evaluation.metrics import image_metrics, psnr
from elvsm_nerfstudio.evaluation.timing import timed
from elvsm_nerfstudio.frames_ahead import FramesAhead, upcoming_poses
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.compiled import CapturedFrames, Compiler
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.kernels import AttentionName, use_attention
from elvsm_nerfstudio.nn.memory import SceneMemory, check_ids
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork, autocast_dtype
from elvsm_nerfstudio.nn.weights import load_weights
from elvsm_nerfstudio.notices import say, warn
from elvsm_nerfstudio.programs import running_program
from elvsm_nerfstudio.training.border_errors import border_errors
from elvsm_nerfstudio.training.ema import WeightAverage
from elvsm_nerfstudio.training.muon import mark_hidden
from elvsm_nerfstudio.training.perceptual import PerceptualLoss, PerceptualLossConfig
from elvsm_nerfstudio.training.prefixes import Prefixes
from elvsm_nerfstudio.training.psnr_loss import psnr_loss
from elvsm_nerfstudio.training.repa import Repa, RepaConfig
from elvsm_nerfstudio.training.run_config import network_of_checkpoint
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
    network: NetworkConfig = field(default_factory=EfficientLVSMConfig)
    """Which network, and its sizes."""
    canonical_frame: Literal["context", "context+target"] = "context"
    """Cameras that fix the canonical frame. 'context' also works where targets are not known, as in the viewer;
    'context+target' is the paper's evaluation protocol."""
    checkpoint: Optional[Union[str, Path]] = None
    """Weights to start from, of the same network: 'pretrained', those that come with this package; a name that `elvsm
    weights` lists; hf://OWNER/REPO/FILE; a file of `elvsm export`, a run's step-*.ckpt, or one in the authors' layout
    (.pt, .safetensors). Steps, learning rate and optimiser start anew; to go on with a run give --load-dir instead."""
    repa: RepaConfig = field(default_factory=RepaConfig)
    """REPA: a frozen teacher whose features the network's are trained to match."""
    gradient_checkpointing: bool = False
    """Whether training keeps only what goes into each block, and computes the rest again on the way back: less memory,
    about a third more time, the same gradients."""
    prefix_loss: bool = False
    """Whether training encodes a step's context views once and renders each target from a random number of them: the
    first 1, 2, ... of a random order. For networks of Efficient-LVSM, with --pipeline.datamanager.num-context-views
    set to the largest number, not to a range."""
    psnr_loss: bool = False
    """Whether training minimises the logarithm of each image's mean squared error, which is its PSNR, in place of the
    mean over all images, in which those that are rendered worst count most (training/psnr_loss.py)."""
    border_weight: float = 0.0
    """Weight of the squared error of what pixels on both sides of a patch's border differ by, beside that of the pixels
    themselves: patches then fit together better."""
    perceptual: PerceptualLossConfig = field(default_factory=PerceptualLossConfig)
    """A perceptual loss beside that of single pixels."""
    nearest_views: Optional[int] = None
    """Renders each camera from only that many context views, those placed best for it, so that a frame costs the same
    however many there are; all of them if absent. Means nothing in training."""
    render_size: Union[int, Literal["trained", "native"]] = "trained"
    """How finely ns-render and the viewer compute frames: as context images of so many pixels in height, and enlarged
    from that. 'trained' is the height of the context images, where a patch covers the angle that the network knows:
    larger frames take long and look worse. 'native' computes every pixel. Means nothing in evaluation."""
    shifted_grids: Literal[1, 4] = 1
    """4 renders each picture on four grids of patches, shifted by half a patch, and takes the mean: patch borders go,
    at four times the cost. For networks that were trained with --pipeline.datamanager.lens-augmentation True."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the transformer: bf16 autocast, or fp32. 'auto' takes bf16 where the device computes in it."""
    compile: Optional[bool] = None
    """Whether torch.compile makes one graph of each block, in training and in rendering: faster on GPUs, after a minute
    of compiling. None does so on GPUs and, where it fails, says why and goes on without; True makes that an error."""
    cuda_graphs: bool = False
    """Whether frames on GPUs are rendered by CUDA graphs: the second frame of a size is captured, and replayed with the
    next cameras, so that the GPU does not wait for the CPU between its kernels. Where that fails, a line says why. Off,
    as no GPU has run it yet. Without effect with nearest_views, in training and on CPUs."""
    attention: AttentionName = "auto"
    """The kernel of attention on GPUs: PyTorch's choice, cuDNN's, or FlashAttention-3 or 4, which are to be installed
    beside this package (FlashAttention-3 for H100s, 4 for H100s and B200s). Means nothing on CPUs."""

    def without_training(self) -> EfficientLVSMModelConfig:
        """The options of a trained model: without weights to start from, teacher and perceptual loss, whose files only
        training has."""
        return replace(self, checkpoint=None, repa=RepaConfig(), perceptual=PerceptualLossConfig())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read from a run's config.yml: options that are younger than the run are as they would have been."""
        self.__dict__.update({**type(self)().__dict__, **state})


FAR = 1000.0
"""The depth that is given where one is asked for: there is nothing in front of it."""


class RenderOutputs(dict[str, Tensor]):
    """Outputs of a render: ``rgb`` alone.

    nerfstudio's viewer asks for depth (a feed-forward renderer has none) to composite the scene with its widgets;
    it gets a far plane, which does not show up among the outputs.
    """

    def __missing__(self, key: str) -> Tensor:
        if key == "depth":
            return torch.full_like(self["rgb"][..., :1], FAR)
        if key == "accumulation":
            return torch.ones_like(self["rgb"][..., :1])
        raise KeyError(key)


@dataclass(frozen=True)
class Context:
    """The views that a scene is rendered from, and the frame that stays while they come and go."""

    views: Views
    ids: tuple[int, ...]
    frame: CanonicalFrame


REMEMBERED_BYTES = 2**30
"""Views that were dropped from the context stay in the memory until it is larger than this."""


TOKENS_PER_CALL = 2**14
"""Target tokens that are rendered in one call: 16 frames of 256 x 256 pixels, 4 of 512 x 512."""


class EfficientLVSMModel(Model):
    """Owns the context: ``set_context`` once, then any number of cameras, and ``edit_context`` in between.

    The context is encoded when first needed, each view once, until the weights, the precision or the device change.
    It is no part of the state dict. The viewer may interrupt a render at any line: what the model keeps changes in
    single statements, each from one good state to another.
    """

    config: EfficientLVSMModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        self.network = self.config.network.build()
        self.network.gradient_checkpointing = self.config.gradient_checkpointing
        self.average: Optional[WeightAverage] = None
        """Where training keeps averaged weights."""
        if self.config.checkpoint is not None:
            try:
                load_weights(self.network, self.config.checkpoint, network_of_checkpoint(self.config.checkpoint))
            except ValueError as error:
                raise ValueError(f"--pipeline.model.checkpoint {error}") from None
        if self.config.prefix_loss and not self.network.has_prefixes:
            raise ValueError(
                f"--pipeline.model.prefix-loss True: found {self.network.architecture}, which goes through all context "
                "views again for every target; expected a network of Efficient-LVSM, or prefix-loss False"
            )
        self.generator = torch.Generator()
        """Of what a training step draws at random; the pipeline sets one for every step."""
        self.repa = None if self.config.repa.teacher == "none" else Repa(self.config.repa, self.network)
        self.perceptual_loss: Optional[PerceptualLoss] = self.config.perceptual.build()
        self._context: Optional[Context] = None
        # What was encoded, dropped views included, and the part of it that is the context.
        self._memory: Optional[tuple[SceneMemory, SceneMemory]] = None
        self._focal_per_height, self._said_size = 1.0, False
        self._ahead = FramesAhead(self.render_frames)
        self.render_for_viewer: Optional[Callable[[Cameras], RenderOutputs]] = None
        """Takes the place of ``get_outputs_for_camera`` once a viewer is there."""

    def to(self, *args, **kwargs) -> EfficientLVSMModel:
        super().to(*args, **kwargs)
        self._prepare(self.network)
        missing = use_attention(self.config.attention, self.device)
        if missing is not None:
            warn(f"--pipeline.model.attention {self.config.attention}: {missing}. PyTorch's own attention is used")
        if self.perceptual_loss is not None:
            self.perceptual_loss.to(self.device, self.network.autocast_dtype or torch.float32)
        return self

    def _prepare(self, network: SceneNetwork) -> None:
        """Precision and compiling of a network, as the config says for the device."""
        network.autocast_dtype = autocast_dtype(self.config.precision, self.device)
        compiled = self.device.type == "cuda" if self.config.compile is None else self.config.compile
        network.compiler = Compiler(required=self.config.compile is True) if compiled else None
        network.captured_frames = CapturedFrames() if self.config.cuda_graphs and self.device.type == "cuda" else None

    @property
    def rendering_network(self) -> SceneNetwork:
        """What evaluates and renders: the averaged weights where training keeps them, else those that are trained."""
        return self.network if self.average is None else self.average.network

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        mark_hidden(self.network)
        projectors = [] if self.repa is None else list(self.repa.parameters())
        return {"network": [*self.network.parameters(), *projectors]}

    # Context

    def frame_of(self, views: ViewSet) -> CanonicalFrame:
        """The canonical frame that the config asks for."""
        return canonical_frame(views, self.config.canonical_frame)

    def set_context(self, views: ViewSet, ids: Optional[Sequence[int]] = None) -> None:
        """Sets the context from which ``get_outputs_for_camera`` renders: one scene's context views.

        The targets' cameras matter only where the canonical frame is to be estimated from them too.

        Args:
            ids: by which ``edit_context`` knows the views; 0, 1, ... if absent.
        """
        ids = check_ids(range(views.context.num_views) if ids is None else ids, views.context.num_views)
        self._context, self._memory = Context(views.context, ids, self.frame_of(views)), None
        self._focal_per_height = float(views.context.intrinsics[..., 1].mean())

    def edit_context(self, add: Optional[Views] = None, ids: Sequence[int] = (), drop: Collection[int] = ()) -> None:
        """Adds views to the context and drops others, at the cost of the views added; the canonical frame stays.

        Args:
            add: of the context's scene and image size.
            ids: of the added views; an id stands for the same view for good.
            drop: ids. Taken back later these views are encoded again only if they were forgotten.
        """
        context = self._require_context()
        ids = check_ids(ids, 0 if add is None else add.num_views)
        kept = [position for position, id in enumerate(context.ids) if id not in drop]
        kept_ids = tuple(context.ids[position] for position in kept)
        if not set(drop) <= set(context.ids) or set(ids) & set(kept_ids) or not (kept_ids or ids):
            raise ValueError(
                f"edit_context: cannot add {list(ids)} and drop {sorted(drop)}; the context is {list(context.ids)}, "
                "and at least one view has to stay"
            )
        views = context.views.select(kept)
        self._context = Context(views if add is None else joined(views, add), (*kept_ids, *ids), context.frame)

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The ids of the context views, in order."""
        return () if self._context is None else self._context.ids

    def context_images(self) -> dict[int, Tensor]:
        """The context views' images [height, width, 3] by id."""
        return dict(zip(self.context_ids, self._require_context().views.rgb[0]))

    def set_precision(self, precision: Literal["auto", "bf16", "fp32"]) -> None:
        """Computes in another precision from now on; the context is then encoded again."""
        self.network.autocast_dtype = autocast_dtype(precision, self.device)
        self.rendering_network.autocast_dtype = self.network.autocast_dtype

    def use_network(self, network: SceneNetwork) -> None:
        """Renders with another network from now on; the context is then encoded again. Not for training."""
        self._prepare(network.to(self.device))
        self.network, self.config.network, self._memory = network, network.config, None

    def use_memory(self, memory: SceneMemory, views: Views) -> None:
        """Takes an encoded scene as the context, without encoding it again.

        Args:
            memory: of one scene, made by the network as it is.
            views: that were encoded, in the order of the memory's ids.

        Raises:
            ValueError: where the memory was made of other cameras.
        """
        found, expected = memory.camera_to_world, views.camera_to_world.to(memory.camera_to_world)
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
            raise ValueError("it was made of other cameras than those of this scene's views")
        self._context, self._memory = Context(views, memory.ids, memory.frame), (memory, memory)
        self._focal_per_height = float(views.intrinsics[..., 1].mean())

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compiles what rendering will run, for one context view and for several, so that no frame has to wait for it;
        does nothing where blocks are not compiled."""
        if self.network.compiler is None:
            return
        context = self._require_context()
        target = self._views(context, context.ids[:1])
        for memory in (self._encode(context, context.ids[:1]), self.memory()):
            self.rendering_network.decode(memory, target)

    @torch.no_grad()
    def memory(self) -> SceneMemory:
        """The encoded context, up to date with views, weights and precision; encodes what is missing."""
        context = self._require_context()
        dtype = self.network.autocast_dtype or next(self.network.parameters()).dtype
        made_by = self.rendering_network.weights_token(), dtype, self.device
        known, current = self._memory or (None, None)
        if known is None or (known.weights, known.dtype, known.device) != made_by:
            known = current = self._encode(context, context.ids)
        elif current.ids != context.ids:
            known = self._remember(known, context)
            current = known.select(context.ids)
        self._memory = known, current
        return current

    def _remember(self, known: SceneMemory, context: Context) -> SceneMemory:
        """What is known, and the views of the context that are missing in it."""
        missing = [id for id in context.ids if id not in known.ids]
        if missing and known.num_bytes > REMEMBERED_BYTES:
            kept = [id for id in context.ids if id in known.ids]
            if not kept:
                return self._encode(context, missing)
            known = known.select(kept)
        return self.rendering_network.append(known, self._views(context, missing), missing) if missing else known

    def _encode(self, context: Context, ids: Sequence[int]) -> SceneMemory:
        return self.rendering_network.encode(self._views(context, ids), context.frame.to(self.device), ids)

    def _views(self, context: Context, ids: Sequence[int]) -> Views:
        return context.views.select([context.ids.index(id) for id in ids]).to(self.device)

    def _require_context(self) -> Context:
        if self._context is None:
            raise RuntimeError("the model has no context views: call set_context first")
        return self._context

    # Training

    def get_outputs(self, ray_bundle: ViewSet) -> dict[str, Tensor]:
        """Renders the targets of a batch of view sets: ``rgb`` [scene, view, height, width, 3].

        Single rays get a far ``depth``: with --render-nearest-camera ns-render asks what stands between two cameras.
        """
        if isinstance(ray_bundle, RayBundle):
            return {"depth": torch.full_like(ray_bundle.origins[..., :1], FAR)}
        views = ray_bundle
        if not self.training:
            return {"rgb": self.rendering_network(views.context, views.target, self.frame_of(views))}
        of_frame, lengths = views, None
        if self.config.prefix_loss:
            prefixes = Prefixes.draw(views.context.num_views, views.target.num_views, self.generator)
            views, lengths = prefixes.ordered(views), prefixes.lengths
            of_frame = prefixes.of_frame(views)
        frame = self.frame_of(of_frame)
        if self.repa is None:
            return {"rgb": self.network(views.context, views.target, frame, lengths)}
        rgb, repa = self.repa(self.network, views, frame, lengths)
        return {"rgb": rgb, "repa": repa}

    def get_metrics_dict(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"psnr": psnr(outputs["rgb"].detach(), batch["image"])}

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Any], metrics_dict: Optional[dict[str, Tensor]] = None
    ) -> dict[str, Tensor]:
        difference = outputs["rgb"] - batch["image"]
        errors = difference.square().mean((-3, -2, -1))
        if self.config.border_weight:
            borders = border_errors(difference, self.config.network.patch_size)
            errors = errors + self.config.border_weight * borders
        losses = {"psnr": psnr_loss(errors)} if self.config.psnr_loss else {"mse": errors.mean()}
        if "repa" in outputs:
            losses["repa"] = self.config.repa.weight * outputs["repa"]
        if self.perceptual_loss is not None:
            looked_at = slice(self.config.perceptual.target_views)
            rendered, truth = (images[:, looked_at] for images in (outputs["rgb"], batch["image"]))
            losses["perceptual"] = self.config.perceptual.weight * self.perceptual_loss(rendered, truth)
        return losses

    # Rendering

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: Optional[OrientedBox] = None) -> RenderOutputs:
        """Renders one camera of any central type and any size from the context: ``rgb`` [height, width, 3].

        The viewer's crop box has no meaning for a renderer without geometry and is ignored.
        """
        if self.render_for_viewer is not None:
            return self.render_for_viewer(camera)
        given, camera, asked = camera, on_cpu(camera.reshape((1,))), self.config.render_size
        size = int(camera.height[0]), int(camera.width[0])
        if asked != "native":
            context_height = self._require_context().views.directions.shape[-3]
            camera = self.no_finer(camera, context_height if asked == "trained" else asked)
        rows, columns = int(camera.height[0]), int(camera.width[0])
        if (rows, columns) != size and not self._said_size:
            self._said_size = True
            say(
                f"Frames of {size[1]}x{size[0]} are computed at {columns}x{rows} and enlarged: the network knows no "
                "finer ones. For others set --pipeline.model.render-size, in a run's config.yml render_size"
            )
        ahead = self.frames_per_call(rows, columns) - 1 if running_program() == "ns-render" else 0
        upcoming = upcoming_poses(given, ahead)
        return RenderOutputs(rgb=enlarge(self._ahead.frame(self.memory(), camera, upcoming), size))

    def no_finer(self, camera: Cameras, size: int) -> Cameras:
        """A camera [1] on the CPU in at most as many pixels as a context image of a height in pixels would need for
        what it sees; one of at most that height is left as it is."""
        height = int(camera.height[0])
        if height <= size:
            return camera
        perspective = int(camera.camera_type[0]) == CameraType.PERSPECTIVE.value
        scale = size * self._focal_per_height / max(float(camera.fy[0]), 1e-9) if perspective else size / height
        return in_fewer_pixels(camera, min(1.0, scale))

    def render(self, memory: SceneMemory, camera: Cameras) -> RenderOutputs:
        """Renders one camera, of shape () or (1,), from a scene's memory."""
        return RenderOutputs(rgb=self.render_frames(memory, camera.reshape((1,)))[0])

    @torch.no_grad()
    def render_frames(self, memory: SceneMemory, cameras: Cameras) -> Float[Tensor, "frame height width 3"]:
        """Renders cameras [frame] of one size from a scene's memory, all in one call, each as if it were alone."""
        cameras, half = on_cpu(cameras), self.config.network.patch_size // 2
        shifts = (0, half) if self.config.shifted_grids == 4 and can_be_extended(cameras) else (0,)
        grids = [self._render_on_grid(memory, cameras, down, right) for down in shifts for right in shifts]
        return grids[0] if len(grids) == 1 else torch.stack(grids).mean(dim=0)

    def _render_on_grid(
        self, memory: SceneMemory, cameras: Cameras, down: int, right: int
    ) -> Float[Tensor, "frame height width 3"]:
        """Renders cameras on patches that begin so many pixels above and to the left of the pictures."""
        height, width = int(cameras.height[0]), int(cameras.width[0])
        extended = extended_cameras(cameras, down, right) if down or right else cameras
        target = views_from_cameras(extended, self.config.network.patch_size, device=self.device)
        rgb = self.rendering_network.decode(memory, target, self.config.nearest_views)[0]
        return rgb[:, down : down + height, right : right + width]

    def frames_per_call(self, height: int, width: int) -> int:
        """Into how many frames of this size it pays to go at once: on a GPU, which one small frame does not fill, up to
        16; on a CPU one, as more are not faster there."""
        if self.device.type != "cuda":
            return 1
        return max(1, min(16, TOKENS_PER_CALL * self.config.network.patch_size**2 // (height * width)))

    def timed_frames(
        self, memory: SceneMemory, cameras: Cameras
    ) -> Iterator[tuple[Float[Tensor, "height width 3"], float]]:
        """Renders cameras [frame] of one size from a scene's memory, as many in one call as pay: each frame, and its
        share in ms of the time of the call that rendered it."""
        first = 0
        while first < len(cameras):
            some = cameras[first : first + self.frames_per_call(int(cameras.height[0]), int(cameras.width[0]))]
            first += len(some)
            images, render_ms = timed(self.device, partial(self.render_frames, memory, some))
            yield from ((image, render_ms / len(some)) for image in images)

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


def joined(views: Views, more: Views) -> Views:
    pairs = ((getattr(v, f) for v in (views, more)) for f in ("camera_to_world", "directions", "intrinsics", "rgb"))
    return Views(*(torch.cat([mine, theirs.to(mine.device)], dim=1) for mine, theirs in pairs))


def enlarge(image: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """[height, width, channel] at another size."""
    if image.shape[:2] == size:
        return image
    mode = {"mode": "nearest-exact"} if nearest else {"mode": "bilinear", "align_corners": False, "antialias": True}
    resized = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], size, **mode)
    return resized[0].permute(1, 2, 0)
