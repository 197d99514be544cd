"""Compares our network with tensors recorded from the official implementation, number by number.

    python scripts/check_parity.py FIXTURE.npz

Prints the largest difference of every quantity and exits with 1 where one exceeds its tolerance.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from elvsm_nerfstudio.geometry import CanonicalFrame, pinhole_directions, pluecker_rays
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.published_weights import from_published, load_published
from elvsm_nerfstudio.views import Views

RENDER_TOLERANCE = 1e-5
"""Absolute, on frames, rays and renders in fp32."""
GRADIENT_TOLERANCE = 1e-4
"""Relative to the largest entry of a gradient."""


@dataclass
class Difference:
    name: str
    value: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.value <= self.tolerance


def compare(fixture: Path) -> list[Difference]:
    """Every quantity that a fixture records, against ours.

    Raises:
        ValueError: for a fixture of another architecture, or none at all.
    """
    recorded = {name: torch.from_numpy(value) for name, value in np.load(fixture).items()}
    if "meta" not in recorded or "state/self_cross_blocks.0.cross_attn.to_q.weight" not in recorded:
        raise ValueError(
            f"{fixture} is not a recording of Efficient-LVSM: it has no meta or no cross-attention weights"
        )
    height, width, num_context, _, channels, head_dim, layers, patch = recorded["meta"].tolist()
    state = {name[len("state/") :]: x for name, x in recorded.items() if name.startswith("state/")}
    mlp_ratio = state["input_self_attn_blocks.0.mlp.mlp.0.weight"].shape[0] // channels
    network = EfficientLVSM(EfficientLVSMConfig(channels, layers, head_dim, patch, mlp_ratio))
    load_published(network, state)

    views = Views(
        camera_to_world=recorded["c2w"][None],
        directions=pinhole_directions(recorded["fxfycxcy"], height, width)[None],
        intrinsics=recorded["fxfycxcy"][None] / torch.tensor([width, height, width, height]),
        rgb=recorded["image"].permute(0, 2, 3, 1)[None],
    )
    context, target = views.select(slice(0, num_context)), views.select(slice(num_context, None))
    differences = []

    def check(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = RENDER_TOLERANCE) -> None:
        differences.append(Difference(name, (ours - theirs).abs().max().item(), tolerance))

    frame = CanonicalFrame.estimate(views.camera_to_world)
    canonical = frame.apply(views.camera_to_world)
    check("c2w_normalized", canonical[0], recorded["c2w_normalized"])
    origins = recorded["ray_o"].permute(0, 2, 3, 1)
    directions = recorded["ray_d"].permute(0, 2, 3, 1)
    rays = pluecker_rays(canonical, views.directions)[0]
    check("ray moment", rays[..., :3], torch.linalg.cross(origins, directions))
    check("ray direction", rays[..., 3:], directions)

    render = network(context, target, frame)[0]
    check("render", render.detach(), recorded["render"].permute(0, 2, 3, 1))
    mse = (render - target.rgb[0]).square().mean()
    check("mse", mse.detach(), recorded["mse"])

    mse.backward()
    ours = dict(network.named_parameters())
    theirs, _ = from_published({n[len("grad/") :]: x for n, x in recorded.items() if n.startswith("grad/")})
    for name, gradient in theirs.items():
        largest = gradient.abs().max()
        check(f"gradient {name}", ours[name].grad / largest, gradient / largest, GRADIENT_TOLERANCE)

    with torch.no_grad():
        memory = None
        for count in range(1, num_context + 1):
            view = network.encode(context.select([count - 1]), frame)
            memory = view if memory is None else memory.append(view)
            incremental = recorded[f"render_incremental_{count}"].permute(0, 2, 3, 1)
            check(f"render_incremental_{count}", network.decode(memory, target)[0], incremental)
    return differences


def main(fixture: tyro.conf.Positional[Path]) -> None:
    """Compares our network with a fixture recorded from the official implementation.

    Args:
        fixture: the .npz file; sizes are read from it.
    """
    try:
        differences = compare(fixture)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for difference in differences:
        mark = "ok  " if difference.ok else "FAIL"
        print(f"{mark} {difference.value:9.2e} (tolerance {difference.tolerance:.0e})  {difference.name}")
    if not all(difference.ok for difference in differences):
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
