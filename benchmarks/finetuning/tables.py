"""Tables of the page on fine-tuning, from result rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.evidence.tables import REFERENCE, Runs, long_horizons
from benchmarks.tables import markdown
from fedcast.evaluate.statistics import paired_difference
from fedcast.run.landscape import Surroundings, surroundings
from fedcast.run.medical import medical_rows

MEDICAL = ("subjects", "sites", "modality", "real", "heartgpt")
SHARPNESS = ("ttm", "native")
BENDS = ("zero_shot", "zero_shot, random", "zero_shot, mixed 0.7", "full", "sff 0.7", "from scratch")
_SCORES = {"rmse": "RMSE", "mae": "MAE", "smape": "sMAPE"}


def collect(runs: Runs) -> pd.DataFrame:
    """Return the test scores of all runs, the fine-tuned model's rows named by their label."""
    frames = []
    for (label, _), run in runs.items():
        rows = run.results()
        frames.append(rows.assign(model=rows.model.where(rows.model != rows.method, label)))
    # A folder of whoever ran it; the study says what the starting model is.
    return pd.concat(frames, ignore_index=True).drop(columns="checkpoint")


def of_study(name: str, rows: pd.DataFrame, runs: Runs) -> dict[str, str]:
    """Return the tables of a study by the names of their markers."""
    labels = list(dict.fromkeys(label for label, _ in runs))
    if name in MEDICAL:
        main, metric = "fedavg", "batch_rmse"
        scores = medical(runs, labels)
    else:
        main, metric = {"trace": "linear probing"}.get(name, "full"), "mse"
        scores = long_horizons(rows, [*labels, REFERENCE], "mse")
    others = [label for label in labels if label != main]
    found = {name: scores, f"{name}-differences": differences(rows, main, others, metric), f"{name}-costs": costs(runs, labels)}
    return found | ({f"{name}-sharpness": bends(runs)} if name in SHARPNESS else {})


def bends(runs: Runs) -> str:
    """Return how sharply the loss bends at models before and after training, on the test windows of two sets, mean over seeds."""
    seeds = sorted({seed for _, seed in runs})
    found: dict[str, list[Surroundings]] = {}
    for seed in seeds:
        for domain in ("etth1", "weather"):
            around = surroundings([runs[label, seed].folder for label in BENDS], domain=domain, windows=16, seed=seed)
            for label, each in zip(BENDS, around, strict=True):
                found.setdefault(label, []).append(each)
    header = ["model", "loss", "tr(H)", "‖H‖ (Frobenius)", "tr(H) / ‖H‖", "largest eigenvalue"]
    body = []
    for label, each in found.items():
        values = [[a.loss, a.sharpness.trace, a.sharpness.frobenius, a.sharpness.ratio, a.sharpness.largest] for a in each]
        body.append([label, *(f"{value:,.3g}" for value in np.mean(values, axis=0))])
    return markdown(header, body)


def medical(runs: Runs, labels: Sequence[str]) -> str:
    """Return the protocol's scores by group of clients, mean and deviation over seeds; all but sMAPE on the [0, 1] scale."""
    frames = [medical_rows(run).assign(label=label, seed=seed) for (label, seed), run in runs.items()]
    frame = pd.concat(frames, ignore_index=True)
    frame["label"] = frame.label.where(frame.model != REFERENCE, REFERENCE)
    sizes = frame.groupby("group").clients.first()
    groups = ["all", *sorted(set(frame.group) - {"all"})] if len(sizes) > 2 else ["all"]
    header = ["row", *(f"{g} ({sizes[g]}) {_SCORES[m]}" for g in groups for m in (_SCORES if g == "all" else ["rmse"]))]
    body = []
    for label in [*labels, REFERENCE]:
        own = frame[frame.label == label]
        cells = [_spread(own[own.group == g], m) for g in groups for m in (_SCORES if g == "all" else ["rmse"])]
        body.append([label, *cells])
    return markdown(header, body)


def _spread(rows: pd.DataFrame, metric: str) -> str:
    values = rows.groupby("seed")[metric].mean()
    digits = 2 if metric == "smape" else 4
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 and values.std() > 0 else "")


def differences(rows: pd.DataFrame, main: str, labels: Sequence[str], metric: str) -> str:
    """Return paired differences of each row against one; a ratio below 1 says that the row has less error."""
    header = [f"row against {main}", "ratio", "bootstrap", "over seeds", "over clients", "wins"]
    averaged = rows.groupby(["model", "seed", "domain"], as_index=False)[[metric]].mean()
    body = []
    for label in labels:
        d = paired_difference(averaged[averaged.model == label], averaged[averaged.model == main], metric)
        bounds = ((d.low, d.high), (d.seed_low, d.seed_high), (d.domain_low, d.domain_high))
        body.append([label, f"{d.ratio:.3f}", *(_interval(low, high) for low, high in bounds), f"{d.wins} of {d.pairs}"])
    return markdown(header, body)


def _interval(low: float, high: float) -> str:
    if np.isnan(low):
        return "-"
    text = f"{np.exp(low):.3f} to {np.exp(high):.3f}"
    return f"**{text}**" if (low > 0) == (high > 0) else text


def costs(runs: Runs, labels: Sequence[str]) -> str:
    """Return what a run of each row took (first seed)."""
    header = ["row", "weights trained", "of", "sent", "KB a client and round, up", "MB, all rounds", "gradient steps", "seconds", "peak MB"]
    body = []
    for label in labels:
        run = next(run for (name, _), run in runs.items() if name == label)
        row = run.results().iloc[0]
        up = [r["bytes_up"] / max(1, len(r["sites"])) for r in run.rows("round") if r["bytes_up"]]
        body.append(
            [
                label,
                *(f"{int(row[name]):,}" for name in ("parameters_trained", "parameters", "parameters_sent")),
                f"{np.median(up) / 1e3:,.0f}" if up else "0",
                f"{row.bytes_total / 1e6:,.1f}",
                str(row.gradient_steps),
                f"{row.wall_seconds:.0f}",
                f"{row.peak_memory / 1e6:,.0f}",
            ]
        )
    return markdown(header, body)
