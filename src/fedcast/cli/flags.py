"""Flags that are generated from the spec: every key ``section.key`` is the flag ``--section.key``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from fedcast.cli.output import console
from fedcast.errors import SpecError, UnknownNameError

_TOP_LEVEL = ("name", "seed", "guards")
_NAMED = ("method", "tuning")
"""Sections whose further keys are the hyper-parameters of what they name."""


def spec_keys() -> list[dict[str, str]]:
    """Return every key of a spec as a dict of ``key``, ``type``, ``default`` and ``description``."""
    from fedcast.spec import iter_keys

    return [
        {"key": key, "type": readable_type(kind), "default": "" if default == "null" else default, "description": description}
        for key, kind, default, description in iter_keys()
        if not _is_options(key)
    ]


def readable_type(kind: str) -> str:
    """Return a type's name for a person: ``Literal['a', 'b']`` is ``a|b``, ``tuple[str, ...]`` is ``list of str``."""
    kind = re.sub(r"Annotated\[(\w+), (?:[^\[\]]|\[[^\[\]]*\])*\]", r"\1", kind)
    kind = re.sub(r"Literal\[([^\]]*)\]", lambda found: found.group(1).replace("'", "").replace(", ", "|"), kind)
    kind = re.sub(r"fedcast\.spec\.\w+", "table", kind)
    kind = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", kind)
    return kind.replace(" | None", "")


def expand_flags(arguments: Sequence[str]) -> list[str]:
    """Turn flags that name a key of the spec into ``--set key=value``; everything else stays.

    Parameters
    ----------
    arguments
        The command line after the verb.

    Raises
    ------
    UnknownNameError
        When a flag with a dot names no key.
    SpecError
        When a flag has no value.
    """
    expanded: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":
            return [*expanded, word, *words]
        if not word.startswith("--") or ("." not in name and name not in _TOP_LEVEL):
            expanded.append(word)
            continue
        key = name.replace("-", "_")
        kind = _type_of(key)
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise SpecError(f"--{name} has no value", hint=f"write --{name} VALUE; see `fedcast init --keys`")
        expanded += ["--set", f"{key}={_as_toml(value, kind)}"]
    return expanded


def _type_of(key: str) -> str:
    from fedcast.spec import iter_keys

    kinds = {name: kind for name, kind, _, _ in iter_keys() if not _is_options(name)}
    if key in kinds:
        return kinds[key]
    section, _, rest = key.partition(".")
    if section in _NAMED and rest.isidentifier():
        return "Any"  # method and tuning check their hyper-parameters themselves
    raise UnknownNameError.of("key", key, kinds)


def _is_options(key: str) -> bool:
    return key in {f"{section}.options" for section in _NAMED}


def _as_toml(value: str, kind: str) -> str:
    if kind.startswith("tuple") and not value.startswith("["):
        return toml_value([part.strip() for part in value.split(",") if part.strip()])
    if kind.startswith(("str", "Literal")):
        return toml_value(value)
    return value


def toml_value(value: object) -> str:
    """Return a value as it stands after the equals sign in TOML."""
    import tomli_w

    if isinstance(value, list):
        return f"[{', '.join(toml_value(inner) for inner in value)}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


class SpecCommand(TyperCommand):
    """A command that takes every key of the spec as a flag and lists them under its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line after the spec's flags are turned into ``--set``."""
        return super().parse_args(ctx, expand_flags(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then every key of the spec."""
        super().format_help(ctx, formatter)
        console().print(keys_table(spec_keys(), "Keys of the spec, each also a flag such as --federation.rounds 5", prefix="--"))


def keys_table(keys: Sequence[dict[str, str]], title: str | None = None, *, prefix: str = "") -> Any:
    """Return the keys of a spec as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("key", "type", "default", "description", title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in keys:
        table.add_row(prefix + row["key"], *(escape(row[name]) for name in ("type", "default", "description")))
    return table
