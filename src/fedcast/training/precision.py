"""Which number format the forward and backward pass compute in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def resolve_precision(asked: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """Return the compute precision for this processor.

    ``"auto"`` gives bfloat16 only where the processor multiplies it natively (AVX512-BF16 or AMX): elsewhere it is emulated and
    slower than float32. Master weights, optimiser moments, losses and whatever travels stay float32 either way.
    """
    if asked != "auto":
        return asked
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the torch dtype of a precision."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
