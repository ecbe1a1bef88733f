"""The page on guards: its spec is one that can be run, and no guard is missing from it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from fedcast.federated.guards.base import GUARDS
from fedcast.federated.plan import Plan
from fedcast.methods.base import build_method
from fedcast.spec import parse_spec


def test_when_the_page_shows_a_spec_then_its_guards_go_together(repository: Path) -> None:
    text = (repository / "docs" / "guards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        spec = parse_spec({"method": {"name": "fedavg"}, "model": {"size": "nano"}, **tomllib.loads(block)})
        plan = Plan(spec, build_method(spec.method))
        plan.guards.check(plan)


def test_when_a_guard_is_registered_then_the_page_has_a_row_and_a_section_for_it(repository: Path) -> None:
    text = (repository / "docs" / "guards.md").read_text(encoding="utf-8")
    assert [name for name in GUARDS if f"\n| `{name}` |" not in text or f"\n## {name}\n" not in text] == []
