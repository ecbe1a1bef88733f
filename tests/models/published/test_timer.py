"""Timer: features and forecasts as the authors' class gives them, and the tensor names of the published checkpoint."""

from __future__ import annotations

import pytest
import torch

from fedcast.models.published.timer import Timer

pytestmark = [
    pytest.mark.skipif(Timer.library.installed is None, reason="sktime is not installed"),
    # the authors' own forward pass, which the adapter does not use
    pytest.mark.filterwarnings("ignore:The attention mask API:FutureWarning"),
]


@pytest.fixture(scope="module")
def model() -> Timer:
    return Timer.tiny(0).eval()


def test_when_nothing_is_missing_then_the_forecast_is_the_authors(model: Timer) -> None:
    context = 4 + 2 * torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    # Their standard deviation has the sample's denominator, ours the population's.
    mean, deviation = context.mean(dim=1, keepdim=True), context.std(dim=1, correction=0, keepdim=True)
    with torch.inference_mode():
        own = model(context, torch.ones_like(context, dtype=torch.bool), 8)
        theirs = model.network((context - mean) / deviation, use_cache=False, return_dict=True).logits
    assert torch.allclose(own.point, theirs * deviation + mean, atol=1e-5)


def test_when_the_first_patches_are_missing_then_they_are_hidden(model: Timer) -> None:
    context = torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[:, :16] = False
    with torch.inference_mode():
        whole, rest = model(context, mask, 8), model(context[:, 16:], mask[:, 16:], 8)
    assert torch.allclose(whole.point, rest.point, atol=1e-5)


def test_when_the_published_shape_is_built_then_it_has_the_authors_tensors() -> None:
    published = {
        "model_type": "timer",
        "input_token_len": 96,
        "output_token_lens": [96],
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    assert Timer.recognises(published)
    with torch.device("meta"):
        model = Timer.drawn(published, 0)
    names = set(model.network.state_dict())
    assert {"model.embed_layer.emb.weight", "model.norm.weight", "lm_heads.0.weight"} < names
    assert {f"model.layers.7.self_attn.{part}_proj.weight" for part in "qkvo"} < names
    assert {f"model.layers.0.ffn_layer.{part}_proj.weight" for part in ("gate", "up", "down")} < names
    assert 84e6 < sum(parameter.numel() for parameter in model.parameters()) < 85e6
    assert (model.config.context, model.config.horizon, model.config.patch) == (2880, 96, 96)
