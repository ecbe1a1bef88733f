"""Where domains come from: the bundled data, the catalogue of raw recordings, the LTSF benchmark, or a person's own folder.

``"bundled"`` is shipped inside the package (see ``bundled/DATA_CARD.md``). ``"catalogue"`` is built from the raw recordings in the folder
that the environment variable ``FEDCAST_DATA`` names; what is taken of each is written in :mod:`fedcast.data.sources.recipes`. ``"ltsf"``
is built from the same folder, see :mod:`fedcast.data.sources.ltsf`, and so are the medical sources, see :mod:`fedcast.data.medical`.
Built stores are kept in ``FEDCAST_CACHE`` (default ``~/.cache/fedcast``, or the platform's cache folder), keyed by the checksums of the
raw files and of the code that reads them, so neither changed data nor changed code gives a stale store.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from fedcast.cache import cache_folder
from fedcast.data.frames import Columns, LongFrame, domain_files, read_frame
from fedcast.data.medical import MEDICAL_SOURCES
from fedcast.data.store import SeriesStore
from fedcast.errors import SourceError, SpecError, UnknownNameError

if TYPE_CHECKING:
    from fedcast.data.sources import Dataset
    from fedcast.spec import DataSpec

DEFAULT_HELD_OUT: dict[str, tuple[str, ...]] = {
    "bundled": ("tourism", "transport", "weather", "web"),
    "catalogue": ("tourism", "transformers", "transport", "weather", "web"),
}
"""Domains that are held out by default: spread over the time scales (months, hours, days, minutes), chosen before any model was trained.

