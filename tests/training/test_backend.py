"""What a run computes with: asked for, measured, recorded, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.errors import MissingExtraError, SpecError
from fedcast.kernels import library
from fedcast.spec import TrainingSpec
from fedcast.training.backend import Backend, Probe, probe

times = st.floats(1e-3, 1e3)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache: no native kernels, whatever the person has compiled."""
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))
    library.kernels.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_when_everything_is_asked_for_then_it_is_given_and_nothing_is_measured() -> None:
    calls = probe.cache_info()
    for precision, products in (("float32", "default"), ("bfloat16", "default")):
        training = TrainingSpec.model_validate({"precision": precision, "products": products, "device": "cpu"})
        assert Backend.resolve(training) == Backend(precision, products)  # type: ignore[arg-type]
    assert probe.cache_info() == calls
    assert Backend("bfloat16").dtype == torch.bfloat16
    assert Backend("float32").dtype == torch.float32


@pytest.mark.usefixtures("nothing_compiled")
def test_when_left_to_the_machine_then_the_probe_decides() -> None:
    measured = probe()
    assert Backend.resolve(TrainingSpec(device="cpu")) == Backend(measured.precision(measured.products), measured.products)
    assert min(measured.default_ms, measured.onednn_ms) > 0
    capabilities = torch.cpu.get_capabilities()
    native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert (measured.bfloat16_ms is not None) == native


def test_when_measuring_then_threads_and_products_stay_as_they_were() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    probe.cache_clear()
    probe()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


@given(default=times, onednn=times, error=st.sampled_from([3e-7, 9e-6, 2e-5, 3e-3]))
def test_when_onednn_is_inexact_or_hardly_faster_then_the_default_stays(default: float, onednn: float, error: float) -> None:
    chosen = Probe(default, onednn, None, error).products
    assert (chosen == "onednn") == (error < 1e-5 and default >= 1.2 * onednn)


@given(default=times, onednn=times, bfloat16=st.none() | times)
def test_when_bfloat16_is_not_clearly_faster_than_the_best_float32_then_float32_stays(
    default: float, onednn: float, bfloat16: float | None
) -> None:
    measured = Probe(default, onednn, bfloat16, 3e-7)
    best = onednn if measured.products == "onednn" else default
    assert (measured.precision(measured.products) == "bfloat16") == (bfloat16 is not None and best >= 1.2 * bfloat16)


@pytest.mark.parametrize("backend", [Backend("bfloat16", "onednn"), Backend("float32", "default")])
def test_when_recorded_then_it_is_read_back_and_written_into_the_spec(backend: Backend) -> None:
    assert Backend.recorded(backend.record()) == backend
    assert Backend.resolve(backend.written_into(TrainingSpec(learning_rate=0.5))) == backend
    assert backend.written_into(TrainingSpec(learning_rate=0.5)).learning_rate == 0.5


@pytest.mark.usefixtures("compiled")
def test_when_native_kernels_are_compiled_then_auto_takes_them_for_bfloat16_only() -> None:
    assert Backend.resolve(TrainingSpec(precision="bfloat16", device="cpu")).kernels == "native"
    assert Backend.resolve(TrainingSpec(precision="float32", device="cpu")).kernels == "torch"
    assert Backend.resolve(TrainingSpec(precision="bfloat16", device="cpu", kernels="torch")).kernels == "torch"
    assert Backend.recorded({"precision": "bfloat16", "kernels": "native"}).kernels == "native"
    with pytest.raises(SpecError, match="compute in bfloat16"):
        Backend.resolve(TrainingSpec(precision="float32", device="cpu", kernels="native"))
    with pytest.raises(SpecError, match="exclude each other"):
        Backend.resolve(TrainingSpec(precision="bfloat16", device="cpu", kernels="native", compile=True))


@pytest.mark.usefixtures("nothing_compiled")
def test_when_native_kernels_are_asked_for_and_not_compiled_then_the_error_says_how() -> None:
    with pytest.raises(MissingExtraError) as caught:
        Backend.resolve(TrainingSpec(precision="bfloat16", device="cpu", kernels="native"))
    assert "fedcast machine --build" in caught.value.hint
    with pytest.raises(MissingExtraError, match="not compiled"):
        Backend.recorded({"precision": "bfloat16", "kernels": "native"})


def test_when_a_record_is_older_than_a_key_then_the_run_computed_with_the_default() -> None:
    assert Backend.recorded({"precision": "bfloat16"}) == Backend("bfloat16")


def test_when_products_are_routed_then_the_setting_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with Backend("float32", "onednn").in_use():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), Backend("float32", "onednn").in_use():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_when_cuda_is_asked_for_and_there_is_none_then_the_error_says_so() -> None:
    with pytest.raises(SpecError, match="no CUDA device") as caught:
        Backend.resolve(TrainingSpec(device="cuda"))
    assert "training.device = 'cpu'" in caught.value.hint
    with pytest.raises(SpecError, match="no CUDA device"):
        Backend.recorded({"precision": "bfloat16", "products": "default", "device": "cuda"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_when_there_is_a_cuda_device_then_it_is_taken_with_torchs_own_products() -> None:
    backend = Backend.resolve(TrainingSpec())
    assert (backend.device, backend.products) == ("cuda", "default")
    with pytest.raises(SpecError, match="onednn"):
        Backend.resolve(TrainingSpec(products="onednn"))


def test_when_compiling_without_a_compiler_then_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SpecError, match="there is no no-such-compiler") as caught:
        Backend.resolve(TrainingSpec(compile=True))
    assert "CXX" in caught.value.hint
