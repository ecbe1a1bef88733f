"""Series forecast a second, beside the architecture of Chronos-Bolt tiny with random weights; and ``fedcast forecast``, phase by phase.

Context 512, horizon 96 in one pass, the same batches, in turns, both cores. "model" is the model alone on a batch, with torch's own
threads; "package" is what a person calls on series: ``Forecaster.predict_arrays``, and ``ChronosBoltPipeline.predict``. FLOPs are those
of one series as torch counts them: Chronos-Bolt decodes one token, whatever the horizon, so that a model of its own arithmetic stands
beside the one of its own number of parameters. "64 steps a pass" is Chronos-Bolt as it is published, and fedcast's default: a horizon of
96 is rolled, by fedcast along the point forecast, by Chronos-Bolt along nine quantiles.

Chronos-Bolt needs its package, in an environment of its own; without it its rows say so:

    python3 -m venv ../chronos && ../chronos/bin/pip install -c constraints.txt torch && ../chronos/bin/pip install -c constraints.txt -e .
    ../chronos/bin/pip install -c constraints.txt chronos-forecasting==2.3.2
    ../chronos/bin/python -m benchmarks.forecast_throughput
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.tables import markdown, write_json
from fedcast.cli.output import save_frame
from fedcast.data.frames import read_frame
from fedcast.models.base import SIZES, ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.patch import PatchTransformer

CONTEXT, HORIZON = 512, 96
PEER = "Chronos-Bolt tiny"
ABSENT = "not installed: pip install chronos-forecasting==2.3.2"
PHASES = ("reading", "forecasting", "stamps", "writing")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Contestant:
    """One way to forecast: ``run`` forecasts series [S, 512] in batches."""

    name: str
    what: str
    precision: str
    parameters: int
    flops: float
    run: Callable[[npt.NDArray[np.float32]], Any]


def fedcast_model(size: str, horizon: int = HORIZON) -> PatchTransformer:
    """Return a model of a size with random weights."""
    return PatchTransformer(ModelConfig(**SIZES[size]._asdict(), context=CONTEXT, horizon=horizon, patch=16, size=size)).eval()


def chronos_model(horizon: int = HORIZON) -> Any:
    """Return Chronos-Bolt tiny's architecture with random weights (8.6M parameters; the published one has 64 steps a pass)."""
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    config = T5Config(
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        dense_act_fn="relu",
        feed_forward_proj="relu",
        dropout_rate=0.1,
        pad_token_id=0,
        decoder_start_token_id=0,
        vocab_size=2,
    )
    config.chronos_config = {
        "context_length": 2048,
        "prediction_length": horizon,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": [level / 10 for level in range(1, 10)],
        "use_reg_token": True,
    }
    return ChronosBoltModelForForecasting(config).eval()


