"""Leakage: which recordings a model was trained on, so that every score says whether it is of data the model has seen.

A domain counts as a set of *recordings*, whatever was cut from them: ETTh1 is every fourth row of ETTm1, the hourly demand of the bundled
data is the mean of the meters of ECL, so these are one recording each. ``leakage.toml`` holds the recordings and, for the training corpora
of published models, which of them they contain, each entry with the place where that was read.

``"seen"`` says that any recording of a domain is among those trained on. It says so of a domain that a run trained on too. Within a source
its test windows lie later in time than all that was trained on; across sources they may have been trained on themselves.
``"unknown"`` is a value of its own, never a guess.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from fedcast.data.catalogue import RAW_SOURCES, bundled_card, domain_names, raw_datasets, split_domains
from fedcast.errors import UnknownNameError
from fedcast.spec import DataSpec

T = TypeVar("T")
Exposure = Literal["seen", "unseen", "unknown"]

WITHOUT_TRAINING: Final[Exposure] = "unseen"
"""What rows of baselines say: seasonal naive, AutoETS and AutoTheta are fitted to the context of each window and trained on nothing."""

_EXPOSURES: Final[dict[str, Exposure]] = {"train": "seen", "no": "unseen", "unknown": "unknown"}


@dataclass(frozen=True)
class Recording:
    """One recording, and the benchmark sets that are cut from it.

    Attributes
    ----------
    key
        Its name.
    title
        Its name for people.
    aliases
        Names of benchmark sets that are cut from it.
    files
        Raw files that hold it and nothing else.
    datasets
        Datasets of ours, as ``"domain/dataset"``, that hold it where their raw file holds others too.
    """

    key: str
    title: str
    aliases: tuple[str, ...]
    files: tuple[str, ...]
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What is known of one recording and one corpus, and the place where it was read."""

    exposure: Exposure
    source: str


@dataclass(frozen=True)
class Corpus:
    """The training data of published models.

    Attributes
    ----------
    key, title, label
        Its name, its name for people, and the head of its column, in lines of at most 5 letters.
    models
        Models trained on it.
    source
        Where its list of data sets was read.
    findings
        What is known of every recording.
    """

    key: str
    title: str
    label: str
    models: tuple[str, ...]
    source: str
    findings: Mapping[str, Finding]


def exposure(training: DataSpec | str, source: str | Path, domain: str) -> Exposure:
    """Return whether a domain's recordings were trained on; see :func:`exposures`."""
    return exposures(training, source, [domain])[domain]


def exposures(training: DataSpec | str, source: str | Path, domains: Iterable[str]) -> dict[str, Exposure]:
    """Return of each domain whether its recordings were trained on.

    Parameters
    ----------
    training
        The data of the run that trained, or the name of a corpus.
    source, domains
        What is evaluated: ``"bundled"``, ``"catalogue"``, ``"ltsf"`` or a person's own folder, and domains of it.

    Returns
    -------
    dict
        ``"seen"`` when any recording of the domain was trained on. What lies in a person's own folder is known by name alone: a domain
        that was trained on is seen, another one of the same folder unseen, and across sources nothing is known.

    Raises
    ------
    UnknownNameError
        When there is no such corpus, or a source has no such domain.
    """
    evaluated = {domain: identity(source, domain) for domain in domains}
    if isinstance(training, str):
        findings = corpus(training).findings
        return {
            domain: _worst(findings[key].exposure if key in findings else "unknown" for key in keys) for domain, keys in evaluated.items()
        }
    if not (_is_ours(source) and _is_ours(training.source)) and _place(source) != _place(training.source):
        return dict.fromkeys(evaluated, "unknown")
    trained = {key for domain in split_domains(training)[0] for key in identity(training.source, domain)}
    return {domain: "seen" if keys & trained else "unseen" for domain, keys in evaluated.items()}


