"""The long-term forecasting benchmark (LTSF), as Autoformer's and Informer's data loaders prepare it.

Seven sets, a domain each, by the protocol of FeDPM (fedpm.md B.5): ETT split into 12, 4 and 4 months, the others 70/10/20 (shares are
rounded here and cut there, so parts begin within a step of theirs); every channel is standardised by mean and deviation of its train
part. ``electricity`` is a substitute: the 321 meters of the original (ECL) cannot be had here, so the hourly demand of 12 French regions
stands in, as many hours. ``weather`` keeps its rows as they are, the -9999 for a missing value included, because the published numbers do.
Channels are series: models here are channel-independent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from fedcast.data.sources import readers
from fedcast.data.sources.dataset import Dataset
from fedcast.data.sources.raw import Series, columns_of, read_csv

VALIDATION = {"etth1": 0.2, "etth2": 0.2, "ettm1": 0.2, "ettm2": 0.2}
"""Share of validation where it is not the default."""

DEFAULT_VALIDATION, TEST = 0.1, 0.2
_MONTHS = 20  # of ETT: 12, 4 and 4; what comes later is never used
_ECL_HOURS = 26_304
Reader = Callable[[Path], list[Series]]


def _ett(name: str) -> Reader:
    a_day = 24 if name.startswith("ETTh") else 96

    def read(root: Path) -> list[Series]:
        table = read_csv(root / f"energy/{name}.csv.gz").drop(columns="date")
        return columns_of(table[: _MONTHS * 30 * a_day], pd.Timestamp("2016-07-01"))

    return read


def _weather(root: Path) -> list[Series]:
    table = read_csv(root / "weather/weather_jena2020.csv.gz", encoding="latin1").drop(columns="date")
    return columns_of(table, pd.Timestamp("2020-01-01 00:10"))


def _demand(root: Path) -> list[Series]:
    return [Series(s.id, s.start, s.values[:_ECL_HOURS]) for s in readers.france_demand(root)]


def _standardised(domain: str, read: Reader) -> Reader:
    validation = VALIDATION.get(domain, DEFAULT_VALIDATION)

    def standardise(series: Series) -> Series:
        length = len(series.values)
        # Cut as split_by_time cuts: the scale must not see a step of validation.
        part = series.values[: length - round(length * TEST) - round(length * validation)]
        deviation = float(np.nanstd(part))
        return Series(series.id, series.start, (series.values - np.nanmean(part)) / (deviation if deviation > 0 else 1.0))

    return lambda root: [standardise(series) for series in read(root)]


def _dataset(domain: str, file: str, freq: str, licence: str, origin: str, taken: str, read: Reader) -> Dataset:
    what = f"{taken}; standardised by the train part"
    return Dataset(domain, domain, (file,), freq, licence, origin, origin, what, _standardised(domain, read))


_STATION = "Electricity transformer temperature, Zhou et al. 2021, github.com/zhouhaoyi/ETDataset, CC BY-ND 4.0"

LTSF: tuple[Dataset, ...] = (
    *(
        _dataset(name.lower(), f"energy/{name}.csv.gz", freq, "CC-BY-ND-4.0", _STATION, "7 channels, the first 20 months", _ett(name))
        for name, freq in (("ETTh1", "h"), ("ETTh2", "h"), ("ETTm1", "15min"), ("ETTm2", "15min"))
    ),
    _dataset(
        "weather",
        "weather/weather_jena2020.csv.gz",
        "10min",
        "none",
        "Max Planck Institute for Biogeochemistry, Jena",
        "21 channels of 2020, row by row",
        _weather,
    ),
    _dataset(
        "electricity",
        "energy/france_regional_demand_hourly.csv.gz",
        "h",
        "etalab-2.0",
        "RTE/ODRE open data, Licence Ouverte",
        f"demand of 12 French regions, the first {_ECL_HOURS} hours: a substitute for ECL",
        _demand,
    ),
    _dataset(
        "exchange",
        "finance/exchange_rate_daily.txt.gz",
        "D",
        "none",
        "Lai et al. 2018, github.com/laiguokun/multivariate-time-series-data",
        "8 currencies",
        readers.exchange,
    ),
)
"""The seven sets, in the order of the papers."""


def ltsf_domains() -> dict[str, tuple[Dataset, ...]]:
    """Return the benchmark's domains, each with its one dataset."""
    return {dataset.domain: (dataset,) for dataset in LTSF}
