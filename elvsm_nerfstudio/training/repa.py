"""REPA: in training, blocks of the network are drawn to what a frozen teacher sees in the same images.

Paper sections on REPA and arXiv 2410.06940. What is learned for it, the projectors, is no part of the network: it is
saved for resuming and left out everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.network import SceneNetwork
from elvsm_nerfstudio.training.teachers import TEACHERS, Teacher, resample
from elvsm_nerfstudio.views import ViewSet

PROJECTORS = "repa.projectors."
"""Of the projectors' names in a model's state dict."""
PROJECTOR_WIDTH = 2048
SPATIAL_NORM_GAMMA = 0.6
"""Share of a feature's mean over the image that spatial normalisation takes away, as in the authors' later work."""


@dataclass
class RepaConfig:
    """REPA: a teacher for training. The network as it is afterwards knows nothing of it."""

    teacher: Literal["none", "dinov3", "dinov2", "vgg16", "saliency-vit-s"] = "none"
    """Frozen network whose features are to be matched. The paper's convergence plot was made with DINOv3 ViT-B/16, the
    weights of which are gated, so that by default there is none. 'saliency-vit-s' is a ViT-S fine-tuned for saliency,
    not DINO."""
    path: Optional[Path] = None
    """Folder of a transformer's weights as transformers saves them (config.json, model.safetensors). For VGG-16 a
    .pth file. Absent: where `elvsm fetch lpips` or `elvsm fetch saliency-vit` puts it."""
    image_size: Optional[int] = None
    """Pixels of the short side of images shown to the teacher; by default 512 for DINOv3, 336 for DINOv2 (both as in
    the official code), 224 for the ViT-S and 256 for VGG-16 (ours)."""
    pairs: tuple[str, ...] = ()
    """Pairs of a teacher's and a network's block, counted from 1: 8-2 in both streams, 8-2i or 8-2t in that of the
    input (context) or target views alone. VGG-16's only block is 5 (relu5_3). Default: the teacher's block 8 for block
    2 of 6 (as in the official script) and the one at a third of other depths (ours: 4 of 12), in every stream that the
    network has."""
    projector: Literal["mlp", "conv"] = "mlp"
    """From the network's features to the teacher's: three linear layers with SiLU, or a 3x3 convolution together with
    spatial normalisation of the teacher's features (arXiv 2512.10794)."""
    loss: Literal["smooth-l1", "l2", "cosine"] = "smooth-l1"
    """Distance of features."""
    weight: float = 0.5
    """Weight of this loss (the official config's; the paper's is not known)."""


@dataclass(frozen=True)
class Pair:
    """A teacher's block and the network's block, from 1, that shall look like it, in one stream."""

    teacher: int
    student: int
    stream: str

    @property
    def key(self) -> str:
        return f"{self.stream}-{self.teacher}-{self.student}"


class Repa(nn.Module):
    """Trains with a teacher: a projector for each pair, and the teacher itself, which is no module of this one.

    Raises:
        ValueError: for pairs that network or teacher do not have, and missing weights of the teacher.
    """

    def __init__(self, config: RepaConfig, network: SceneNetwork):
        super().__init__()
        self.config = config
        kind: Any = TEACHERS[config.teacher]  # each has its own constructor
        depths = {stream: len(blocks) for stream, blocks in network.streams.items()}
        self.pairs = find_pairs(config.pairs, kind.default_block, depths)
        self.teacher: Teacher = kind({pair.teacher for pair in self.pairs}, config.path, config.image_size)
        make = mlp_projector if config.projector == "mlp" else ConvProjector
        self.projectors = nn.ModuleDict(
            {pair.key: make(network.config.width, self.teacher.channels) for pair in self.pairs}
        )

    def forward(
        self,
        network: SceneNetwork,
        views: ViewSet,
        frame: CanonicalFrame,
        prefixes: Optional[Sequence[int]] = None,
    ) -> tuple[Float[Tensor, "scene view height width 3"], Float[Tensor, ""]]:
        """Renders targets with the network, and compares its features on the way with the teacher's.

        Args:
            views: with the targets' images.
            prefixes: as the network takes them.

        Returns:
            What the network gives; and the loss, not weighted, averaged over channels, tokens, and the images of all
            pairs (as in the official code: the stream with more views counts for more).
        """
        with watch(network, self.pairs) as outputs:
            rgb = network(views.context, views.target, frame, prefixes)
        return rgb, self.loss(network, views, outputs)

    def loss(self, network: SceneNetwork, views: ViewSet, outputs: Mapping[Pair, Sequence[Tensor]]) -> Tensor:
        """The loss for outputs of blocks; see ``forward``."""
        losses, num_images = [], 0
        for stream in sorted({pair.stream for pair in self.pairs}):
            images = getattr(views, stream).rgb
            if images is None:
                raise ValueError(f"REPA: the {stream} views have no rgb, which the teacher is to look at")
            images = images.flatten(0, 1).permute(0, 3, 1, 2)
            size = images.shape[-2:]
            grid = size[0] // network.config.patch_size, size[1] // network.config.patch_size
            dtype = network.autocast_dtype
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                features = self.teacher.features(images)
                for pair in (pair for pair in self.pairs if pair.stream == stream):
                    tokens = _only_output(pair, outputs.get(pair, ())).flatten(0, -3)
                    maps = tokens[:, : grid[0] * grid[1]].unflatten(1, grid)
                    wanted = resample(
                        features[pair.teacher].transpose(1, 2).unflatten(2, self.teacher.grid(*size)), grid
                    ).permute(0, 2, 3, 1)
                    if self.config.projector == "conv":
                        wanted = spatial_norm(wanted)
                    found = self.projectors[pair.key](maps)
                    losses.append(distance(found.float(), wanted, self.config.loss) * len(images))
                    num_images += len(images)
        return torch.stack(losses).sum() / num_images


