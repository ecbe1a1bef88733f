"""The report on how the domains' gradients conflict: what it measures, and that it changes nothing of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.federations import DOMAINS, model_layout, small_spec, train_small
from tests.run.test_resume import weights

from fedcast.data.splits import split_store
from fedcast.data.windows import WindowSampler
from fedcast.errors import RunError, SpecError
from fedcast.federated.conflict import PROBES, SKETCH, GradientProbe, conflict_row, cosines_of, encoder_gradient, probe_batch
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import Silent
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.models.architectures import build_model
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.run.diagnose import conflict_rows, gradient_conflict
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import load_training, prepare
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import Layout


def reporting(method: str = "fedavg", *, conflict: int = 2, data: dict[str, Any] | None = None, **options: Any) -> RunSpec:
    """A small federation that reports every other round, unless told otherwise."""
    spec = small_spec(method, **{"local_steps": 1, **options})
    evaluation, changed = spec.evaluation.model_copy(update={"conflict": conflict}), spec.data.model_copy(update=data or {})
    return spec.model_copy(update={"evaluation": evaluation, "data": changed})


def samplers(spec: RunSpec) -> dict[str, WindowSampler]:
    return {
        name: WindowSampler(store, split_store(store, spec.data, 16), context=64, horizon=16)
        for name, store in load_training(spec.data).items()
    }


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without a report."""
    return train_small(small_spec(local_steps=1), tmp_path_factory.mktemp("silent"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, with one."""
    return train_small(reporting("fedtrl"), tmp_path_factory.mktemp("reported"))


def test_when_two_sites_report_then_the_cosine_is_that_of_their_gradients_by_hand() -> None:
    spec, task = reporting(), ForecastTask()
    gradients, sketches = [], []
    for sampler in [samplers(spec)[name] for name in DOMAINS[:2]]:
        model = PatchTransformer(ModelConfig.of(spec.model))
        batch = sampler.gather(sampler.evaluation("validation", PROBES))
        task.loss(model.normalised(batch.context, batch.mask, 16), batch).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None]))
        model.zero_grad()
        # As at a site, where the model that evaluates is frozen.
        model.requires_grad_(False)
        assert torch.equal(encoder_gradient(model, task, probe_batch(sampler)), gradients[-1])
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
        sketches.append(GradientProbe(sampler, spec).answer(model, task)["gradient"])
    by_hand = float(F.cosine_similarity(*(gradient.double() for gradient in gradients), dim=0))
    assert cosines_of(gradients)[1] == pytest.approx(by_hand, abs=1e-5)
    assert cosines_of(gradients)[2] == float(by_hand < 0)
    assert {len(sketch) for sketch in sketches} == {SKETCH}
    assert len(gradients[0]) > SKETCH
    assert cosines_of(sketches)[1] == pytest.approx(by_hand, abs=0.01)


def test_when_the_encoder_is_no_longer_than_a_sketch_then_its_cosines_are_exact() -> None:
    spec, task = reporting(), ForecastTask()
    config = ModelConfig(d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)
    exact, sketched = [], []
    for _, sampler in sorted(samplers(spec).items()):
        exact.append(encoder_gradient(PatchTransformer(config), task, probe_batch(sampler)))
        sketched.append(GradientProbe(sampler, spec).answer(PatchTransformer(config), task)["gradient"])
    assert len(sketched[0]) == len(exact[0])
    assert torch.allclose(cosines_of(sketched)[0], cosines_of(exact)[0], rtol=0, atol=1e-6)


def test_when_a_run_reports_then_rows_stand_for_the_first_the_chosen_and_the_last_rounds(reported: Run) -> None:
    rows = reported.rows("conflict")
    assert [row["round"] for row in rows] == [1, 2, 3]
    shared = model_layout(small_spec(), build_method(small_spec().method))[0].shared_size
    for row in rows:
        cosines = np.array(row["cosines"])
        pairs = cosines[np.triu_indices(3, 1)]
        assert row["sites"] == list(DOMAINS)
        assert row["dropped"] == {}
        assert np.array_equal(cosines, cosines.T)
        assert np.array_equal(np.diag(cosines), np.ones(3))
        assert row["mean"] == pytest.approx(pairs.mean(), abs=1e-4)
        assert row["negative"] == pytest.approx((pairs < 0).mean(), abs=1e-4)
        assert row["bytes_probe"] >= 3 * 4 * (SKETCH + shared)
    table = conflict_rows(RunFolder(reported.folder))
    assert table.columns.tolist() == ["round", "mean", "negative"]
    assert table["mean"].tolist() == [row["mean"] for row in rows]


def test_when_a_run_reports_then_the_last_row_is_what_the_final_model_says(reported: Run) -> None:
    negative, mean = gradient_conflict(RunFolder(reported.folder))
    assert reported.rows("conflict")[-1]["mean"] == pytest.approx(mean, abs=0.01)
    assert reported.rows("conflict")[-1]["negative"] == pytest.approx(negative, abs=1e-4)


def test_when_a_run_reports_then_weights_scores_and_costs_are_those_of_a_run_that_does_not(reported: Run, silent: Run) -> None:
    assert weights(reported) == weights(silent)
    ours, theirs = reported.results(), silent.results()
    for name in ("weights_sha256", "bytes_total", "gradient_steps", "mse", "wql"):
        assert ours[name].tolist() == theirs[name].tolist()
    for kind in ("round", "validation"):
        assert [len(row["sites"]) for row in reported.rows(kind)] == [len(row["sites"]) for row in silent.rows(kind)]
    assert [row["bytes_up"] for row in reported.rows("round")] == [row["bytes_up"] for row in silent.rows("round")]
    assert conflict_rows(RunFolder(silent.folder)).empty


def test_when_a_worker_process_does_the_work_then_the_rows_are_the_same(reported: Run, tmp_path: Path) -> None:
    run = train_small(reporting("fedtrl", fleet="processes", workers=1), tmp_path)
    assert run.rows("conflict") == reported.rows("conflict")
    assert weights(run) == weights(reported)


class StoppedError(Exception):
    """What ends a run in the middle."""


class Stopper(Silent):
    """Ends a run in its second round: at a phase, or as soon as the row of a kind has been logged."""

    def __init__(self, at: str) -> None:
        self._at = at

    def phase(self, name: str, round: int) -> None:
        """Stop when the phase has come."""
        if (name, round) == (self._at, 2):
            raise StoppedError

    def row(self, row: dict[str, Any]) -> None:
        """Stop after the row."""
        if row["kind"] == self._at:
            self.phase(row["kind"], row["round"])


@pytest.mark.parametrize("at", ["probe", "log", "validation"])
def test_when_stopped_around_a_report_then_the_resumed_run_has_every_row_once(at: str, reported: Run, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        pretrain(reporting("fedtrl", workers=1), output=tmp_path / "run", observer=Stopper(at))
    assert [row["round"] for row in RunFolder(tmp_path / "run").rows("conflict")] == [1]
    resumed = pretrain(reporting("fedtrl", workers=1), output=tmp_path / "run")
    assert resumed.rows("conflict") == reported.rows("conflict")
    assert weights(resumed) == weights(reported)


@pytest.mark.parametrize("method", ["central", "local", "fedpm"])
def test_when_the_model_is_pooled_private_or_of_another_kind_then_its_domains_report(method: str, tmp_path: Path) -> None:
    run = train_small(reporting(method, rounds=1), tmp_path)
    (row,) = run.rows("conflict")
    assert row["sites"] == list(DOMAINS)
    assert -1 <= row["mean"] <= 1
    # A private encoder is the site's own: that of the site's saved model.
    assert row["mean"] == pytest.approx(gradient_conflict(RunFolder(run.folder))[1], abs=0.01)


@pytest.mark.parametrize("architecture", ["patch", "causal", "trend", "prototype"])
def test_when_a_model_has_an_encoder_then_it_has_a_gradient(architecture: str) -> None:
    config = ModelConfig(
        d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8, architecture=architecture
    )
    model = build_model(config)
    gradient = encoder_gradient(model, ForecastTask(), probe_batch(samplers(reporting())["energy"]))
    assert gradient.shape == (sum(p.numel() for p in model.encoder.parameters()),)
    assert gradient.isfinite().all()
    assert float(gradient.norm()) > 0


def test_when_clients_cut_across_domains_then_domains_report_if_all_weights_travel(tmp_path: Path) -> None:
    cut = {"partition": "iid", "clients": 3}
    run = train_small(reporting(rounds=1, data=cut), tmp_path)
    assert run.rows("conflict")[0]["sites"] == list(DOMAINS)
    with pytest.raises(RunError, match="one site a domain"):
        gradient_conflict(RunFolder(run.folder))
    spec = reporting("fedtrl", data=cut)
    with pytest.raises(SpecError, match="no domain trains alone"):
        pretrain(spec, output=tmp_path / "private")
    assert not (tmp_path / "private").exists()


def test_when_there_is_one_domain_only_then_the_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    spec = reporting(data={"domains": ("energy",)})
    with pytest.raises(SpecError, match="fewer than two domains"):
        pretrain(spec, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_when_a_method_does_not_train_the_objective_by_itself_then_the_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    spec = reporting("ffts")
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"objective": "reconstruct"})})
    with pytest.raises(SpecError, match="no masked reconstruction by itself"):
        pretrain(spec, output=tmp_path / "run")


def test_when_the_spec_does_not_ask_then_a_site_gives_no_gradient(tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], Plan(spec, method), tmp_path)
    layout, initial = model_layout(spec, method)
    reply = site.run(Task("evaluate", 1, {"shared": initial[: layout.shared_size]}, {"part": "gradient"}), Workspaces())
    assert reply.error == "screen: no gradient leaves the site"
    assert not reply.tensors


def test_when_a_reply_has_no_usable_gradient_then_the_row_names_the_site_and_goes_on_without_it() -> None:
    layout = Layout(("encoder.a", "heads.b"), ((2,), (3,)), 2)
    nan = torch.tensor([1.0, float("nan")])
    answers = {"c": Reply({"gradient": torch.tensor([1.0, -1.0])}), "b": Reply({"gradient": nan}), "a": Reply()}
    row = conflict_row(4, answers, layout, 100)
    assert row["sites"] == ["c"]
    assert set(row["dropped"]) == {"a", "b"}
    assert row["mean"] is row["negative"] is None
    assert row["bytes_probe"] == 100 + 16
    answers |= {"a": Reply({"gradient": torch.tensor([-2.0, -2.0])}), "b": Reply({"gradient": torch.tensor([-1.0, 0.0])})}
    row = conflict_row(4, answers, layout, 0)
    assert row["cosines"] == [[1.0, 0.7071, 0.0], [0.7071, 1.0, -0.7071], [0.0, -0.7071, 1.0]]
    assert (row["mean"], row["negative"]) == (0.0, 0.3333)
