"""A run folder written by hand in the format that the run loop keeps, close to what a real run of eight domains looks like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRAINING = ("bike sharing", "cloud", "economics", "electricity", "retail", "river flow", "traffic", "web")
HELD_OUT = ("hospital", "solar", "tourism", "wind")
SPEC = """name = "demo"
seed = 3

[data]
source = "bundled"
held_out = ["hospital", "solar", "tourism", "wind"]

[model]
size = "nano"
context = 256
horizon = 48

[method]
name = "fedtrl"
alpha = 0.1

[federation]
rounds = 20
"""
Row = dict[str, Any]
MakeRun = Callable[..., Path]


def round_rows(sites: Sequence[str], rounds: int, rng: np.random.Generator) -> list[Row]:
    """Rows of kinds round and validation; every fifth round one site does not take part."""
    level = {site: 0.35 + 0.5 * rng.random() for site in sites}
    speed = {site: 3 + 4 * rng.random() for site in sites}
    samples = {site: int(10 ** rng.uniform(3.2, 5.2)) for site in sites}
    angle = rng.normal(size=(len(sites), 3))
    rows: list[Row] = []
    for number in range(1, rounds + 1):
        present = [s for i, s in enumerate(sites) if not (number % 5 == 0 and i == number % len(sites) and len(sites) > 1)]
        prior = np.array([samples[s] ** 0.5 for s in present])
        pull = np.exp(0.3 * np.sin(number / 6 + np.arange(len(present))))
        weights = prior * pull / (prior * pull).sum()
        features = angle + number * 0.12
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        loss = {s: level[s] * (1 + 1.4 * math.exp(-number / speed[s])) + 0.01 * rng.normal() for s in sites}
        values = {
            s: {
                "loss": loss[s],
                "steps": 50,
                "samples": samples[s],
                "seconds": 0.9 + 0.2 * rng.random(),
                "weight": float(w),
                "discriminator_accuracy": 0.5 + 0.35 * math.exp(-number / 8) + 0.02 * rng.normal(),
                "discriminator_chance": 0.5 if sites.index(s) % 2 else 1 / 3,
                "feature_variance": 0.2 + 0.4 * math.exp(-number / 10) + 0.01 * rng.normal(),
                "alignment": 0.8 * math.exp(-number / 7) + 0.05,
            }
            for s, w in zip(present, weights, strict=True)
        }
        server = {"similarity": np.clip(unit @ unit.T, -1, 1).tolist(), "sites": list(sites), "temperature": 0.02 + 0.1 / number}
        up = 1_070_000 * len(present)
        rows.append(
            {
                "kind": "round",
                "round": number,
                "seconds": 4.4 + 0.3 * rng.random(),
                "overhead_seconds": 0.09,
                "bytes_up": up,
                "bytes_down": up + 512,
                "sites": values,
                "server": server,
            }
        )
        checked = {s: {"loss": loss[s] * 1.12 + 0.015 * rng.normal()} for s in sites}
        rows.append(
            {"kind": "validation", "round": number, "sites": checked, "mean": float(np.mean([v["loss"] for v in checked.values()]))}
        )
    return rows


def conflict_rows(sites: Sequence[str], rounds: int) -> list[Row]:
    """Rows of kind conflict, as often as a run with ``evaluation.conflict = 5`` keeps them."""
    rng = np.random.default_rng(8)
    rows: list[Row] = []
    for number in sorted({1, rounds, *range(5, rounds + 1, 5)}) if rounds else ():
        unit = rng.normal(size=(len(sites), 6))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = (unit @ unit.T).round(4)
        pairs = cosines[np.triu_indices(len(sites), 1)]
        summary = {"mean": float(pairs.mean()), "negative": float((pairs < 0).mean())} if len(pairs) else {"mean": None, "negative": None}
        row = {
            "kind": "conflict",
            "round": number,
            "sites": list(sites),
            "cosines": cosines.tolist(),
            "dropped": {},
            "bytes_probe": 9_000_000,
        }
        rows.append(row | summary)
    return rows


def result_rows(domains: Sequence[tuple[str, bool]], models: Sequence[str], rng: np.random.Generator) -> list[Row]:
    """One row a model and domain."""
    skill = {"fedtrl": 0.8, "fedavg": 0.86, "central": 0.83, "local": 0.95, "auto_ets": 0.97, "seasonal_naive": 1.0}
    rows: list[Row] = []
    for domain, held_out in domains:
        base = {
            "mse": rng.uniform(0.3, 1.6),
            "mae": rng.uniform(0.3, 0.9),
            "mase": rng.uniform(0.8, 1.8),
            "smape": rng.uniform(0.1, 0.6),
            "wql": rng.uniform(0.05, 0.4),
        }
        for model in models:
            factor = 1.0 if model == "seasonal_naive" else skill.get(model, 0.9) * rng.uniform(0.72, 1.25) * (1.08 if held_out else 1.0)
            scores = {key: value * factor for key, value in base.items()}
            scores |= {
                "coverage80": float(np.clip(0.8 + 0.06 * rng.normal(), 0, 1)),
                "windows": 64,
                "horizon": 48,
                "context": 256,
                "seed": 3,
            }
            about = {
                "method": "fedtrl",
                "data_fingerprint": "9f2c" * 16,
                "spec_fingerprint": "51ab" * 16,
                "version": "0.1.0",
                "code": "4be1c09d77aa31f0" * 2,
                "part": "test",
            }
            costs = {"wall_seconds": 96.4, "bytes_total": 342_000_000, "gradient_steps": 8000}
            rows.append({"kind": "result", "model": model, "domain": domain, "held_out": held_out} | scores | about | costs)
    return rows


def samples_of(domains: Sequence[tuple[str, bool]], rng: np.random.Generator, each: int = 2, horizon: int = 48) -> list[Row]:
    """Forecasts with a daily season, a trend and, in every third domain, missing values."""
    entries: list[Row] = []
    for index, (domain, held_out) in enumerate(domains):
        for number in range(each):
            time = np.arange(256 + horizon)
            scale = 10 ** rng.uniform(-1, 4)
            clean = scale * (2 + np.sin(2 * np.pi * time / 24 + rng.uniform(0, 6)) * rng.uniform(0.3, 1) + 0.003 * time * rng.normal())
            series = clean + 0.16 * scale * rng.normal(size=time.size).cumsum() / 4 + 0.1 * scale * rng.normal(size=time.size)
            point = 0.7 * clean[256:] + 0.3 * series[240:256].mean()
            width = 0.1 * scale * np.sqrt(1 + np.arange(horizon) / 6)
            quantiles = {
                f"{q / 10:.1f}": (point + z * width).tolist()
                for q, z in zip(range(1, 10), (-1.28, -0.84, -0.52, -0.25, 0, 0.25, 0.52, 0.84, 1.28), strict=True)
            }
            values: list[float | None] = series.tolist()
            if index % 3 == 0:
                values[190:203] = [None] * 13
                values[270:275] = [None] * 5
                values[276] = None
            entry = {
                "domain": domain,
                "held_out": held_out,
                "series": f"{domain}-{number + 1}",
                "context": values[:256],
                "truth": values[256:],
                "point": point.tolist(),
            }
            entries.append(entry | {"quantiles": quantiles, "seasonal_naive": np.resize(series[232:256], horizon).tolist()})
    return entries


def write_run(
    folder: Path,
    *,
    training: Sequence[str] = TRAINING,
    held_out: Sequence[str] = HELD_OUT,
    rounds: int = 20,
    models: Sequence[str] = ("fedtrl", "seasonal_naive", "auto_ets", "fedavg", "central", "local"),
    samples: bool = True,
    conflict: bool = True,
    spec: str = SPEC,
) -> Path:
    """Write a run folder; empty arguments leave their part out."""
    rng = np.random.default_rng(7)
    domains = [(name, False) for name in training] + [(name, True) for name in held_out]
    rows = round_rows(list(training), rounds, rng) + result_rows(domains, models, rng)
    rows += conflict_rows(training, rounds) if conflict else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.toml").write_text(spec, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if samples:
        (folder / "samples.json").write_text(json.dumps(samples_of(domains, rng)), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder under a fresh directory; see :func:`write_run`."""

    def make(name: str = "demo", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make
