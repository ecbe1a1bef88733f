"""Train a foundation model from a spec: the main job of fedcast."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.data.leakage import WITHOUT_TRAINING, exposures
from fedcast.errors import PrivacyBudgetError, SpecError
from fedcast.federated.audit import NAME as AUDIT
from fedcast.federated.audit import AuditLog
from fedcast.federated.checkpoint import Checkpoints, Progress, digest
from fedcast.federated.messages import Reply
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import Observer, RoundLoop, Silent
from fedcast.federated.silo import check_ranks
from fedcast.federated.site import SiteRole
from fedcast.federated.workspace import build_mixture
from fedcast.methods.base import Server, build_method, empty
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import weights_digest
from fedcast.run.folder import RunFolder, write_text
from fedcast.run.prepare import Prepared, start_fleet
from fedcast.run.remote import Consortium, gathered
from fedcast.spec import RunSpec, load_spec
from fedcast.training.backend import Backend
from fedcast.training.memory import peak_bytes, reset_peak
from fedcast.version import __version__, code_version


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        The run folder.
    """

    folder: Path

    @property
    def final(self) -> Path:
        """Folder of the model after the last round."""
        return RunFolder(self.folder).final

    @property
    def best(self) -> Path:
        """Folder of the model with the smallest validation loss."""
        return RunFolder(self.folder).best

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the logged rows, all or of one kind (``round``, ``validation``, ``conflict``, ``result``)."""
        return RunFolder(self.folder).rows(kind)

    def results(self) -> pd.DataFrame:
        """Return the test scores, one row a model and domain."""
        return RunFolder(self.folder).results()


def pretrain(
    spec: RunSpec | str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
    consortium: Consortium | None = None,
) -> Run:
    """Train a model over the spec's domains and score it on theirs and on held-out ones.

    A folder that already holds this run is resumed: a run killed at any point and started again ends with the same bytes.

    Parameters
    ----------
    spec
        A spec, or the path of a TOML file.
    output
        Run folder; ``runs/<name>`` when absent.
    overrides
        Dotted assignments such as ``"federation.rounds=5"``, when ``spec`` is a path.
    observer
        Hears of phases, sites and rows.
    consortium
        Where the sites are, for ``federation.fleet = "flower"``.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    SpecError, DataError, FederationError, ResumeError
        See :mod:`fedcast.errors`.
    """
    run_spec = spec if isinstance(spec, RunSpec) else load_spec(spec, overrides)
    if run_spec.model.checkpoint is not None:
        raise SpecError(
            f"the spec starts from the checkpoint {run_spec.model.checkpoint}, which is no training from scratch",
            hint="use `fedcast finetune`",
        )
    return execute(run_spec, output=output, observer=observer, consortium=consortium)


def execute(run_spec: RunSpec, *, output: str | Path | None, observer: Observer | None, consortium: Consortium | None = None) -> Run:
    """Run a spec, from scratch or from its checkpoint; see :func:`pretrain`."""
    method = build_method(run_spec.method)
    folder = RunFolder(output if output is not None else Path("runs") / run_spec.name)
    plan = Plan(run_spec, method)
    training = plan.training  # builds the model: what does not go together is named before data are read
    plan.guards.check(plan)
    check_ranks(plan)
    with gathered(run_spec, method, consortium) as prepare_sites, folder.locked():
        # Chosen once, by whoever started the run: every site computes alike, also after a resume elsewhere.
        resumes = (folder.path / "run.json").is_file()
        backend = Backend.recorded(folder.about()) if resumes else Backend.resolve(training)
        resolved = plan.computing_with(backend.written_into(run_spec.training))
        prepared = prepare_sites(plan, resolved.spec.training)
        for guard in plan.guards:
            guard.check_sites(plan, sorted(prepared.samples))
        held = folder.claim(run_spec, _about(plan, prepared, backend))
        if not (held and (folder.path / "results.parquet").is_file()):
            with backend.in_use():
                _Training(resolved, prepared, folder, observer or Silent()).run(resume=held)
    return Run(folder.path)


def _about(plan: Plan, prepared: Prepared, backend: Backend) -> dict[str, Any]:
    spec = plan.spec
    return {
        "spec_fingerprint": spec.fingerprint(),
        "data_fingerprint": prepared.fingerprint,
        **backend.record(),
        **({"checkpoint_sha256": weights_digest(plan.folder)} if spec.model.checkpoint is not None else {}),
        "series_left_out": prepared.left_out,
        "version": __version__,
        "code": code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": str(torch.cpu.get_capabilities().get("cpu_name", platform.machine())),
        **({"accelerator": torch.cuda.get_device_name()} if backend.device == "cuda" else {}),
    }


class _Training:
    """One run in the making."""

    def __init__(self, plan: Plan, prepared: Prepared, folder: RunFolder, observer: Observer) -> None:
        self._plan, self._prepared = plan, prepared
        self._spec, self._method = spec, method = plan.spec, plan.method
        self._folder, self._observer = folder, observer
        layout, self._initial = plan.layout, plan.initial
        self._server = Server(
            layout=layout,
            shared=self._initial[: layout.shared_size].clone(),
            private=empty(),
            tensors={},
            round=0,
            rounds=method.federated_rounds(spec.federation.rounds),
            sites=sum(role.trains for role in prepared.roles.values()),
            config=plan.config,
            parts=plan.parts,
        )

    def run(self, *, resume: bool) -> None:
        reset_peak()
        checkpoints = Checkpoints(self._folder.checkpoints)
        progress = (checkpoints.load(self._server) if resume else None) or Progress()
        self._folder.rewind(self._server.round, progress.rows)
        threads = torch.get_num_threads()
        fleet = start_fleet(self._plan, self._prepared, self._folder)
        audit = AuditLog(self._folder.path / AUDIT)
        about = {"spec": self._folder.about()["spec_fingerprint"], "version": __version__, "code": code_version()}
        try:
            audit.append("run-resumed" if resume else "run-started", durable=True, round=self._server.round, **about)
            loop = RoundLoop(
                plan=self._plan,
                fleet=fleet,
                roles=self._prepared.roles,
                samples=self._prepared.samples,
                server=self._server,
                checkpoints=checkpoints,
                log=self._folder.append,
                keep_best=lambda _: self._save_unseen(self._folder.best),
                observer=self._observer,
                record=audit.append,
            )
            try:
                progress = loop.run(progress)
            except PrivacyBudgetError:
                self._save_unseen(self._folder.final)
                raise
            self._finish(loop, progress)
            audit.append("run-finished", durable=True, round=self._server.round, weights_sha256=digest(self._server))
        finally:
            # First: a terminal that shows a bar hides the cursor, and whatever is said next would be drawn over.
            self._observer.finish()
            fleet.close()
            audit.close()
            torch.set_num_threads(threads)

    def _finish(self, loop: RoundLoop, progress: Progress) -> None:
        """Score the final model, save it, and write the results."""
        self._observer.phase("test", self._server.round)
        self._save_unseen(self._folder.final)
        if not self._server.rounds:
            self._save_unseen(self._folder.best)
        progress.peak_memory = max(progress.peak_memory, peak_bytes())
        roles = self._prepared.roles
        seen = [name for name, role in sorted(roles.items()) if role.evaluates and not role.held_out]
        unseen = [name for name, role in sorted(roles.items()) if role.held_out]
        adapted = self._method.adaptation(self._server.rounds) > 0
        personal = self._server.layout.private_size > 0 or adapted or bool(self._server.own)
        answers = loop.evaluate(seen, {"part": "test", "baselines": True, "personal": personal})
        if self._method.unseen() == "each":
            answers |= self._average(loop, unseen, sorted(self._server.experts))
        else:
            answers |= loop.evaluate(unseen, {"part": "test", "baselines": True})
        rows, samples = [], []
        shared = self._row_of_run(progress)
        if self._spec.federation.fleet == "flower":
            # What lies at a site is known by the site's name alone.
            exposed = {site: "seen" if roles[site].trains else "unseen" for site in answers}
        else:
            exposed = dict(exposures(self._spec.data, self._spec.data.source, answers))
        if self._spec.model.checkpoint is not None:
            # What a checkpoint was trained on is not known here.
            exposed = {site: "seen" if found == "seen" and self._server.rounds else "unknown" for site, found in exposed.items()}
        for site, reply in answers.items():
            rows += self._result_rows(roles[site], reply, {**shared, "exposure": exposed[site]})
            samples += [{**sample, "held_out": roles[site].held_out} for sample in reply.meta["samples"]]
        for row in rows:
            self._folder.append(row)
            self._observer.row(row)
        write_text(self._folder.path / "samples.json", json.dumps(samples))
        aside = self._folder.path / "results.parquet.aside"
        pd.DataFrame(rows).to_parquet(aside)
        os.replace(aside, self._folder.path / "results.parquet")

    def _average(self, loop: RoundLoop, sites: Sequence[str], experts: Sequence[str]) -> dict[str, Reply]:
        """Score every site's own model on unseen domains and average the scores."""
        answers = [loop.evaluate(sites, {"part": "test", "baselines": i == 0}, expert=name) for i, name in enumerate(experts)]
        mean: dict[str, Reply] = {}
        for site in sites:
            results = []
            for number, first in enumerate(answers[0][site].meta["results"]):
                scores = [answer[site].meta["results"][number]["scores"] for answer in answers]
                average = {name: sum(_score(score.get(name)) for score in scores) / len(scores) for name in scores[0]}
                results.append({**first, "scores": average})
            mean[site] = Reply(meta={**answers[0][site].meta, "results": results})
        return mean

    def _row_of_run(self, progress: Progress) -> dict[str, Any]:
        """Return what all result rows of a run have in common."""
        spec = self._spec
        steps = sum(int(s["steps"]) for row in self._folder.rows("round") for s in row["sites"].values())
        return {
            "kind": "result",
            "part": "test",
            "task": "forecast",
            "objective": spec.model.objective,
            "context": spec.model.context,
            "size": self._plan.size,
            "seed": spec.seed,
            "method": self._method.name,
            "options": json.dumps(spec.method.options, sort_keys=True),
            "data_fingerprint": self._prepared.fingerprint,
            "spec_fingerprint": self._folder.about()["spec_fingerprint"],
            "weights_sha256": digest(self._server),
            "version": __version__,
            "code": code_version(),
            "rounds": self._server.round,
            "gradient_steps": steps,
            "tuning": spec.tuning.name,
            "tuning_options": json.dumps(spec.tuning.options, sort_keys=True),
            "guards": json.dumps(spec.to_dict()["guards"], sort_keys=True),
            "checkpoint": self._folder.spec().model.checkpoint,
            "parameters": self._plan.parameters,
            "parameters_trained": self._server.layout.size if self._server.rounds else 0,
            "parameters_sent": self._server.layout.shared_size if self._server.rounds else 0,
            "peak_memory": progress.peak_memory,
            "wall_seconds": progress.seconds,
            "bytes_total": progress.bytes_up + progress.bytes_down,
        }

    def _result_rows(self, role: SiteRole, reply: Reply, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for result in reply.meta["results"]:
            own = {"domain": role.name, "held_out": role.held_out, "horizon": result["horizon"], "windows": result["windows"]}
            scored: dict[str, Mapping[str, float]] = {self._method.name: result["scores"], **result["baselines"]}
            untrained = {name: {"exposure": WITHOUT_TRAINING} for name in result["baselines"]}
            rows += [
                {**shared, **own, "model": name, **untrained.get(name, {}), **{key: _number(value) for key, value in scores.items()}}
                for name, scores in scored.items()
            ]
        return rows

    def _save_unseen(self, folder: Path) -> None:
        """Write the model that serves domains no site has seen; one model a site where the method has no such model."""
        server, unseen = self._server, self._method.unseen()
        # In the order of the sites' names, not of their last replies, which a resume would not remember.
        experts = {site: torch.cat([server.shared_of(site), private]) for site, private in sorted(server.experts.items())}
        if unseen == "mixture" and experts:
            build_mixture(cast(ModelConfig, self._plan.config), server.layout, experts).save_pretrained(folder)
        elif unseen == "each":
            for site, weights in experts.items():
                self._save_model(weights, folder / site)
        elif self._method.exports() != "last":
            private = server.private if server.private.numel() else self._initial[server.layout.shared_size :]
            self._save_model(torch.cat([server.shared, private]), folder)

    def _save_model(self, weights: Tensor, folder: Path) -> None:
        """Write weights, shared ones first, as a model that ``Forecaster.from_pretrained`` loads."""
        self._plan.save(weights, self._server.tensors, folder)


def _score(value: float | None) -> float:
    # A score that does not exist is NaN where it was made, and null once it has crossed a wire.
    return float("nan") if value is None else float(value)


def _number(value: float | None) -> float | None:
    # JSON has neither NaN nor infinity; a score that does not exist is null.
    score = _score(value)
    return score if isfinite(score) else None
