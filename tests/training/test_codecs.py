"""Codecs of updates: error bounds, error feedback, bytes, and codes that no encoder writes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fedcast.errors import ScreenError
from fedcast.training.codecs import BFloat16, BitDifference, Codec, Codes, Int8, TopK, deflate, inflate

TINY = 2.0**-118  # below, a codec may take a value for 0
CODECS: tuple[Codec, ...] = (BFloat16(), Int8(16), Int8(256), Int8(16, stochastic=True), TopK(0.01), TopK(0.3), TopK(1.0))
codecs = st.sampled_from(CODECS)
finite = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = arrays(np.float32, st.integers(0, 700), elements=finite)
seeds = st.integers(0, 2**31 - 1)


def normal(size: int, seed: int = 0, scale: float = 1e-3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32))


def steps_of(codec: Int8, vector: Tensor) -> Tensor:
    """Return the step of each value's block."""
    blocks = [block.abs().max().expand(len(block)) / 127 for block in vector.split(codec.block)] if len(vector) else [vector]
    return torch.cat(blocks)


def bound(codec: Codec, vector: Tensor) -> Tensor:
    """Return the largest error of each value."""
    relative = vector.abs() * 2**-8
    if isinstance(codec, BFloat16):
        return relative + TINY
    if isinstance(codec, Int8):
        return steps_of(codec, vector) * (1.0 if codec.stochastic else 0.5) * (1 + 1e-5) + TINY
    kept = codec.kept(len(vector))
    ranks = torch.empty(len(vector), dtype=torch.int64)
    ranks[torch.sort(vector.abs(), descending=True, stable=True).indices] = torch.arange(len(vector))
    return torch.where(ranks < kept, relative, vector.abs()) + TINY


@settings(deadline=None)
@given(codecs, vectors, seeds)
def test_when_a_vector_is_coded_and_decoded_then_no_value_is_off_by_more_than_its_codec_says(
    codec: Codec, values: np.ndarray, seed: int
) -> None:
    vector = torch.from_numpy(values)
    codes = codec.encode(vector, np.random.default_rng(seed))
    error = (codec.decode(codes, len(vector)).double() - vector.double()).abs()
    assert (error <= bound(codec, vector).double()).all()


@settings(deadline=None)
@given(codecs, vectors, seeds, st.sampled_from([1, 3, 19]))
def test_when_codes_are_deflated_then_inflating_gives_the_same_codes(codec: Codec, values: np.ndarray, seed: int, level: int) -> None:
    codes = codec.encode(torch.from_numpy(values), np.random.default_rng(seed))
    again = inflate(deflate(codes, level), codec.layout(len(values)))
    assert again.keys() == codes.keys()
    assert all(again[name].dtype == code.dtype and torch.equal(again[name], code) for name, code in codes.items())


@settings(deadline=None, max_examples=50)
@given(codecs, st.integers(1, 300), st.integers(1, 12), seeds)
def test_when_what_was_left_out_is_fed_back_then_the_sum_decoded_is_the_true_sum_but_for_the_last_step(
    codec: Codec, size: int, steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    residual, decoded_sum, true_sum = torch.zeros(size), torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for step in range(steps):
        update = normal(size, seed + step)
        target = update + residual
        decoded = codec.decode(codec.encode(target, rng), size)
        residual = target - decoded
        decoded_sum += decoded
        true_sum += update
        # Sums are right but for what the last codes left out, and for the rounding of the additions themselves.
        assert torch.allclose(true_sum - decoded_sum, residual.double(), atol=1e-7, rtol=0)
    assert (residual.abs() <= bound(codec, target) * (1 + 1e-5)).all()


@given(arrays(np.float32, 50, elements=st.floats(width=32)), arrays(np.float32, 50, elements=st.floats(width=32)))
def test_when_bits_are_told_as_differences_then_every_bit_comes_back(values: np.ndarray, known: np.ndarray) -> None:
    vector, base = torch.from_numpy(values), torch.from_numpy(known)
    again = BitDifference().decode(BitDifference().encode(vector, base), base)
    assert torch.equal(again.view(torch.int32), vector.view(torch.int32))


def test_when_rounding_is_stochastic_then_the_mean_over_many_draws_is_the_value() -> None:
    codec, vector = Int8(64, stochastic=True), normal(64)
    draws = torch.stack([codec.decode(codec.encode(vector, np.random.default_rng(seed)), 64) for seed in range(2000)])
    step = steps_of(codec, vector)[0]
    # The standard error of a mean of 2,000 draws is at most half a step over the root of 2,000.
    assert (draws.mean(dim=0) - vector).abs().max() < 5 * step / 2 / 2000**0.5
    assert (Int8(64).decode(Int8(64).encode(vector, np.random.default_rng(0)), 64) - vector).abs().max() > step / 4


def test_when_values_are_equally_large_then_top_k_keeps_the_first() -> None:
    vector = torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0])
    assert TopK(0.4).decode(TopK(0.4).encode(vector, np.random.default_rng(0)), 5).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("codec", "least"), [(BFloat16(), 2.0), (Int8(), 3.9), (TopK(0.1), 10.0), (TopK(0.01), 100.0)])
