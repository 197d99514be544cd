"""The methods that `elvsm compare` compares, behind one interface: photos in, a renderer out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.trainer import TrainerConfig
from torch import Tensor

from elvsm_nerfstudio.cameras import in_pixels, views_from_cameras
from elvsm_nerfstudio.compare.layout import MethodSpec, Settings, compared_scene
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.metrics import mean_over_areas
from elvsm_nerfstudio.evaluation.timing import milliseconds, synchronise, timed
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.model import EfficientLVSMModel
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.nn.weights import load_weights, read_weights
from elvsm_nerfstudio.runs import network_methods, read_network_config, with_network
from elvsm_nerfstudio.views import Views, ViewSet

FINETUNE_RATE = 2e-4
"""Learning rate of fine-tuning, with AdamW whatever the run was trained with. Ours."""
FINETUNE_BATCH = 4
"""Held-out choices of the context views in a step of fine-tuning. Ours."""

Render = Callable[[Cameras], Iterator[tuple[Float[Tensor, "height width 3"], float]]]
"""Renders cameras [camera] of one size: each picture, and its share in ms of the time of the call that rendered it."""


@dataclass(frozen=True)
class SceneContext:
    """What a method may know of a scene: nothing of its targets."""

    name: str
    views: Views
    """The context views [1, view, ...] with their images."""
    index: Path
    """Names the same frames, for methods that read the scene themselves."""
    count: int


@dataclass(frozen=True)
class Prepared:
    """A scene, ready to be rendered."""

    render: Render
    seconds: float
    """From the photos to here, the device waited for, programs and weights loaded and warm."""
    disk_bytes: int
    """What has to be kept to render the scene again."""
    frames_per_call: int = 1
    """How many pictures of the context's size ``render`` makes in one call."""
    child_peak_bytes: int = 0
    """Peak memory, of the kind that is measured here, of a process of its own in which the scene was prepared."""
    facts: dict[str, Any] = field(default_factory=dict)


def one_by_one(device: torch.device, render: Callable[[Cameras], Float[Tensor, "height width 3"]]) -> Render:
    """Renders one camera [1] in a call."""
    return lambda cameras: (timed(device, partial(render, cameras[i : i + 1])) for i in range(len(cameras)))


class Method(Protocol):
    """A method of the comparison."""

    def prepare(self, scene: SceneContext) -> Prepared:
        """Makes a renderer from the context views alone."""
        ...


class Baseline:
    """Something that needs no learning."""

    def __init__(self, name: str):
        self._baseline = BASELINES[name.replace("-", "_")]

    def prepare(self, scene: SceneContext) -> Prepared:
        context = scene.views

        def render(camera: Cameras) -> Tensor:
            return self._baseline(context, views_from_cameras(camera, 1, device=context.rgb.device))[0, 0]

        photos = context.rgb.numel()  # a byte for each colour
        return Prepared(one_by_one(context.rgb.device, render), seconds=0.0, disk_bytes=photos)