@contextmanager
def watch(network: SceneNetwork, pairs: Collection[Pair]) -> Iterator[dict[Pair, list[Tensor]]]:
    """Collects what the pairs' blocks put out within the context.

    Gradient checkpointing runs blocks again in the backward pass, when nobody watches any more.
    """
    outputs: dict[Pair, list[Tensor]] = {pair: [] for pair in pairs}

    def keep(pair: Pair):
        return lambda module, inputs, output: outputs[pair].append(output)

    handles = [network.streams[p.stream][p.student - 1].register_forward_hook(keep(p)) for p in pairs]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _only_output(pair: Pair, outputs: Sequence[Tensor]) -> Tensor:
    if len(outputs) != 1 or (torch.is_grad_enabled() and not outputs[0].requires_grad):
        found = f"{len(outputs)} outputs" if len(outputs) != 1 else "an output without gradient"
        raise RuntimeError(
            f"REPA: found {found} of block {pair.student} of the {pair.stream} stream; expected one, with gradient, in "
            "each forward pass. REPA needs gradients, and cannot look into compiled blocks."
        )
    return outputs[0]


def find_pairs(names: Sequence[str], default_block: int, depths: Mapping[str, int]) -> tuple[Pair, ...]:
    """The pairs that a config asks for, one for each stream.

    Args:
        names: e.g. '8-2', '8-2i', '8-2t'; the default if empty.
        default_block: the teacher's, for the default.
        depths: number of blocks of each stream that the network has.

    Raises:
        ValueError: for what is no pair, streams or blocks that the network does not have, and repetitions.
    """
    if not names:
        return tuple(Pair(default_block, max(1, round(depth / 3)), stream) for stream, depth in depths.items())
    streams = {"": ("context", "target"), "i": ("context",), "t": ("target",)}
    pairs: list[Pair] = []
    for name in names:
        match = re.fullmatch(r"(\d+)-(\d+)([it]?)", name)
        if match is None:
            raise ValueError(
                f"--pipeline.model.repa.pairs {name}: expected TEACHERBLOCK-BLOCK, with i or t for input or target "
                "views alone, e.g. 8-2 or 8-2i; several are separated by spaces"
            )
        for stream in streams[match[3]]:
            pair = Pair(int(match[1]), int(match[2]), stream)
            if stream not in depths:
                known = " or ".join(f"{match[1]}-{match[2]}{'t' if s == 'target' else 'i'}" for s in depths)
                raise ValueError(
                    f"--pipeline.model.repa.pairs {name}: this network has no tokens of {stream} views alone; expected "
                    f"{known}"
                )
            if not 1 <= pair.student <= depths[stream]:
                raise ValueError(
                    f"--pipeline.model.repa.pairs {name}: found block {pair.student}, expected 1 to {depths[stream]}"
                )
            if pair in pairs:
                raise ValueError(f"--pipeline.model.repa.pairs {name}: this pair is there twice")
            pairs.append(pair)
    return tuple(pairs)


def mlp_projector(width: int, channels: int) -> nn.Sequential:
    """Three linear layers with SiLU, for each token, with biases and PyTorch's initialisation (official code)."""
    return nn.Sequential(
        nn.Linear(width, PROJECTOR_WIDTH),
        nn.SiLU(),
        nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
        nn.SiLU(),
        nn.Linear(PROJECTOR_WIDTH, channels),
    )


class ConvProjector(nn.Conv2d):
    """A 3x3 convolution over the grid of tokens."""

    def __init__(self, width: int, channels: int):
        super().__init__(width, channels, kernel_size=3, padding=1)

    def forward(self, maps: Float[Tensor, "image row column d"]) -> Float[Tensor, "image row column c"]:
        return super().forward(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def spatial_norm(maps: Float[Tensor, "image row column c"]) -> Float[Tensor, "image row column c"]:
    """Takes most of each channel's mean over the image away and divides by its spread there: what is left is where
    things are (arXiv 2512.10794)."""
    spread, mean = torch.std_mean(maps, dim=(1, 2), correction=0, keepdim=True)
    return (maps - SPATIAL_NORM_GAMMA * mean) / (spread + 1e-6)


def distance(
    found: Float[Tensor, "*batch c"], wanted: Float[Tensor, "*batch c"], kind: Literal["smooth-l1", "l2", "cosine"]
) -> Float[Tensor, ""]:
    """Mean over everything: smooth-L1 (quadratic up to 1), squared difference, or one minus the cosine."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()
    return F.smooth_l1_loss(found, wanted) if kind == "smooth-l1" else F.mse_loss(found, wanted)
