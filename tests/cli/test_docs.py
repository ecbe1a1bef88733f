from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fedcast
from fedcast import errors
from fedcast.cli.main import app
from fedcast.methods.base import METHODS
from fedcast.tuning.base import TUNINGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- runnable -->\n```(?P<language>bash|python)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)(?P<target>[^)#]*)(?:#[^)]*)?\)")
TRAINING = ("pretrain", "finetune")
# What a page trains, in seconds instead of minutes; a page's own flags stand before these and are not repeated in them.
SMALL = {
    "training.batch_size": "4",
    "federation.local_steps": "1",
    "evaluation.windows": "4",
    "evaluation.validation_windows": "4",
    "evaluation.baselines": "['seasonal_naive']",
}


@dataclass(frozen=True)
class Block:
    """One runnable block of a page."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(found["language"], found["text"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command line after ``fedcast``; a page shows no other command."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if words := shlex.split(part, comments=True):
                assert words[0] == "fedcast", part
                yield words[1:]


def overrides(rounds: int, given: str = "") -> list[str]:
    return [f"{key}={value}" for key, value in {"federation.rounds": str(rounds), **SMALL}.items() if key not in given]


def small(words: list[str]) -> list[str]:
    if words[0] not in TRAINING or "--help" in words:
        return words
    return [*words, *(word for override in overrides(3, given=" ".join(words)) for word in ("--set", override))]


def run_python(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedcast, "pretrain", partial(fedcast.pretrain, overrides=overrides(1)))
    script = folder / "block.py"
    script.write_text(text, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


RUNNABLE = [pytest.param(page, id=page.name) for page in PAGES if blocks_of(page)]


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("page", RUNNABLE)
@pytest.mark.timeout(240)
def test_when_a_page_shows_commands_then_they_run(
    page: Path, tmp_path: Path, fedcast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "cli.md":
        fedcast("init", "my-spec.toml", "--data", "my-data", "--time", "date", "--id", "shop", "--target", "sales")
    if page.name == "finetuning.md":
        for library in ("chronos", "peft"):
            pytest.importorskip(library)
    if page.name == "consortium.md":
        pytest.importorskip("cryptography")
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block.text, tmp_path, monkeypatch)
            continue
        for words in commands(block.text):
            answer = fedcast(*small(words))
            assert answer.code == 0, f"{page.name}: {shlex.join(words)}\n{answer.out}\n{answer.err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_when_a_page_links_to_a_file_then_it_is_there(page: Path) -> None:
    missing = [found["target"] for found in LINK.finditer(page.read_text(encoding="utf-8")) if not (page.parent / found["target"]).exists()]
    assert missing == []


def test_when_the_index_lists_pages_then_none_is_left_out() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "index.md" and f"({page.name})" not in index] == []


def test_when_the_readme_is_opened_then_a_first_result_begins_before_line_30() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("|")) < 30


def test_when_an_error_exists_then_the_docs_have_its_exit_code() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.FedcastError)]
    assert [cls.__name__ for cls in classes if f"| {cls.exit_code} | `{cls.code}` |" not in text] == []


def test_when_a_verb_exists_then_the_docs_have_it() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs = [str(command.name) for command in app.registered_commands]
    behind = [f"{group.name} {verb.name}" for group in app.registered_groups for verb in group.typer_instance.registered_commands]
    assert [verb for verb in (*verbs, *behind) if not re.search(rf"`{verb}[ `]", text)] == []


def test_when_a_method_is_registered_then_the_readme_has_a_row_for_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(METHODS)


def test_when_a_tuning_is_registered_then_the_page_on_fine_tuning_has_a_row_for_it() -> None:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.-]+)` \|", text, re.MULTILINE))
    assert sorted(set(TUNINGS) - rows) == []
