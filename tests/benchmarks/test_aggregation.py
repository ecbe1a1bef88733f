from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import aggregation
from fedcast.training.aggregate import Vectors, median, pairwise_cosines, trimmed_mean


@pytest.fixture(scope="module")
def replies() -> aggregation.Replies:
    return aggregation.Replies("nano", 20)


def flat(replies: aggregation.Replies, named: dict[str, torch.Tensor]) -> torch.Tensor:
    return replies.layout.flatten(named)


def test_when_means_are_compared_then_all_of_them_are_the_same_mean(replies: aggregation.Replies) -> None:
    expected = np.average(replies.matrix.double().numpy(), axis=0, weights=replies.samples)
    named = [aggregation.pfllib(replies), aggregation.fedml(replies)]
    named += [dict(zip(replies.layout.names, aggregation.foreach(replies), strict=True))]
    named += [dict(zip(replies.layout.names, map(torch.from_numpy, aggregation.flower(replies)), strict=True))]
    found = [aggregation.streamed(replies), aggregation.plain_stream(replies), *(flat(replies, mean) for mean in named)]
    for mean in found:
        np.testing.assert_allclose(mean.numpy(), expected, atol=1e-6)


def test_when_rules_are_compared_then_they_agree(replies: aggregation.Replies) -> None:
    rows = Vectors(replies.vectors)
    trimmed = trimmed_mean(rows, aggregation.SHARE)
    for rule in (aggregation.trim_sorted, aggregation.trim_topk):
        assert torch.allclose(flat(replies, aggregation.by_key(replies, rule)), trimmed, atol=1e-6)
    ours = median(rows)
    assert bool((flat(replies, aggregation.by_key(replies, lambda stacked: stacked.median(dim=0).values)) <= ours).all())
    cosines = pairwise_cosines(rows)
    first, second = torch.triu_indices(20, 20, offset=1)
    assert torch.allclose(torch.tensor(aggregation.pair_loop(replies), dtype=torch.float64), cosines[first, second], atol=1e-5)
    assert torch.allclose(aggregation.sketched(replies), cosines, atol=0.03)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
def test_when_the_script_runs_quickly_then_it_prints_tables_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    aggregation.main(["--quick", "--clients", "3", "--folder", str(tmp_path), "--output", str(path)])
    assert capsys.readouterr().out.count("| --- |") >= 3
    found = json.loads(path.read_text())
    assert [len(found[part]) for part in ("means", "rules", "memory")] == [10, 10, 3]
    assert all(row["seconds"] > 0 for part in ("means", "rules", "memory") for row in found[part])
