"""The methods of `elvsm compare` that optimise Gaussians for each scene, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.utils.eval_utils import eval_setup

from elvsm_nerfstudio.compare.layout import MethodSpec, Settings
from elvsm_nerfstudio.compare.methods import Prepared, SceneContext, one_by_one
from elvsm_nerfstudio.evaluation.report import write_image, write_json
from elvsm_nerfstudio.views import Views

GAUSSIANS = "splatfacto-sparse"
WITH_RENDERS = "splatfacto-lvsm"
SPLATFACTO = "splatfacto"
NUMPY_SCALARS = [np.dtype, np.dtypes.Float64DType, np.float64(0).__reduce__()[0]]
"""What nerfstudio's schedules leave in checkpoints, and torch reads on request only."""


class Gaussians:
    """gsplat's splatfacto on the context frames, optimised by ns-train in a process of its own."""

    def __init__(self, spec: MethodSpec, settings: Settings, folder: Path, device: torch.device):
        self._spec, self._settings, self._folder, self._device = spec, settings, folder, device

    def prepare(self, scene: SceneContext) -> Prepared:
        experiment = f"{scene.name}-{scene.count}_views"
        run = self._folder / experiment / self._spec.method / "run"
        command = self._command(scene, experiment)
        log = self._folder / f"{experiment}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"{' '.join(command)}\nended with status {status}:\n{log.read_text()[-2000:]}")
        fit = self._fit(run)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            _, pipeline, _, _ = eval_setup(run / "config.yml")
        # Nothing but what nerfstudio renders from: neither the optimiser's moments nor the images.
        kept = pipeline.model.gauss_params.values()
        return Prepared(
            render=one_by_one(self._device, lambda camera: pipeline.model.get_outputs_for_camera(camera)["rgb"]),
            seconds=sum(fit["seconds"].values()),
            disk_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept),
            child_peak_bytes=fit.get("peak_gpu_bytes", 0) if self._device.type == "cuda" else usage.ru_maxrss * 1024,
            facts={"fit": fit, "wall_seconds": wall, "command": command},
        )

    def _fit(self, run: Path) -> dict[str, Any]:
        return json.loads((run / "fit.json").read_text())

    def _command(self, scene: SceneContext, experiment: str) -> list[str]:
        settings, spec = self._settings, self._spec
        options = {
            "data": settings.data,
            "machine.device-type": self._device.type,
            "vis": "tensorboard",
            "output-dir": str(self._folder),
            "experiment-name": experiment,
            "timestamp": "run",
            "max-num-iterations": str(spec.iterations),
            "pipeline.model.backend": spec.backend,
            "pipeline.datamanager.scene": scene.name,
            "pipeline.datamanager.evaluation-index": str(scene.index),
            "pipeline.datamanager.background": settings.background,
            "pipeline.model.background-color": settings.background,
            **({} if spec.weights is None else {"pipeline.datamanager.weights": spec.weights}),
        }
        height, width = map(str, settings.image_size)
        return [
            str(Path(sys.executable).parent / "ns-train"),
            spec.method,
            *(part for name, value in options.items() for part in (f"--{name}", value)),
            *("--pipeline.datamanager.image-size", height, width),
            *(() if settings.dataparser is None else (settings.dataparser,)),
        ]


class Splatfacto(Gaussians):
    """nerfstudio's own splatfacto, on CUDA: its random points, densification and iterations.

    Only what would spoil small images on a plain background is set: they are not made smaller, and the background is
    theirs. It does not say how much memory its optimisation takes: peak memory is that of rendering.
    """

    def _command(self, scene: SceneContext, experiment: str) -> list[str]:
        folder = self._folder / f"{experiment}-photos"
        write_capture(folder, scene.views)
        options = {
            "data": str(folder),
            "vis": "tensorboard",
            "output-dir": str(self._folder),
            "experiment-name": experiment,
            "timestamp": "run",
            "max-num-iterations": str(self._spec.iterations),
            "steps-per-eval-image": "0",
            "steps-per-eval-all-images": "0",
            "pipeline.model.num-downscales": "0",
            "pipeline.model.background-color": self._settings.background,
        }
        # The cameras stay where they are: those of the targets are to fit.
        placed = {"orientation-method": "none", "center-method": "none", "auto-scale-poses": "False"}
        return [
            str(Path(sys.executable).parent / "ns-train"),
            SPLATFACTO,
            *(part for name, value in options.items() for part in (f"--{name}", value)),
            "nerfstudio-data",
            *(part for name, value in placed.items() for part in (f"--{name}", value)),
            *("--eval-mode", "all"),
        ]

    def _fit(self, run: Path) -> dict[str, Any]:
        """From the start of the training loop, when nerfstudio writes one file, to its last checkpoint."""
        checkpoint = max((run / "nerfstudio_models").glob("step-*.ckpt"))
        seconds = checkpoint.stat().st_mtime - (run / "dataparser_transforms.json").stat().st_mtime
        return {"backend": "gsplat", "iterations": self._spec.iterations, "seconds": {"optimisation": seconds}}


def write_capture(folder: Path, views: Views) -> None:
    """Writes one scene's photos and cameras in nerfstudio's format.

    Raises:
        ValueError: for cameras that are no pinholes, which splatfacto does not render.
    """
    height, width = views.height, views.width
    frames = []
    for i in range(views.num_views):
        fx, fy, cx, cy = (views.intrinsics[0, i].cpu() * torch.tensor([width, height] * 2)).tolist()
        x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
        directions = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x)], dim=-1)
        directions = torch.nn.functional.normalize(directions, dim=-1)
        if (directions - views.directions[0, i].cpu()).abs().max() > 1e-3:
            raise ValueError(
                f"{SPLATFACTO} renders pinhole cameras alone, and these have other lenses; take {GAUSSIANS}"
            )
        write_image(folder / "images" / f"{i:03d}.png", views.rgb[0, i])
        pose = views.camera_to_world[0, i].cpu().clone()
        pose[:3, 1:3] *= -1  # nerfstudio's axes: y up, z backwards
        lens = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": width, "h": height}
        frames.append({"file_path": f"images/{i:03d}.png", "transform_matrix": pose.tolist(), **lens})
    write_json(folder / "transforms.json", {"camera_model": "OPENCV", "frames": frames})
