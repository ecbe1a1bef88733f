"""The native blocks against the torch blocks, outputs and gradients, with float32 as the reference."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcast.kernels.blocks import fits
from fedcast.models.base import SIZES, ModelConfig
from fedcast.models.layers import DecoderBlock, EncoderBlock, key_bias, rotary_table
from fedcast.models.patch import PatchTransformer
from fedcast.tasks.forecast import ForecastTask

pytestmark = pytest.mark.usefixtures("compiled")


class _Case(NamedTuple):
    encoder: EncoderBlock
    decoder: DecoderBlock
    tokens: Tensor
    queries: Tensor
    seen: Tensor
    rotary: bool


def _case(windows: int, length: int, asked: int, width: int, heads: int, rotary: bool, seed: int) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = EncoderBlock(width, heads), DecoderBlock(width, heads)
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *decoder.parameters()]:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.1, generator=generator)
        for norm in (encoder.attention_norm, encoder.forward_norm, decoder.attention_norm, decoder.forward_norm):
            norm.weight.add_(1.0)
    seen = torch.rand(windows, length, generator=generator) > 0.3
    seen[0] = False  # a window without any observed patch
    tokens = torch.randn(windows, length, width, generator=generator)
    return _Case(encoder, decoder, tokens, torch.randn(windows, asked, width, generator=generator), seen, rotary)


def _gradients(case: _Case, dtype: torch.dtype, native: bool) -> list[Tensor]:
    """Outputs of both blocks, and the gradients of everything that goes in."""
    encoder, decoder = copy.deepcopy(case.encoder).to(dtype), copy.deepcopy(case.decoder).to(dtype)
    encoder.native = decoder.native = native
    tokens, queries = (x.to(dtype).clone().requires_grad_() for x in (case.tokens, case.queries))
    length, asked = tokens.shape[1], queries.shape[1]
    own = asking = None
    if case.rotary:
        cosines, sines = rotary_table(length + asked, tokens.shape[2] // encoder.heads, dtype, tokens.device)
        own, asking = (cosines[:length], sines[:length]), (cosines[length:], sines[length:])
    bias = key_bias(case.seen, dtype)
    features = encoder(tokens, bias, own)
    answers = decoder(queries, features, bias, None if own is None or asking is None else (asking, own))
    (features.float().sin().sum() + answers.float().cos().sum()).backward()
    weights = [*encoder.parameters(), *decoder.parameters()]
    inputs = (tokens.grad, queries.grad, *(p.grad for p in weights))
    return [features.detach(), answers.detach(), *(g for g in inputs if g is not None)]


def _error(got: Tensor, reference: Tensor) -> float:
    return float((got.float() - reference).norm() / reference.norm())


# the compiled kernels do not change between examples
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    windows=st.integers(1, 4),
    length=st.integers(1, 70),
    asked=st.integers(1, 20),
    shape=st.sampled_from([(64, 2), (128, 4), (128, 2), (384, 6)]),
    rotary=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_when_blocks_run_natively_then_they_are_as_close_to_float32_as_torch_in_bfloat16(
    windows: int, length: int, asked: int, shape: tuple[int, int], rotary: bool, seed: int
) -> None:
    case = _case(windows, length, asked, *shape, rotary, seed)
    reference = _gradients(case, torch.float32, native=False)
    torch_bfloat16 = _gradients(case, torch.bfloat16, native=False)
    native = _gradients(case, torch.bfloat16, native=True)
    assert len(native) == len(reference)
    for want, plain, got in zip(reference, torch_bfloat16, native, strict=True):
        assert got.dtype == torch.bfloat16
        # one small tensor's rounding errors scatter; what is wrong is wrong by its whole size, but for gradients that are rounding only
        assert _error(got, want) < 2 * _error(plain, want) + 0.03 or want.norm() < 1e-3 * reference[0].norm()
    everything = [torch.cat([x.float().flatten() for x in found]) for found in (reference, torch_bfloat16, native)]
    assert _error(everything[2], everything[0]) < 1.25 * _error(everything[1], everything[0]) + 3e-3


def test_when_one_row_of_queries_serves_all_windows_then_their_gradient_is_the_sum_over_windows() -> None:
    case = _case(windows=3, length=8, asked=1, width=64, heads=2, rotary=False, seed=5)
    found = []
    for dtype, native in ((torch.float32, False), (torch.bfloat16, True)):
        decoder = copy.deepcopy(case.decoder).to(dtype)
        decoder.native = native
        queries = case.queries[0].to(dtype).clone().requires_grad_()
        answers = decoder(queries.expand(3, -1, -1), case.tokens.to(dtype), key_bias(case.seen, dtype), None)  # rows at stride 0
        answers.float().cos().sum().backward()
        found.append((answers.detach(), queries.grad))
    (answers, gradient), (native_answers, native_gradient) = found
    assert gradient is not None
    assert native_gradient is not None
    assert _error(native_answers, answers) < 0.03
    assert _error(native_gradient, gradient) < 0.05


def test_when_one_mask_serves_all_windows_then_it_is_that_of_each() -> None:
    case = _case(windows=3, length=20, asked=1, width=64, heads=2, rotary=False, seed=6)
    block, tokens = case.encoder.bfloat16(), case.tokens.bfloat16()
    causal = torch.ones(20, 20).triu(1)[None, None] * -1e9  # [1, 1, N, N], float32
    block.native = True
    one, each = block(tokens, causal, None), block(tokens, causal.expand(3, -1, -1, -1).bfloat16(), None)
    assert torch.equal(one, each)
    block.native = False
    assert _error(one.detach(), block(tokens, causal.bfloat16(), None).detach().float()) < 0.02


def _model(size: str, context: int, native: bool) -> PatchTransformer:
    model = PatchTransformer(ModelConfig(**SIZES[size]._asdict(), context=context, horizon=32, patch=16, size=size), seed=3)
    model.to(torch.bfloat16)
    model.use_native(native)
    return model


def _loss(model: PatchTransformer, context: Tensor, mask: Tensor) -> Tensor:
    output = model.normalised(context, mask, 32)
    return output.quantiles.square().mean() + output.point.sin().mean() + output.features[output.feature_mask].mean()


def test_when_windows_are_packed_then_native_and_torch_gradients_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(12, 512, generator=generator).cumsum(dim=1)
    used = torch.tensor([512, 40, 64, 100, 16, 200, 33, 90, 120, 64, 48, 300])
    mask = torch.arange(512) >= 512 - used[:, None]
    found = []
    for native in (False, True):
        model = _model("nano", 512, native)
        _loss(model, context * mask, mask).backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert _error(found[1], found[0]) < 0.05


def test_when_the_model_trains_natively_then_its_loss_falls_as_in_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 160, generator=generator).cumsum(dim=1)
    context, target, mask = data[:, :128], data[:, 128:], torch.ones(64, 128, dtype=torch.bool)
    losses = {}
    for native in (False, True):
        model = _model("nano", 128, native)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(20):
            output = model.normalised(context, mask, 32)
            error = (target - output.loc) / output.scale - output.point
            loss = nn.functional.huber_loss(error, torch.zeros_like(error)) + ForecastTask().eta * output.quantiles.square().mean() * 0.01
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[native] = loss.item()
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_when_a_shape_does_not_fit_then_the_torch_path_computes_it() -> None:
    tokens = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    weight = torch.zeros(192, 64, dtype=torch.bfloat16)
    assert fits(tokens, weight, 8, 2)
    assert not fits(tokens.float(), weight, 8, 2)  # float32 tokens
    assert not fits(tokens, weight.float(), 8, 2)  # float32 weights
    assert not fits(tokens, weight, 8, 4)  # heads of 16
    assert not fits(tokens, weight, 300, 2)  # too many keys


def test_when_a_second_derivative_is_asked_for_then_it_is_refused_aloud() -> None:
    model = _model("nano", 64, native=True)
    context = torch.randn(3, 64)
    loss = _loss(model, context, torch.ones(3, 64, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, [model.encoder.blocks[0].get_parameter("qkv.weight")], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
