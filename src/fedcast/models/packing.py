"""Packing: windows that use few of their patches share rows of the encoder's batch, instead of each being padded to the longest.

A patch without an observed point is no attention key, and its features count nowhere, so it need not be encoded at all. Rows are
filled by first-fit decreasing; tokens of different windows in a row do not see each other, and each keeps its own position, so the
features are those of the padded batch. Shapes: B windows, N patches a window, R rows, W slots a row, T used patches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcast.models.layers import exclude

WORTHWHILE = 0.9
"""Packing is used when it leaves at most this share of the tokens; above it, moving them costs as much as is saved."""

_Ints = NDArray[np.int64]


class Packing(NamedTuple):
    """Where the used patches of a batch of windows lie.

    Attributes
    ----------
    rows
        int64 [B]: the row that holds the patches of a window, side by side and in order.
    source
        int64 [R, W]: the patch in each slot, counted through the batch (``window * N + patch``); 0 in a free slot.
    owner
        int64 [R, W]: the window of each slot, -1 where it is free.
    slots, patches
        int64 [T] each: the slots that are taken, counted through the rows, and the patches in them, counted through the batch.
    """

    rows: Tensor
    source: Tensor
    owner: Tensor
    slots: Tensor
    patches: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Bring [B, N, c] into rows [R, W, c]; what stands in a free slot has no meaning."""
        return x.flatten(0, 1).index_select(0, self.source.flatten()).view(*self.source.shape, -1)

    def restore(self, x: Tensor, count: int) -> Tensor:
        """Bring rows [R, W, c] back to windows of ``count`` patches [B, N, c], zeros where a patch is not used."""
        taken = x.flatten(0, 1).index_select(0, self.slots)
        empty = x.new_zeros(len(self.rows) * count, x.shape[-1])
        return empty.index_copy(0, self.patches, taken).view(len(self.rows), count, -1)

    def own_bias(self, dtype: torch.dtype) -> Tensor:
        """Return the additive attention mask [R, 1, W, W] within which a token sees its own window only."""
        return exclude(self.owner[:, :, None] != self.owner[:, None, :], dtype)[:, None]

    def window_bias(self, dtype: torch.dtype) -> Tensor:
        """Return the additive attention mask [B, 1, 1, W] of each window over the slots of its row."""
        own = torch.arange(len(self.rows))[:, None]
        return exclude(self.owner.index_select(0, self.rows) != own, dtype)[:, None, None]


def arrange(mask: Tensor) -> tuple[int, Packing | None]:
    """Return how many of the last patches a batch needs, and how to pack them where that saves enough.

    A window without any observed point uses all of its patches. On another device than the CPU nothing is left out, since reading the
    mask would make the host wait for the device in every step; nor in compiled code, which is compiled for one shape.

    Parameters
    ----------
    mask
        bool [B, N], True where a patch has an observed point.
    """
    count = mask.shape[1]
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or bool(mask.all()):
        return count, None
    used: NDArray[np.bool_] = (mask | mask.any(dim=1, keepdim=True).logical_not()).numpy()
    width = count - int(used.any(axis=0).argmax())
    lengths = used.sum(axis=1)
    limit = WORTHWHILE * len(lengths) * width
    if lengths.sum() > limit:
        return width, None
    slots = int(lengths.max())
    row, start = first_fit(lengths, slots)
    rows = int(row.max()) + 1
    return width, pack(used, row, start, (rows, slots)) if rows * slots <= limit else None


def first_fit(lengths: _Ints, width: int) -> tuple[_Ints, _Ints]:
    """Place pieces into rows by first-fit decreasing (Johnson, 1973: at most 11/9 of the fewest rows, and one).

    Parameters
    ----------
    lengths
        int [B], from 1 to ``width``.
    width
        Length of a row.

    Returns
    -------
    tuple
        Row and start of each piece, int64 [B] each; rows are numbered from 0 without gaps.
    """
    free = np.full(len(lengths), width)
    row, start = np.empty((2, len(lengths)), dtype=np.int64)
    for piece in np.argsort(-lengths, kind="stable"):
        first = (free >= lengths[piece]).argmax()
        row[piece], start[piece] = first, width - free[first]
        free[first] -= lengths[piece]
    return row, start


def pack(used: NDArray[np.bool_], row: _Ints, start: _Ints, shape: tuple[int, int]) -> Packing:
    """Lay the used patches [B, N] of each window into its row, from its start on; ``shape`` is (R, W)."""
    patches = np.flatnonzero(used)
    window = patches // used.shape[1]
    lengths = used.sum(axis=1)
    before = np.cumsum(lengths) - lengths
    slots = (row * shape[1] + start - before)[window] + np.arange(len(patches))
    source, owner = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
    source.flat[slots], owner.flat[slots] = patches, window
    return Packing(*(torch.from_numpy(part) for part in (row, source, owner, slots, patches)))
