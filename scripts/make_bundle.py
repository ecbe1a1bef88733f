"""Build the bundled data from the raw recordings: ``FEDCAST_DATA=<raw folder> python scripts/make_bundle.py``.

Writes ``src/fedcast/data/bundled/<domain>/<dataset>.parquet``, ``card.json`` and ``DATA_CARD.md``. The choice of series and spans below is
the whole recipe; reading and resampling are those of ``fedcast.data.sources``. The values are the same on every machine (up to the last
bit of the resampled waveforms); the bytes of the files are the same for the same versions of pyarrow, numpy and scipy, which the card
names. ``--check`` compares instead of writing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy

from fedcast.data.catalogue import DEFAULT_HELD_OUT, raw_folder
from fedcast.data.frames import LongFrame
from fedcast.data.sources import CLEAN_LICENCES, DATASETS, Dataset, Series, long_frame

TARGET = Path(__file__).resolve().parents[1] / "src/fedcast/data/bundled"
LICENCE_TEXTS = Path(__file__).resolve().parent / "licence_texts.md"
LIMIT = 8 * 2**20
_LOG = logging.getLogger("make_bundle")

Chooser = Callable[[Sequence[Series]], list[Series]]


@dataclass(frozen=True)
class Pick:
    """What the bundle takes of one catalogue dataset: a choice of series, a span of each, and both in words."""

    domain: str
    dataset: str
    choose: Chooser
    taken: str
    first: int = 0
    count: int | None = None


def everything(series: Sequence[Series]) -> list[Series]:
    """Take every series."""
    return list(series)


def starting(*prefixes: str) -> Chooser:
    """Take the series whose name starts with one of the prefixes."""
    return lambda series: [s for s in series if s.id.startswith(prefixes)]


def named(*names: str) -> Chooser:
    """Take the series of these names."""
    return lambda series: [s for s in series if s.id in names]


def spread(count: int, at_least: int) -> Chooser:
    """Take `count` series evenly spread over those with at least `at_least` points, in name order of the file."""

    def choose(series: Sequence[Series]) -> list[Series]:
        long = [s for s in series if len(s.values) >= at_least]
        return [long[i] for i in np.linspace(0, len(long) - 1, count).round().astype(int)]

    return choose


def largest(count: int) -> Chooser:
    """Take the `count` series with the largest mean."""
    return lambda series: sorted(series, key=lambda s: (-float(np.nanmean(s.values)), s.id))[:count]


def at_least(length: int) -> Chooser:
    """Take the series with at least `length` points."""
    return lambda series: [s for s in series if len(s.values) >= length]


def one_recording_a_subject(series: Sequence[Series]) -> list[Series]:
    """Take, of each person in turn, the recording of another exercise, with all six axes."""
    labels = sorted({s.id.rsplit("-", 1)[0] for s in series})
    subjects = sorted({label.split("-")[1] for label in labels})
    kept = set()
    for i, subject in enumerate(subjects):
        own = [label for label in labels if f"-{subject}-" in label]
        kept.add(own[i % len(own)])
    return [s for s in series if s.id.rsplit("-", 1)[0] in kept]


_AIRPORTS_AND_CARRIERS = ("EWR", "JFK", "LGA", *(f"carrier_{c}" for c in ("9E", "AA", "B6", "DL", "EV", "MQ", "UA", "US")))
_STATIONS = ("35005001", "35162003", "35202001", "35228001", "35281001")

PICKS = (
    Pick("energy", "france_demand", everything, "12 regions, 2019", 43824, 8760),
    Pick(
        "energy",
        "household",
        named("Global_active_power", "Voltage", "Sub_metering_3"),
        "3 meters, 120 days from January 2008",
        36507,
        11520,
    ),
    Pick("energy", "hourly_power", everything, "electricity, wind and solar power, first 8220 hours of each", 0, 8220),
    Pick("wind", "power", everything, "4 turbines, first 120 days", 0, 17280),
    Pick("wind", "wind_speed", everything, "4 turbines, first 60 days", 0, 8640),
    Pick("traffic", "occupancy", everything, "20 sensors, first 26 weeks", 0, 4368),
    Pick("traffic", "metr_la", spread(15, 1), "15 of 207 detectors"),
    Pick("retail", "items_daily", largest(120), "120 most sold items"),
    Pick("retail", "shop_hourly", everything, "units, revenue and invoices, last 52 weeks", 8982, 8736),
    Pick("health", "flu_states", everything, "50 regions"),
    Pick("health", "flu_national", everything, "7 columns"),
    Pick("health", "births", everything, "one series"),
    Pick("medical", "mitbih", everything, "3 records, 2 leads, 100 seconds", 7500, 12500),
    Pick("medical", "incart", named("I06-II", "I06-V1", "I06-V5"), "3 of 12 leads, 60 seconds", 0, 7500),
    Pick("medical", "icg_ecg", everything, "2 people, neutral and under stress, 40 seconds", 7500, 5000),
    Pick("medical", "vital_signs", everything, "pressure, respiration and pulse, 60 seconds", 7500, 7500),
    Pick("cloud", "cloudwatch", everything, "17 series"),
    Pick("cloud", "google", everything, "4 channels"),
    Pick("cloud", "azure", everything, "2 channels"),
    Pick("nature", "sunspots", everything, "days from 1948 on", 47500, None),
    Pick("nature", "co2", everything, "all days"),
    Pick("nature", "saugeen_river", everything, "all days"),
    Pick("economics", "fred_md", everything, "107 series"),
    Pick(
        "economics",
        "m4_weekly",
        spread(60, 500),
        "60 series, evenly spread over those with at least 500 weeks; last 1040 weeks",
        -1040,
        1040,
    ),
    Pick("activity", "watch", one_recording_a_subject, "one recording of each of 10 people, 6 axes"),
    Pick("tourism", "monthly", at_least(208), "292 series with at least 208 months"),
    Pick("transport", "flights", named(*_AIRPORTS_AND_CARRIERS), "3 airports and the 8 busiest carriers"),
    Pick("transport", "buses", largest(60), "60 busiest stops"),
    Pick("transport", "taxi", everything, "one series"),
    Pick(
        "weather",
        "meteo_france",
        starting(*_STATIONS),
        "Arbrissel, Louvigne-du-Desert, La Noe-Blanche, Dinard and Rennes, last 20 years",
        -7305,
        7305,
    ),
    Pick("web", "tweets", everything, "10 companies, last 28 days", -8064, 8064),
    Pick("web", "ad_exchange", everything, "6 series"),
    Pick("web", "wikipedia", everything, "9 of 10 pages"),
)


def span(series: Series, pick: Pick, freq: str) -> Series:
    """Return the pick's span of a series; a negative first point counts from the end."""
    first = pick.first if pick.first >= 0 else max(0, len(series.values) + pick.first)
    last = None if pick.count is None else first + pick.count
    stamps = pd.date_range(pd.Timestamp(series.start), periods=first + 1, freq=freq)
    return Series(series.id, stamps[-1], series.values[first:last])


