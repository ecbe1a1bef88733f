from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.models.masking import observed_patches, patch_mask, spread


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(1, 24), st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_when_patches_are_hidden_then_each_window_has_its_share_and_only_of_usable_ones(
    windows: int, patches: int, ratio: float, seed: int
) -> None:
    usable = torch.rand(windows, patches, generator=generator(seed)) < 0.8
    hidden = patch_mask(usable, ratio, generator(seed))
    assert not (hidden & ~usable).any()
    for count, found in zip(usable.sum(1).tolist(), hidden.sum(1).tolist(), strict=True):
        assert found == (min(max(round(ratio * count), 1), count - 1) if count > 1 else 0)


def test_when_the_seed_is_the_same_then_so_is_the_mask_and_every_patch_is_hidden_as_often() -> None:
    usable = torch.ones(4000, 20, dtype=torch.bool)
    hidden = patch_mask(usable, 0.75, generator(3))
    assert torch.equal(hidden, patch_mask(usable, 0.75, generator(3)))
    assert not torch.equal(hidden, patch_mask(usable, 0.75, generator(4)))
    assert (hidden.float().mean(0) - 0.75).abs().max() < 0.03


def test_when_flags_are_spread_then_they_cover_their_points_and_back() -> None:
    flags = torch.tensor([[True, False, True]])
    points = spread(flags, 2)
    assert points.tolist() == [[True, True, False, False, True, True]]
    assert torch.equal(observed_patches(points, 2), flags)
