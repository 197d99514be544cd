"""How much memory a device has left, asked before much of it is taken, and how much a process holds."""

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
        return _kilobytes(meminfo, "MemAvailable")
    return None


def resident_bytes(field: str) -> Optional[int]:
    """A line of Linux's /proc/self/status in bytes: VmRSS, resident memory now, or VmHWM, its peak; None elsewhere."""
    status = Path("/proc/self/status")
    return _kilobytes(status, field) if status.exists() else None


def require_bytes(needed: int, device: torch.device, purpose: str) -> None:
    """Raises NotEnoughMemoryError, with both numbers, where fewer bytes are available than needed."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise NotEnoughMemoryError(
            f"{purpose}: {_readable(needed)} needed on {device}, {_readable(available)} available"
        )


def _kilobytes(file: Path, field: str) -> Optional[int]:
    """The line "field:   N kB" of one of Linux's files, in bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _readable(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB ({count} bytes)"
