"""Task and Reply: named tensors plus a little JSON, the same on every fleet; on any wire they are safetensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from fedcast.errors import ScreenError, WireError
from fedcast.safe import UnsafeError, finite, printable, read_json
from fedcast.tensors import Limits, read_bytes, to_bytes

TaskKind = Literal["train", "evaluate", "guard", "describe"]
WIRE_LIMIT: Final = 1 << 33
"""Bytes of a message at most."""
HEADER_LIMIT: Final = 1 << 20
"""Bytes of a message's header, which holds its JSON, at most."""
SCORES_LIMIT: Final = 1 << 24
"""The same for answers to a task of kind ``"evaluate"``, which hold forecasts where a spec asks for them."""
_TENSORS = 10_000
_LATEST = 10**9
_ID_LENGTH = 200
_ERROR_LENGTH = 2_000
_HEADER = "fedcast"
_HINT = "check that both sides run the same version of fedcast and that nothing between them alters bytes"
_RESERVED = frozenset({"loss", "steps", "samples", "seconds", "weight"})
_LARGEST = sys.float_info.max
_MOST = 10**9
_METRICS = 64
_SHOWN = 300


@dataclass(frozen=True)
class Task:
    """What a site is asked to do.

    Attributes
    ----------
    kind
        ``"train"``, ``"evaluate"``, ``"guard"`` (a guard's own exchange, ``meta["guard"]`` names it) or ``"describe"`` (what a site
        has): a closed list, sites run nothing else.
    round
        Round, from 1; 0 before training.
    tensors
        Named tensors, float32.
    meta
        JSON values.
    id
        Names this task among all of all runs; the same work always has the same one (:func:`task_id`).
    """

    kind: TaskKind
    round: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return _nbytes(self.tensors)

    def encode(self) -> bytes:
        """Return the task as bytes; :class:`WireError` when it has more than a receiver reads."""
        return _encode({"kind": self.kind, "round": self.round, "meta": dict(self.meta), "id": self.id}, self.tensors, HEADER_LIMIT)

    @classmethod
    def decode(cls, payload: bytes) -> Task:
        """Read a task; :class:`WireError` when the bytes are not one."""
        header, tensors = _decode(payload, {"kind", "round", "meta", "id"}, HEADER_LIMIT)
        known = header["kind"] in get_args(TaskKind) and _is_id(header["id"])
        if not known or type(header["round"]) is not int or not 0 <= header["round"] <= _LATEST:
            raise WireError("the payload is no task: its kind, its id or its round is none", hint=_HINT)
        return cls(header["kind"], header["round"], tensors, header["meta"], header["id"])


