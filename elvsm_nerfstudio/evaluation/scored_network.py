"""A network as it is scored: from memories of as many context views as a protocol asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from elvsm_nerfstudio.data.datamanager import EvaluationScene
from elvsm_nerfstudio.evaluation.evaluator import TimedFrames
from elvsm_nerfstudio.evaluation.protocols import Protocol
from elvsm_nerfstudio.evaluation.timing import timed
from elvsm_nerfstudio.model import EfficientLVSMModel, canonical_frame
from elvsm_nerfstudio.nn.memory import SceneMemory
from elvsm_nerfstudio.views import ViewSet


@dataclass(frozen=True)
class ScoredNetwork:
    """A model with its network, as ``Evaluator`` asks for it."""

    model: EfficientLVSMModel

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def record(self) -> dict[str, Any]:
        return {
            "nearest_views": self.model.config.nearest_views,
            "precision": str(self.model.network.autocast_dtype or torch.float32).removeprefix("torch."),
        }

    def frames_per_call(self, height: int, width: int) -> int:
        return self.model.frames_per_call(height, width)

    def renders(self, scene: EvaluationScene, protocol: Protocol) -> Iterator[tuple[int, TimedFrames, float]]:
        for count, memory, encode_ms in self.memories(scene.views, protocol):
            yield count, partial(self.model.timed_frames, memory), encode_ms

    def memories(self, views: ViewSet, protocol: Protocol) -> Iterator[tuple[int, SceneMemory, float]]:
        """The memory of each number of context views, and the time in ms that it took to get there."""
        network = self.model.rendering_network
        counts = protocol.context_views or (views.context.num_views,)
        if not protocol.one_memory:
            for count in counts:
                context = views.context.select(range(count))
                frame = canonical_frame(ViewSet(context, views.target), protocol.canonical_frame)
                memory, encode_ms = timed(self.device, lambda c=context, f=frame: network.encode(c, f))
                yield count, memory, encode_ms
            return
        frame = canonical_frame(views, protocol.canonical_frame)
        memory = None
        for count in range(1, max(counts) + 1):
            view = views.context.select([count - 1])

            @torch.no_grad()
            def append(memory=memory, view=view) -> SceneMemory:
                return network.encode(view, frame) if memory is None else network.append(memory, view)

            memory, encode_ms = timed(self.device, append)
            if count in counts:
                yield count, memory, encode_ms