def test_when_an_update_is_coded_then_it_shrinks_as_promised(codec: Codec, least: float) -> None:
    codes = codec.encode(normal(200_000), np.random.default_rng(0))
    assert 4 * 200_000 / sum(code.numel() * code.element_size() for code in codes.values()) >= least


def test_when_weights_moved_a_little_then_their_bit_differences_deflate() -> None:
    before = normal(200_000, scale=0.05)
    frame = deflate(BitDifference().encode(before + normal(200_000, seed=1, scale=1e-4), before), 3)
    assert len(frame) < 0.75 * 4 * 200_000


def altered(codec: Codec, change: Callable[[Codes], object], size: int = 600) -> Codes:
    codes = codec.encode(normal(size), np.random.default_rng(0))
    change(codes)
    return codes


HOSTILE: dict[str, tuple[Codec, Callable[[Codes], object]]] = {
    "no codes": (BFloat16(), lambda codes: codes.clear()),
    "one too many": (Int8(), lambda codes: codes.update(more=torch.zeros(1))),
    "other type": (BFloat16(), lambda codes: codes.update(bfloat16=codes["bfloat16"].to(torch.float16))),
    "too short": (Int8(), lambda codes: codes.update(int8=codes["int8"][:-1])),
    "too long": (BFloat16(), lambda codes: codes.update(bfloat16=torch.zeros(601, dtype=torch.bfloat16))),
    "two dimensions": (Int8(), lambda codes: codes.update(int8=codes["int8"].view(2, -1))),
    "not finite": (BFloat16(), lambda codes: codes["bfloat16"].__setitem__(3, float("nan"))),
    "scale not finite": (Int8(), lambda codes: codes["scales"].__setitem__(0, float("inf"))),
    "scale negative": (Int8(), lambda codes: codes["scales"].__setitem__(1, -1.0)),
    "scale overflows": (Int8(), lambda codes: (codes["scales"].__setitem__(0, 3e38), codes["int8"].fill_(127))),
    "step out of range": (Int8(), lambda codes: codes["int8"].__setitem__(9, -128)),
    "too few scales": (Int8(), lambda codes: codes.update(scales=codes["scales"][:1])),
    "values not finite": (TopK(0.1), lambda codes: codes["values"].__setitem__(0, float("-inf"))),
    "fewer gaps than values": (TopK(0.1), lambda codes: codes.update(gaps=codes["gaps"][:-1])),
    "more gaps than values": (TopK(0.1), lambda codes: codes.update(gaps=torch.cat([codes["gaps"], torch.zeros(1, dtype=torch.uint8)]))),
    "gaps without end": (TopK(0.1), lambda codes: codes.update(gaps=torch.zeros(10**6, dtype=torch.uint8))),
    "a gap that leads nowhere": (TopK(0.1), lambda codes: codes.update(gaps=torch.cat([codes["gaps"], codes["gaps"][:1] * 0 + 255]))),
    "a place beyond the end": (TopK(0.1), lambda codes: codes["gaps"].__setitem__(-1, 254)),
    "no gaps": (TopK(0.1), lambda codes: codes.update(gaps=codes["gaps"][:0])),
    "wide gaps": (TopK(0.1), lambda codes: codes.update(gaps=codes["gaps"].to(torch.int32))),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_when_codes_are_such_as_no_encoder_writes_then_they_are_refused(case: str) -> None:
    codec, change = HOSTILE[case]
    assert len(codec.decode(altered(codec, lambda codes: None), 600)) == 600
    with pytest.raises(ScreenError):
        codec.decode(altered(codec, change), 600)


@settings(deadline=None, max_examples=300)
@given(codecs, st.binary(max_size=400), st.binary(max_size=64))
def test_when_codes_are_any_bytes_then_they_decode_to_finite_values_or_are_refused(codec: Codec, first: bytes, second: bytes) -> None:
    codes: Codes = {}
    for (name, (shape, dtype)), raw in zip(codec.layout(60).items(), (first, second), strict=False):
        padded = raw if name == "gaps" else raw.ljust(shape[0] * dtype.itemsize, b"\x01")[: shape[0] * dtype.itemsize]
        codes[name] = torch.from_numpy(np.frombuffer(padded, dtype=np.uint8).copy()).view(dtype)
    try:
        decoded = codec.decode(codes, 60)
    except ScreenError:
        return
    assert decoded.shape == (60,)
    assert decoded.isfinite().all()


def frame_of(raw: bytes, **options: bool) -> Tensor:
    data = zstandard.ZstdCompressor(level=1, **options).compress(raw)
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def flipped(frame: Tensor, place: int) -> Tensor:
    changed = frame.clone()
    changed[place] ^= 255
    return changed


GOOD = frame_of(bytes(1200), write_checksum=True)
FRAMES = {
    "no frame": torch.arange(200, dtype=torch.uint8),
    "nothing": GOOD[:0],
    "cut off": GOOD[:-3],
    "more behind it": torch.cat([GOOD, GOOD[:5]]),
    "two frames": torch.cat([GOOD, GOOD]),
    "checksum wrong": flipped(GOOD, -1),
    "too short": frame_of(bytes(1198)),
    "too long": frame_of(bytes(1202)),
    "length not told": frame_of(bytes(1200), write_content_size=False),
    "floats": GOOD.float(),
    "two dimensions": GOOD.unsqueeze(0),
}


@pytest.mark.parametrize("case", sorted(FRAMES))
def test_when_a_zstd_frame_is_not_that_of_the_codes_then_it_is_refused(case: str) -> None:
    assert inflate(GOOD, BFloat16().layout(600))["bfloat16"].tolist() == [0.0] * 600
    with pytest.raises(ScreenError):
        inflate(FRAMES[case], BFloat16().layout(600))


@pytest.mark.parametrize("tells_its_length", [True, False])
def test_when_a_zstd_frame_is_a_bomb_then_it_is_refused_in_little_memory(tells_its_length: bool) -> None:
    bomb = frame_of(bytes(2**28), write_content_size=tells_its_length)
    assert len(bomb) < 2**15
    tracemalloc.start()
    with pytest.raises(ScreenError):
        inflate(bomb, BFloat16().layout(600))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18


def test_when_a_frame_claims_less_than_it_holds_then_it_is_refused() -> None:
    bomb = frame_of(bytes(2**20)).numpy().tobytes()
    # Magic, descriptor, then the length: one claimed within the limit does not open the frame.
    claimed = bomb.replace((2**20).to_bytes(4, "little"), (1200).to_bytes(4, "little"), 1)
    assert claimed != bomb
    with pytest.raises(ScreenError):
        inflate(torch.from_numpy(np.frombuffer(claimed, dtype=np.uint8).copy()), BFloat16().layout(600))
