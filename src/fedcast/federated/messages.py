"""Task and Reply: named tensors plus a little JSON, the same on every fleet; on any wire they are safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedcast.errors import ScreenError, WireError

TaskKind = Literal["train", "evaluate"]
_HEADER = "fedcast"
_HEADER_LIMIT = 100_000_000
_RESERVED = frozenset({"loss", "steps", "samples", "seconds", "weight"})


@dataclass(frozen=True)
class Task:
    """What a site is asked to do.

    Attributes
    ----------
    kind
        ``"train"`` or ``"evaluate"``: a closed list, sites run nothing else.
    round
        Round, from 1; 0 before training.
    tensors
        Named tensors, float32.
    meta
        JSON values.
    """

    kind: TaskKind
    round: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return _nbytes(self.tensors)

    def encode(self) -> bytes:
        """Return the task as bytes."""
        return _encode({"kind": self.kind, "round": self.round, "meta": dict(self.meta)}, self.tensors)

    @classmethod
    def decode(cls, payload: bytes) -> Task:
        """Read a task; :class:`WireError` when the bytes are not one."""
        header, tensors = _decode(payload)
        if header.get("kind") not in ("train", "evaluate") or not isinstance(header.get("round"), int):
            raise WireError("the payload is no task", hint="check that both sides run the same version of fedcast")
        return cls(header["kind"], header["round"], tensors, header.get("meta", {}))


@dataclass(frozen=True)
class Reply:
    """What a site answers: tensors and JSON values, or an error in one sentence (never a traceback, which can leak data)."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return _nbytes(self.tensors)

    def encode(self) -> bytes:
        """Return the reply as bytes."""
        return _encode({"error": self.error, "meta": dict(self.meta)}, self.tensors)

    @classmethod
    def decode(cls, payload: bytes) -> Reply:
        """Read a reply; :class:`WireError` when the bytes are not one."""
        header, tensors = _decode(payload)
        error = header.get("error")
        if error is not None and not isinstance(error, str):
            raise WireError("the payload is no reply", hint="check that both sides run the same version of fedcast")
        return cls(tensors, header.get("meta", {}), error)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _encode(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={_HEADER: json.dumps(header)})


def _decode(payload: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    hint = "check that both sides run the same version of fedcast and that nothing between them alters bytes"
    try:
        tensors = load(payload)
        length = int.from_bytes(payload[:8], "little")
        if length > _HEADER_LIMIT:
            raise WireError("the payload's header is too long", hint=hint)
        metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
        header = json.loads(metadata[_HEADER])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise WireError("the payload is no message", hint=hint) from error
    if not isinstance(header, dict) or not isinstance(header.get("meta", {}), dict):
        raise WireError("the payload's header is no message", hint=hint)
    return header, tensors


def screen(reply: Reply, shapes: Mapping[str, tuple[int, ...]], *, largest_samples: int) -> None:
    """Check a training reply against its declared layout before any method sees it.

    Parameters
    ----------
    reply
        The reply.
    shapes
        Exactly the tensors it must hold, with their shapes; all are float32 and finite.
    largest_samples
        Most training points the site may claim.

    Raises
    ------
    ScreenError
        Naming the first thing that does not hold.
    """
    hint = "the reply is dropped and the round goes on without it"
    if reply.error is not None:
        raise ScreenError(reply.error, hint=hint)
    if set(reply.tensors) != set(shapes):
        unexpected = sorted(set(reply.tensors) ^ set(shapes))
        raise ScreenError(f"tensors missing or not declared: {', '.join(unexpected)}", hint=hint)
    for name, shape in shapes.items():
        tensor = reply.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ScreenError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, declared is float32 {shape}", hint=hint)
        if not all_finite(tensor):
            raise ScreenError(f"{name} is not finite", hint=hint)
    samples = reply.meta.get("samples")
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= largest_samples:
        raise ScreenError(f"claims {samples!r} training points, declared are {largest_samples}", hint=hint)
    steps, metrics = reply.meta.get("steps"), reply.meta.get("metrics")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ScreenError(f"claims {steps!r} steps", hint=hint)
    for name in ("loss", "seconds", "compute_seconds"):
        if not _is_number(reply.meta.get(name)):
            raise ScreenError(f"{name} is no finite number", hint=hint)
    if not isinstance(metrics, dict) or any(name in _RESERVED or not _is_number(value) for name, value in metrics.items()):
        raise ScreenError("its metrics are not named finite numbers", hint=hint)


def is_local(task: Task) -> bool:
    """Return whether a site is to go on alone, from the weights it was sent or those it has: nothing of its work travels."""
    return task.kind == "train" and task.meta.get("stage") == "local"


def screen_task(task: Task, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Check a task against its declared layout before a site works on it.

    Parameters
    ----------
    task
        The task.
    shapes
        Every tensor it may hold, with its shape (``None``: any length); ``"shared"`` it must hold, but where the site goes on alone.
        All are float32 and finite.

    Raises
    ------
    ScreenError
        Naming the first thing that does not hold.
    """
    hint = "check that both sides run the same version of fedcast"
    if ("shared" not in task.tensors and not is_local(task)) or not task.tensors.keys() <= shapes.keys():
        raise ScreenError("the task's tensors are not as declared", hint=hint)
    for name, tensor in task.tensors.items():
        fits = tensor.dim() == len(shapes[name]) and all(want in (None, got) for want, got in zip(shapes[name], tensor.shape, strict=True))
        if not fits or tensor.dtype != torch.float32 or not all_finite(tensor):
            raise ScreenError(f"the task's {name} is not as declared", hint=hint)


def all_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number."""
    # One pass that makes no copy; NaN and infinity both show in the extremes.
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
