"""Write docs/leakage.md from src/fedcast/data/leakage.toml: ``python tools/leakage_page.py``; a test holds the two together."""

from __future__ import annotations

from pathlib import Path

from fedcast.data.catalogue import domain_names
from fedcast.data.leakage import Corpus, Recording, corpora, identity, recordings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "leakage.md"
CELLS = {"seen": "seen", "unseen": "·", "unknown": "?"}
SOURCES = ("bundled", "catalogue", "ltsf")

HEAD = """# Leakage list

A model that has trained on a benchmark set scores better on it than it would on new data. Every result row of `fedcast pretrain` and
`fedcast evaluate` therefore has a column `exposure`, and `fedcast leakage` says the same of published training corpora.

| `exposure` | says |
|---|---|
| `seen` | a recording of this domain is among those that were trained on |
| `unseen` | none is; baselines are fitted to the context of each window and trained on nothing, so they are always `unseen` |
| `unknown` | it cannot be known: a model folder without its run, or a person's own folder against another source |

What counts is the **recording**, not the name or the cut. ETTh1 is every fourth row of ETTm1, so a model that trained on one has seen
the other. `hourly_power` of the bundled data holds the mean of ECL's meters, so it is ECL. A domain that a run trained on is `seen`
although within one source its test windows lie later in time than all that was trained on; across sources they may have been trained on.
`held_out` says which domains took no part at all. Data of your
own is known by name: a domain of the folder that was trained on is `seen` if it took part and `unseen` if not.

<!-- runnable -->
```bash
fedcast leakage
fedcast leakage --benchmark ETTh1
fedcast leakage --corpus lotsa --json
```

## Benchmark sets and corpora

`seen`: the corpus holds the recording. `·`: it does not. `?`: not known; nothing here is guessed. A corpus that holds only the training
part of a set counts as one that holds it. The last column names the domains of fedcast that hold the recording (b: bundled, c: catalogue,
l: ltsf). This page is made from `src/fedcast/data/leakage.toml` by `python tools/leakage_page.py`.

"""


def page() -> str:
    """Return the page."""
    every = list(corpora().values())
    ours = holders()
    names = [_row(["benchmark set", *(each.title for each in every), "here"])]
    names.append(_row(["---"] * (len(every) + 2)))
    for row in recordings().values():
        cells = [CELLS[each.findings[row.key].exposure] for each in every]
        names.append(_row([_named(row), *cells, ", ".join(ours.get(row.key, []))]))
    parts = [HEAD + "\n".join(names), "## Where it was read", *(_sources(each) for each in every)]
    return "\n\n".join(parts) + "\n"


def holders() -> dict[str, list[str]]:
    """Return the domains of fedcast that hold each recording, as ``"b:energy"``."""
    found: dict[str, list[str]] = {}
    for source in SOURCES:
        for domain in domain_names(source):
            for key in sorted(identity(source, domain)):
                found.setdefault(key, []).append(f"{source[0]}:{domain}")
    return found


def _named(row: Recording) -> str:
    return row.title + (f" ({', '.join(row.aliases)})" if row.aliases else "")


def _sources(each: Corpus) -> str:
    by_source: dict[tuple[str, str], list[str]] = {}
    for key, found in each.findings.items():
        by_source.setdefault((found.source, found.exposure), []).append(recordings()[key].title)
    models = f" Models: {', '.join(each.models)}." if each.models else ""
    lines = [f"### {each.title}", f"`--corpus {each.key}`.{models}", "| read in | exposure | benchmark sets |\n|---|---|---|"]
    rest = max(by_source, key=lambda pair: (pair[0] == each.source or pair[1] != "seen", len(by_source[pair])))
    for pair, titles in sorted(by_source.items(), key=lambda item: (item[0] == rest, item[0][1], item[0][0])):
        lines[-1] += "\n" + _row([pair[0], pair[1], "all others" if pair == rest else "; ".join(titles)])
    return "\n\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
