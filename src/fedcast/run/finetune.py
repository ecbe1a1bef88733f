"""Fine-tune a checkpoint federatedly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fedcast.tuning  # noqa: F401 - registers the tunings
from fedcast.errors import ResumeError, SpecError
from fedcast.federated.rounds import Observer
from fedcast.methods.base import build_method
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run, execute
from fedcast.run.remote import Consortium
from fedcast.spec import RunSpec, TuningSpec, load_spec
from fedcast.tuning.base import Tuning, build_tuning

CANDIDATES = "candidates"
"""Folder of a search's runs, and the name of the file that compares them."""


def finetune(
    spec: RunSpec | str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
    consortium: Consortium | None = None,
) -> Run:
    """Fine-tune ``model.checkpoint`` over the spec's domains and score it on theirs and on held-out ones.

    Every site reads the checkpoint itself; only weights that the tuning trains and the method shares travel. A folder that already
    holds this run is resumed. Where the tuning leaves a choice to the validation loss, such as ``tuning.alpha = "validation"``, each
    candidate is a run of its own below ``candidates/``, and the best one is copied into the run folder.

    Parameters
    ----------
    spec
        A spec, or the path of a TOML file.
    output
        Run folder; ``runs/<name>`` when absent.
    overrides
        Dotted assignments such as ``"tuning.name=lora"``, when ``spec`` is a path.
    observer
        Hears of phases, sites and rows; before each candidate, of a row of kind ``candidate`` with its ``label``.
    consortium
        Where the sites are, for ``federation.fleet = "flower"``.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    SpecError, CheckpointError, MissingExtraError, DataError, FederationError, ResumeError
        See :mod:`fedcast.errors`.
    """
    run_spec = spec if isinstance(spec, RunSpec) else load_spec(spec, overrides)
    if run_spec.model.checkpoint is None:
        raise SpecError("the spec names nothing to fine-tune", hint="set model.checkpoint, or train from scratch with `fedcast pretrain`")
    candidates = build_tuning(run_spec.tuning).candidates()
    if len(candidates) == 1:
        return execute(run_spec, output=output, observer=observer, consortium=consortium)
    folder = Path(output) if output is not None else Path("runs") / run_spec.name
    if not build_method(run_spec.method).federated_rounds(run_spec.federation.rounds):
        raise SpecError(
            f"method {run_spec.method.name!r} trains nothing, so no validation loss can choose", hint="give the tuning one value"
        )
    specs = [run_spec.model_copy(update={"tuning": _spec_of(candidate)}) for candidate in candidates]
    _check_free(RunFolder(folder), specs)
    tried = [_try(one, folder / CANDIDATES / _label(one.tuning), observer, consortium) for one in specs]
    best, _ = min(tried, key=lambda each: each[1]["validation_loss"])
    shutil.copytree(best, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    (folder / f"{CANDIDATES}.json").write_text(json.dumps([about for _, about in tried], indent=2) + "\n", encoding="utf-8")
    return Run(folder)


def _try(spec: RunSpec, folder: Path, observer: Observer | None, consortium: Consortium | None) -> tuple[Path, dict[str, Any]]:
    """Run a candidate; return its folder, and its tuning, last validation loss and costs."""
    if observer is not None:
        observer.row({"kind": "candidate", "label": folder.name})
    run = execute(spec, output=folder, observer=observer, consortium=consortium)
    losses = [row["mean"] for row in run.rows("validation") if row["mean"] is not None]
    if not losses:
        raise SpecError("no site has a validation window to choose by", hint="give the tuning one value")
    result = run.rows("result")[0]
    costs = {name: result[name] for name in ("bytes_total", "wall_seconds", "gradient_steps")}
    return run.folder, {"tuning": spec.to_dict()["tuning"], "validation_loss": losses[-1], **costs}


def _check_free(folder: RunFolder, specs: Sequence[RunSpec]) -> None:
    """Refuse a folder that holds a run that is none of the candidates, by :class:`ResumeError`."""
    if (folder.path / "run.json").is_file() and folder.about()["spec_fingerprint"] not in [spec.fingerprint() for spec in specs]:
        raise ResumeError(
            f"{folder.path} holds a run of another spec", hint="choose another --output, or remove the folder to start afresh"
        )


def _spec_of(tuning: Tuning) -> TuningSpec:
    return TuningSpec(name=tuning.name, options=asdict(tuning))


def _label(tuning: TuningSpec) -> str:
    return "-".join([tuning.name, *(str(value) for value in tuning.options.values())])
