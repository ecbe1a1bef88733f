"""Whether the number format changes what a model learns: whole runs by seed, in float32, in float32 through oneDNN, and in bfloat16.

Every run trains on the same bundled domains and scores the same test windows; runs of a seed differ in the arithmetic only. Shown are
each setting's differences from float32 of the same seed, in per cent: mean over the seeds and the largest; beside them the spread
between seeds of float32 itself, as a standard deviation. Test scores are geometric means over domains relative to seasonal naive.
Goal: a mean difference of at most 0.3 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json
from fedcast.run.pretrain import pretrain
from fedcast.spec import parse_spec

DOMAINS = ["activity", "economics", "energy", "medical", "nature", "traffic"]
SETTINGS = {
    "float32": ["training.precision=float32", "training.products=default"],
    "float32, oneDNN": ["training.precision=float32", "training.products=onednn"],
    "bfloat16": ["training.precision=bfloat16", "training.products=default"],
    "bfloat16, oneDNN": ["training.precision=bfloat16", "training.products=onednn"],
}
MEASURES = {"validation": "validation loss", "mse": "test MSE", "wql": "test WQL"}


def score(overrides: Sequence[str], seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one run and return its validation loss and test scores."""
    spec = parse_spec(
        {
            "seed": seed,
            "data": {"domains": DOMAINS},
            "model": {"size": arguments.size, "context": arguments.context},
            "method": {"name": "fedavg"},
            "federation": {"rounds": arguments.rounds, "local_steps": arguments.steps},
            "evaluation": {"every": arguments.rounds, "windows": arguments.windows, "validation_windows": arguments.windows},
        },
        ["training.device=cpu", *overrides],
    )
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain(spec, output=Path(folder) / "run")
        results = run.results()
        scores = {"validation": float(run.rows("validation")[-1]["mean"])}
    by_model = {model: frame.set_index("domain") for model, frame in results.groupby("model")}
    for name in ("mse", "wql"):
        ratios = (by_model["fedavg"][name] / by_model["seasonal_naive"][name]).dropna()
        scores[name] = statistics.geometric_mean(ratios.loc[ratios > 0])
    return scores


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="steps a domain and round")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS)[:3], choices=list(SETTINGS), help="the first is compared with")
    parser.add_argument("--also", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="another setting")
    parser.add_argument("--quick", action="store_true", help="two seeds of one short round")
    parser.add_argument("--output", type=Path, help="write the scores as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.context, arguments.rounds, arguments.steps, arguments.seeds, arguments.windows = 64, 1, 2, 2, 4
    chosen = {name: SETTINGS[name] for name in arguments.settings} | {name: overrides for name, *overrides in arguments.also}
    base, *others = chosen
    # Settings in turn within a seed, seeds as repeats.
    scores = [{name: score(overrides, seed, arguments) for name, overrides in chosen.items()} for seed in range(arguments.seeds)]
    rows = []
    for name, words in MEASURES.items():
        of_base = [by_setting[base][name] for by_setting in scores]
        mean = statistics.mean(of_base)
        row = [words, f"{mean:.4f}", f"{100 * statistics.stdev(of_base) / mean:.2f} %"]
        for other in others:
            changes = [100 * (by_setting[other][name] / by_setting[base][name] - 1) for by_setting in scores]
            row += [f"{statistics.mean(changes):+.3f} %", f"{max(changes, key=abs):+.3f} %"]
        rows.append(row)
    steps = arguments.rounds * arguments.steps * len(DOMAINS)
    print(f"{processor_name()}, size {arguments.size}, {len(DOMAINS)} domains, {steps} steps a run, {arguments.seeds} seeds\n")
    columns = ["", base, "spread between seeds"]
    for other in others:
        columns += [f"{other}: mean difference", "largest"]
    print(markdown(columns, rows))
    write_json(arguments.output, {"processor": processor_name(), "steps": steps, "scores": scores})


if __name__ == "__main__":
    main()
