"""The precision that a device computes in."""

from __future__ import annotations

from typing import Literal, Optional

import torch


def autocast_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> Optional[torch.dtype]:
    """The dtype for a transformer's autocast, or None for fp32. 'auto' takes bf16 where the device computes in it."""
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:
            precision = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
