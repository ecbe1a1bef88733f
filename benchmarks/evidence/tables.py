"""Tables of the evidence page, from result rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.tables import markdown
from fedcast.evaluate.statistics import geometric_mean, paired_difference, relative
from fedcast.methods.base import METHODS
from fedcast.run.diagnose import conflict_rows, coreset_distances
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run

REFERENCE = "seasonal_naive"
MAIN = "fedtrl"
BOUNDS = ("fedpm, oracle",)
Runs = Mapping[tuple[str, int], Run]
_NAMES = {"mse": "MSE", "mae": "MAE", "mase": "MASE", "wql": "WQL", "reconstruction_mse": "MSE", "reconstruction_nmse": "window units"}


def relative_scores(rows: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str] = ("mse", "mase", "wql")) -> str:
    """Return geometric means over domains relative to the seasonal naive forecast: mean and deviation over seeds, held-out ones first."""
    scores = relative(rows, metrics=list(metrics))
    header = ["model", *(f"{where} {_NAMES[m]}" for where in ("held-out", "in-domain") for m in metrics), "coverage80, held out"]
    body = []
    for label in labels:
        own = scores[scores.model == label]
        cells = [_spread(own[own.held_out == held], m) for held in (True, False) for m in metrics]
        body.append([label, *cells, f"{own[own.held_out].coverage80.astype(float).mean():.3f}"])
    return markdown(header, _best_in_bold(header, body))


def reconstruction(rows: pd.DataFrame, labels: Sequence[str]) -> str:
    """Return reconstruction errors, means over five mask ratios and over domains, and the training domains' at each ratio."""
    ratios = [name for name in rows.columns if str(name).startswith("reconstruction_mse_")]
    header = ["model", *(f"{where}, {unit}" for unit in ("MSE", "window units") for where in ("in-domain", "held-out"))]
    body = []
    for label in labels:
        own = rows[rows.model == label]
        cells = [_spread(own[own.held_out == held], "reconstruction_mse") for held in (False, True)]
        cells += [_spread(own[own.held_out == held], "reconstruction_nmse", np.mean) for held in (False, True)]
        body.append([label, *cells, *(f"{geometric_mean(own[~own.held_out][name].astype(float)):.3f}" for name in ratios)])
    header += [f"{name.split('_')[-1]} %" for name in ratios]
    return markdown(header, _best_in_bold(header, body))


def long_horizons(rows: pd.DataFrame, labels: Sequence[str], metric: str) -> str:
    """Return standardised errors a set, the mean over horizons and seeds; the best trained row in bold."""
    sets = sorted(rows.domain.unique())
    means = rows.groupby(["model", "domain"])[metric].mean()
    seeds = rows.groupby(["model", "seed"])[metric].mean()
    body = []
    for label in labels:
        mean = seeds[label]
        spread = f" ± {mean.std(ddof=1):.3f}" if len(mean) > 1 and label != REFERENCE else ""
        body.append([label, *(f"{means[label, name]:.3f}" for name in sets), f"{mean.mean():.3f}{spread}"])
    header = ["model", *sets, "mean"]
    return markdown(header, _best_in_bold(header, body))


def by_horizon(rows: pd.DataFrame, labels: Sequence[str], metric: str) -> str:
    """Return standardised errors a set and horizon, the mean over seeds."""
    means = rows.groupby(["domain", "horizon", "model"])[metric].mean().unstack("model")
    body = [
        [str(domain), str(horizon), *(f"{means.loc[(domain, horizon), label]:.3f}" for label in labels)] for domain, horizon in means.index
    ]
    return markdown(["set", "horizon", *labels], body)


def _best_in_bold(header: Sequence[str], body: list[list[str]]) -> list[list[str]]:
    """Put the smallest error of each column in bold; the seasonal naive row and bounds that nobody could know do not compete."""
    for column, name in enumerate(header):
        if column == 0 or name.startswith("coverage80"):
            continue
        values = [np.nan if row[0] in (REFERENCE, *BOUNDS) else _number(row[column]) for row in body]
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            body[best][column] = f"**{body[best][column]}**"
    return body


def _number(cell: str) -> float:
    try:
        return float(cell.split()[0])
    except ValueError:
        return float("nan")


def _spread(rows: pd.DataFrame, metric: str, mean: Any = geometric_mean) -> str:
    if rows.empty or rows[metric].isna().all():
        return "-"
    by_seed = rows.groupby("seed")[metric].apply(lambda values: mean(values.astype(float)))
    return f"{by_seed.mean():.3f} ± {by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else f"{by_seed.mean():.3f}"


