from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor, step


def test_when_steps_are_taken_quickly_then_every_variant_has_a_time_a_share_and_the_right_gradient(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.json"

    step.main(["--quick", "--output", str(path)])

    document = json.loads(path.read_text())
    row = document["rows"][0]
    names = {variant.name for variant in step.VARIANTS} - set(document["missing"])
    assert set(row["share"]) == set(row["gradient_error"]) == names
    assert min(row["ms"].values()) > 0
    assert row["gradient_error"]["plain PyTorch"] == 0
    # one patch of horizon: the queries of a batch are then one row of memory, which kernels must not take for several
    assert all(error < (0.05 if name.startswith("bfloat16") else 1e-4) for name, error in row["gradient_error"].items())
    printed = capsys.readouterr().out
    if step.NATIVE.name in names:
        assert set(step.GROUPS) < set(row["profile_ms"])
        assert all(milliseconds > 0 for group, milliseconds in row["profile_ms"].items() if group != "rest")
    else:
        assert "not run" in printed
    assert printed.count("| --- |") >= 2


def test_when_native_kernels_cannot_be_built_then_the_reason_stands_in_place_of_the_variant(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr("fedcast.kernels.library.supported", lambda: False)

    step.main(["--quick", "--output", str(path)])

    document = json.loads(path.read_text())
    assert list(document["missing"]) == [step.NATIVE.name]
    assert step.NATIVE.name not in document["rows"][0]["ms"]
    assert f"{step.NATIVE.name}: not run, {document['missing'][step.NATIVE.name]}" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["nano", "mini"])
def test_when_the_products_alone_run_then_torch_counts_those_of_the_linear_layers_of_all_blocks(size: str) -> None:
    config = floor.configuration(size, 64, 32)
    expected = sum(6 * times * rows * inner * columns for times, rows, inner, columns in step.products_of_blocks(config, 2))

    with FlopCounterMode(display=False) as counter:
        step.products_alone(config, 2, "float32")()

    assert counter.get_total_flops() == expected
    assert 0.7 < expected / floor.step(config, 2).products < 1


def test_when_a_format_is_routed_then_torch_multiplies_accordingly() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        step.route("float32, oneDNN")
        assert torch.get_float32_matmul_precision() == "medium"
        step.route("bfloat16")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
