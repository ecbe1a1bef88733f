"""The rules of the house that no other tool checks; standard library only.

``python tools/house_rules.py [ROOT]`` prints one line a finding, ``file:line: rule: what``, and exits with 1 when there is any.

==================  ==================================================================================================
file-length         no Python file has more than 500 lines
function-length     no function has more than 60 lines
forbidden           no assert, print, bare except, eval, exec, pickle and its like in src; ``torch.load`` only with
                    ``weights_only=True``; no module is imported by a name that comes from data
open-end            nothing in src is marked as left open
duplication         under 8 % of the lines of src stand in a window of six lines that occurs more than once
floors              an import points down, or to its own floor without a cycle
docstring           every public module, class, function and method in src has a docstring
==================  ==================================================================================================
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 500
FUNCTION_LINES = 60
WINDOW = 6
DUPLICATED_SHARE = 0.08
SHOWN_DUPLICATES = 8

FOLDERS = ("src", "tests", "tools", "scripts", "benchmarks")
PACKAGE = "fedcast"
# The facade (fedcast/__init__.py) and __main__ stand above all floors: they import lazily what a person asks for.
FLOORS = {
    "errors": 0,
    "spec": 0,
    "version": 0,
    "cache": 0,
    "registry": 0,
    "safe": 0,
    "tensors": 0,
    "data": 1,
    "kernels": 1,
    "models": 2,
    "tasks": 2,
    "evaluate": 2,
    "training": 3,
    "methods": 4,
    "tuning": 4,
    "federated": 5,
    "consortium": 5,
    "run": 6,
    "report": 7,
    "serve": 7,
    "cli": 7,
    "__init__": 8,
    "__main__": 8,
}
SERIALISERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
LEFT_OPEN = re.compile(r"\b(TODO|FIXME|XXX)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Finding:
    """One broken rule: where, which and what."""

    file: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.what}"


@dataclass(frozen=True)
class Source:
    """One parsed Python file, named relative to the root."""

    name: str
    text: str
    tree: ast.Module

    @property
    def is_product(self) -> bool:
        """Whether the file is part of the product (``src``), where all rules hold."""
        return self.name.startswith("src/")

    def finding(self, line: int, rule: str, what: str) -> Finding:
        """Return a finding in this file."""
        return Finding(self.name, line, rule, what)


def read_sources(root: Path) -> tuple[list[Source], list[Finding]]:
    """Return every Python file of the project, and a finding for each that cannot be parsed."""
    sources, broken = [], []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            try:
                sources.append(Source(name, text, ast.parse(text)))
            except SyntaxError as error:
                broken.append(Finding(name, error.lineno or 1, "syntax", error.msg))
    return sources, broken


def lengths(source: Source) -> Iterator[Finding]:
    """Find files and functions that are too long."""
    count = len(source.text.splitlines())
    if count > FILE_LINES:
        yield source.finding(count, "file-length", f"{count} lines ({FILE_LINES} at most)")
    for node in ast.walk(source.tree):
        if isinstance(node, Function) and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES:
            yield source.finding(node.lineno, "function-length", f"{node.name} has {size} lines ({FUNCTION_LINES} at most)")


def forbidden(source: Source) -> Iterator[Finding]:
    """Find statements and calls that have no place in the product."""
    for node in ast.walk(source.tree):
        what = _forbidden(node)
        if what:
            yield source.finding(getattr(node, "lineno", 1), "forbidden", what)
    for number, line in enumerate(source.text.splitlines(), 1):
        if LEFT_OPEN.search(line):
            yield source.finding(number, "open-end", "finish it, or write it down where it is planned")


def _forbidden(node: ast.AST) -> str | None:
    if isinstance(node, ast.Assert):
        return "assert vanishes under python -O: raise an error of the tree"
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except: name the exceptions"
    for module in _imported_modules(node):
        if module.split(".")[0] in SERIALISERS:
            return f"{module} runs code from data: use safetensors or JSON"
    return _forbidden_call(node) if isinstance(node, ast.Call) else None


def _forbidden_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "print":
        return "print: results go through fedcast.cli.output, progress through an observer"
    if name in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}:
        return f"{name} runs code from data"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True runs code from data"
    if keywords.get("allow_pickle") == "True":
        return "allow_pickle=True runs code from data"
    if name in {"import_module", "importlib.import_module"} and not (call.args and _names_own_module(call.args[0])):
        return f"{name} of a name that may come from data: begin it with '{PACKAGE}.' or __name__"
    return None


def _names_own_module(node: ast.expr) -> bool:
    """Return whether an argument is a constant, or an f-string that begins with this package's own name."""
    if isinstance(node, ast.Constant):
        return True
    if not isinstance(node, ast.JoinedStr) or not node.values:
        return False
    first = node.values[0]
    if isinstance(first, ast.Constant):
        return str(first.value).startswith(f"{PACKAGE}.")
    return isinstance(first, ast.FormattedValue) and ast.unparse(first.value) in {"__name__", "__package__"}


