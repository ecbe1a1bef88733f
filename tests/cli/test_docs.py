from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcast import errors
from fedcast.methods.base import method_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- runnable -->\n```(?P<language>bash|console|python)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)(?P<target>[^)#]*)(?:#[^)]*)?\)")
# What a page trains, in seconds instead of minutes; a page's own flags stand before these and are not repeated in them.
SMALL = (
    "--training.batch_size 4 --federation.local_steps 2 --evaluation.windows 4 --evaluation.validation_windows 4"
    " --evaluation.baselines seasonal_naive"
)
SHIM = f"""#!/bin/sh
case "$1 $*" in
  "pretrain "*--help*) set -- "$@" ;;
  "pretrain "*federation.rounds*) set -- "$@" {SMALL} ;;
  "pretrain "*) set -- "$@" --federation.rounds 2 {SMALL} ;;
esac
exec "{sys.executable}" -m fedcast "$@"
"""
PYTHON_SMALL = "import fedcast; _p = fedcast.pretrain; fedcast.pretrain = lambda s, **k: _p(s, **k, overrides={overrides!r})\n"


@dataclass(frozen=True)
class Block:
    """One runnable block of a page."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(found["language"], found["text"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def _script(block: Block) -> list[str]:
    if block.language == "python":
        words = f"--federation.rounds 1 {SMALL}".replace("--", "").split()
        overrides = [
            f"{key}=['{value}']" if key.endswith("baselines") else f"{key}={value}"
            for key, value in zip(words[::2], words[1::2], strict=True)
        ]
        return [sys.executable, "-c", PYTHON_SMALL.format(overrides=overrides) + block.text]
    lines = block.text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


RUNNABLE = [pytest.param(page, id=page.name) for page in PAGES if blocks_of(page)]


@pytest.mark.parametrize("page", RUNNABLE)
@pytest.mark.timeout(240)
def test_when_a_page_shows_commands_then_they_run(page: Path, tmp_path: Path, own_data: Path) -> None:
    shim = tmp_path / "bin" / "fedcast"
    shim.parent.mkdir()
    shim.write_text(SHIM, encoding="utf-8")
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    if page.name == "cli.md":
        init = f"init my-spec.toml --data {own_data} --time date --id shop --target sales"
        subprocess.run([shim, *init.split()], cwd=tmp_path, check=True, env=environment)
    for block in blocks_of(page):
        done = subprocess.run(_script(block), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}: {block.text}\n{done.stdout}\n{done.stderr}"


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


def test_when_a_method_is_registered_then_the_readme_has_a_row_for_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == method_names()
