from __future__ import annotations

import pytest
import torch

from fedcast.errors import ModelError
from fedcast.models.architectures import build_model
from fedcast.models.backbones import Backbone, build_decoder, build_encoder
from fedcast.models.base import ModelConfig
from fedcast.models.layers import key_bias


def config(patch: int = 4, context: int = 96, width: int = 64, **settings: str) -> ModelConfig:
    return ModelConfig(width, 8, 2, 4, context, 12, patch, architecture="prototype", settings=tuple(settings.items()))


# Of the released classes at the paper's sizes (fedpm.md B.2), counted layer by layer.
RELEASED: list[tuple[Backbone, int, int]] = [
    ("transformer", 68_800, 199_936),
    ("cnn", 156_288, 344_512),
    ("fc", 16_896, 919_808),
    ("lstm", 610_688, 2_138_432),
    ("gru", 462_208, 1_612_096),
]


@pytest.mark.parametrize(("kind", "encoder", "decoder"), RELEASED)
def test_when_the_sizes_are_the_papers_then_so_are_the_numbers_of_parameters(kind: Backbone, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        parts = build_encoder(kind, config()), build_decoder(kind, config(), 4)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [encoder, decoder]


@pytest.mark.parametrize("patch", [4, 8, 12, 16])
def test_when_it_is_convolutional_then_there_is_a_token_a_patch_and_one_a_step_of_the_decoder(patch: int) -> None:
    shape = config(patch, 96, 16)
    encoder, decoder = build_encoder("cnn", shape), build_decoder("cnn", shape, 4)
    count = 96 // patch
    bias = key_bias(torch.ones(2, count, dtype=torch.bool), torch.float32)
    with torch.no_grad():
        assert encoder(torch.zeros(2, count, patch), bias).shape == (2, count, 16)
        assert decoder(torch.zeros(2, count, 16), bias).shape == (2, 96, 16)


def test_when_a_patch_has_no_strides_then_it_is_refused() -> None:
    with pytest.raises(ModelError, match="patches of 6 steps"):
        build_encoder("cnn", config(6))


@pytest.mark.parametrize("kind", ["cnn", "fc", "lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_it_is_trained_then_the_gradient_reaches_every_layer(kind: str, dtype: torch.dtype) -> None:
    net = build_model(config(4, 32, 16, backbone=kind)).to(dtype)
    context = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    net.normalised(context, torch.ones_like(context, dtype=torch.bool), 12).point.square().sum().backward()
    for part in (net.encoder, net.decoder):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
