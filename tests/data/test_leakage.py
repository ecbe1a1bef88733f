"""The leakage list: recordings of our own sources, training corpora, and the page that is made from it."""

from __future__ import annotations

import tomllib
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import leakage_page
from fedcast.data.catalogue import domain_names
from fedcast.data.leakage import corpora, corpus, exposure, exposures, identity, recording, recordings
from fedcast.errors import UnknownNameError
from fedcast.spec import DataSpec

DOCUMENT = tomllib.loads((resources.files("fedcast.data") / "leakage.toml").read_text(encoding="utf-8"))
OURS = [(source, domain) for source in ("bundled", "catalogue", "ltsf") for domain in domain_names(source)]


@pytest.mark.parametrize(("source", "domain"), OURS, ids=lambda value: str(value))
def test_when_a_domain_is_ours_then_the_list_knows_each_of_its_recordings(source: str, domain: str) -> None:
    assert identity(source, domain)
    assert identity(source, domain) <= set(recordings())


@pytest.mark.parametrize("key", sorted(DOCUMENT["corpora"]))
def test_when_a_corpus_is_listed_then_it_names_known_recordings_once_and_a_source_for_each(key: str) -> None:
    entry = DOCUMENT["corpora"][key]
    named = [*entry.get("train", ()), *entry.get("no", ()), *entry.get("unknown", ())]
    assert [name for name, count in Counter(named).items() if count > 1] == []
    assert {*named, *entry.get("sources", {})} <= set(recordings())
    assert entry["default"] in ("no", "unknown")
    assert corpora()[key].findings.keys() == recordings().keys()
    assert all(found.source for found in corpora()[key].findings.values())
    assert all(len(line) <= 5 for line in entry["label"].split("\n"))


def test_when_a_file_or_an_alias_is_listed_then_it_stands_for_one_recording() -> None:
    for field in ("files", "aliases", "datasets"):
        names = [name.lower() for each in recordings().values() for name in getattr(each, field)]
        assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize(
    ("trained", "evaluated", "expected"),
    [
        (("catalogue", "transformers"), ("ltsf", "etth1"), "seen"),
        (("ltsf", "ettm1"), ("ltsf", "etth1"), "seen"),  # ETTh1 is every fourth row of ETTm1
        (("ltsf", "etth1"), ("ltsf", "etth2"), "unseen"),
        (("catalogue", "weather"), ("ltsf", "weather"), "seen"),
        (("bundled", "weather"), ("ltsf", "weather"), "unseen"),  # what is shipped leaves Jena out
        (("catalogue", "finance"), ("ltsf", "exchange"), "seen"),
        (("bundled", "energy"), ("ltsf", "electricity"), "seen"),  # French demand stands in for ECL
        (("catalogue", "energy"), ("bundled", "energy"), "seen"),
        (("bundled", "energy"), ("catalogue", "wind"), "unseen"),
        (("catalogue", "cloud"), ("catalogue", "transport"), "unseen"),  # two recordings of one archive
    ],
)
def test_when_a_run_trained_on_a_domain_then_its_recordings_are_seen_under_every_name(
    trained: tuple[str, str], evaluated: tuple[str, str], expected: str
) -> None:
    assert exposure(DataSpec(source=trained[0], domains=(trained[1],)), *evaluated) == expected


@given(st.sets(st.sampled_from(domain_names("catalogue")), min_size=1), st.sampled_from(domain_names("catalogue")))
def test_when_a_run_trains_on_more_then_nothing_seen_becomes_unseen(domains: set[str], more: str) -> None:
    before = exposures(DataSpec(source="catalogue", domains=tuple(domains)), "bundled", domain_names("bundled"))
    after = exposures(DataSpec(source="catalogue", domains=tuple(domains | {more})), "bundled", domain_names("bundled"))
    assert {name for name, what in before.items() if what == "seen"} <= {name for name, what in after.items() if what == "seen"}


def test_when_data_is_a_persons_own_then_only_the_name_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shops"
    folder.mkdir()
    for name in ("north", "south"):
        (folder / f"{name}.csv").write_text("ds,y\n", encoding="utf-8")
    training = DataSpec(source=str(folder), domains=("north",))
    monkeypatch.chdir(tmp_path)
    assert exposures(training, "shops", ["north", "south"]) == {"north": "seen", "south": "unseen"}
    assert exposure(training, tmp_path / "other", "north") == "unknown"
    assert exposure(training, "bundled", "energy") == "unknown"
    assert exposure(DataSpec(domains=("energy",)), folder, "energy") == "unknown"
    assert exposure("lotsa", folder, "north") == "unknown"


@pytest.mark.parametrize(
    ("name", "evaluated", "expected"),
    [
        ("lag_llama", ("ltsf", "ettm2"), "seen"),  # ETTm2 was held out, the same station by the hour was not
        ("lotsa", ("ltsf", "exchange"), "unseen"),
        ("Moirai 1.1", ("bundled", "tourism"), "seen"),
        ("chronos", ("ltsf", "weather"), "unknown"),
        ("time_300b", ("bundled", "energy"), "seen"),  # one of several recordings is enough
    ],
)
def test_when_a_corpus_is_asked_then_any_recording_of_the_domain_counts(name: str, evaluated: tuple[str, str], expected: str) -> None:
    assert exposure(name, *evaluated) == expected


def test_when_fev_says_what_moirai_was_trained_on_then_the_list_agrees() -> None:
    # autogluon/fev, benchmarks/chronos_zeroshot/results/moirai_large.csv: sets with and without trained_on_this_dataset
    flagged = (
        "m4_quarterly",
        "m4_yearly",
        "m5",
        "car_parts",
        "covid_deaths",
        "fred_md",
        "hospital",
        "m1_monthly",
        "m3_monthly",
        "nn5_weekly",
    )
    findings = corpus("lotsa").findings
    assert {findings[recording(name).key].exposure for name in (*flagged, "tourism_monthly", "traffic")} == {"seen"}
    assert {findings[recording(name).key].exposure for name in ("ETTh1", "ETTm1", "exchange", "dominick", "ercot")} == {"unseen"}


def test_when_a_name_is_unknown_then_the_nearest_is_suggested() -> None:
    assert recording("etth1") is recording("ETTm1")
    with pytest.raises(UnknownNameError, match="did you mean 'ETTh2'"):
        recording("ETTh3")
    with pytest.raises(UnknownNameError, match="did you mean 'lotsa'"):
        corpus("lotza")
    with pytest.raises(UnknownNameError, match="'wind'"):
        identity("bundled", "winds")


def test_when_the_list_changes_then_the_page_is_written_again() -> None:
    assert leakage_page.PAGE.read_text(encoding="utf-8") == leakage_page.page(), "run python tools/leakage_page.py"
