"""The benchmark ``medical``: federated fine-tuning on ECG and impedance cardiograms, after Ali et al. 2025 (arXiv 2502.09744)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedcast.data.medical import MEDICAL_SOURCES
from fedcast.data.medical.parts import CONTEXT, HORIZON
from fedcast.data.medical.strategies import medical_domains
from fedcast.errors import UnknownNameError
from fedcast.evaluate.medical import SCORES, across_clients
from fedcast.federated.rounds import Observer
from fedcast.run.finetune import finetune
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run
from fedcast.spec import RunSpec, parse_spec

STRATEGIES = {name: f"medical-{name}" for name in ("subjects", "sites", "modality", "real")}
"""The three partitions of the paper (``docs/medical.md``), and the real recordings alone."""

ROWS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot"},
    "local": {"name": "local"},
    "fedavg": {"name": "fedavg"},
    "fedprox": {"name": "fedprox", "mu": 1.0},
    "fedla": {"name": "fedla", "mu": 1.0},
}
"""The rows of the paper's tables: methods, with its coefficients."""

COSTS = ("parameters_trained", "parameters_sent", "bytes_total", "gradient_steps", "wall_seconds", "peak_memory")
"""What a run of each row took."""

_TRAINING = {
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "warmup": 0.0,
    "schedule": "linear",
    "schedule_over": "round",
    "final_rate": 0.0,
    "moments": "reset",
}
"""The train script of Chronos: AdamW, rate 1e-3 falling to 0 within each round, new moments each round."""


@dataclass(frozen=True)
class Setting:
    """How much is trained and scored.

    Attributes
    ----------
    rounds, steps, batch
        Rounds, gradient steps a client and round, windows a step.
    windows
        Test windows a client.
    """

    rounds: int
    steps: int
    batch: int
    windows: int


SETTINGS: dict[Literal["paper", "small"], Setting] = {"paper": Setting(30, 400, 64, 3200), "small": Setting(6, 20, 16, 128)}
"""That of the paper (hours on a GPU), and one for two cores."""


def medical_spec(
    checkpoint: str | Path,
    *,
    strategy: str = "subjects",
    method: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    setting: Setting = SETTINGS["paper"],
    seed: int = 0,
    context: int = CONTEXT,
    overrides: Sequence[str] = (),
) -> RunSpec:
    """Return the spec of one row.

    Parameters
    ----------
    checkpoint
        What is fine-tuned: a folder, or a name on the hub.
    strategy
        A name of :data:`STRATEGIES`, or one of ``data.source``'s medical sources.
    method, tuning
        Sections of the spec; FedAvg and full fine-tuning when absent.
    setting, seed
        How much is trained and scored; the seed of everything random.
    context
        Steps a model reads: 512 in the paper.
    overrides
        Dotted assignments, applied last.

    Raises
    ------
    UnknownNameError
        When there is no such strategy.
    """
    source = STRATEGIES.get(strategy, strategy)
    if source not in MEDICAL_SOURCES:
        raise UnknownNameError.of("strategy", strategy, STRATEGIES)
    document = {
        "name": f"medical-{strategy}",
        "seed": seed,
        "data": {"source": source, "validation": 0.1, "test": 0.4},
        "model": {"checkpoint": str(checkpoint), "context": context, "horizon": HORIZON},
        "method": dict(method or ROWS["fedavg"]),
        "tuning": dict(tuning or {"name": "full"}),
        "training": {"batch_size": setting.batch, **_TRAINING},
        # The authors weigh by steps, which are as many at every client, and at sites of PTB-XL by records.
        "federation": {
            "rounds": setting.rounds,
            "local_steps": setting.steps,
            "weights": "samples" if "sites" in source else "equal",
        },
        "evaluation": {"windows": setting.windows, "every": setting.rounds},
    }
    return parse_spec(document, overrides)


def run_medical(
    checkpoint: str | Path,
    output: Path,
    *,
    strategy: str = "subjects",
    methods: Sequence[str] = tuple(ROWS),
    tuning: Mapping[str, Any] | None = None,
    setting: Setting = SETTINGS["paper"],
    seeds: int = 3,
    observer: Callable[[str], Observer | None] = lambda label: None,
) -> pd.DataFrame:
    """Fine-tune and score the benchmark's rows; runs that are complete are not repeated, stopped ones are resumed.

    Parameters
    ----------
    checkpoint, strategy, tuning, setting
        As for :func:`medical_spec`.
    output
        Folder of the runs, one a method and seed.
    methods
        Names of :data:`ROWS`.
    seeds
        Runs a method, with seeds 0, 1, ...
    observer
        Makes the observer of a run from its label, such as ``fedavg, seed 0``.

    Returns
    -------
    pandas.DataFrame
        The rows of :func:`medical_rows` of all runs, with ``seed`` and the costs of each run (:data:`COSTS`; ``None`` for baselines).

    Raises
    ------
    UnknownNameError
        When there is no such strategy or method.
    """
    for name in methods:
        if name not in ROWS:
            raise UnknownNameError.of("method of the benchmark", name, ROWS)
    frames = []
    for seed in range(seeds):
        for name in methods:
            spec = medical_spec(checkpoint, strategy=strategy, method=ROWS[name], tuning=tuning, setting=setting, seed=seed)
            folder = output / strategy / spec.tuning.name / name / f"seed-{seed}"
            run = finetune(spec, output=folder, observer=observer(f"{name}, seed {seed}"))
            frames.append(_with_costs(medical_rows(run), run, name).assign(seed=seed))
    return pd.concat(frames, ignore_index=True).drop_duplicates(["model", "group", "seed"])


def _with_costs(rows: pd.DataFrame, run: Run, method: str) -> pd.DataFrame:
    """Add what the run took to the rows of its model; a baseline cost nothing of it."""
    costs = run.rows("result")[0]
    return rows.assign(
        **{cost: pd.Series([costs[cost] if model == method else None for model in rows.model], dtype=object) for cost in COSTS}
    )


def medical_rows(run: Run) -> pd.DataFrame:
    """Return a run's scores over clients, weighted by their test windows: of its model and of each baseline, by kind of recording.

    Returns
    -------
    pandas.DataFrame
        Columns ``model``, ``group`` (``all``, and by kind and origin such as ``ecg, real``), ``clients``, and the protocol's scores
        (:data:`fedcast.evaluate.medical.SCORES`) on the [0, 1] scale, sMAPE in per cent.
    """
    results = run.results()
    groups = _groups(RunFolder(run.folder).spec().data.source)
    rows = []
    for model, part in results.groupby("model", sort=False):
        records = part.to_dict("records")
        scores = {str(row["domain"]): {name: float(row[f"batch_{name}"]) for name in SCORES} for row in records}
        windows = {str(row["domain"]): int(row["windows_available"]) for row in records}
        for group in ["all", *sorted(set(groups.values()))]:
            chosen = {client: each for client, each in scores.items() if group in ("all", groups[client])}
            rows.append({"model": model, "group": group, "clients": len(chosen), **across_clients(chosen, windows)})
    return pd.DataFrame(rows)


def _groups(source: str) -> dict[str, str]:
    """Return what each client holds, such as ``ecg, real``."""
    found = {}
    for client, datasets in medical_domains(source).items():
        name = datasets[0].name
        found[client] = f"{name.split('_')[0]}, {'synthetic' if name.endswith('synthetic') else 'real'}"
    return found