Each has training domains of the same time scale but of another origin: economics; traffic and energy; nature and retail; cloud.
"""


RAW_SOURCES = ("catalogue", "ltsf", *MEDICAL_SOURCES)
"""Sources that are built from the raw recordings, or synthesised."""

_WITHOUT_EFFECT = ("catalogue.py", "check.py", "leakage.py", "partition.py", "splits.py", "windows.py")
"""Modules of this floor that do not touch how a store is built."""


def domain_names(source: str | Path) -> list[str]:
    """Return the names of a source's domains, sorted.

    Parameters
    ----------
    source
        ``"bundled"``, ``"catalogue"``, ``"ltsf"``, a medical source or a folder, whose file names say it all: neither raw files nor a
        person's own are read.

    Raises
    ------
    SourceError
        When the folder is missing or holds no data.
    """
    if source == "bundled":
        return sorted(bundled_card()["domains"])
    if source in RAW_SOURCES:
        return sorted(raw_datasets(str(source)))
    return sorted(domain_files(source))


def split_domains(data: DataSpec, known: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """Return the (training, held-out) domains that a spec asks for.

    Parameters
    ----------
    data
        ``domains`` empty means all that are not in ``held_out``; ``held_out`` empty means none.
    known
        The source's domains, where they are known already.

    Raises
    ------
    UnknownNameError
        When the source has no domain of that name.
    SpecError
        When a domain is both trained on and held out, or nothing is left to train on.
    """
    names = sorted(known) if known is not None else domain_names(data.source)
    _require_known([*data.domains, *data.held_out], names)
    both = sorted(set(data.domains) & set(data.held_out))
    if both:
        raise SpecError(f"domain {both[0]!r} is in both data.domains and data.held_out", hint="take it out of one of them")
    training = list(data.domains) or [name for name in names if name not in data.held_out]
    if not training:
        raise SpecError("every domain is held out, so none is left to train on", hint="take one out of data.held_out")
    return training, list(data.held_out)


def load_domains(data: DataSpec, names: Sequence[str] | None = None) -> dict[str, SeriesStore]:
    """Load domains as series stores.

    Parameters
    ----------
    data
        Its ``source`` is ``"bundled"``, ``"catalogue"``, ``"ltsf"``, a medical source or a folder (each file or sub-folder a
        domain); ``time``, ``id``, ``target`` and ``freq`` apply to a folder.
    names
        Domains to load, in this order; by default all that the spec trains on or holds out.

    Returns
    -------
    dict
        Domain name to store.

    Raises
    ------
    UnknownNameError
        When the source has no domain of that name.
    SpecError
        When the spec contradicts itself, see :func:`split_domains`.
    SourceError
        When the source cannot be found or read; for the catalogue, when ``FEDCAST_DATA`` is not set.
    FrameError
        When a file of a wanted domain is malformed; the other domains' files are not read.
    """
    if data.source == "bundled":
        return {name: load_bundled(name) for name in _wanted(data, names, domain_names(data.source))}
    if data.source in RAW_SOURCES:
        return {name: load_raw(data.source, name) for name in _wanted(data, names, domain_names(data.source))}
    files = domain_files(data.source)
    columns = {"time": data.time, "id": data.id, "target": data.target, "freq": data.freq}
    return {
        name: SeriesStore.from_frames(name, {dataset: read_frame(file, **columns) for dataset, file in files[name].items()})
        for name in _wanted(data, names, files)
    }


def _wanted(data: DataSpec, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    known = sorted(known)
    if names is None:
        training, held_out = split_domains(data, known)
        return [*training, *held_out]
    _require_known(names, known)
    return list(dict.fromkeys(names))


def _require_known(names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError.of("domain", name, known)


# bundled


def bundled_folder() -> Traversable:
    """Return the folder of the data shipped inside the package."""
    return resources.files("fedcast.data") / "bundled"


@cache
def bundled_card() -> dict[str, Any]:
    """Return the data card of the shipped data: ``{"domains": {domain: {dataset: {file, freq, licence, sha256, ...}}}}``."""
    try:
        card: dict[str, Any] = json.loads((bundled_folder() / "card.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError("the bundled data is missing from this installation", hint="install fedcast again") from error
    return card


def bundled_frames(domain: str) -> dict[str, LongFrame]:
    """Return the datasets of one shipped domain as long frames.

    Raises
    ------
    UnknownNameError
        When no shipped domain has that name.
    """
    domains = bundled_card()["domains"]
    _require_known([domain], sorted(domains))
    return {name: _bundled_frame(entry) for name, entry in domains[domain].items()}


def load_bundled(domain: str) -> SeriesStore:
    """Load one shipped domain; see :func:`bundled_frames`."""
    return SeriesStore.from_frames(domain, bundled_frames(domain))


def _bundled_frame(entry: dict[str, Any]) -> LongFrame:
    file = str(entry["file"])
    table = pq.read_table(io.BytesIO((bundled_folder() / file).read_bytes()), read_dictionary=["unique_id"])
    ids = table["unique_id"].combine_chunks()
    names = np.asarray(ids.dictionary.to_pylist(), dtype=object)
    frame = pd.DataFrame(
        {
            "unique_id": names[ids.indices.to_numpy()],  # dictionary lookup: one Python string a series, not one a row
            "ds": table["ds"].to_numpy(),
            "y": table["y"].to_numpy().astype(np.float64),
        }
    )
    return LongFrame(frame=frame, freq=entry["freq"], columns=Columns(id="unique_id", time="ds", target="y"), source=f"bundled/{file}")


# catalogue


def raw_folder() -> Path:
    """Return the folder of raw recordings that ``FEDCAST_DATA`` names.

    Raises
    ------
    SourceError
        When the variable is not set, or names no folder.
    """
    hint = "set FEDCAST_DATA to the folder of raw recordings, or use data.source = 'bundled'"
    value = os.environ.get("FEDCAST_DATA", "")
    if not value:
        raise SourceError("this source needs raw recordings, and FEDCAST_DATA is not set", hint=hint)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise SourceError(f"FEDCAST_DATA names {folder}, which is not a folder", hint=hint)
    return folder


def raw_datasets(source: str) -> dict[str, tuple[Dataset, ...]]:
    """Return the datasets of each domain of a source of :data:`RAW_SOURCES`; no raw file is read."""
    # imported here since the recipes need scipy's signal processing, which the bundled data does not
    from fedcast.data.sources import catalogue_domains
    from fedcast.data.sources.ltsf import ltsf_domains

    if source in MEDICAL_SOURCES:
        from fedcast.data.medical.strategies import medical_domains

        return medical_domains(source)
    return catalogue_domains() if source == "catalogue" else ltsf_domains()


def raw_frames(source: str, domain: str) -> dict[str, LongFrame]:
    """Build the datasets of one domain of a source of :data:`RAW_SOURCES` from the raw recordings, without the cache.

    Raises
    ------
    UnknownNameError
        When the source has no domain of that name.
    SourceError
        When ``FEDCAST_DATA`` is not set, or a raw file is missing.
    """
    from fedcast.data.sources import long_frame

    datasets = _datasets(source, domain)
    root = _root(datasets)
    _require_files(root, datasets)
    return {d.name: long_frame(d.read(root), d.freq, f"{source}/{domain}/{d.name}") for d in datasets}


def load_raw(source: str, domain: str) -> SeriesStore:
    """Load one domain of a source of :data:`RAW_SOURCES` from the cache, or build it and keep it there; see :func:`raw_frames`."""
    datasets = _datasets(source, domain)
    root = _root(datasets)
    _require_files(root, datasets)
    place = cache_folder() / source / f"{domain}-{_cache_key(root, datasets)}"
    if place.is_dir():
        try:
            return SeriesStore.open(place)
        except SourceError:
            pass  # a damaged entry is built again and replaced
    store = SeriesStore.from_frames(domain, raw_frames(source, domain))
    try:
        store.save(place)
    except SourceError as error:
        hint = "set FEDCAST_CACHE to a folder that can be written"
        raise SourceError(f"the store of domain {domain!r} cannot be kept: {error.message}", hint=hint) from error
    return SeriesStore.open(place)


def _datasets(source: str, domain: str) -> tuple[Dataset, ...]:
    domains = raw_datasets(source)
    _require_known([domain], sorted(domains))
    return domains[domain]


def _root(datasets: Iterable[Dataset]) -> Path:
    """Return the raw folder, or any where no raw file is needed: synthesised recordings can be had without."""
    return raw_folder() if any(dataset.files for dataset in datasets) else Path()


def _require_files(root: Path, datasets: Iterable[Dataset]) -> None:
    for dataset in datasets:
        for file in dataset.files:
            if not (root / file).is_file():
                hint = f"put it there, or leave domain {dataset.domain!r} out"
                raise SourceError(f"{dataset.domain}/{dataset.name} needs {root / file}, which is missing", hint=hint)


def _cache_key(root: Path, datasets: Iterable[Dataset]) -> str:
    digest = hashlib.sha256(_code_digest().encode())
    for dataset in datasets:
        for file in dataset.files:
            digest.update(f"{dataset.name}:{file}:{_file_digest(root / file)};".encode())
    return digest.hexdigest()[:20]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code_digest() -> str:
    package = resources.files("fedcast.data")
    files = [
        file for folder in (package, package / "sources", package / "medical") for file in folder.iterdir() if file.name.endswith(".py")
    ]
    digest = hashlib.sha256()
    for file in sorted(files, key=str):
        if file.name not in _WITHOUT_EFFECT:
            digest.update(file.read_bytes())
    return digest.hexdigest()
