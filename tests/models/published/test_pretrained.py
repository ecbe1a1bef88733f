"""What a checkpoint's folder must not be able to do, whatever stands in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedcast.errors import CheckpointError
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.published.chronos_bolt import ChronosBolt

pytest.importorskip("chronos")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ChronosBolt.tiny(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_when_weights_are_split_over_files_then_they_are_read(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    halves = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for name, keys in halves.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    before = load_checkpoint(folder).state_dict()
    weights.unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    after = load_checkpoint(folder).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_when_an_index_leads_out_of_the_folder_then_it_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    keys = list(safetensors.torch.load_file(weights))
    weights.rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, "../model.safetensors")}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_checkpoint(folder)


def test_when_an_adapter_lies_beside_the_model_then_it_is_not_put_into_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("key", "value"), [("attn_implementation", "someone/kernels"), ("quantization_config", {"quant_method": "any"})])
def test_when_a_configuration_asks_for_foreign_kernels_then_it_is_refused(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=key):
        load_checkpoint(folder)


def test_when_a_weight_is_no_number_then_it_is_named(folder: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(iter(state))
    state[name][(0,) * state[name].dim()] = float("nan")
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        load_checkpoint(folder)
