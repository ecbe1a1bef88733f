"""Batches of numbers that a test chooses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedcast.data.windows import Batch, Windows


def batch_of(values: Tensor, context: int, seen: Tensor | None = None) -> Batch:
    """Return values [N, context + horizon] as the batch that a store would give: zeros where not ``seen``, and each row a series."""
    seen = torch.ones_like(values, dtype=torch.bool) if seen is None else seen
    values = torch.where(seen, values, 0.0)
    places, labels = np.arange(len(values)), torch.zeros(len(values), dtype=torch.int64)
    return Batch(values[:, :context], seen[:, :context], values[:, context:], seen[:, context:], Windows(places, places), labels, labels)
