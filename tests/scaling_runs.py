"""Run folders written by hand whose errors lie on a known scaling curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcast.spec import RunSpec, parse_spec
from tests.federations import DOMAINS, HELD_OUT, small_spec

SHARES = (0.1, 0.25, 0.5, 1.0)
POINTS = 10_000


def curve(x: float) -> float:
    """The error at so many training points, relative to seasonal naive."""
    return 0.5 + 20 * x**-0.5


def share_spec(share: float, seed: int = 0, **training: Any) -> RunSpec:
    """A small spec that trains on a share of the data."""
    document = small_spec("fedavg").to_dict()
    document["data"]["share"] = share
    document["training"] |= training
    return parse_spec({**document, "seed": seed})


def write_run(folder: Path, spec: RunSpec, error: float, *, data: str = "same", steps: int = 100, naive: bool = True) -> Path:
    """Write what a comparison reads of a finished run: every domain's error is ``error`` times seasonal naive's."""
    folder.mkdir(parents=True)
    (folder / "spec.toml").write_text(spec.to_toml(), encoding="utf-8")
    samples = round(POINTS * spec.data.share)
    sites = {"a": {"samples": samples // 2, "loss": 1.0}, "b": {"samples": samples - samples // 2, "loss": 1.0}}
    rows: list[dict[str, Any]] = [{"kind": "round", "round": i + 1, "sites": {name: sites[name]}} for i, name in enumerate("ab")]
    shared = {"kind": "result", "task": "forecast", "horizon": 16, "context": 64, "windows": 8, "seed": spec.seed, "code": "c0de"}
    shared |= {"method": spec.method.name, "data_fingerprint": data, "gradient_steps": steps}
    for scale, domain in enumerate((*DOMAINS, *HELD_OUT), start=1):
        own = {**shared, "domain": domain, "held_out": domain in HELD_OUT}
        rows.append({**own, "model": spec.method.name, "mse": error * scale, "mase": None if domain == DOMAINS[0] else error})
        if naive:
            rows.append({**own, "model": "seasonal_naive", "mse": float(scale), "mase": None if domain == DOMAINS[0] else 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def share_runs(folder: Path, shares: tuple[float, ...] = SHARES, seeds: int = 2) -> list[Path]:
    """Write runs over shares and seeds on the curve."""
    return [
        write_run(folder / f"{share:g}-{seed}", share_spec(share, seed), curve(POINTS * share) + 0.001 * (-1) ** seed)
        for share in shares
        for seed in range(seeds)
    ]


def prox_runs(folder: Path, values: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)) -> list[Path]:
    """Write runs of FedProx that differ in ``mu``."""
    return [
        write_run(folder / f"{mu:g}", parse_spec(small_spec("fedprox").to_dict(), [f"method.mu={mu}"]), 0.8 + 0.1 * mu) for mu in values
    ]
