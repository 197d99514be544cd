"""Compares our networks with tensors recorded from the official implementations, number by number.

    elvsm check FIXTURE.npz ...

Which network a fixture is of is told from the names of its weights. Prints the largest difference of every quantity
and exits with 1 where one exceeds its tolerance.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.geometry import CanonicalFrame, pinhole_directions, pluecker_rays
from elvsm_nerfstudio.nn.published_weights import from_published, load_published, published_config
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
        ValueError: for a fixture of an architecture that we do not have, or none at all.
    """
    recorded = {name: torch.from_numpy(value) for name, value in np.load(fixture).items()}
    missing = {"meta", "image", "c2w", "c2w_normalized", "fxfycxcy", "render"} - set(recorded)
    if missing:
        raise ValueError(f"{fixture} is not a recording of a network: it has no {', '.join(sorted(missing))}")
    height, width, num_context, _, *sizes = recorded["meta"].tolist()
    state = _part(recorded, "state/")
    try:
        config = published_config(state)
    except ValueError as error:
        raise ValueError(f"{fixture}: {error}") from None
    found = [config.width, config.head_dim, config.num_layers, config.patch_size]
    if found != sizes:
        raise ValueError(f"{fixture}: its weights are of sizes {found}, its meta says {sizes}")
    network = config.build()
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
    if "ray_o" in recorded:
        origins, directions = (recorded[name].permute(0, 2, 3, 1) for name in ("ray_o", "ray_d"))
        rays = pluecker_rays(canonical, views.directions)[0]
        check("ray moment", rays[..., :3], torch.linalg.cross(origins, directions))
        check("ray direction", rays[..., 3:], directions)

    render = network(context, target, frame)[0]
    check("render", render.detach(), recorded["render"].permute(0, 2, 3, 1))
    if "mse" in recorded:
        mse = (render - target.rgb[0]).square().mean()
        check("mse", mse.detach(), recorded["mse"])
        mse.backward()
        ours = dict(network.named_parameters())
        theirs, _ = from_published(_part(recorded, "grad/"))
        for name, gradient in theirs.items():
            largest = gradient.abs().max()
            check(f"gradient {name}", ours[name].grad / largest, gradient / largest, GRADIENT_TOLERANCE)

    with torch.no_grad():
        memory = None
        for count in range(1, num_context + 1):
            view = context.select([count - 1])
            memory = network.encode(view, frame) if memory is None else network.append(memory, view)
            name = f"render_incremental_{count}"
            if name in recorded:
                check(name, network.decode(memory, target)[0], recorded[name].permute(0, 2, 3, 1))
        check("render, view after view", network.decode(memory, target)[0], recorded["render"].permute(0, 2, 3, 1))
    return differences


def _part(recorded: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: x for name, x in recorded.items() if name.startswith(prefix)}


@dataclass
class CheckOptions:
    """Options."""

    fixtures: tyro.conf.Positional[tuple[Path, ...]]
    """.npz files; network and sizes are read from them."""


def main(args: list[str]) -> None:
    """Command line."""
    fixtures = parse(CheckOptions, "check", __doc__, args).fixtures
    if not fixtures:
        raise ValueError("no fixture given; expected .npz files with tensors recorded from the official code")
    ok = True
    for fixture in fixtures:
        differences = compare(fixture)
        print(fixture)
        for difference in differences:
            mark = "ok  " if difference.ok else "FAIL"
            print(f"  {mark} {difference.value:9.2e} (tolerance {difference.tolerance:.0e})  {difference.name}")
        ok = ok and all(difference.ok for difference in differences)
    if not ok:
        sys.exit(1)
