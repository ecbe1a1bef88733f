"""Choosing one of several frozen dataclasses by name, its fields checked: methods, tunings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from fedcast.errors import SpecError, UnknownNameError

T = TypeVar("T")


def register(kind: str, cls: type[T], name: str, known: dict[str, type[T]]) -> None:
    """Enter a class under its name; an empty name and one that another class has are refused by :class:`SpecError`."""
    if not name:
        raise SpecError(f"{kind} class {cls.__name__} has no name", hint="set the class attribute `name`")
    other = known.get(name)
    # A slotted or re-executed definition of the same class replaces itself; another class must not take its name.
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SpecError(f"two {kind}s are named {name!r}: {other.__module__} and {cls.__module__}", hint="rename one of them")
    known[name] = cls


def build(kind: str, name: str, options: Mapping[str, Any], known: Mapping[str, type[T]], *, help: str) -> T:
    """Return the object a section of a spec names, its hyper-parameters checked.

    A list may be written as text with commas, such as ``"q,v"``: that is how a flag of the command line arrives.

    Raises
    ------
    UnknownNameError
        When nothing, or no hyper-parameter of it, has that name.
    SpecError
        When a hyper-parameter's value is refused.
    """
    if name not in known:
        raise UnknownNameError.of(kind, name, known)
    cls: Any = known[name]
    names = _options(cls)
    for option in options:
        if option not in names:
            # Often the name was forgotten: the default tuning has no hyper-parameters.
            owners = " or ".join(repr(other) for other, one in sorted(known.items()) if option in _options(one))
            named = f"set {kind}.name to {owners}" if owners else f"leave it out, or set {kind}.name to another {kind}"
            otherwise = None if names else f"{name!r} has no hyper-parameters: {named}"
            raise UnknownNameError.of(f"hyper-parameter of {kind} {name!r}:", option, names, otherwise=otherwise)
    # A pydantic twin of the dataclass: hints are resolved in the module of each class, also for classes outside this package.
    hints = get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    values = {option: _listed(value, hints[option]) for option, value in options.items()}
    try:
        built: T = cls(**dict(create_model(cls.__name__, __config__=ConfigDict(allow_inf_nan=False), **fields).model_validate(values)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SpecError(f"{kind}.{key} = {first['input']!r} is refused: {first['msg']}", hint=help) from error
    return built


def _options(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _listed(value: Any, hint: Any) -> Any:
    """Return the parts of a text with commas where a tuple is wanted, and any other value as it is."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is not tuple or not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def describe(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, summary and hyper-parameters (name, type, default, description) of everything in a registry, sorted by name."""
    return [
        {
            "name": name,
            "summary": cls.summary,
            "parameters": [
                {"name": f.name, "type": str(f.type), "default": f.default, "description": f.metadata.get("doc", "")}
                for f in dataclasses.fields(cls)
            ],
        }
        for name, cls in sorted(known.items())
    ]


def hyper(default: T, doc: str) -> T:
    """Declare a hyper-parameter with its default and one line of documentation."""
    value: T = dataclasses.field(default=default, metadata={"doc": doc})
    return value