def identity(source: str | Path, domain: str) -> frozenset[str]:
    """Return the keys of a domain's recordings.

    Parameters
    ----------
    source, domain
        As for :func:`exposures`. A domain of a person's own folder is one recording, named by folder and domain.

    Raises
    ------
    UnknownNameError
        When the source is one of ours and has no such domain.
    """
    if not _is_ours(source):
        return frozenset({f"{_place(source)}:{domain}"})
    files = _raw_files(str(source))
    if domain not in files:
        raise UnknownNameError.of("domain", domain, domain_names(source))
    by_file = {file: recording.key for recording in recordings().values() for file in recording.files}
    by_dataset = {name: recording.key for recording in recordings().values() for name in recording.datasets}
    keys: set[str] = set()
    for dataset, raw in files[domain].items():
        named = by_dataset.get(f"{domain}/{dataset}")
        keys |= {named} if named is not None else {by_file.get(file, file) for file in raw}
    return frozenset(keys)


def recording(name: str) -> Recording:
    """Return the recording of a benchmark set, by key, title or alias, whatever the case.

    Raises
    ------
    UnknownNameError
        When the list has no such set.
    """
    return _find("benchmark set", name, {each.key: (each.key, each.title, *each.aliases) for each in recordings().values()}, recordings())


def corpus(name: str) -> Corpus:
    """Return a corpus by its key, its title or a model that was trained on it, whatever the case.

    Raises
    ------
    UnknownNameError
        When the list has no such corpus.
    """
    return _find("corpus", name, {each.key: (each.key, each.title, *each.models) for each in corpora().values()}, corpora())


def _find(kind: str, name: str, names: Mapping[str, Iterable[str]], entries: Mapping[str, T]) -> T:
    """Return the entry that goes by a name; where two do, the one whose key it is."""
    spelt = {each.lower(): key for key, group in names.items() for each in group} | {key.lower(): key for key in names}
    if name.lower() not in spelt:
        raise UnknownNameError.of(kind, name, [each for group in names.values() for each in group])
    return entries[spelt[name.lower()]]


@cache
def recordings() -> dict[str, Recording]:
    """Return every recording of the list, by key."""
    return {
        key: Recording(key, each["title"], *(tuple(each.get(field, ())) for field in ("aliases", "files", "datasets")))
        for key, each in _document()["recordings"].items()
    }


@cache
def corpora() -> dict[str, Corpus]:
    """Return every corpus of the list, by key."""
    return {key: _corpus(key, each) for key, each in _document()["corpora"].items()}


def _corpus(key: str, each: Mapping[str, Any]) -> Corpus:
    said = {name: value for value in _EXPOSURES for name in each.get(value, ())}
    findings = {}
    for name in recordings():
        value = said.get(name, each["default"])
        source = each.get("sources", {}).get(name, each.get(f"{value}_source", each["source"]))
        findings[name] = Finding(_EXPOSURES[value], source)
    return Corpus(key, each["title"], each["label"], tuple(each["models"]), each["source"], findings)


@cache
def _document() -> dict[str, Any]:
    return tomllib.loads((resources.files("fedcast.data") / "leakage.toml").read_text(encoding="utf-8"))


@cache
def _raw_files(source: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the raw files of every dataset of a source of ours: ``{domain: {dataset: files}}``."""
    if source == "bundled":
        domains = bundled_card()["domains"]
        return {domain: {name: tuple(entry["raw"]) for name, entry in datasets.items()} for domain, datasets in domains.items()}
    # what was synthesised has no file: who made it, and of which number, says what it is
    return {domain: {each.name: each.files or (each.origin,) for each in datasets} for domain, datasets in raw_datasets(source).items()}


def _worst(found: Iterable[Exposure]) -> Exposure:
    order: tuple[Exposure, ...] = ("unseen", "unknown", "seen")
    return max(found, key=order.index)


def _is_ours(source: str | Path) -> bool:
    return source == "bundled" or source in RAW_SOURCES


def _place(source: str | Path) -> str:
    return str(source) if _is_ours(source) else str(Path(source).expanduser().resolve())