class Network:
    """A trained network that encodes the context, as a run or a file of weights holds it.

    One that was trained at a larger size than the comparison's, and the same aspect, gets the photos and renders at its
    own, as it would be used, and its pictures are reduced.
    """

    def __init__(self, spec: MethodSpec, settings: Settings, device: torch.device):
        config = network_config(spec)
        height, width = settings.image_size
        own = spec.image_size or settings.image_size
        is_larger = own[0] > height and own[0] * width == own[1] * height
        self._larger = replace(settings, image_size=tuple(own)) if is_larger else None
        self._open_larger = cache(self._larger.datamanager) if self._larger is not None else None
        # The targets' cameras are for nobody to know.
        model_config = replace(config.pipeline.model.without_training(), canonical_frame="context")
        self._optimizer = config.optimizers["network"]["optimizer"]
        self._minutes = spec.finetune_minutes
        box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.model: EfficientLVSMModel = model_config.setup(scene_box=box, num_train_data=0)
        load_weights(self.model.network, Path(spec.weights), model_config.network)
        self.model.to(device).eval()
        self._weights = {name: tensor.clone() for name, tensor in self.model.network.state_dict().items()}
        self._warm = False

    def prepare(self, scene: SceneContext) -> Prepared:
        model, device = self.model, self.model.device
        model.network.load_state_dict(self._weights)
        views = scene.views if self._larger is None else self._read_larger(scene)
        facts: dict[str, Any] = {"precision": str(model.network.autocast_dtype or torch.float32).split(".")[1]}
        if self._larger is not None:
            facts["rendered_size"] = [views.height, views.width]
        if not self._warm:
            self._encode(views)
            self._warm = True
        synchronise(device)
        start = time.perf_counter()
        if self._minutes is not None:
            facts["finetuning_steps"] = self._finetune(views)
        encode_ms = milliseconds(device, lambda: self._encode(views))
        seconds = time.perf_counter() - start
        return Prepared(
            render=partial(self._render, model.memory()),
            seconds=seconds,
            disk_bytes=sum(tensor.numel() * tensor.element_size() for tensor in self._weights.values()),
            frames_per_call=model.frames_per_call(views.height, views.width),
            facts={**facts, "encode_ms": encode_ms, "memory_bytes": model.memory().num_bytes},
        )

    def _read_larger(self, scene: SceneContext) -> Views:
        """The context views at the network's own size."""
        datamanager = self._open_larger(scene.index, scene.count, str(self.model.device))
        return compared_scene(datamanager, scene.name, scene.count, max_targets=1).views.context

    def _render(self, memory: SceneMemory, cameras: Cameras) -> Iterator[tuple[Float[Tensor, "height width 3"], float]]:
        size = int(cameras.height[0]), int(cameras.width[0])
        if self._larger is None or size[0] >= self._larger.image_size[0]:
            yield from self.model.timed_frames(memory, cameras)
            return
        for picture, ms in self.model.timed_frames(memory, in_pixels(cameras, *self._larger.image_size)):
            yield mean_over_areas(picture, size), ms

    def _encode(self, context: Views) -> None:
        self.model.set_context(ViewSet(context, context))
        self.model.memory()

    def _finetune(self, context: Views) -> int:
        """Trains on the context views for the minutes asked, each time some of them from the others; returns the steps.

        Mean squared error alone, in the canonical frame of all context views, the one that is rendered in.
        """
        network, context = self.model.network, context.to(self.model.device)
        parameters = self.model.get_param_groups()["network"]
        optimizer = replace(self._optimizer, lr=FINETUNE_RATE, muon=False).setup(parameters)
        frame = CanonicalFrame.estimate(context.camera_to_world)
        many = (FINETUNE_BATCH,)
        frame = CanonicalFrame(*(x.expand(*many, *x.shape[1:]) for x in (frame.axes, frame.centre, frame.scale)))
        generator = torch.Generator().manual_seed(0)
        targets = max(1, context.num_views // 4)
        steps, end = 0, time.perf_counter() + 60 * self._minutes
        network.train()
        while time.perf_counter() < end:
            order = torch.stack([torch.randperm(context.num_views, generator=generator) for _ in range(FINETUNE_BATCH)])
            inputs, held_out = (_dealt(context, chosen) for chosen in (order[:, targets:], order[:, :targets]))
            loss = (network(inputs, held_out, frame) - held_out.rgb).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1
        network.eval()
        return steps


def network_config(spec: MethodSpec) -> TrainerConfig:
    """The options of a run, or of a method with the network that a file of weights says it is of.

    Raises:
        ValueError: where these are of another method than named.
    """
    if spec.config is not None:
        return read_network_config(Path(spec.config), f"--runs {spec.name}=")
    method, weights = network_methods()[spec.method], read_weights(Path(spec.weights))
    return with_network(method, weights.config, f"--runs {spec.name}={spec.weights}") if weights.complete else method


def _dealt(views: Views, chosen: Tensor) -> Views:
    """A batch of scenes [scene, view] from one scene's views with these positions."""
    parts = (views.camera_to_world, views.directions, views.intrinsics, views.rgb)
    return Views(*(part[0][chosen.to(part.device)] for part in parts))


def device_to_use() -> torch.device:
    """CUDA where there is one, as nerfstudio's own programs choose."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
