"""Low-rank adaptation: which maps are adapted, and the adapter as other tools read it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tuned import forecast, tiny, train

from fedcast.errors import MissingExtraError, ModelError
from fedcast.models.architectures.trend import TrendTransformer
from fedcast.models.base import ModelConfig
from fedcast.models.contract import Model
from fedcast.models.published.base import Published
from fedcast.spec import TuningSpec
from fedcast.tuning.base import build_tuning
from fedcast.tuning.lora import LoRA

SEED = 11


@pytest.fixture(autouse=True)
def peft() -> None:
    """Skip everything here without peft."""
    pytest.importorskip("peft")


def trained(model: Model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_when_a_native_model_is_adapted_then_the_inputs_of_its_attention_are() -> None:
    model = LoRA(rank=2).prepare(tiny("native"), SEED)
    maps = ["encoder.blocks.0.qkv", "encoder.blocks.1.qkv", "decoder.blocks.0.query", "decoder.blocks.0.kv"]
    assert trained(model) == {f"{name}.lora_{part}.default.weight" for name in maps for part in "AB"}
    assert model.get_parameter("encoder.blocks.0.qkv.lora_A.default.weight").shape == (2, 16)
    assert torch.equal(
        model.get_parameter("encoder.blocks.0.qkv.base_layer.weight"), tiny("native").get_parameter("encoder.blocks.0.qkv.weight")
    )


def test_when_targets_are_named_then_those_are_adapted_and_seeds_differ() -> None:
    tuning = build_tuning(TuningSpec(name="lora", options={"targets": ["feed_forward.out"], "rank": 3, "alpha": 6}))
    one, two = tuning.prepare(tiny("native"), 1), tuning.prepare(tiny("native"), 2)
    assert len(trained(one)) == 2 * 3
    assert all(".feed_forward.out.lora_" in name for name in trained(one))
    name = "encoder.blocks.0.feed_forward.out.lora_A.default.weight"
    assert not torch.equal(one.get_parameter(name), two.get_parameter(name))


def test_when_every_linear_map_and_the_head_train_then_the_head_trains_as_it_is() -> None:
    model = LoRA(targets=("all-linear",), head=True).prepare(tiny("native"), SEED)
    heads = {name for name, _ in tiny("native").named_parameters() if name.startswith("heads.")}
    assert heads < trained(model)
    assert not any("lora" in name for name in trained(model) if name.startswith("heads."))
    assert "encoder.embedding.skip.lora_A.default.weight" in trained(model)


def test_when_no_map_has_the_name_then_those_that_could_be_adapted_are_named() -> None:
    with pytest.raises(ModelError, match="no linear map of PatchTransformer is named q_proj") as caught:
        LoRA(targets=("q_proj",)).prepare(tiny("native"), SEED)
    assert "hidden, kv, out, point" in caught.value.hint


def test_when_peft_is_missing_then_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="pip install peft"):
        LoRA().prepare(tiny("native"), SEED)


def test_when_a_map_is_read_in_parts_then_its_adapter_is_not_left_out() -> None:
    config = ModelConfig(16, 2, 1, 1, context=32, horizon=8, patch=8, architecture="trend")
    model = LoRA(targets=("decoder.out",)).prepare(TrendTransformer(config, 0), SEED)
    before = forecast(model)
    train(model, steps=1)
    assert not torch.equal(forecast(model), before)
    assert torch.allclose(forecast(LoRA().plain(model)), forecast(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("head", [False, True])
def test_when_a_published_model_is_saved_then_peft_puts_the_adapter_onto_the_librarys_own(head: bool, tmp_path: Path) -> None:
    tuning = LoRA(rank=2, alpha=4.0, head=head)
    base = tiny("chronos-bolt")
    assert isinstance(base, Published)
    library = copy.deepcopy(base.network)
    model = tuning.prepare(base, SEED)
    train(model)
    tuning.save(model, tmp_path / "model")

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(library, tmp_path / "model" / "adapter")
    again = tiny("chronos-bolt")
    again.network = adapted.get_base_model()
    assert torch.equal(forecast(again), forecast(model))
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["inference_mode"]) == ("LORA", 2, True)
    # A frozen copy, such as one that only forecasts, is written alike.
    tuning.save(copy.deepcopy(model).requires_grad_(False), tmp_path / "frozen")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "frozen" / "adapter" / file).read_bytes() == (tmp_path / "model" / "adapter" / file).read_bytes()
    weights = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_when_a_tuned_model_is_made_plain_then_it_goes_on_training_as_it_was() -> None:
    tuning = LoRA()
    model = tuning.prepare(tiny("native"), SEED)
    train(model)
    names = trained(model)
    plain = tuning.plain(model)
    assert trained(model) == names
    assert trained(plain) == {name for name, _ in tiny("native").named_parameters()}
    name = "encoder.blocks.0.qkv.weight"
    assert not torch.equal(plain.get_parameter(name), tiny("native").get_parameter(name))
