"""Models are read from folders, run folders and the hub's cache; what is none is refused with a next step."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from fedcast.errors import CheckpointError, MissingExtraError
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint, locate, recognise, weights_digest
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import Library
from fedcast.models.published.chronos_bolt import ChronosBolt

NAME = "amazon/chronos-bolt-tiny"
NATIVE = ModelConfig(d_model=8, n_heads=2, encoder_layers=1, decoder_layers=1, context=16, horizon=4, patch=4)
needs_chronos = pytest.mark.skipif(ChronosBolt.library.installed is None, reason="chronos-forecasting is not installed")


@pytest.fixture(scope="module")
def bolt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bolt")
    ChronosBolt.tiny(0).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def keep(hub: Path, source: Path, revision: str, branch: str = "main") -> Path:
    """Lay a checkpoint into the cache as the hub's client does."""
    snapshot = hub / "models--amazon--chronos-bolt-tiny" / "snapshots" / revision
    shutil.copytree(source, snapshot)
    ref = hub / "models--amazon--chronos-bolt-tiny" / "refs" / branch
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(revision)
    return snapshot


@needs_chronos
def test_when_a_checkpoint_is_in_the_hubs_cache_then_its_name_loads_it_without_a_network(hub: Path, bolt: Path, tmp_path: Path) -> None:
    snapshot = keep(hub, bolt, "a" * 40)
    assert locate(NAME) == snapshot
    values = torch.arange(64.0).expand(2, -1)
    forecasts = [load_checkpoint(place).eval()(values, torch.ones_like(values).bool(), 5) for place in (NAME, bolt)]
    assert torch.equal(forecasts[0].quantiles, forecasts[1].quantiles)
    ChronosBolt.tiny(1).save_pretrained(tmp_path / "other")
    keep(hub, tmp_path / "other", "b" * 40, "second")
    assert locate(f"{NAME}@second").name == "b" * 40
    assert weights_digest(f"{NAME}@second") != weights_digest(NAME) == weights_digest(bolt)


@pytest.mark.usefixtures("hub")
def test_when_there_is_no_network_then_a_name_of_the_hub_is_refused_at_once_with_a_way_out() -> None:
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"no folder {NAME}, and the checkpoint cannot be had") as caught:
        load_checkpoint(NAME)
    assert time.perf_counter() - begin < 5
    assert f"hf download {NAME} --local-dir" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "name", ["", "nowhere", "./here", "../here/there", "/abs", "/abs/olute", "owner/name/more", "owner/", "a b/c", "owner/..x"]
)
def test_when_a_checkpoint_is_neither_a_folder_nor_a_name_then_it_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        locate(name or "no such folder")
    assert caught.value.hint


def test_when_a_file_is_given_then_it_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint at runs/model\.safetensors"):
        locate("runs/model.safetensors")


def test_when_a_folder_is_given_then_it_or_its_final_model_is_read(tmp_path: Path) -> None:
    PatchTransformer(NATIVE).save_pretrained(tmp_path / "run" / "final")
    assert locate(tmp_path / "run") == locate(tmp_path / "run" / "final") == tmp_path / "run" / "final"
    assert recognise(tmp_path / "run" / "final") is None
    assert isinstance(load_checkpoint(str(tmp_path / "run")), PatchTransformer)


def test_when_a_folder_holds_a_model_a_site_then_one_must_be_named(tmp_path: Path) -> None:
    for site in ("north", "south"):
        PatchTransformer(NATIVE).save_pretrained(tmp_path / site)
    with pytest.raises(CheckpointError, match="one model a site: north, south") as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path / "north") in caught.value.hint


@pytest.mark.parametrize("config", [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "bert"}, {"some": "thing"}])
def test_when_no_family_knows_a_configuration_then_it_is_refused_by_name(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no adapter for") as caught:
        load_checkpoint(tmp_path)
    assert "fedcast models" in caught.value.hint
    assert str(next(iter(config.values()))) in caught.value.message or "some" in config


@pytest.mark.parametrize("content", [None, "", "[]", "{", "{}"])
def test_when_no_configuration_can_be_read_then_the_folder_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


@needs_chronos
def test_when_a_models_library_is_not_installed_then_the_command_is_named(bolt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChronosBolt, "library", Library("chronos-forecasting", "no_such_module", "pip install chronos-forecasting"))
    with pytest.raises(MissingExtraError, match="chronos-bolt need the library chronos-forecasting") as caught:
        load_checkpoint(bolt)
    assert caught.value.hint == "pip install chronos-forecasting"


def test_when_a_byte_of_the_weights_changes_then_the_digest_does(tmp_path: Path) -> None:
    PatchTransformer(NATIVE).save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("not part of the model")
    before = weights_digest(tmp_path / "model")
    assert weights_digest(tmp_path / "copy") == before
    weights = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(weights)
    assert weights_digest(tmp_path / "copy") != before