def encode(long: LongFrame) -> bytes:
    """Return a long frame as the smallest of three parquet encodings of float32 values."""
    frame = long.frame
    table = pa.table(
        {
            "unique_id": pa.array(frame["unique_id"].tolist(), pa.string()),
            "ds": pa.array(frame["ds"].to_numpy(dtype="datetime64[ns]"), pa.timestamp("ns")),
            "y": pa.array(frame["y"].to_numpy(dtype=np.float32), pa.float32()),
        }
    )
    return min((_parquet(table, encoding) for encoding in ("PLAIN", "BYTE_STREAM_SPLIT", "RLE_DICTIONARY")), key=len)


def _parquet(table: pa.Table, encoding: str) -> bytes:
    buffer = io.BytesIO()
    dictionaries = ["unique_id", "y"] if encoding == "RLE_DICTIONARY" else ["unique_id"]
    encodings = {"ds": "DELTA_BINARY_PACKED"} | ({} if encoding == "RLE_DICTIONARY" else {"y": encoding})
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=19,
        use_dictionary=dictionaries,
        column_encoding=encodings,
        row_group_size=len(table),
        dictionary_pagesize_limit=2**20,
        write_statistics=False,
    )
    return buffer.getvalue()


def build(root: Path) -> dict[str, bytes]:
    """Return every file of the bundle, by its path below the bundle's folder."""
    table = {(d.domain, d.name): d for d in DATASETS}
    files: dict[str, bytes] = {}
    domains: dict[str, dict[str, Any]] = {}
    for pick in PICKS:
        dataset = table[pick.domain, pick.dataset]
        if dataset.licence not in CLEAN_LICENCES:
            raise SystemExit(f"{pick.domain}/{pick.dataset} has licence {dataset.licence}, which may not be shipped")
        chosen = [span(s, pick, str(dataset.freq)) for s in pick.choose(dataset.read(root))]
        long = long_frame(chosen, dataset.freq, f"{pick.domain}/{pick.dataset}")
        name = f"{pick.domain}/{pick.dataset}.parquet"
        files[name] = encode(long)
        domains.setdefault(pick.domain, {})[pick.dataset] = entry(root, dataset, pick, long, name, files[name])
        _LOG.info("%s %d series %d points %.0f KiB", name, long.frame["unique_id"].nunique(), len(long.frame), len(files[name]) / 1024)
    card = {
        "format": 1,
        "held_out": list(DEFAULT_HELD_OUT["bundled"]),
        "built_with": {"pyarrow": pa.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "domains": domains,
    }
    files["card.json"] = (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode()
    files["DATA_CARD.md"] = data_card(card).encode()
    total = sum(map(len, files.values()))
    _LOG.info("total %.2f MiB in %d files", total / 2**20, len(files))
    if total > LIMIT:
        raise SystemExit(f"the bundle has {total} bytes, the limit is {LIMIT}")
    return files


def entry(root: Path, dataset: Dataset, pick: Pick, long: LongFrame, name: str, data: bytes) -> dict[str, Any]:
    """Return one dataset's entry of the card."""
    lengths = long.frame.groupby("unique_id", sort=False).size()
    finite = int(np.isfinite(long.frame["y"]).sum())
    return {
        "file": name,
        "freq": dataset.freq,
        "series": len(lengths),
        "points": len(long.frame),
        "missing": len(long.frame) - finite,
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "taken": pick.taken,
        "recipe": dataset.taken,
        "origin": dataset.origin,
        "licence": dataset.licence,
        "attribution": dataset.attribution,
        "raw": {file: hashlib.sha256((root / file).read_bytes()).hexdigest() for file in dataset.files},
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


_HEAD = """# Data card of the bundled data

{n_domains} domains, {n_datasets} datasets, {series} series, {points} points, {size:.1f} MiB. Each file is a parquet long frame
with the columns `unique_id`, `ds`, `y` (float32, missing values are NaN, holes are explicit rows). `card.json` says the same for machines.

Held out by default (forecast zero-shot, never trained on): {held_out}.

Rebuilt by `FEDCAST_DATA=<raw folder> python scripts/make_bundle.py` (pyarrow {pyarrow}, numpy {numpy}, scipy {scipy}); the sha256 is that
of the shipped file, those of the raw files stand in `card.json`. Values are those of the source, rounded to float32; only those of
`medical` (resampled) and `energy/household` (averaged) are computed.
Each dataset keeps its own licence; show the attribution when you pass it on.

| domain | dataset | taken | freq | series | points | missing | KiB | source | licence | attribution | sha256 |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def data_card(card: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    rows = [(domain, name, e) for domain, datasets in card["domains"].items() for name, e in datasets.items()]
    head = _HEAD.format(
        n_domains=len(card["domains"]),
        n_datasets=len(rows),
        series=sum(e["series"] for *_, e in rows),
        points=sum(e["points"] for *_, e in rows),
        size=sum(e["bytes"] for *_, e in rows) / 2**20,
        held_out=", ".join(card["held_out"]),
        **card["built_with"],
    )
    lines = [
        f"| {domain} | {name} | {e['taken']}; out of: {e['recipe']} | {e['freq']} | {e['series']} | {e['points']:,} | {e['missing']:,} "
        f"| {e['bytes'] / 1024:.0f} | {e['origin']} | {e['licence']} | {e['attribution']} | `{e['sha256']}` |"
        for domain, name, e in rows
    ]
    return head + "\n".join(lines) + "\n" + LICENCE_TEXTS.read_text(encoding="utf-8")


def main() -> int:
    """Write the bundle, or compare it with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there instead of writing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = build(raw_folder())
    if arguments.check:
        different = [name for name, data in files.items() if not (TARGET / name).is_file() or (TARGET / name).read_bytes() != data]
        for name in different:
            _LOG.error("differs: %s", name)
        return int(bool(different))
    shutil.rmtree(TARGET, ignore_errors=True)
    for name, data in files.items():
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