def _flops(forward: Callable[[torch.Tensor], object]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward(torch.randn(4, CONTEXT))
    return counter.get_total_flops() / 4


def _in_batches(forward: Callable[[torch.Tensor], object], batch: int) -> Callable[[npt.NDArray[np.float32]], None]:
    def run(series: npt.NDArray[np.float32]) -> None:
        with torch.inference_mode():
            for start in range(0, len(series), batch):
                forward(torch.from_numpy(series[start : start + batch]))

    return run


def of_fedcast(size: str, batch: int) -> Iterator[Contestant]:
    """Yield fedcast's ways for a size."""
    for precision, dtype in DTYPES.items():
        model = fedcast_model(size).to(dtype)

        def forward(x: torch.Tensor, model: PatchTransformer = model) -> object:
            return model(x, x.isfinite(), HORIZON)

        flops = _flops(lambda x: fedcast_model(size).bfloat16()(x, x.isfinite(), HORIZON))
        shape = (precision, sum(p.numel() for p in model.parameters()), flops)
        yield Contestant(f"fedcast {size}", "model", *shape, _in_batches(forward, batch))
        for what, horizon in (("package", HORIZON), ("package, 64 steps a pass", 64)):
            forecaster = Forecaster(fedcast_model(size, horizon).to(dtype))
            yield Contestant(
                f"fedcast {size}", what, *shape, lambda x, forecaster=forecaster: forecaster.predict_arrays(x, HORIZON, batch_size=batch)
            )


def of_chronos(batch: int) -> Iterator[Contestant]:
    """Yield Chronos-Bolt's ways."""
    from chronos.chronos_bolt import ChronosBoltPipeline

    for precision, dtype in DTYPES.items():
        model = chronos_model().to(dtype)
        flops = _flops(chronos_model().bfloat16())
        shape = (precision, sum(p.numel() for p in model.parameters()), flops)
        yield Contestant(PEER, "model", *shape, _in_batches(model, batch))
        for what, horizon in (("package", HORIZON), ("package, 64 steps a pass", 64)):
            pipeline = ChronosBoltPipeline(chronos_model(horizon).to(dtype))

            def forward(x: torch.Tensor, pipeline: Any = pipeline) -> object:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that 96 is over 64
                    return pipeline.predict(x, prediction_length=HORIZON)

            yield Contestant(PEER, what, *shape, _in_batches(forward, batch))


def throughput(contestants: Sequence[Contestant], count: int, repeats: int) -> list[dict[str, Any]]:
    """Time all in turns, another one first each time; return a row for each, its ratio to the peer's way of the same kind and precision."""
    series = np.random.default_rng(0).normal(10, 2, (count, CONTEXT)).astype(np.float32)
    seconds: list[list[float]] = [[] for _ in contestants]
    for repeat in range(repeats + 1):
        for place in range(len(contestants)):
            index = (place + repeat) % len(contestants)
            # the rolled ones take up to ten times as long: fewer series are enough to tell
            part = series[: max(1, count // 4)] if "64" in contestants[index].what else series
            start = time.perf_counter()
            contestants[index].run(part)
            if repeat:  # the first one warms up
                seconds[index].append((time.perf_counter() - start) / len(part))
    peers = {(c.what, c.precision): s for c, s in zip(contestants, seconds, strict=True) if c.name == PEER}
    rows = []
    for contestant, times in zip(contestants, seconds, strict=True):
        row = {key: value for key, value in asdict(contestant).items() if key != "run"}
        row["series_a_second"] = 1 / statistics.median(times)
        peer = peers.get((contestant.what, contestant.precision))
        row["ratio"] = None if peer is None else statistics.median(b / a for a, b in zip(times, peer, strict=True))
        rows.append(row)
    return rows


def phases(size: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """Time ``fedcast forecast`` on so many hourly series: as a process, and its phases one by one in this one."""
    fedcast_model(size).save_pretrained(folder / "model")
    stamps = pd.date_range("2024-01-01", periods=CONTEXT, freq="h")
    values = np.random.default_rng(0).normal(10, 2, (count, CONTEXT)).round(3)
    names = np.repeat([f"series-{i:05}" for i in range(count)], CONTEXT)
    save_frame(frame := pd.DataFrame({"unique_id": names, "ds": np.tile(stamps, count), "y": values.ravel()}), folder / "in.parquet")
    save_frame(frame, folder / "in.csv")
    return [_phases(folder, ending, precision) for ending in ("parquet", "csv") for precision in DTYPES]


def _phases(folder: Path, ending: str, precision: str) -> dict[str, Any]:
    model, source, target = folder / "model", folder / f"in.{ending}", folder / f"out.{ending}"
    words = ["--model", model, "--data", source, "--horizon", str(HORIZON), "--precision", precision, "--output", target]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fedcast", "forecast", *words], check=True, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = {"files": ending, "precision": precision, "process": time.perf_counter() - start}
    marks = [time.perf_counter()]
    history = read_frame(source)
    marks.append(time.perf_counter())
    told: list[float] = []
    forecaster = Forecaster.from_pretrained(model)
    frame = forecaster.predict(history, HORIZON, precision=precision, progress=lambda done, total: told.append(time.perf_counter()))
    marks += [told[-1], time.perf_counter()]
    save_frame(frame, target)
    marks.append(time.perf_counter())
    return row | dict(zip(PHASES, np.diff(marks).tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["mini", "tiny"])
    parser.add_argument("--batch", type=int, default=64, help="series a batch")
    parser.add_argument("--series", type=int, default=512, help="series a timing; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=10_000, help="series in the files that `fedcast forecast` is timed on; 0 for none")
    parser.add_argument("--quick", action="store_true", help="few series of a small model")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.batch, options.repeats = ["nano"], 4, 1
        options.series, options.files = min(options.series, 8), min(options.files, 20)
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(f"{machine.processor_name()}, {threads} threads, torch {torch.__version__}, load average before the run {load:.2f}.")
    rows, whole = [], []
    if options.series:
        rows = throughput(_contestants(options.sizes, options.batch), options.series, options.repeats)
        print(f"Batches of {options.batch}, context {CONTEXT}, horizon {HORIZON}.\n\n{_table(rows)}\n")
    if options.files:
        with tempfile.TemporaryDirectory() as folder:
            whole = phases(options.sizes[0], options.files, Path(folder))
        print(f"`fedcast forecast`, {options.files} series, size {options.sizes[0]}, seconds:\n")
        names = [*PHASES, "process"]
        print(markdown(["files", "precision", *names], [[r["files"], r["precision"], *(f"{r[n]:.2f}" for n in names)] for r in whole]))
    write_json(options.output, {"processor": machine.processor_name(), "threads": threads, "load": load, "rows": rows, "forecast": whole})


def _contestants(sizes: Sequence[str], batch: int) -> list[Contestant]:
    found = [contestant for size in sizes for contestant in of_fedcast(size, batch)]
    return found + (list(of_chronos(batch)) if find_spec("chronos") is not None else [])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            *(row["name"], row["what"], row["precision"], f"{row['parameters'] / 1e6:.1f}M", f"{row['flops'] / 1e6:.0f}M"),
            *(f"{row['series_a_second']:.0f}", f"**{row['ratio']:.2f}**" if row["ratio"] else ""),
        ]
        for row in sorted(rows, key=lambda row: (row["what"], row["precision"], row["name"]))
    ]
    cells += [] if any(row["name"] == PEER for row in rows) else [[PEER, ABSENT, "", "", "", "", ""]]
    return markdown(["", "what", "precision", "parameters", "FLOPs a series", "series/s", f"times {PEER}"], cells)


if __name__ == "__main__":
    main()
