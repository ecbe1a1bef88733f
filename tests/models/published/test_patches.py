"""Gaps, the pinball loss and the levels that adapters of patch models accept."""

from __future__ import annotations

import pytest
import torch

from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES
from fedcast.models.published.patches import check_nine, in_patches, interpolated, pinball


def test_when_values_are_missing_then_gaps_are_filled_linearly_and_ends_by_the_nearest_value() -> None:
    values = torch.tensor([[9.0, 1.0, 9.0, 9.0, 4.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]])
    mask = torch.tensor([[False, True, False, False, True, False], [False] * 6, [True] * 6])
    filled = interpolated(values, mask)
    assert torch.allclose(filled[0], torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 4.0]))
    assert torch.equal(filled[1], torch.zeros(6))
    assert torch.equal(filled[2], values[2])


def test_when_a_target_lies_above_a_quantile_then_the_error_counts_with_its_level() -> None:
    quantiles = torch.tensor([[[0.0, 0.0]]])
    assert pinball(quantiles, torch.tensor([[2.0]]), [0.1, 0.9]).item() == pytest.approx((0.2 + 1.8) / 2)
    assert pinball(quantiles, torch.tensor([[-2.0]]), [0.1, 0.3]).item() == pytest.approx((1.8 + 1.4) / 2)


def test_when_values_are_cut_then_patches_keep_their_order_even_without_rows() -> None:
    assert torch.equal(in_patches(torch.arange(6.0)[None], 3), torch.tensor([[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]))
    assert in_patches(torch.zeros(0, 6), 3).shape == (0, 2, 3)


def test_when_a_checkpoint_learnt_other_levels_then_it_is_refused() -> None:
    check_nine(QUANTILES)
    with pytest.raises(CheckpointError, match=r"0\.05, 0\.5"):
        check_nine([0.05, 0.5])
