"""Runs one method on some scenes in a process of its own, for `elvsm compare`: its peak memory is its own, and
whatever it breaks, it breaks alone.

    python -m elvsm_nerfstudio.compare.worker JOBS.json
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Optional

import torch

from elvsm_nerfstudio.cameras import in_pixels
from elvsm_nerfstudio.compare.gaussians import Gaussians, Splatfacto
from elvsm_nerfstudio.compare.layout import Job, Layout, MethodSpec, Settings, compared_scene
from elvsm_nerfstudio.compare.methods import Baseline, Method, Network, SceneContext, device_to_use
from elvsm_nerfstudio.compare.path import path_through
from elvsm_nerfstudio.compare.scoring import frame_file
from elvsm_nerfstudio.data.datamanager import ViewSetDataManager
from elvsm_nerfstudio.evaluation.report import write_image, write_json
from elvsm_nerfstudio.nn.device_memory import resident_bytes


def load_method(spec: MethodSpec, settings: Settings, layout: Layout, device: torch.device) -> Method:
    """The method of a row, with its weights on the device."""
    if spec.kind == "baseline":
        return Baseline(spec.method)
    if spec.kind == "network":
        return Network(spec, settings, device)
    fitted = Gaussians if spec.kind == "gaussians" else Splatfacto
    return fitted(spec, settings, layout.fits(spec), device)


class Worker:
    """One method, loaded once, on scene after scene."""

    def __init__(self, settings: Settings, layout: Layout, spec: MethodSpec):
        self.settings, self.layout, self.spec = settings, layout, spec
        self.device = device_to_use()
        self.memory_before = resident_bytes("VmRSS")
        self._method: Optional[Method] = None
        self._datamanagers: dict[int, ViewSetDataManager] = {}

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, Any]:
        """Renders a scene's targets, writes them, and returns what it cost."""
        datamanager = self._datamanager(job.count)
        scene = compared_scene(datamanager, job.scene, job.count)
        context = SceneContext(job.scene, scene.views.context, self.layout.index(job.count), job.count)
        frames = datamanager.evaluation_index.choices[job.scene].target
        cameras = scene.cameras
        del scene  # the targets' pixels are nothing for a method to see, and no memory of its

        reset = self._reset_peak()
        if self._method is None:
            self._method = load_method(self.spec, self.settings, self.layout, self.device)
        with torch.enable_grad():
            prepared = self._method.prepare(context)
        (_, first_ms), *_ = prepared.render(cameras[:1])
        pictures, times = zip(*((picture.cpu(), ms) for picture, ms in prepared.render(cameras)))
        peak = max(self._peak(), prepared.child_peak_bytes)
        folder = self.layout.pictures(self.spec, job.count, job.scene, "target")
        for frame, picture in zip(frames, pictures):
            if not picture.isfinite().all():
                raise ValueError(f"frame {frame}: the picture has values that are not finite")
            write_image(folder / frame_file(frame), picture)
        if job.path_frames:
            folder = self.layout.pictures(self.spec, job.count, job.scene, "path")
            path = path_through(context.views, job.path_frames).to(self.device)
            if job.path_size is not None:
                path = in_pixels(path, *job.path_size)
            for i, (picture, _) in enumerate(prepared.render(path)):
                write_image(folder / frame_file(i), picture.cpu())
        return {
            "status": "done",
            "prepare_seconds": prepared.seconds,
            "first_picture_seconds": prepared.seconds + first_ms / 1e3,
            "render_ms": times,
            "frames_per_call": prepared.frames_per_call,
            "peak_bytes": peak,
            "peak_is_of_this_scene": reset,
            "memory_before_bytes": self.memory_before,
            "disk_bytes": prepared.disk_bytes,
            "facts": prepared.facts,
            "device": str(self.device),
            "load": os.getloadavg()[0],
        }

    def _datamanager(self, count: int) -> ViewSetDataManager:
        if count not in self._datamanagers:
            index = self.layout.index(count)
            self._datamanagers[count] = self.settings.datamanager(index, count, str(self.device))
        return self._datamanagers[count]

    def _reset_peak(self) -> bool:
        """Whether memory is measured from here on, or else since the process began."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what there is now
            return True
        except OSError:
            return False

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resident_bytes("VmHWM")
        if peak is None:
            raise RuntimeError("peak memory is measured through Linux's /proc, which is not there")
        return peak


def main() -> None:
    """Runs all jobs of a file; a scene that fails leaves its error, and the next follows."""
    content = json.loads(Path(sys.argv[1]).read_text())
    settings, spec = Settings(**content["settings"]), MethodSpec(**content["method"])
    layout = Layout(Path(content["root"]))
    worker = Worker(settings, layout, spec)
    for job in (Job(**job) for job in content["jobs"]):
        try:
            record = worker.run(job)
        except Exception as error:
            traceback.print_exc()
            record = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        about = {"method": spec.name, "scene": job.scene, "context_views": job.count}
        record |= {**about, "key": spec.key(), "path_frames": job.path_frames, "path_size": job.path_size}
        write_json(layout.record(spec, job.count, job.scene), record)


if __name__ == "__main__":
    main()
