"""FFTS: its masks, its losses, the alignment of the trend-awareness module and its moving average at the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.batches import batch_of
from tests.federations import shared_size, small_spec, train_small
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import ModelError, SpecError
from fedcast.methods.base import Client, Server, Update, build_method
from fedcast.methods.ffts import FFTS, geometric_mask, masked_error, trend_places
from fedcast.models.architectures import build_model
from fedcast.models.architectures.trend import TrendTransformer
from fedcast.models.forecaster import Forecaster
from fedcast.models.layers import InstanceNorm
from fedcast.spec import MethodSpec, ModelSpec
from fedcast.tasks.forecast import ForecastTask
from fedcast.tasks.reconstruct import reconstruction_mse
from fedcast.training.flat import FlatParameters, Layout

MODEL = ModelSpec(size="nano", context=64, horizon=16)


def runs_of(mask: np.ndarray) -> np.ndarray:
    """Lengths of the masked runs that both begin and end within a row."""
    lengths = []
    for row in mask:
        edges = np.flatnonzero(np.diff(row.astype(int)))
        starts, stops = (edges[row[edges + 1] == value] for value in (True, False))
        stops = stops[stops > starts[0]] if len(starts) else stops[:0]
        lengths += [stop - start for start, stop in zip(starts, stops, strict=False)]
    return np.array(lengths)


@pytest.mark.parametrize(("ratio", "run"), [(0.15, 6.0), (0.15, 3.0), (0.35, 16.0), (0.75, 8.0)])
def test_when_masks_are_drawn_then_share_mean_run_and_chances_are_the_chains(ratio: float, run: float) -> None:
    mask = geometric_mask(np.random.default_rng(0), 400, 4000, ratio, run)
    assert mask.mean() == pytest.approx(ratio, rel=0.02)
    # The first step is as likely to be masked as any: 400 of them.
    assert geometric_mask(np.random.default_rng(1), 40_000, 2, ratio, run)[:, 0].mean() == pytest.approx(ratio, rel=0.03)
    lengths = runs_of(mask)
    assert lengths.mean() == pytest.approx(run, rel=0.02)
    # Geometric lengths: their variance is (1 - p) / p^2.
    assert lengths.var() == pytest.approx((1 - 1 / run) * run**2, rel=0.06)
    before, after = mask[:, :-1], mask[:, 1:]
    assert (~after[before]).mean() == pytest.approx(1 / run, rel=0.03)
    assert after[~before].mean() == pytest.approx(ratio / (1 - ratio) / run, rel=0.03)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 80), st.floats(0, 0.8), st.floats(0, 10))
def test_when_masks_are_drawn_then_the_seed_decides_and_shapes_fit(seed: int, rows: int, steps: int, ratio: float, above: float) -> None:
    run = 1 / (1 - ratio) + above
    first, second = (geometric_mask(np.random.default_rng(seed), rows, steps, ratio, run) for _ in range(2))
    assert first.shape == (rows, steps)
    assert first.dtype == bool
    assert (first == second).all()
    assert ratio > 0 or not first.any()


def test_when_points_are_masked_then_only_their_squares_count() -> None:
    filled = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    truth = torch.tensor([[0.0, 9.0, 1.0], [9.0, 9.0, 100.0]])
    hidden = torch.tensor([[True, False, True], [False, False, True]])
    error = masked_error(filled, truth, hidden)
    assert error.item() == pytest.approx((1 + 4 + 16) / 3)  # the last one's truth is clamped to 10
    error.backward()
    assert torch.equal(filled.grad != 0, hidden)
    nothing = masked_error(filled, truth, torch.zeros_like(hidden))
    assert nothing.item() == 0


def walks(rows: int = 4, missing: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    values = 5 + torch.randn(rows, 80, generator=generator).cumsum(1)
    mask = torch.ones_like(values, dtype=torch.bool)
    if missing:
        mask[0, :30] = False
        mask[1] = False
        mask[1, 40] = True
    return batch_of(values, 64, mask)


def client_of(method: FFTS, server: Tensor | None = None) -> Client:
    model = build_model(method.model_config(MODEL), seed=0)
    named = dict(model.named_parameters())
    parameters = FlatParameters(named, Layout.of(named, method.shares), torch.float32)
    received = {"shared": parameters.shared.clone() if server is None else server}
    unused: Any = None
    return Client("a", 1, 1, model, nn.ModuleDict(), ForecastTask(), parameters, received, unused, {}, np.random.default_rng(7))


def test_when_a_site_trains_then_its_loss_is_the_masked_error_plus_the_tasks() -> None:
    method, batch = FFTS(reconstruction=2.0, forecasting=0.5), walks()
    client = client_of(method)
    loss = method.local_loss(client, batch)
    hidden = torch.from_numpy(geometric_mask(np.random.default_rng(7), 4, 80, 0.15, 6.0))
    assert hidden.any()
    values = torch.cat((batch.context, batch.target), dim=1)
    _, loc, scale = InstanceNorm.forward(torch.where(hidden, 0.0, values), ~hidden)
    filled = client.model.restore(client.model.represent(torch.where(hidden, 1e9, values), ~hidden), 80)
    squares = ((filled - (values - loc) / scale) ** 2)[hidden]
    forecast = ForecastTask().loss(client.model.normalised(batch.context, batch.mask, 16), batch)
    assert loss.item() == pytest.approx(2 * squares.mean().item() + 0.5 * forecast.item(), rel=1e-4)
    assert client.records()["reconstruction"] == pytest.approx(squares.mean().item(), rel=1e-4)


def test_when_points_are_missing_then_none_of_them_is_masked_and_something_stays_visible() -> None:
    batch = walks(missing=True)
    mask = torch.cat((batch.mask, batch.target_mask), dim=1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        hidden = FFTS(mask_ratio=0.6)._hide(mask, rng)
        assert not (hidden & ~mask).any()
        assert (mask & ~hidden).any(dim=1).all()
    assert torch.isfinite(FFTS().local_loss(client_of(FFTS()), batch))


def test_when_only_pretraining_is_asked_for_then_the_forecast_is_not_trained() -> None:
    method = FFTS(forecasting=0.0)
    client = client_of(method)
    method.local_loss(client, walks()).backward()
    assert client.model.heads.quantiles.weight.grad.abs().sum() == 0
    assert client.model.decoder.out.weight.grad.abs().sum() > 0
    assert set(client.records()) == {"reconstruction"}


@pytest.mark.parametrize("options", [{"experts": "linear"}, {"experts": "mlp"}], ids=str)
def test_when_a_site_has_moved_then_it_is_pulled_by_the_gradient_of_the_per_tensor_errors(options: dict[str, Any]) -> None:
    method = FFTS(alignment=0.3, **options)
    client = client_of(method)
    parameters = client.parameters
    generator = torch.Generator().manual_seed(1)
    parameters.vector.add_(0.1 * torch.randn(parameters.vector.shape, generator=generator))
    pull = method.correction(client)
    leaf = parameters.vector.clone().requires_grad_(True)
    ours, theirs = parameters.layout.views(leaf), parameters.layout.views(client.received["shared"])
    errors = [nn.functional.mse_loss(ours[name], theirs[name]) for name in ours if ".trend." in name]
    (0.3 * sum(errors)).backward()
    assert torch.allclose(pull, leaf.grad, atol=1e-9)
    assert pull.abs().sum() > 0
    # Each expert's weight and bias, the gate's eight or ten tensors, and each scale count by themselves.
    per_layer = 10 + 4 * 2 if options["experts"] == "linear" else 10 + 4 * 5
    assert len(errors) == 2 * per_layer
    assert client.records()["alignment"] == pytest.approx(sum(errors).item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"alignment": 0.0}, {"experts": "none"}], ids=str)
def test_when_nothing_is_aligned_then_there_is_no_correction(options: dict[str, Any]) -> None:
    method = FFTS(**options)
    assert method.correction(client_of(method)) is None


def server_of(method: FFTS, before: Tensor, layout: Layout) -> Server:
    return Server(layout, before, torch.zeros(0), {}, 1, 10)


@pytest.mark.parametrize(("rate", "experts"), [(0.5, "linear"), (0.2, "mlp"), (1.0, "linear"), (0.5, "none")])
def test_when_aggregating_then_the_module_moves_part_of_the_way_and_the_rest_all_of_it(rate: float, experts: Any) -> None:
    method = FFTS(server_rate=rate, experts=experts)
    layout = client_of(method).parameters.layout
    generator = torch.Generator().manual_seed(2)
    before, first, second = (torch.randn(layout.shared_size, generator=generator) for _ in range(3))
    server = server_of(method, before.clone(), layout)
    method.aggregate(server, [Update("a", {"shared": first}, 100), Update("b", {"shared": second}, 300)])
    mean = 0.25 * first + 0.75 * second
    for name, got, old, new in zip(layout.names, *(layout.views(vector).values() for vector in (server.shared, before, mean)), strict=True):
        expected = (1 - rate) * old + rate * new if ".trend." in name else new
        assert torch.allclose(got, expected, atol=1e-5), name
    assert sum(place.stop - place.start for place in trend_places(layout)) == sum(
        p.numel() for name, p in zip(layout.names, layout.views(before).values(), strict=True) if ".trend." in name
    )


def test_when_the_module_is_left_out_then_nothing_of_it_travels() -> None:
    size = {experts: shared_size(FFTS(experts=experts), FFTS(experts=experts).model_config(MODEL)) for experts in ("none", "linear", "mlp")}
    width, layers = 128, 2
    gate = 2 * (width * width // 2 + width // 2) + 2 * width + 4 * (width // 2) + 4
    assert size["linear"] - size["none"] == layers * (4 * (width * width + width) + gate)
    experts = 4 * (width * 2 * width + 2 * width + 2 * width * width + width + 1)
    assert size["mlp"] - size["none"] == layers * (experts + gate + 2 * width)


@pytest.mark.parametrize(
    ("scales", "experts", "scaled"), [("auto", "linear", 0), ("auto", "mlp", 1), ("on", "linear", 1), ("off", "mlp", 0)]
)
def test_when_scales_are_left_to_the_method_then_only_todays_experts_have_them(scales: Any, experts: Any, scaled: int) -> None:
    assert dict(FFTS(scales=scales, experts=experts).model_config(MODEL).settings)["scaled"] == scaled


REFUSED = [
    ({"kernel": 24}, "kernel"),
    ({"mask_ratio": 0.75, "mask_run": 3.0}, "masked steps"),
    ({"top_k": 5}, "top_k"),
    ({"experts": "x"}, "experts"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=str)
def test_when_a_hyper_parameter_is_refused_then_it_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        build_method(MethodSpec(name="ffts", options=options))


SWITCHES: list[dict[str, object]] = [
    {"experts": "none"},
    {"experts": "mlp"},
    {"scales": "on"},
    {"alignment": 0.0},
    {"server_rate": 1.0},
    {"top_k": 2},
    {"top_k": 3},
    {"top_k": 4},
    {"kernel": 5},
    {"mask_ratio": 0.4},
    {"mask_ratio": 0.0},
    {"mask_run": 3.0},
    {"head": "patch"},
    {"forecasting": 0.0},
]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_small(small_spec("ffts"), tmp_path_factory.mktemp("ffts"))


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_when_it_is_switched_then_it_trains_and_differs_from_the_default(options: dict[str, object], default: Any, tmp_path: Path) -> None:
    run = train_small(small_spec("ffts", **options), tmp_path)
    results = run.results()
    ours = results[results.model == "ffts"]
    assert ours.mse.notna().all()
    assert np.isfinite(ours.wql).all()
    assert ours.weights_sha256.iloc[0] != default.results().weights_sha256.iloc[0]


def test_when_a_round_is_over_then_the_weights_and_nothing_else_have_travelled(default: Any) -> None:
    method = FFTS()
    size = shared_size(method, method.model_config(MODEL))
    row = default.rows("round")[0]
    assert row["bytes_up"] == row["bytes_down"] == 3 * 4 * size
    assert all(site["alignment"] > 0 for site in row["sites"].values())


def test_when_a_run_is_done_then_its_model_forecasts_and_reconstructs_what_it_has_not_seen(default: Any) -> None:
    forecaster = Forecaster.from_pretrained(default.folder)
    model = forecaster.model
    assert isinstance(model, TrendTransformer)
    assert dict(model.config.settings) == dict(FFTS().model_config(MODEL).settings)
    stamps = pd.date_range("2024-01-01", periods=100, freq="h")
    frame = pd.DataFrame({"unique_id": "new", "ds": stamps, "y": np.sin(np.arange(100.0) / 4)})
    forecast = forecaster.predict(frame, 40)
    assert np.isfinite(forecast[["forecast", "q0.1", "q0.9"]].to_numpy()).all()
    scores = reconstruction_mse(model, walks(), torch.ones(4))
    assert all(np.isfinite(score) for score in scores.values())


def test_when_a_site_learns_then_hidden_points_are_restored_better() -> None:
    """Sines whose points are hidden in runs: 150 steps restore them far better than their mean does."""
    method = FFTS(forecasting=0.0, top_k=2)
    client = client_of(method)
    optimiser = torch.optim.Adam(client.model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(150):
        phase = 6.28 * torch.rand(16, 1, generator=generator)
        values = torch.sin(phase + 0.4 * torch.arange(80))
        batch = replace(walks(16), context=values[:, :64], target=values[:, 64:])
        loss = method.local_loss(client, batch)
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[0] > 0.8
    assert np.mean(errors[-10:]) < 0.2


def test_when_a_model_of_other_settings_is_read_then_it_is_refused(default: Any) -> None:
    config = default.folder / "final" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"linear"', '"cubic"'))
    with pytest.raises(ModelError, match="experts"):
        Forecaster.from_pretrained(default.folder)
    config.write_text(text)
