"""Does federating help? Trains every method and ablation on the same domains with equally many gradient steps, several seeds each.

Run it with ``make evidence`` (hours; a run that is complete is not repeated, a killed one is resumed). It writes the tables of
``docs/evidence.md`` between their markers and nothing else; the sentences around them are written by people who read the tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fedcast.evaluate.statistics import geometric_mean, paired_difference, relative
from fedcast.run.diagnose import gradient_conflict
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run, pretrain
from fedcast.run.serving import serve_otherwise
from fedcast.spec import RunSpec, load_spec

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"
REFERENCE = "seasonal_naive"
MAIN = "fedtrl"

# Methods with personal parts serve unseen domains by the same mixture, so that serving does not stand in for the method.
CONTROLS = {
    "fedtrl": {"name": "fedtrl"},
    "fedavg": {"name": "fedavg"},
    "fedavg_encoder": {"name": "fedavg_encoder", "serving": "mixture"},
    "central": {"name": "central"},
    "central_balanced": {"name": "central_balanced"},
    "local": {"name": "local", "serving": "mixture"},
}
# The same training as a control, other models for unseen domains.
SERVED = {
    "fedtrl, mean decoder": ("fedtrl", "shadow"),
    "fedavg_encoder, mean decoder": ("fedavg_encoder", "shadow"),
    "local, one by one": ("local", "each"),
}
ABLATIONS = {
    "no domain loss": {"name": "fedtrl", "alpha": 0.0},
    "no alignment": {"name": "fedtrl", "beta": 0.0},
    "neither": {"name": "fedtrl", "alpha": 0.0, "beta": 0.0},
    "sample weights": {"name": "fedtrl", "aggregation": "samples"},
    "random labels": {"name": "fedtrl", "labels": "random"},
}


def train(base: RunSpec, label: str, method: dict[str, object], seed: int, output: Path) -> Run:
    """Train one row with one seed, or return it where it is complete."""
    document = {**base.to_dict(), "name": "evidence", "seed": seed, "method": method}
    start = time.perf_counter()
    run = pretrain(RunSpec.model_validate(document), output=output / label.replace(" ", "-") / f"seed-{seed}")
    print(f"{label}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return run


def collect(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """Return the test scores of all runs, the trained model's rows named by their label."""
    frames = []
    for (label, _), run in runs.items():
        rows = run.results()
        rows.loc[rows.model == rows.method, "model"] = label
        frames.append(rows)
        for name, (of, serving) in SERVED.items():
            if of == label:
                frames.append(serve_otherwise(RunFolder(run.folder), serving).assign(model=name))
    return pd.concat(frames, ignore_index=True)


def summary(rows: pd.DataFrame, labels: list[str]) -> str:
    """Return the table of geometric means over domains and seeds, relative to the seasonal naive forecast."""
    scores = relative(rows, metrics=["mse", "wql"])
    lines = [
        "| model | held-out MSE | held-out WQL | in-domain MSE | in-domain WQL | coverage of the 80 % interval, held out |",
        "|---|---|---|---|---|---|",
    ]
    for label in labels:
        own = scores[scores.model == label]
        cells = [_spread(own[own.held_out == held], metric) for held in (True, False) for metric in ("mse", "wql")]
        cover = own[own.held_out].coverage80.astype(float).mean()
        lines.append(f"| {label} | {' | '.join(cells)} | {cover:.3f} |")
    return "\n".join(lines)


def _spread(rows: pd.DataFrame, metric: str) -> str:
    by_seed = rows.groupby("seed")[metric].apply(lambda values: geometric_mean(values.astype(float)))
    return f"{by_seed.mean():.3f} ± {by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else f"{by_seed.mean():.3f}"


def differences(rows: pd.DataFrame, labels: list[str], *, held_out: bool) -> str:
    """Return paired differences of the main method against each row: ratio below 1 says the main method has less error."""
    part = rows[rows.held_out == held_out]
    intervals = "bootstrap | over seeds | over domains"
    lines = [f"| fedtrl against | MSE ratio | {intervals} | WQL ratio | {intervals} | wins (MSE) |", f"|{'---|' * 10}"]
    for label in labels:
        cells = []
        wins = ""
        for metric in ("mse", "wql"):
            d = paired_difference(part[part.model == MAIN], part[part.model == label], metric)
            bounds = ((d.low, d.high), (d.seed_low, d.seed_high), (d.domain_low, d.domain_high))
            cells += [f"{d.ratio:.3f}", *(_interval(low, high) for low, high in bounds)]
            wins = wins or f"{d.wins} of {d.pairs}"
        lines.append(f"| {label} | {' | '.join(cells)} | {wins} |")
    return "\n".join(lines)


def _interval(low: float, high: float) -> str:
    if np.isnan(low):
        return "-"
    text = f"{np.exp(low):.3f} to {np.exp(high):.3f}"
    return f"**{text}**" if (low > 0) == (high > 0) else text


