"""Linear probing."""

from __future__ import annotations

import pytest
import torch
from tests.tuned import MODELS, tiny, weights

from fedcast.errors import ModelError
from fedcast.models.contract import Model
from fedcast.tuning.head import Head


@pytest.mark.parametrize("name", MODELS)
def test_when_only_the_head_trains_then_it_keeps_its_weights_or_gets_those_of_a_new_model(name: str) -> None:
    before, new = weights(tiny(name)), weights(tiny(name).fresh(5))
    kept, drawn = Head().prepare(tiny(name), 5), Head(fresh=True).prepare(tiny(name), 5)
    heads = {parameter for parameter, _ in kept.named_parameters() if kept.head(parameter)}
    assert heads
    for model in (kept, drawn):
        assert {parameter for parameter, p in model.named_parameters() if p.requires_grad} == heads
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(kept).items())
    assert all(torch.equal(tensor, (new if key in heads else before)[key]) for key, tensor in weights(drawn).items())
    assert any(not torch.equal(new[key], before[key]) for key in heads)


def test_when_a_model_has_no_head_then_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Model = tiny("native")
    monkeypatch.setattr(model, "part", lambda name: f"encoder.{name}")
    with pytest.raises(ModelError, match="PatchTransformer has no forecasting head"):
        Head().prepare(model, 0)
