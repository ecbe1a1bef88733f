"""Mutations of good and bad bytes, 10^6 in all: no reader raises anything but fedcast's own errors, none hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.hostile import pack
from tests.fuzz.targets import TARGETS

from fedcast.safe import UnsafeError
from fedcast.tensors import FILES, read_bytes, to_bytes

RUNS = {"wire": 800_000, "spec": 100_000, "checkpoint": 95_000, "frame": 5_000}
"""Shares by how long one takes: a table is read by pandas in about 8 ms, a message in 0.1 ms."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TARGETS)
def test_when_bytes_are_mutated_then_nothing_crashes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("targets.py")), name, str(tmp_path), f"-runs={RUNS[name]}", "-seed=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    units = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert units is not None
    assert int(units[1]) >= RUNS[name]


def test_when_the_mutations_are_counted_then_they_are_a_million() -> None:
    assert sum(RUNS.values()) == 10**6
    assert RUNS.keys() == TARGETS.keys()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I8", "U8", "BOOL", "F4", "C64"]) | VALUES,
        "shape": st.lists(st.integers(-1, 5) | VALUES, max_size=4) | VALUES,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list) | VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | VALUES, max_size=4)


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 64))
def test_when_a_header_is_drawn_then_it_is_refused_or_read_as_the_library_reads_it(header: dict[str, object], size: int) -> None:
    payload = pack(header, bytes(size))
    try:
        found = read_bytes(payload, FILES).tensors
    except UnsafeError:
        return
    known = safetensors.torch.load(payload)
    assert known.keys() == found.keys()
    assert all(torch.equal(known[name], tensor) and known[name].dtype == tensor.dtype for name, tensor in found.items())


TENSORS = st.dictionaries(
    st.text("abc./_é 1", min_size=1, max_size=6).filter(lambda name: not set(name.split("/")) & {"", ".", ".."}),
    st.tuples(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]),
        st.lists(st.integers(0, 4), max_size=4),
    ),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(TENSORS, st.text('abcé"\\ \n', max_size=10))
def test_when_tensors_are_written_then_the_bytes_are_the_librarys_and_are_read_back(
    drawn: dict[str, tuple[torch.dtype, list[int]]], text: str
) -> None:
    tensors = {name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) for name, (dtype, shape) in drawn.items()}
    payload = to_bytes(tensors, {"x": text})
    assert payload == safetensors.torch.save(tensors, metadata={"x": text})
    back = read_bytes(payload, FILES)
    assert back.metadata == {"x": text}
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
