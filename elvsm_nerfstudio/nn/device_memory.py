"""How much memory a device has left, asked before much of it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import torch


class NotEnoughMemoryError(MemoryError):
    """Something would not fit; nothing has been allocated or computed for it yet."""


def available_bytes(device: torch.device) -> Optional[int]:
    """Bytes that can still be allocated on a device; None where there is no telling.

    CUDA: what the driver calls free, and what PyTorch holds without using it. CPU: Linux's MemAvailable, which knows
    nothing of a container's limit.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def require_bytes(needed: int, device: torch.device, purpose: str) -> None:
    """Raises NotEnoughMemoryError, with both numbers, where fewer bytes are available than needed."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise NotEnoughMemoryError(
            f"{purpose}: {_readable(needed)} needed on {device}, {_readable(available)} available"
        )


def _readable(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB ({count} bytes)"
