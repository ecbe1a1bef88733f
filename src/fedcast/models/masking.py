"""Which patches of a window a masked reconstructor does not see."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_mask(usable: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a share of each window's usable patches, chosen uniformly.

    Of n usable patches ``ratio * n`` are hidden, rounded, but at least one and at most ``n - 1``; of one patch alone, none.

    Parameters
    ----------
    usable
        bool [B, N]: True where a patch has an observed point.
    ratio
        Share to hide, from 0 to 1.
    generator
        The only source of randomness, on the CPU. Generators of one seed hide alike patches in the windows that two batches of the same
        number of windows have in common.

    Returns
    -------
    Tensor
        bool [B, N], True where hidden, on the device of ``usable``.
    """
    order = torch.rand(usable.shape, generator=generator).to(usable.device).masked_fill(usable.logical_not(), 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)
    count = usable.sum(dim=1, keepdim=True)
    hidden = (ratio * count).round().clamp_min(1).minimum(count - 1)
    return rank < hidden


def spread(patches: Tensor, patch: int) -> Tensor:
    """Return flags of patches [B, N] as flags of their points [B, N * patch]."""
    return patches.repeat_interleave(patch, dim=1)


def observed_patches(mask: Tensor, patch: int) -> Tensor:
    """Return bool [B, N]: which patches have an observed point, from ``mask`` bool [B, N * patch]."""
    return mask.view(len(mask), -1, patch).any(dim=-1)
