from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.batches import batch_of
from tests.federations import shared_size, small_spec, train_small
from tests.methods.test_drift import CURVATURE, MINIMUM, OPTIMUM, _limit, _Site
from torch import Tensor, nn

from fedcast import Forecaster
from fedcast.data.windows import Batch
from fedcast.errors import FederationError, SpecError
from fedcast.methods.base import Client, Server, Update, build_method
from fedcast.methods.fedal import FedAl, decompose, default_kernel, domain_bias
from fedcast.models.architectures.causal import CausalTransformer
from fedcast.models.base import ModelConfig
from fedcast.run.diagnose import coreset_distances
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run
from fedcast.spec import MethodSpec, ModelSpec
from fedcast.training.flat import FlatParameters, Layout

TOY = {"dbe": False, "coreset": 0, "beta": 1.0}


@pytest.mark.parametrize(("options", "unbiased"), [
    ({"dynamics": "dyn_feddyn"}, True),
    ({"dynamics": "dyn_literal"}, False),
    ({"dynamics": "dyn_literal", "beta": 50.0}, False),
    ({"dynamics": "dyn_literal", "rho": 1.0}, False),
    ({"dynamics": "dyn_scaled", "beta": 0.1}, False),
    ({"dynamics": "none"}, False),
    ({"gbe": False}, False),
])  # fmt: skip
def test_when_sites_differ_then_feddyns_correction_removes_fedavgs_bias_and_the_printed_one_keeps_it(
    options: dict[str, Any], unbiased: bool
) -> None:
    fedavg = _limit("fedavg")
    assert abs(fedavg - OPTIMUM) > 0.3
    assert _limit("fedal", **{**TOY, **options}) == pytest.approx(OPTIMUM if unbiased else fedavg, abs=1e-3)


@pytest.mark.parametrize(("dynamics", "first", "second", "last"), [
    # Replies that move by 2 and by 4 on the mean; beta = 0.25, two of four sites reply.
    ("dyn_feddyn", 3 + 1.5, 4.5 + 3 + 3, 10.5 + 3),
    ("dyn_literal", 3 + 1.5, 4.5 + 3 + 0.5 * 1.5 + 1.5, 9.75 + 3 + 0.25 * 1.5 + 0.5 * 1.5 + 1.5),
    ("dyn_scaled", 3 + 0.75, 3.75 + 3 + 0.5 * 0.75 + 0.75, 7.875 + 3 + 0.25 * 0.75 + 0.5 * 0.75 + 0.75),
    ("none", 3.0, 6.0, 9.0),
])  # fmt: skip
def test_when_weights_are_corrected_then_it_is_by_the_formula(dynamics: Any, first: float, second: float, last: float) -> None:
    method = FedAl(dbe=False, coreset=0, dynamics=dynamics, beta=0.25, rho=0.5)
    server = Server(Layout(("weight",), ((1,),), 1), torch.zeros(1), torch.zeros(0), {}, 0, 3, sites=4)
    for server.round, expected in enumerate((first, second, last), start=1):
        replies = [{"shared": server.shared + step} for step in (2.0, 4.0)]
        method.aggregate(server, [Update(str(i), reply, 1) for i, reply in enumerate(replies)])
        assert float(server.shared) == pytest.approx(expected)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("samples", [(1, 9), (9, 1)])
def test_when_sites_weigh_differently_or_take_turns_then_the_limit_is_still_the_optimum_of_the_plain_mean(
    samples: tuple[int, int], half: bool
) -> None:
    method = FedAl(dbe=False, coreset=0, beta=1.0)
    sites = [_Site(a, b) for a, b in zip(CURVATURE, MINIMUM, strict=True)]
    server, rng = Server(Layout(("weight",), ((1, 1),), 1), torch.zeros(1), torch.zeros(0), {}, 0, 300, sites=2), np.random.default_rng(0)
    for server.round in range(1, 301):
        chosen = [int(rng.integers(2))] if half else [0, 1]
        replies = [(i, sites[i].train(method, method.message(server, "a"))) for i in chosen]
        method.aggregate(server, [Update(str(i), reply, samples[i]) for i, reply in replies])
    assert float(server.shared) == pytest.approx(OPTIMUM, abs=1e-3)


