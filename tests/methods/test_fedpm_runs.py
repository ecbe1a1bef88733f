"""Whole runs of FeDPM: what crosses the wire, what stands in the run folder, and every switch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.federations import DOMAINS, model_layout, small_spec, train_small

import fedcast.run.pretrain as pretraining
from fedcast.federated.fleet import Fleet
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.workspace import build_workspace
from fedcast.methods.base import build_method
from fedcast.methods.fedpm import FedPM
from fedcast.models.forecaster import Forecaster
from fedcast.models.mixture import DomainMixture
from fedcast.run.pretrain import Run
from fedcast.spec import RunSpec
from fedcast.training.backend import Backend


class Watching:
    """A real fleet that keeps what crosses the wire while training."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.tasks: list[tuple[int, str, Task]] = []
        self.replies: list[tuple[int, str, Reply]] = []

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and keep those that train."""
        trains = [(task.round, site, task) for site, task in tasks.items() if task.kind == "train"]
        self.tasks += trains
        for site, reply in self._fleet.run(tasks, deadline_s):
            if trains:
                self.replies.append((trains[0][0], site, reply))
            yield site, reply

    def close(self) -> None:
        """Close the fleet."""
        self._fleet.close()


def watch(spec: RunSpec, folder: Path) -> tuple[Run, Watching]:
    watching: list[Watching] = []
    start = pretraining.start_fleet

    def start_watching(*arguments: object) -> Watching:
        watching.append(Watching(start(*arguments)))  # type: ignore[arg-type]
        return watching[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "start_fleet", start_watching)
        run = train_small(spec, folder)
    return run, watching[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watching]:
    return watch(small_spec("fedpm"), tmp_path_factory.mktemp("fedpm"))


def test_when_training_then_only_memory_and_counts_cross_the_wire(watched: tuple[Run, Watching]) -> None:
    run, watching = watched
    private = model_layout(small_spec("fedpm"), FedPM())[0].private_size
    assert len(watching.tasks) == len(watching.replies) == 3 * len(DOMAINS)
    for _, _, task in watching.tasks:
        assert {name: tuple(tensor.shape) for name, tensor in task.tensors.items()} == {"shared": (256 * 64,)}
        assert task.nbytes == 64 * 1024
        assert len(task.encode()) < 64 * 1024 + 512
    for number, _, reply in watching.replies:
        # Private weights are handed in once, at the end, to serve domains that no site has seen.
        last = number == 3
        assert set(reply.tensors) == {"shared", "counts"} | ({"private"} if last else set())
        assert reply.nbytes == 64 * 1024 + 1024 + (4 * private if last else 0)
        if not last:
            assert len(reply.encode()) < 65 * 1024 + 1024
    assert [row["bytes_up"] for row in run.rows("round")][:2] == [3 * 65 * 1024] * 2
    assert [row["bytes_down"] for row in run.rows("round")] == [3 * 64 * 1024] * 3


def test_when_training_then_counts_are_those_of_all_patches_with_points(watched: tuple[Run, Watching]) -> None:
    _, watching = watched
    for _, _, reply in watching.replies:
        counts = reply.tensors["counts"]
        # 4 steps of 8 windows of 64 / 4 patches, some of them without points.
        assert 0 < counts.sum() <= 4 * 8 * 16
        assert torch.equal(counts, counts.round())


def test_when_training_then_each_site_starts_from_its_own_memory(watched: tuple[Run, Watching]) -> None:
    _, watching = watched
    sent = {(number, site): task.tensors["shared"] for number, site, task in watching.tasks}
    assert torch.equal(sent[1, "energy"], sent[1, "health"])
    assert not torch.equal(sent[2, "energy"], sent[2, "health"])
    shared = torch.stack([sent[2, site].view(256, 64) for site in DOMAINS])
    # At most 243 of 256 rows are the same everywhere.
    same = (shared == shared[0]).all(2).all(0)
    assert same[:1].all()
    assert not same[243:].any()


def test_when_a_run_is_over_then_rows_tell_what_became_of_the_prototypes(watched: tuple[Run, Watching]) -> None:
    run, _ = watched
    for row in run.rows("round"):
        assert set(row["server"]) == {"dead_share", "clusters", "index_aligned", "shared_prototypes"}
        assert 0 <= row["server"]["dead_share"] <= 1
        assert row["server"]["index_aligned"] <= row["server"]["clusters"]
        assert {"forecast_loss", "quantisation_error", "dead_share"} <= set(row["sites"]["energy"])


def test_when_a_run_is_over_then_sites_and_the_final_mixture_hold_the_memories_of_the_last_round(watched: tuple[Run, Watching]) -> None:
    run, _ = watched
    kept = load_file(sorted((run.folder / "checkpoints").glob("round-*"))[-1] / "server.safetensors")
    final = Forecaster.from_pretrained(run.final)
    assert isinstance(final.model, DomainMixture)
    for site in DOMAINS:
        own = kept[f"own.{site}"].view(256, 64)
        assert torch.equal(load_file(run.folder / "sites" / site / "model" / "model.safetensors")["memory.prototypes"], own)
        state = final.model.expert(site).state_dict()
        assert torch.equal(state["memory.prototypes"], own)
        # What a new domain's quantisation errors are compared with.
        assert float(state["heads.typical_error"]) == pytest.approx(run.rows("round")[-1]["sites"][site]["quantisation_error"])
    forecast = final.predict_arrays(np.random.default_rng(0).normal(size=(3, 50)), 20)
    assert np.isfinite(forecast.point).all()
    assert np.isfinite(forecast.quantiles).all()


def test_when_a_run_is_resumed_then_it_ends_with_the_same_bytes(watched: tuple[Run, Watching], tmp_path: Path) -> None:
    whole, _ = watched
    cut = train_small(small_spec("fedpm"), tmp_path)
    (cut.folder / "results.parquet").unlink()
    for path in cut.folder.glob("checkpoints/round-000003/*"):
        path.unlink()
    again = train_small(small_spec("fedpm"), tmp_path)
    assert again.results().weights_sha256.iloc[0] == whole.results().weights_sha256.iloc[0]
    assert again.results().mse.tolist() == whole.results().mse.tolist()


OPTIONS = [
    {"as_released": True},
    {"restart": True},
    {"units": "data"},
    {"statistics": 0},
    {"aggregation": "fedavg"},
    {"aggregation": "none"},
    {"fill": "random_isolated"},
    {"fill": "none"},
    {"similarity": "max"},
    {"backbone": "cnn", "width": 16, "encoder_layers": 1, "decoder_layers": 1},
    {"backbone": "gru", "width": 16, "encoder_layers": 1, "decoder_layers": 1},
    {"prototypes": 32, "width": 32, "patch": 8, "encoder_layers": 1, "decoder_layers": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_when_it_is_switched_then_it_trains_and_differs_from_the_default(
    options: dict[str, object], watched: tuple[Run, Watching], tmp_path: Path
) -> None:
    results = train_small(small_spec("fedpm", **options), tmp_path).results()
    ours = results[results.model == "fedpm"]
    assert ours.mse.notna().all()
    assert ours.wql.notna().all()
    assert ours.weights_sha256.iloc[0] != watched[0].results().weights_sha256.iloc[0]


def test_when_dead_prototypes_are_restarted_then_they_are_features_and_used_ones_stay(
    watched: tuple[Run, Watching], tmp_path: Path
) -> None:
    _, restarted = watch(small_spec("fedpm", restart=True), tmp_path)
    plain = {site: reply.tensors for number, site, reply in watched[1].replies if number == 1}
    first = [(site, reply) for number, site, reply in restarted.replies if number == 1]
    assert len(first) == len(DOMAINS)
    for site, reply in first:
        counts = reply.tensors["counts"]
        rows, before = (tensors["shared"].view(256, 64) for tensors in (reply.tensors, plain[site]))
        assert torch.equal(counts, plain[site]["counts"])
        assert torch.equal(rows[counts > 0], before[counts > 0])
        # Features leave a layer norm, so their mean is 0 and their length 8 while its weights are 1.
        changed = (rows != before).any(1)
        assert 16 <= changed.sum() <= 8 * 64 / 4
        assert not changed[counts > 0].any()
        torch.testing.assert_close(rows[changed].norm(dim=1), torch.full((int(changed.sum()),), 8.0), rtol=0.1, atol=0)


@pytest.mark.parametrize(("kind", "spread"), [("gaussian", 1.0), ("laplace", 2**0.5)])
def test_when_uploads_are_noisy_then_by_the_noise_asked_for_and_nothing_else_changes(
    kind: str, spread: float, watched: tuple[Run, Watching], tmp_path: Path
) -> None:
    _, noisy = watch(small_spec("fedpm", noise=0.5, noise_kind=kind), tmp_path)
    plain = {site: reply.tensors for number, site, reply in watched[1].replies if number == 1}
    draws = []
    for _, site, reply in [each for each in noisy.replies if each[0] == 1]:
        assert torch.equal(reply.tensors["counts"], plain[site]["counts"])
        draws.append(reply.tensors["shared"] - plain[site]["shared"])
    drawn = torch.stack(draws)
    assert drawn.std().item() == pytest.approx(0.5 * spread, rel=0.03)
    # Half of a Gaussian lies within 0.674 deviations, half of a Laplace distribution within 0.490.
    assert drawn.abs().median().item() == pytest.approx(0.5 * (0.674 if kind == "gaussian" else 0.693), rel=0.03)
    assert not torch.equal(draws[0], draws[1])


def test_when_sites_start_then_their_encoders_are_the_same() -> None:
    spec = small_spec("fedpm")
    method = build_method(spec.method)
    layout, initial = model_layout(spec, method)
    for _ in range(2):
        workspace = build_workspace(Plan(spec, method), {}, Backend.resolve(spec.training))
        assert torch.equal(workspace.initial, initial)
        encoder = workspace.model.encoder.embedding.weight
        assert torch.equal(encoder, layout.views(initial)["encoder.embedding.weight"])


def test_when_rows_come_back_in_another_order_then_only_their_moments_are_forgotten() -> None:
    spec = small_spec("fedpm")
    workspace = build_workspace(Plan(spec, FedPM()), {}, Backend.resolve(spec.training))
    workspace.parameters.gradient.fill_(1.0)
    workspace.optimiser.step(1e-3)
    workspace.optimiser.forget_shared()
    state, size = workspace.optimiser.state(), workspace.parameters.layout.shared_size
    for name in ("exp_avg", "exp_avg_sq"):
        assert (state[name][:size] == 0).all()
        assert (state[name][size:] > 0).all()
    assert float(state["step"]) == 1
