"""Which rasterizer renders: gsplat's CUDA kernels, or ours where there are none."""

from __future__ import annotations

from typing import Literal

import torch

Backend = Literal["auto", "gsplat", "cpu"]


def choose_backend(wanted: Backend, device: torch.device | str) -> Literal["gsplat", "cpu"]:
    """The rasterizer for a device; 'auto' is gsplat on CUDA devices and ours on all others.

    gsplat builds its kernels when they are first asked for, which it is only where there is a GPU to run them.

    Raises:
        RuntimeError: where gsplat cannot render on this device. Nothing falls back to another rasterizer.
    """
    device = torch.device(device)
    if wanted == "cpu" or (wanted == "auto" and device.type != "cuda"):
        return "cpu"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(
            f"--pipeline.model.backend gsplat: found device {device}"
            f"{'' if torch.cuda.is_available() else ' and no working CUDA GPU'}; gsplat renders on CUDA alone. Use "
            "--pipeline.model.backend cpu, or --machine.device-type cuda on a machine that has one"
        )
    from gsplat.cuda._backend import _C

    if _C is None:
        raise RuntimeError(
            f"--pipeline.model.backend {wanted}: gsplat has no CUDA kernels here and cannot build them, for want of "
            "nvcc; install the CUDA toolkit, or use --pipeline.model.backend cpu"
        )
    return "gsplat"
