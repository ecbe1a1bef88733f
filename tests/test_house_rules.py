from __future__ import annotations

from pathlib import Path

import pytest

import house_rules

DOC = '"""Doc."""\n'
LONG_FUNCTION = DOC + "def work() -> None:\n" + '    """Doc."""\n' + "    x = 1\n" * 59
REPEATED = "".join(f"value_{i} = {i}\n" for i in range(6))

BROKEN = [
    ("data/a.py", DOC + "x = 1\n" * 500, 501, "file-length"),
    ("data/a.py", LONG_FUNCTION, 2, "function-length"),
    ("data/a.py", DOC + "assert True\n", 2, "forbidden"),
    ("data/a.py", DOC + "print('x')\n", 2, "forbidden"),
    ("data/a.py", DOC + "import pickle\n", 2, "forbidden"),
    ("data/a.py", DOC + "from cloudpickle import loads\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = eval('1')\n", 2, "forbidden"),
    ("data/a.py", DOC + "exec('x = 1')\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = torch.load('f')\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = torch.load('f', weights_only=False)\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = np.load('f', allow_pickle=True)\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = import_module(name)\n", 2, "forbidden"),
    ("data/a.py", DOC + "x = importlib.import_module(f'{name}.models')\n", 2, "forbidden"),
    ("data/a.py", DOC + "try:\n    x = 1\nexcept:\n    x = 2\n", 4, "forbidden"),
    ("data/a.py", DOC + "x = 1  # TO" + "DO: later\n", 2, "open-end"),
    ("data/a.py", "x = 1\n", 1, "docstring"),
    ("data/a.py", DOC + "def work() -> None: ...\n", 2, "docstring"),
    ("data/a.py", DOC + "class Work:\n    " + DOC + "    def go(self) -> None: ...\n", 4, "docstring"),
    ("data/a.py", DOC + "from fedcast.models.patch import PatchTransformer\n", 2, "floors"),
    ("data/a.py", DOC + "def _work() -> None:\n    import fedcast.run.pretrain\n", 3, "floors"),
    ("data/a.py", DOC + "from ..run import pretrain\n", 2, "floors"),
    ("data/a.py", DOC + "from fedcast import pretrain\n", 2, "floors"),
    ("nowhere/a.py", DOC, 1, "floors"),
    ("data/a.py", DOC + REPEATED + "other = 1\n" + REPEATED, 2, "duplication"),
    ("data/a.py", "def (:\n", 1, "syntax"),
]

ALLOWED = [
    ("data/a.py", DOC + "x = torch.load('f', weights_only=True)\n"),
    ("data/a.py", DOC + "x = import_module(f'fedcast.{name}')\n"),
    ("data/a.py", DOC + "x = import_module(f'{__name__}.{name}')\n"),
    ("data/a.py", DOC + "x = model.eval()\n"),
    ("data/a.py", DOC + "def _work() -> None: ...\n"),
    ("data/a.py", DOC + "from fedcast.errors import DataError\n"),
    ("cli/a.py", DOC + "from fedcast.report.page import write_report\n"),
    ("data/a.py", DOC + "x = 1\n" * 499),
]


def _project(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "src" / "fedcast" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_when_the_project_is_checked_then_no_rule_is_broken(repository: Path) -> None:
    assert [str(finding) for finding in house_rules.check(repository)] == []


@pytest.mark.parametrize(("name", "text", "line", "rule"), BROKEN)
def test_when_a_rule_is_broken_then_file_line_and_rule_are_named(tmp_path: Path, name: str, text: str, line: int, rule: str) -> None:
    findings = house_rules.check(_project(tmp_path, {name: text}))
    assert (f"src/fedcast/{name}", line, rule) in {(finding.file, finding.line, finding.rule) for finding in findings}
    assert str(findings[0]).startswith(f"{findings[0].file}:{findings[0].line}: ")


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_when_code_only_looks_forbidden_then_it_passes(tmp_path: Path, name: str, text: str) -> None:
    findings = house_rules.check(_project(tmp_path, {name: text}))
    assert [str(finding) for finding in findings if finding.rule != "duplication"] == []


def test_when_two_packages_of_one_floor_import_each_other_then_both_are_named(tmp_path: Path) -> None:
    files = {"models/a.py": DOC + "from fedcast.tasks.b import x\n", "tasks/b.py": DOC + "from fedcast.models.a import y\n"}
    findings = house_rules.check(_project(tmp_path, files))
    assert [(finding.file, finding.rule) for finding in findings] == [
        ("src/fedcast/models/a.py", "floors"),
        ("src/fedcast/tasks/b.py", "floors"),
    ]


def test_when_main_is_run_then_the_exit_code_says_whether_rules_are_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert house_rules.main([str(_project(tmp_path, {"data/a.py": DOC}))]) == 0
    assert house_rules.main([str(_project(tmp_path, {"data/a.py": DOC + "assert True\n"}))]) == 1
    assert "src/fedcast/data/a.py:2: forbidden: assert" in capsys.readouterr().out
