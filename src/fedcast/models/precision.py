"""Number formats that a model forecasts in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from fedcast.errors import UnknownNameError

Precision = Literal["auto", "float32", "bfloat16"]


def native_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 by itself; where it is emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def forecast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the torch type of a precision; ``"auto"`` is bfloat16 where the device multiplies it by itself.

    Raises
    ------
    UnknownNameError
        When there is no such precision.
    """
    if precision not in get_args(Precision):
        raise UnknownNameError.of("precision", precision, get_args(Precision))
    if precision == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