@dataclass(frozen=True)
class Reply:
    """What a site answers: tensors and JSON values, or an error in one sentence (never a traceback, which can leak data).

    Attributes
    ----------
    tensors
        Named tensors.
    meta
        JSON values.
    error
        What went wrong, if anything did.
    task
        The id of the task it answers: a reply to another task has no effect.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    task: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return _nbytes(self.tensors)

    def encode(self) -> bytes:
        """Return the reply as bytes; :class:`WireError` when it has more than a receiver reads."""
        error = None if self.error is None else self.error[:_ERROR_LENGTH]
        return _encode({"error": error, "meta": dict(self.meta), "task": self.task}, self.tensors, SCORES_LIMIT)

    @classmethod
    def decode(cls, payload: bytes, to: TaskKind = "train") -> Reply:
        """Read a reply to a task of a kind; :class:`WireError` when the bytes are not one."""
        header, tensors = _decode(payload, {"error", "meta", "task"}, SCORES_LIMIT if to == "evaluate" else HEADER_LIMIT)
        error = header["error"]
        if not (error is None or (isinstance(error, str) and len(error) <= _ERROR_LENGTH)) or not _is_id(header["task"]):
            raise WireError("the payload is no reply: its error is no short text, or it names no task", hint=_HINT)
        return cls(tensors, header["meta"], None if error is None else printable(error), header["task"])


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _ID_LENGTH and value.isprintable()


def _encode(header: Mapping[str, Any], tensors: Mapping[str, Tensor], header_limit: int) -> bytes:
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(header), allow_nan=False)
    payload = to_bytes(tensors, {_HEADER: text})
    length = int.from_bytes(payload[:8], "little")
    if len(payload) > WIRE_LIMIT or length > header_limit or len(tensors) > _TENSORS:
        raise WireError(
            f"a message would have {len(payload)} bytes in {len(tensors)} tensors, and a header of {length} bytes",
            hint=f"{WIRE_LIMIT} bytes, {_TENSORS} tensors and {header_limit} bytes of header are read: lower evaluation.samples, "
            "or train a smaller model",
        )
    return payload


def _decode(payload: bytes, keys: set[str], header_limit: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        tensors, metadata, _ = read_bytes(payload, Limits(WIRE_LIMIT, header_limit, _TENSORS))
        if metadata.keys() != {_HEADER}:
            raise UnsafeError("its metadata are not those of a message")
        header = read_json(metadata[_HEADER].encode(), header_limit)
    except UnsafeError as error:
        raise WireError(f"the payload is no message: {error}", hint=_HINT) from error
    if not isinstance(header, dict) or header.keys() != keys or not isinstance(header["meta"], dict):
        raise WireError("the payload is no message: its header has other keys", hint=_HINT)
    return header, tensors


def screen(
    reply: Reply, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, torch.dtype] | None = None, *, largest_samples: int
) -> None:
    """Check a training reply against its declared layout before any method sees it.

    Parameters
    ----------
    reply
        The reply.
    shapes
        Exactly the tensors it must hold, with their shapes; all are finite.
    types
        Their types, by name; float32 where there is none.
    largest_samples
        Most training points the site may claim.

    Raises
    ------
    ScreenError
        Naming the first thing that does not hold.
    """
    hint = "the reply is dropped and the round goes on without it"
    if reply.error is not None:
        raise ScreenError(_shown(reply.error), hint=hint)
    if set(reply.tensors) != set(shapes):
        unexpected = sorted(set(reply.tensors) ^ set(shapes))
        raise ScreenError(f"tensors missing or not declared: {_shown(', '.join(unexpected))}", hint=hint)
    for name, shape in shapes.items():
        tensor = reply.tensors[name]
        dtype = (types or {}).get(name, torch.float32)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ScreenError(f"{name} is {_type(tensor.dtype)} {tuple(tensor.shape)}, declared is {_type(dtype)} {shape}", hint=hint)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ScreenError(f"{name} is not finite", hint=hint)
    samples = reply.meta.get("samples")
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= largest_samples:
        raise ScreenError(f"claims {_shown(repr(samples))} training points, declared are {largest_samples}", hint=hint)
    steps, metrics = reply.meta.get("steps"), reply.meta.get("metrics")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= _MOST:
        raise ScreenError(f"claims {_shown(repr(steps))} steps", hint=hint)
    if not is_number(reply.meta.get("loss")):
        raise ScreenError("loss is no finite number", hint=hint)
    for name in ("seconds", "compute_seconds"):
        # They are added up and logged: a sum must stay a number.
        if not (is_number(seconds := reply.meta.get(name)) and 0 <= seconds <= _MOST):
            raise ScreenError(f"{name} is no number of seconds", hint=hint)
    if not isinstance(metrics, dict) or len(metrics) > _METRICS:
        raise ScreenError(f"its metrics are not at most {_METRICS} named numbers", hint=hint)
    if any(name in _RESERVED or len(name) > _METRICS or not is_number(value) for name, value in metrics.items()):
        raise ScreenError("its metrics are not named finite numbers", hint=hint)


def _shown(text: str) -> str:
    """Return what a site wrote as it may stand in a log: short, and on one line."""
    return "".join(c if c.isprintable() else " " for c in text[:_SHOWN])


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_local(task: Task) -> bool:
    """Return whether a site is to go on alone, from the weights it was sent or those it has: nothing of its work travels."""
    return task.kind == "train" and task.meta.get("stage") == "local"


def screen_task(task: Task, shapes: Mapping[str, tuple[int | None, ...]], guards: tuple[str, ...] = ()) -> None:
    """Check a task against its declared layout before a site works on it.

    Parameters
    ----------
    task
        The task.
    shapes
        Every tensor it may hold, with its shape (``None``: any length); ``"shared"`` it must hold, but where the site goes on alone.
        All are float32 and finite.
    guards
        What the names of the guards' tensors begin with; what is in those, the guards check.

    Raises
    ------
    ScreenError
        Naming the first thing that does not hold.
    """
    hint = "check that both sides run the same version of fedcast"
    tensors = {name: tensor for name, tensor in task.tensors.items() if not (guards and name.startswith(guards))}
    if ("shared" not in tensors and not is_local(task)) or not tensors.keys() <= shapes.keys():
        raise ScreenError("the task's tensors are not as declared", hint=hint)
    for name, tensor in tensors.items():
        fits = tensor.dim() == len(shapes[name]) and all(want in (None, got) for want, got in zip(shapes[name], tensor.shape, strict=True))
        if not fits or tensor.dtype != torch.float32 or not all_finite(tensor):
            raise ScreenError(f"the task's {name} is not as declared", hint=hint)


def all_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number."""
    # One pass that makes no copy; NaN and infinity both show in the extremes.
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number that a float can be."""
    # A whole number of hundreds of digits is none that a float can be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
