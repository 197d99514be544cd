"""Times that wait for the device, and the name of what computes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch

T = TypeVar("T")


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
    """What a run gives, and its milliseconds to the end of what it started on the device."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return result, (time.perf_counter() - start) * 1e3


def milliseconds(device: torch.device, run: Callable[[], Any]) -> float:
    """The time alone of ``timed``."""
    return timed(device, run)[1]


def processor(device: torch.device) -> str:
    """What computes, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What measured something, for its record."""
    return {"processor": processor(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 5090": 209, "RTX 4090": 165}
"""Of dense matrix products in bf16, by what the card's name contains, as its maker states it; of RTX cards with sums in
fp32."""


def peak_flops(device: torch.device) -> Optional[float]:
    """FLOP/s that a GPU can reach in bf16; None where that is not known."""
    name = processor(device)
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
