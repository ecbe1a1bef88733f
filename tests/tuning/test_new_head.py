from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcast.errors import SpecError, UnknownNameError
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.patch import PatchTransformer
from fedcast.models.reheaded import Reheaded
from fedcast.spec import TuningSpec
from fedcast.tuning.base import build_tuning
from fedcast.tuning.new_head import NewHead

CONFIG = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)


@pytest.mark.parametrize(("kind", "weights"), [("flatten", 8 * 16 * 24 + 24), ("depthwise", 16 * 4 + 4 * 17 + 24 * (8 * 4 + 1))])
def test_when_a_model_gets_a_new_head_then_the_head_alone_trains(kind: str, weights: int, tmp_path: Path) -> None:
    tuning = build_tuning(TuningSpec(name="new_head", options={"kind": kind, "width": 4, "horizon": 24}))
    model = tuning.prepare(PatchTransformer(CONFIG, seed=1), seed=2)
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains
    assert all(model.head(name) for name in trains)
    assert sum(parameter.numel() for parameter in trains.values()) == weights
    tuning.save(model, tmp_path / "model")
    read = load_checkpoint(tmp_path / "model")
    values, mask = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 64, dtype=torch.bool)
    assert isinstance(read, Reheaded)
    assert torch.equal(read(values, mask, 24).point, model(values, mask, 24).point)


def test_when_a_model_is_prepared_twice_then_the_seed_alone_decides() -> None:
    one, same, other = (NewHead().prepare(PatchTransformer(CONFIG, seed=1), seed).state_dict() for seed in (2, 2, 3))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["network.out.weight"], other["network.out.weight"])


def test_when_a_shorter_context_is_asked_for_then_the_head_reads_that() -> None:
    model = NewHead(context=24).prepare(PatchTransformer(CONFIG), 0)
    assert model.config.context == 24
    assert model.config.tokens == 3


def test_when_an_option_is_unknown_or_refused_then_it_is_named() -> None:
    with pytest.raises(UnknownNameError, match="kinds"):
        build_tuning(TuningSpec(name="new_head", options={"kinds": "flatten"}))
    with pytest.raises(SpecError, match=r"tuning\.width"):
        build_tuning(TuningSpec(name="new_head", options={"width": 0}))