def _imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []


def docstrings(source: Source) -> Iterator[Finding]:
    """Find public modules, classes, functions and methods without a docstring."""
    if not ast.get_docstring(source.tree):
        yield source.finding(1, "docstring", "the module has none")
    yield from _docstrings(source, source.tree, "")


def _docstrings(source: Source, parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Finding]:
    for node in parent.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _is_exempt(node):
            yield source.finding(node.lineno, "docstring", f"{prefix}{node.name} has none")
        if isinstance(node, ast.ClassDef):
            yield from _docstrings(source, node, f"{prefix}{node.name}.")


def _is_exempt(node: Function | ast.ClassDef) -> bool:
    """Return whether the docstring stands elsewhere: at the overloaded function, or at the property that a setter belongs to."""
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.split(".")[-1] in {"overload", "setter", "deleter"} for name in names)


def floors(sources: Iterable[Source]) -> Iterator[Finding]:
    """Find imports that point up, and cycles between packages of one floor."""
    sideways: dict[tuple[str, str], Finding] = {}
    for source in sources:
        here = _package_of(source.name)
        if here not in FLOORS:
            yield source.finding(1, "floors", f"{here} has no floor: give it one in tools/house_rules.py")
            continue
        for line, target in _own_imports(source):
            if target not in FLOORS:
                yield source.finding(line, "floors", f"{here} imports {target}, which has no floor")
            elif FLOORS[target] > FLOORS[here]:
                yield source.finding(line, "floors", f"{here} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[target]})")
            elif FLOORS[target] == FLOORS[here] and target != here:
                sideways.setdefault((here, target), source.finding(line, "floors", f"{here} and {target} import each other"))
    for (here, target), finding in sideways.items():
        if (target, here) in sideways:
            yield finding


def _package_of(name: str) -> str:
    parts = name.removeprefix("src/").removesuffix(".py").split("/")
    return parts[1] if len(parts) > 1 else parts[0]


def _own_imports(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line and top folder of every import of the package's own modules, wherever in the file it stands."""
    parts = source.name.removeprefix("src/").removesuffix(".py").split("/")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            modules = [".".join([*base, *filter(None, [node.module])])]
        else:
            modules = _imported_modules(node)
        for module in modules:
            inner = module.split(".")
            if inner[0] != PACKAGE:
                continue
            if len(inner) > 1:
                yield node.lineno, inner[1]  # type: ignore[attr-defined]
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, alias.name if alias.name in FLOORS else "__init__") for alias in node.names)
            else:
                yield node.lineno, "__init__"  # type: ignore[attr-defined]


def duplication(sources: Iterable[Source]) -> Iterator[Finding]:
    """Find the share of lines that stand in a window of lines occurring more than once, when it is too large."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    lines: dict[str, list[tuple[int, str]]] = {}
    for source in sources:
        kept = lines[source.name] = _telling_lines(source)
        for start in range(len(kept) - WINDOW + 1):
            places[tuple(text for _, text in kept[start : start + WINDOW])].append((source.name, start))
    marked: set[tuple[str, int]] = set()
    repeated = [found for found in places.values() if len(found) > 1]
    for found in repeated:
        marked.update((name, start + step) for name, start in found for step in range(WINDOW))
    total = sum(len(kept) for kept in lines.values())
    share = len(marked) / total if total else 0.0
    if share < DUPLICATED_SHARE:
        return
    what = f"{share:.1%} of the lines of src stand in a repeated window of {WINDOW} lines (under {DUPLICATED_SHARE:.0%})"
    for found in sorted(repeated)[:SHOWN_DUPLICATES]:
        spots = [f"{name}:{lines[name][start][0]}" for name, start in found]
        name, start = found[0]
        yield Finding(name, lines[name][start][0], "duplication", f"{what}: also at {', '.join(spots[1:])}")


def _telling_lines(source: Source) -> list[tuple[int, str]]:
    """Return number and stripped text of every line but blank ones, comments and lone brackets."""
    stripped = ((number, line.strip()) for number, line in enumerate(source.text.splitlines(), 1))
    return [(number, line) for number, line in stripped if len(line.strip("()[]{},:")) > 1 and not line.startswith("#")]


def check(root: Path) -> list[Finding]:
    """Return every broken rule below a project's root, sorted by place."""
    sources, findings = read_sources(root)
    product = [source for source in sources if source.is_product]
    for source in sources:
        findings += lengths(source)
    for source in product:
        findings += forbidden(source)
        findings += docstrings(source)
    findings += floors(product)
    findings += duplication(product)
    return sorted(set(findings))


def main(arguments: list[str]) -> int:
    """Check a project and return the exit code."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    findings = check(root)
    for finding in findings:
        print(finding)
    print(f"house rules: {len(findings)} finding{'' if len(findings) == 1 else 's'}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