def by_domain(rows: pd.DataFrame, labels: list[str], metric: str) -> str:
    """Return the table domain by model, relative to the seasonal naive forecast; held-out domains last."""
    scores = relative(rows, metrics=[metric])
    lines = [f"| domain | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for (held, domain), part in scores.groupby(["held_out", "domain"]):
        values = [geometric_mean(part[part.model == label][metric].astype(float)) for label in labels]
        best = int(np.nanargmin(values)) if not np.isnan(values).all() else -1
        cells = [f"**{v:.3f}**" if i == best else f"{v:.3f}" for i, v in enumerate(values)]
        lines.append(f"| {domain}{' (held out)' if held else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(runs: dict[tuple[str, int], Run], labels: list[str]) -> str:
    """Return gradient steps, bytes and seconds of a run of each row (first seed)."""
    lines = ["| model | gradient steps | MB sent, all rounds | wall seconds | best validation loss |", "|---|---|---|---|---|"]
    for label in labels:
        run = next(run for (name, _), run in runs.items() if name == label)
        row = run.results().iloc[0]
        best = min(v["mean"] for v in run.rows("validation"))
        lines.append(f"| {label} | {row.gradient_steps} | {row.bytes_total / 1e6:.1f} | {row.wall_seconds:.0f} | {best:.4f} |")
    return "\n".join(lines)


def why(runs: dict[tuple[str, int], Run], labels: list[str]) -> str:
    """Return the diagnostics: gradient conflict between domains, discriminator accuracy against chance, feature variance, weights."""
    lines = [
        "| model | negative gradient cosines | mean cosine | discriminator accuracy | chance "
        "| feature variance, first to last round | smallest and largest weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in labels:
        run = next(run for (name, _), run in runs.items() if name == label)
        cells = ["-", "-"]
        if (run.final / "model.safetensors").is_file():
            share, cosine = gradient_conflict(RunFolder(run.folder))
            cells = [f"{100 * share:.0f} %", f"{cosine:.3f}"]
        rounds = run.rows("round")
        cells += [_last(rounds, "discriminator_accuracy"), _last(rounds, "discriminator_chance")]
        cells.append(f"{_mean(rounds[0], 'feature_variance')} to {_mean(rounds[-1], 'feature_variance')}")
        weights = [site["weight"] for site in rounds[-1]["sites"].values() if "weight" in site]
        cells.append(f"{min(weights):.3f}, {max(weights):.3f}" if len(weights) > 1 else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(row: dict[str, dict[str, dict[str, float]]], name: str) -> str:
    values = [site[name] for site in row["sites"].values() if name in site]
    return f"{np.mean(values):.3f}" if values else "-"


def _last(rounds: list[dict[str, dict[str, dict[str, float]]]], name: str) -> str:
    return _mean(rounds[-1], name)


def write(tables: dict[str, str], page: Path) -> None:
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


def main() -> None:
    """Train what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spec", type=Path, default=HERE / "evidence.toml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    parser.add_argument("--rows", nargs="*", help="train only these rows and write no page")
    arguments = parser.parse_args()
    base = load_spec(arguments.spec, arguments.overrides)
    rows = {**CONTROLS, **ABLATIONS}
    chosen = arguments.rows or list(rows)
    runs = {}
    for seed in range(arguments.seeds):
        for label in chosen:
            runs[label, seed] = train(base, label, rows[label], seed, arguments.output)
    if arguments.rows:
        print(summary(collect(runs), [*chosen, REFERENCE]))
        return
    scores = collect(runs)
    scores.to_parquet(arguments.output / "results.parquet")
    others = [label for label in CONTROLS if label != MAIN]
    machine = f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {os.cpu_count()} cores, torch {torch.__version__}"
    machine += f", precision {RunFolder(next(iter(runs.values())).folder).about()['precision']}"
    commits = ", ".join(sorted({str(code)[:12] for code in scores.code}))
    tables = {
        "set-up": f"Command: `make evidence` (seeds 0 to {arguments.seeds - 1}). Machine: {machine}. Code: {commits}.",
        "summary": summary(scores, [*CONTROLS, *SERVED, REFERENCE]),
        "held-out": differences(scores, [*others, *SERVED, REFERENCE], held_out=True),
        "in-domain": differences(scores, [*others, REFERENCE], held_out=False),
        "ablations": summary(scores, [MAIN, *ABLATIONS]),
        "ablation-differences": differences(scores, list(ABLATIONS), held_out=True),
        "domains-mse": by_domain(scores, list(CONTROLS), "mse"),
        "domains-wql": by_domain(scores, list(CONTROLS), "wql"),
        "why": why(runs, [*CONTROLS, *ABLATIONS]),
        "costs": costs(runs, list(CONTROLS)),
    }
    write(tables, arguments.page)


if __name__ == "__main__":
    main()
