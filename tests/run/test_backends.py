"""Whole runs by device, by library of float32 products, and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federations import small_spec, train_small

from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec, TrainingSpec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
# oneDNN's float32 products are exact only where the processor has no AMX.
AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
FLEETS = [("threads",), pytest.param(("threads", "processes"), marks=pytest.mark.slow)]


def trained(spec: RunSpec, **training: object) -> RunSpec:
    # Through validation, since these values are the subject here.
    return spec.model_copy(update={"training": TrainingSpec.model_validate({**spec.training.model_dump(), **training})})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["fedavg", "fedtrl"])
def test_when_training_on_a_device_then_it_learns_as_on_the_cpu(method: str, device: str, tmp_path: Path) -> None:
    run = train_small(trained(small_spec(method), device=device), tmp_path / device)
    assert json.loads((run.folder / "run.json").read_text())["device"] == device
    reference = train_small(trained(small_spec(method), device="cpu"), tmp_path / "reference")
    losses, expected = ([row["mean"] for row in run_.rows("validation")] for run_ in (run, reference))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert run.results().mse.tolist() == pytest.approx(reference.results().mse.tolist(), rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_when_a_run_on_a_device_is_resumed_then_private_weights_and_moments_come_back(device: str, tmp_path: Path) -> None:
    spec = trained(small_spec("fedtrl"), device=device)
    whole = train_small(spec, tmp_path / "whole")
    cut = train_small(spec, tmp_path / "cut")
    (cut.folder / "results.parquet").unlink()
    for path in cut.folder.glob("checkpoints/round-000003/*"):
        path.unlink()
    again = train_small(spec, tmp_path / "cut")
    last = [row["mean"] for row in again.rows("validation")][-1]
    assert last == pytest.approx([row["mean"] for row in whole.rows("validation")][-1], rel=1e-6 if device == "cpu" else 1e-3)


@pytest.mark.skipif(AMX, reason="oneDNN multiplies float32 in bfloat16 on this processor")
@pytest.mark.parametrize("fleets", FLEETS, ids="+".join)
def test_when_products_go_through_onednn_then_fleets_agree_and_the_loss_stays(fleets: tuple[str, ...], tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    runs = {
        fleet: train_small(trained(small_spec("fedavg", rounds=2, fleet=fleet), products="onednn"), tmp_path / fleet) for fleet in fleets
    }
    assert torch.get_float32_matmul_precision() == before
    hashes = {run.results().weights_sha256.iloc[0] for run in runs.values()}
    assert len(hashes) == 1
    default = train_small(small_spec("fedavg", rounds=2), tmp_path / "default")
    assert default.results().weights_sha256.iloc[0] not in hashes
    losses, expected = ([row["mean"] for row in run.rows("validation")] for run in (runs["threads"], default))
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("fleets", FLEETS, ids="+".join)
def test_when_kernels_are_native_then_fleets_agree_a_cut_run_resumes_and_the_loss_stays(fleets: tuple[str, ...], tmp_path: Path) -> None:
    def native(**changes: Any) -> RunSpec:
        return trained(small_spec("fedtrl", rounds=2, **changes), precision="bfloat16", kernels="native")

    runs = {fleet: train_small(native(fleet=fleet), tmp_path / fleet) for fleet in fleets}
    hashes = {run.results().weights_sha256.iloc[0] for run in runs.values()}
    assert len(hashes) == 1
    losses = [row["mean"] for row in runs["threads"].rows("validation")]
    cut = runs[fleets[-1]]
    (cut.folder / "results.parquet").unlink()
    for path in cut.folder.glob("checkpoints/round-000002/*"):
        path.unlink()
    assert set(train_small(native(), tmp_path / fleets[-1]).results().weights_sha256) == hashes
    torch_kernels = train_small(trained(small_spec("fedtrl", rounds=2), precision="bfloat16", kernels="torch"), tmp_path / "torch")
    assert set(torch_kernels.results().weights_sha256) != hashes
    assert losses == pytest.approx([row["mean"] for row in torch_kernels.rows("validation")], rel=2e-2)


def test_when_a_run_is_older_than_the_choice_of_products_then_it_resumes_as_it_began(tmp_path: Path) -> None:
    spec = trained(small_spec("fedavg", rounds=2), products="auto", kernels="auto", device="auto")
    begun = train_small(trained(spec, products="default", kernels="torch", device="cpu"), tmp_path / "begun")
    old = tmp_path / "old"
    old.mkdir()
    (old / "spec.toml").write_text(spec.to_toml())
    about = json.loads((begun.folder / "run.json").read_text())
    about["spec_fingerprint"] = spec.fingerprint()
    (old / "run.json").write_text(json.dumps({key: value for key, value in about.items() if key not in ("products", "kernels", "device")}))
    resumed = pretrain(spec, output=old)
    assert resumed.results().weights_sha256.iloc[0] == begun.results().weights_sha256.iloc[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns about itself
def test_when_compiling_then_it_happens_once_for_all_threads_and_the_loss_stays(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    run = train_small(trained(small_spec("fedtrl"), compile=True), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 3  # encoder, decoder, heads
    seconds = [site["compile_seconds"] for row in run.rows("round") for site in row["sites"].values()]
    assert max(seconds) > 0.5
    assert sorted(seconds)[-2] < max(seconds) / 2
    eager = train_small(small_spec("fedtrl"), tmp_path / "eager")
    losses, expected = ([row["mean"] for row in run_.rows("validation")] for run_ in (run, eager))
    assert losses == pytest.approx(expected, rel=1e-3)
