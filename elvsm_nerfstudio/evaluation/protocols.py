"""Named benchmark protocols: what has to be the same for two numbers to be comparable."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Optional

from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.data.images import Background, ImageSpec


@dataclass(frozen=True)
class Protocol:
    """Resolution, crop, views and canonical frame of an evaluation. The metrics are evaluation/metrics.py's."""

    name: str
    description: str
    views: ViewRule
    context_views: tuple[int, ...]
    """Scored with so many of the context views, the first ones, each with the same targets."""
    image_size: Optional[tuple[int, int]] = None
    """Height and width; the size that the model was trained for if absent."""
    scored_size: Optional[tuple[int, int]] = None
    """Height and width to which renders and photos are reduced, by the mean over areas, before they are compared; as
    they are if absent."""
    width_multiple: int = 1
    """Images are resized (Lanczos) to cover the size, their width rounded to a multiple of this, then cut out of the
    middle."""
    background: Background = "white"
    """Colour behind transparent pixels."""
    canonical_frame: Literal["context", "context+target"] = "context"
    """Cameras that the canonical frame is estimated from."""
    one_memory: bool = False
    """Context views are appended one by one to one memory, in the frame of all of them; else each number of context
    views is encoded anew in its own frame."""

    def images(self, model_size: tuple[int, int]) -> ImageSpec:
        """How images are read, for a model of some size."""
        return ImageSpec(self.image_size or model_size, self.background, self.width_multiple)

    def as_json(self, model_size: tuple[int, int]) -> dict[str, Any]:
        """All of it, for a result file."""
        return {**asdict(self), "image_size": list(self.image_size or model_size), "resampling": "lanczos"}


_RE10K = Protocol(
    name="re10k-2view-256",
    description="RealEstate10K, pixelSplat's index, 2 context and 3 target views, cameras normalised by all of them "
    "(the official code's protocol)",
    views=ViewRule(num_context_views=2, source="index", targets_may_be_context=True),
    context_views=(2,),
    image_size=(256, 256),
    width_multiple=8,
    canonical_frame="context+target",
)
_OBJECTS_1_TO_16 = Protocol(
    name="objects-1-to-16",
    description="1, 2, 4, 8 and 16 context views of an object, spread by farthest point, on white; 8 target views "
    "spread over the other frames",
    views=ViewRule(num_context_views=16, num_target_views=8, source="spread"),
    context_views=(1, 2, 4, 8, 16),
)
_OBJECTS = Protocol(
    name="objects-4view",
    description="Objects on white, 4 context views: the index's, or the first frames of each scene, which are the "
    "context of the official renders; the other frames are targets",
    views=ViewRule(num_context_views=4, source="index or first"),
    context_views=(4,),
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _RE10K,
        replace(
            _RE10K,
            name="re10k-2view-256-context-frame",
            description="re10k-2view-256 with cameras normalised by the context views alone, as when the targets are "
            "not known beforehand",
            canonical_frame="context",
        ),
        *(
            replace(
                _RE10K,
                name=f"re10k-{count}view-256",
                description=f"re10k-2view-256 with {count} context views, spread evenly between the two of the index",
                views=replace(_RE10K.views, num_context_views=count),
                context_views=(count,),
            )
            for count in (4, 8)
        ),
        _OBJECTS,
        replace(
            _OBJECTS,
            name="objects-4view-black",
            description=_OBJECTS.description.replace("white", "black"),
            background="black",
        ),
        _OBJECTS_1_TO_16,
        replace(
            _OBJECTS_1_TO_16,
            name="objects-1-to-16-scored-at-64",
            description="objects-1-to-16 at the model's own size, scored after reducing renders and photos to 64 x 64: "
            "for comparing models of different sizes",
            scored_size=(64, 64),
        ),
        Protocol(
            name="wide-range",
            description="100 frames sampled uniformly over the scene, 2, 4, 8 and 12 context views spread by farthest "
            "point, 8 target views spread over the others",
            views=ViewRule(num_context_views=12, num_target_views=8, source="spread", num_frames=100),
            context_views=(2, 4, 8, 12),
        ),
        Protocol(
            name="incremental",
            description="1 to 8 context views, farthest point first, appended one by one to one memory; 8 target views "
            "spread over the other frames",
            views=ViewRule(num_context_views=8, num_target_views=8, source="spread"),
            context_views=tuple(range(1, 9)),
            one_memory=True,
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: for an unknown one, naming the nearest.
    """
    if name not in PROTOCOLS:
        nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"--pipeline.protocol {name}: no such protocol; did you mean {nearest}? There are {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name]
