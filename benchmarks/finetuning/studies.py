"""What is fine-tuned for each table: a study is a starting model, a spec of what its rows have in common, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.finetuning import bases
from fedcast.run import medical
from fedcast.run.medical import Setting, medical_spec
from fedcast.spec import RunSpec, parse_spec

SETTING = Setting(rounds=6, steps=16, batch=16, windows=64)
FAST = "training.precision=bfloat16"
SLOW = Setting(rounds=4, steps=10, batch=8, windows=16)
"""For a model that reads 500 tokens and writes one at a time."""
FULL = {"name": "full"}
FEDAVG = {"name": "fedavg"}


@dataclass(frozen=True)
class Row:
    """One row: a method, a tuning, and further assignments."""

    method: Mapping[str, Any]
    tuning: Mapping[str, Any]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Rows over one starting model.

    Attributes
    ----------
    base
        Gives the starting model; trains it first where fedcast does.
    spec
        Gives the spec of a row: from the starting model, the row and a seed.
    rows
        Rows by label.
    start
        Where the weights come from, for the page.
    """

    base: Callable[[Path], Path]
    spec: Callable[[Path, Row, int], RunSpec]
    rows: Mapping[str, Row]
    start: str
    seeds: int = 3


ROWS = {name: Row(method, FULL) for name, method in medical.ROWS.items()}


def _medical(strategy: str, *overrides: str, setting: Setting = SETTING, context: int = 512) -> Callable[[Path, Row, int], RunSpec]:
    def spec(base: Path, row: Row, seed: int) -> RunSpec:
        found = medical_spec(
            base,
            strategy=strategy,
            method=row.method,
            tuning=row.tuning,
            setting=setting,
            seed=seed,
            context=context,
            overrides=[FAST, *overrides, *row.overrides],
        )
        return RunSpec.model_validate({**found.to_dict(), "name": strategy})

    return spec


def _cures(*patterns: str) -> dict[str, Row]:
    """Return what may help a modality that few clients have, whose names fit a pattern."""
    groups = {"name": "fedgroup", "groups": list(patterns)}
    return {
        "modalities weigh alike": Row(groups, FULL),
        "heads by modality": Row({**groups, "even": False, "apart": "heads"}, FULL),
        "LoRA, shared": Row(FEDAVG, {"name": "lora", "rank": 8}),
        "LoRA by modality": Row({**groups, "even": False, "apart": "adapters"}, {"name": "lora", "rank": 8}),
    }


TUNINGS = {
    "zero_shot": Row({"name": "zero_shot"}, FULL),
    "zero_shot, mixed 0.85": Row({"name": "zero_shot"}, {"name": "sff", "alpha": 0.85}),
    "zero_shot, mixed 0.7": Row({"name": "zero_shot"}, {"name": "sff"}),
    "zero_shot, random": Row({"name": "zero_shot"}, {"name": "sff", "alpha": 0.0}),
    "full": Row(FEDAVG, FULL),
    "sff 0.7": Row(FEDAVG, {"name": "sff"}),
    "sff, validation": Row(FEDAVG, {"name": "sff", "alpha": "validation"}),
    "sff, noise": Row(FEDAVG, {"name": "sff", "control": "noise"}),
    "sff, shrink": Row(FEDAVG, {"name": "sff", "control": "shrink"}),
    "from scratch": Row(FEDAVG, {"name": "sff", "alpha": 0.0}),
    "lora": Row(FEDAVG, {"name": "lora", "rank": 8}),
    "head": Row(FEDAVG, {"name": "head"}),
    "trace": Row(FEDAVG, {"name": "trace", "rank": 8}),
    "local": Row({"name": "local"}, FULL),
    "local, sff 0.7": Row({"name": "local"}, {"name": "sff"}),
    "local, sff 0.9": Row({"name": "local"}, {"name": "sff", "alpha": 0.9}),
    "local, from scratch": Row({"name": "local"}, {"name": "sff", "alpha": 0.0}),
    "fedprox": Row({"name": "fedprox", "mu": 1.0}, FULL),
    "fedla": Row({"name": "fedla", "mu": 1.0}, FULL),
}


def _sets(context: int, horizon: int, *, rate: float, rounds: int = 4, steps: int = 40) -> Callable[[Path, Row, int], RunSpec]:
    def spec(base: Path, row: Row, seed: int) -> RunSpec:
        document = {
            "name": "sets",
            "seed": seed,
            "data": {"source": "ltsf", "domains": ["etth1", "etth2", "ettm2", "weather", "exchange"]},
            "model": {"checkpoint": str(base), "context": context, "horizon": horizon},
            "method": dict(row.method),
            "tuning": dict(row.tuning),
            "training": {"batch_size": 32, "learning_rate": rate, "weight_decay": 0.0, "final_rate": 0.1},
            "federation": {"rounds": rounds, "local_steps": steps},
            "evaluation": {"windows": 128, "every": rounds, "baselines": ["seasonal_naive"]},
        }
        return parse_spec(document, [FAST, *row.overrides])

    return spec


_NEW = {"name": "new_head", "context": 512}
_TRACE = {"name": "trace", "head": "depthwise", "width": 10, "context": 512, "rank": 2}
TRACE = {
    "linear probing": Row(FEDAVG, {**_NEW, "kind": "flatten"}),
    "rebuilt head": Row(FEDAVG, {**_NEW, "kind": "depthwise", "width": 10}),
    "linear probing + LoRA": Row(FEDAVG, {**_TRACE, "head": "flatten", "keep": 1.0}),
    "rebuilt head + LoRA": Row(FEDAVG, {**_TRACE, "keep": 1.0}),
    "+ naive gates": Row(FEDAVG, {**_TRACE, "selection": "naive"}),
    "+ random gates": Row(FEDAVG, {**_TRACE, "selection": "random"}),
    "TRACE": Row(FEDAVG, _TRACE),
}

_TTM_ALONE = (
    *("zero_shot, mixed 0.85", "sff, validation", "sff, noise", "sff, shrink", "fedprox"),
    *("local, sff 0.7", "local, sff 0.9", "local, from scratch"),
)
"""Rows that are run for the published weights alone, to save time."""

STUDIES: dict[str, Study] = {
    "subjects": Study(bases.bolt, _medical("subjects"), ROWS, "fedcast"),
    "sites": Study(bases.bolt, _medical("sites"), ROWS, "fedcast"),
    "modality": Study(bases.bolt, _medical("modality"), {**ROWS, **_cures("client_20*")}, "fedcast"),
    "real": Study(bases.bolt, _medical("real"), {**ROWS, **dict(list(_cures("icg_*").items())[:2])}, "fedcast"),
    "heartgpt": Study(
        lambda _: bases.published("heartgpt/ECGPT_560k_iters.safetensors"),
        _medical("medical-real-100hz", "training.learning_rate=3e-4", setting=SLOW, context=436),
        ROWS,
        "published",
    ),
    "ttm": Study(lambda _: bases.published("ttm_r1_1024_96_finetuned"), _sets(1024, 96, rate=3e-4), TUNINGS, "published"),
    "native": Study(bases.native, _sets(512, 96, rate=3e-4), {k: v for k, v in TUNINGS.items() if k not in _TTM_ALONE}, "fedcast"),
    "trace": Study(bases.native, _sets(512, 96, rate=1e-3, rounds=6), TRACE, "fedcast"),
}