def by_hand(features: Tensor, usable: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Trend and seasonal part, one patch at a time."""
    trend, filled = torch.zeros_like(features), features.clone()
    count = features.shape[1]
    for b in range(len(features)):
        seen = [n for n in range(count) if usable[b, n]]
        for n in range(count):
            before = [m for m in seen if m <= n]
            filled[b, n] = features[b, before[-1] if before else seen[0] if seen else 0]
        for n in range(count):
            near = [min(max(n + k, 0), count - 1) for k in range(-(kernel // 2), kernel // 2 + 1)]
            trend[b, n] = filled[b, near].mean(0)
    return trend, filled - trend


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 3, 5, 25]), st.integers(0, 10_000))
def test_when_representations_are_decomposed_then_the_parts_are_those_of_the_formula(
    batch: int, patches: int, kernel: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, patches, 3, generator=generator)
    usable = torch.rand(batch, patches, generator=generator) < 0.8
    trend, season = by_hand(features, usable, kernel)
    found = decompose(features, usable, kernel)
    assert torch.allclose(found[0], trend, atol=1e-5)
    assert torch.allclose(found[1], season, atol=1e-5)
    for axes, shapes in {"mixed": (1, patches), "batch": (patches, patches), "batch+token": (1, 1)}.items():
        means = domain_bias(features, usable, kernel, axes)  # type: ignore[arg-type]
        for mean, part, rows in zip(means, (trend, season), shapes, strict=True):
            assert mean.shape == (rows, 3)
            for row in range(rows):
                chosen = part[:, row][usable[:, row]] if rows > 1 or patches == 1 else part[usable]
                expected = chosen.mean(0) if len(chosen) else torch.zeros(3)
                assert torch.allclose(mean[row], expected, atol=1e-5)


def test_when_the_mean_is_over_patches_then_the_seasonal_bias_is_nearly_nothing() -> None:
    features = torch.randn(16, 20, 4, generator=torch.Generator().manual_seed(0)) + torch.sin(torch.arange(20.0)).view(1, 20, 1) * 3
    usable = torch.ones(16, 20, dtype=torch.bool)
    template = domain_bias(features, usable, 5, "mixed")[1]
    assert domain_bias(features, usable, 5, "batch+token")[1].norm() < 0.1 * template.norm(dim=1).mean()


@pytest.mark.parametrize(("patches", "kernel"), [(2, 3), (5, 3), (10, 3), (20, 5), (32, 7), (80, 19), (200, 25)])
def test_when_no_kernel_is_given_then_it_is_odd_and_a_quarter_of_the_window_but_at_least_3(patches: int, kernel: int) -> None:
    assert default_kernel(patches) == kernel


def test_when_the_kernel_is_even_then_it_is_refused() -> None:
    with pytest.raises(SpecError, match="middle"):
        build_method(MethodSpec(name="fedal", options={"kernel": 4}))


def client_of(method: FedAl, received: dict[str, Tensor] | None = None, seed: int = 0) -> Client:
    config = method.model_config(ModelSpec(size="nano", context=64, horizon=16))
    config = replace(config, d_model=16, n_heads=2)
    model = CausalTransformer(config, 0)
    named = dict(model.named_parameters())
    layout = Layout.of(named, method.shares)
    parameters = FlatParameters(named, layout, torch.float32)
    unused: Any = None
    received = {"shared": parameters.shared.clone(), **(received or {})}
    return Client("a", 1, 9, model, nn.ModuleDict(), unused, parameters, received, unused, {}, np.random.default_rng(seed))


def walks(seed: int, size: int = 6) -> Batch:
    values = torch.randn(size, 80, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    seen = torch.ones(size, 80, dtype=torch.bool)
    seen[0, :20] = False
    return batch_of(values, 64, seen)


def test_when_batches_come_then_the_bias_is_their_moving_average_and_is_pulled_to_the_global_one() -> None:
    reference = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    method = FedAl(coreset=0, dynamics="none", momentum=0.8, align=0.25, kernel=3)
    pulled, free = client_of(method, {"bias": reference}), client_of(method)
    model, expected = pulled.model, None
    assert isinstance(model, CausalTransformer)
    assert model.domain is not None
    hidden: list[Tensor] = []
    for seed in (0, 1):
        seen = model.represent
        model.represent = lambda v, m, h, seen=seen: hidden.append(h) or seen(v, m, h)  # type: ignore[method-assign, assignment, misc]
        batch = walks(seed)
        difference = (method.local_loss(pulled, batch) - method.local_loss(free, batch)).item()
        model.represent = seen  # type: ignore[method-assign]
        values, mask = torch.cat((batch.context, batch.target), 1), torch.cat((batch.mask, batch.target_mask), 1)
        usable = mask.view(6, 5, 16).any(-1)
        trend, season = domain_bias(model.represent(values, mask, hidden[-1]).features, usable, 3, "mixed")
        fresh = model.domain.trend * trend + model.domain.season * season
        expected = fresh if expected is None else 0.8 * expected + 0.2 * fresh
        assert torch.allclose(pulled.scratch["bias"], expected, atol=1e-5)
        assert difference == pytest.approx(0.25 * (expected - reference).square().sum(1).mean().item(), rel=1e-4)
        # Three quarters of each window's usable patches, at least one left.
        assert hidden[-1].sum(1).tolist() == [3, 4, 4, 4, 4, 4]


def test_when_a_bias_is_kept_then_its_gradient_is_this_batchs_share() -> None:
    method = FedAl(coreset=0, dynamics="none", momentum=0.75)
    client = client_of(method)
    assert isinstance(client.model, CausalTransformer)
    assert client.model.domain is not None
    features = torch.randn(4, 5, 16, requires_grad=True)
    usable = torch.ones(4, 5, dtype=torch.bool)
    client.scratch["bias"] = torch.zeros(5, 16)
    method._bias(client, features, usable).sum().backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert torch.allclose(features.grad.sum((0, 1)), 5 * 0.25 * client.model.domain.trend, atol=1e-5)


def test_when_a_round_ends_then_the_bias_is_sent_and_kept_and_its_mean_is_weighted() -> None:
    method = FedAl(coreset=0, dynamics="none")
    client = client_of(method)
    method.local_loss(client, walks(0))
    reply = method.reply(client)
    assert set(reply) == {"bias"}
    assert torch.equal(client.parameters.private, reply["bias"].flatten())
    assert torch.equal(client.state["bias"], reply["bias"])
    assert not method.shares("domain.own")
    assert method.shares("domain.trend")
    layout = client.parameters.layout
    server = Server(layout, client.parameters.shared.clone(), torch.zeros(0), {}, 1, 9)
    biases = [torch.full((5, 16), 1.0), torch.full((5, 16), 4.0)]
    method.aggregate(server, [Update(f"s{i}", {"shared": server.shared, "bias": b}, n) for i, (b, n) in enumerate(zip(biases, (2, 1)))])  # noqa: B905
    assert torch.allclose(server.tensors["bias"], torch.full((5, 16), 2.0))
    assert torch.equal(server.private, server.tensors["bias"].flatten())
    assert torch.equal(method.message(server, "a")["bias"], server.tensors["bias"])


def test_when_the_server_does_not_know_its_model_then_it_says_so() -> None:
    method = FedAl(dbe=False)
    server = Server(Layout(("weight",), ((2,),), 1), torch.zeros(2), torch.zeros(0), {}, 1, 9)
    with pytest.raises(FederationError, match="model"):
        method.aggregate(server, [Update("a", {"shared": torch.ones(2), "coreset": torch.ones(2, 3)}, 1)])


def test_when_weights_are_fused_then_it_is_the_convex_combination() -> None:
    def after(alpha: float) -> Tensor:
        method = FedAl(dynamics="none", dbe=False, alpha=alpha, tune_rate=1e-2)
        client = client_of(method)
        server = Server(client.parameters.layout, client.parameters.shared.clone(), torch.zeros(0), {}, 1, 9, config=client.model.config)
        coreset = torch.randn(8, 80, generator=torch.Generator().manual_seed(2))
        method.aggregate(server, [Update("a", {"shared": server.shared + 0.01, "coreset": coreset}, 1)])
        return server.shared

    tuned, kept, half = after(0.0), after(1.0), after(0.5)
    assert (tuned - kept).norm() > 0.01
    assert torch.allclose(half, (tuned + kept) / 2, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec("fedal", coreset=8, match_steps=3, refresh=2), tmp_path_factory.mktemp("fedal"))


def test_when_rounds_are_over_then_as_many_bytes_travelled_as_the_specification_says(trained: Run) -> None:
    method, spec = FedAl(), small_spec("fedal")
    config: ModelConfig = method.model_config(spec.model)
    weights, bias, coreset = shared_size(method, config), 5 * config.d_model, 8 * 80
    up, down = zip(*((row["bytes_up"], row["bytes_down"]) for row in trained.rows("round")), strict=True)
    # Three sites, four bytes a number. Down: weights, and from round 2 on the global bias. Up: weights, bias and core-set.
    assert down == (12 * weights, 12 * (weights + bias), 12 * (weights + bias))
    assert up == (12 * (weights + bias + coreset),) * 3


def test_when_core_sets_are_made_then_the_round_says_how_near_they_are_to_training_windows(trained: Run) -> None:
    for row in trained.rows("round"):
        for site in row["sites"].values():
            made = row["round"] in (1, 3)
            assert ("coreset_nearest_minimum" in site) == made
            if made:
                assert 0 < site["coreset_nearest_minimum"] <= site["coreset_nearest_median"] < 2
                assert site["coreset_mismatch"] > 0
    # That of each vector stays at its site.
    listed = coreset_distances(RunFolder(trained.folder))
    for name, last in trained.rows("round")[-1]["sites"].items():
        distances = listed[listed.site == name].distance
        assert len(distances) == 8
        assert distances.min() == pytest.approx(last["coreset_nearest_minimum"])
        assert distances.median() == pytest.approx(last["coreset_nearest_median"])


def test_when_a_run_is_over_then_its_model_forecasts_any_series(trained: Run) -> None:
    forecaster = Forecaster.from_pretrained(trained.final)
    assert isinstance(forecaster.model, CausalTransformer)
    forecast = forecaster.predict_arrays([np.sin(np.arange(200) / 3), np.ones(3)], 40)
    assert np.isfinite(forecast.point).all()
    assert np.isfinite(forecast.quantiles).all()
    # The model for domains that no site has seen holds the mean of the sites' biases.
    assert forecaster.model.domain is not None
    assert forecaster.model.domain.own.abs().sum() > 0


@pytest.mark.parametrize("options", [
    {"align": 0.0},
    {"dbe": False},
    {"coreset": 0},
    {"dynamics": "none"},
    {"dynamics": "dyn_literal"},
    {"dynamics": "dyn_scaled"},
    {"gbe": False},
    {"axes": "batch"},
    {"axes": "batch+token"},
], ids=str)  # fmt: skip
def test_when_a_part_is_switched_then_it_trains_and_differs_from_the_default(
    options: dict[str, object], trained: Run, tmp_path: Path
) -> None:
    fast = {"coreset": 8, "match_steps": 3, "refresh": 2}
    results = train_small(small_spec("fedal", **{**fast, **options}), tmp_path).results()
    ours = results[results.model == "fedal"]
    assert ours.mse.notna().all()
    assert ours.weights_sha256.iloc[0] != trained.results().weights_sha256.iloc[0]


@pytest.mark.slow
def test_when_worker_processes_carry_it_then_the_bytes_are_the_same(trained: Run, tmp_path: Path) -> None:
    again = train_small(small_spec("fedal", fleet="processes", coreset=8, match_steps=3, refresh=2), tmp_path)
    assert again.results().weights_sha256.iloc[0] == trained.results().weights_sha256.iloc[0]