def differences(rows: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str], main: str = MAIN) -> str:
    """Return paired differences of a row against each other one; a ratio below 1 says that it has less error."""
    intervals = ["bootstrap", "over seeds", "over domains"]
    header = [f"{main} against", *(cell for m in metrics for cell in (f"{_NAMES[m]} ratio", *intervals)), f"wins ({_NAMES[metrics[0]]})"]
    averaged = rows.groupby(["model", "seed", "domain"], as_index=False)[list(metrics)].mean()
    body = []
    for label in labels:
        cells, wins = [], ""
        for metric in metrics:
            d = paired_difference(averaged[averaged.model == main], averaged[averaged.model == label], metric)
            bounds = ((d.low, d.high), (d.seed_low, d.seed_high), (d.domain_low, d.domain_high))
            cells += [f"{d.ratio:.3f}", *(_interval(low, high) for low, high in bounds)]
            wins = wins or f"{d.wins} of {d.pairs}"
        body.append([label, *cells, wins])
    return markdown(header, body)


def _interval(low: float, high: float) -> str:
    if np.isnan(low):
        return "-"
    text = f"{np.exp(low):.3f} to {np.exp(high):.3f}"
    return f"**{text}**" if (low > 0) == (high > 0) else text


def by_domain(rows: pd.DataFrame, labels: Sequence[str], metric: str) -> str:
    """Return the table domain by model, relative to the seasonal naive forecast; held-out domains last."""
    scores = relative(rows, metrics=[metric])
    body = []
    for (held, domain), part in scores.groupby(["held_out", "domain"]):
        values = [geometric_mean(part[part.model == label][metric].astype(float)) for label in labels]
        best = int(np.nanargmin(values)) if np.isfinite(values).any() else -1
        cells = [f"**{v:.3f}**" if i == best else f"{v:.3f}" for i, v in enumerate(values)]
        body.append([f"{domain}{' (held out)' if held else ''}", *cells])
    return markdown(["domain", *labels], body)


def costs(runs: Runs, labels: Sequence[str]) -> str:
    """Return what a run of each row took (first seed); bytes a client and round leave out the models for unseen domains (a median)."""
    header = [
        "model",
        "KB up",
        "KB down",
        "weights",
        "of them sent",
        "gradient steps",
        "MB, all rounds",
        "seconds a round",
        "best validation",
    ]
    body = []
    for label in labels:
        run = next(run for (name, _), run in runs.items() if name == label)
        row, rounds = run.results().iloc[0], run.rows("round")
        up = np.median([r["bytes_up"] / max(1, len(r["sites"])) for r in rounds]) / 1e3
        down = np.median([r["bytes_down"] / max(1, len(r["sites"])) for r in rounds]) / 1e3
        seconds = np.median([r["seconds"] for r in rounds])
        best = min(v["mean"] for v in run.rows("validation"))
        sizes = [f"{int(row.parameters):,}", f"{int(row.parameters_sent):,}", str(row.gradient_steps)]
        sent = [f"{up:,.0f}", f"{down:,.0f}", *sizes[:2], f"{row.bytes_total / 1e6:,.1f}"]
        if METHODS[row.method].pooled:  # its data were sent, and no weights
            sent = ["-", "-", sizes[0], "-", "-"]
        body.append([label, *sent[:4], sizes[2], sent[4], f"{seconds:.2f}", f"{best:.3f}"])
    return markdown(header, body)


def conflict(runs: Runs, labels: Sequence[str]) -> str:
    """Return share of negative cosines and mean cosine of the domains' encoder gradients over the rounds, the mean over seeds."""
    found = {label: [conflict_rows(RunFolder(run.folder)) for (name, _), run in runs.items() if name == label] for label in labels}
    frames = {label: pd.concat(parts).groupby("round").mean(numeric_only=True) for label, parts in found.items()}
    rounds = sorted(set.intersection(*(set(frame.index) for frame in frames.values())))
    header = ["round", *(f"{label}: negative, mean" for label in labels)]
    body = [
        [str(number), *(f"{100 * f.loc[number, 'negative']:.0f} %, {f.loc[number, 'mean']:.3f}" for f in frames.values())]
        for number in rounds
    ]
    return markdown(header, body)


def coresets(runs: Runs, label: str) -> str:
    """Return how far core-set vectors lie from their nearest training window, a row a site, all seeds together."""
    frame = pd.concat([coreset_distances(RunFolder(run.folder)) for (name, _), run in runs.items() if name == label])
    body = [[str(site), *(f"{part.distance.quantile(q):.2f}" for q in (0.0, 0.25, 0.5, 0.75, 1.0))] for site, part in frame.groupby("site")]
    return markdown(["site", "nearest", "a quarter", "median", "three quarters", "farthest"], body)


def set_up(runs: Iterable[Run], codes: Iterable[object], seeds: int) -> str:
    """Return one line on seeds, the machine that trained, and code."""
    about = [RunFolder(run.folder).about() for run in runs]

    def all_of(key: str) -> str:
        return " and ".join(sorted({str(each.get(key, "torch")) for each in about}))

    what = f"{all_of('processor')}, torch {all_of('torch')}, precision {all_of('precision')}, kernels {all_of('kernels')}"
    return f"Seeds 0 to {seeds - 1}; {what}; code {', '.join(sorted({str(code)[:12] for code in codes}))}."


def write(tables: Mapping[str, str], page: Path) -> None:
    """Put each table between its markers."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{page} has no markers {begin} ... {end}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
