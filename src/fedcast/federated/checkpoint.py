"""Checkpoints of the server: written aside, synced, renamed; a SHA-256 in the manifest; the last two are kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedcast.errors import CheckpointError
from fedcast.methods.base import Server

_NAME = re.compile(r"round-(\d{6})")
_TENSORS = "server.safetensors"
_MANIFEST = "manifest.json"
_KEPT = 2


@dataclass
class Progress:
    """What the loop itself must remember beside the server's state.

    Attributes
    ----------
    best_loss, best_round
        Smallest mean validation loss so far, and its round.
    bytes_up, bytes_down, seconds
        Sums over all rounds so far.
    peak_memory
        The most bytes the coordinating process held at once.
    rows
        The rows of the checkpoint's own round: they are appended to the log after the checkpoint, and again after a kill between
        the two.
    """

    best_loss: float = float("inf")
    best_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def save(self, server: Server, progress: Progress, *, before_rename: Callable[[], None] = lambda: None) -> None:
        """Write the checkpoint of the server's round."""
        groups = {"method": server.tensors, "own": server.own, "expert": server.experts}
        named = {f"{group}.{name}": tensor.contiguous().clone() for group, tensors in groups.items() for name, tensor in tensors.items()}
        payload = save({"shared": server.shared, "private": server.private, **named})
        manifest = {
            "round": server.round,
            "layout": server.layout.digest,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "progress": {**vars(progress), "best_loss": progress.best_loss if isfinite(progress.best_loss) else None},
        }
        manifest["manifest_sha256"] = _seal(manifest)
        aside = self._folder / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside / _TENSORS, payload)
        _write(aside / _MANIFEST, json.dumps(manifest).encode())
        before_rename()
        final = self._folder / f"round-{server.round:06d}"
        # A checkpoint of this round can only be left over from a history that was given up as damaged.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(self._folder)
        for number in self._rounds()[:-_KEPT]:
            shutil.rmtree(self._folder / f"round-{number:06d}")

    def load(self, server: Server) -> Progress | None:
        """Set the server to the newest undamaged checkpoint; ``None`` when there is no checkpoint at all.

        Raises
        ------
        CheckpointError
            When there are checkpoints but none is whole.
        """
        rounds = self._rounds()
        for number in reversed(rounds):
            progress = self._load(number, server)
            if progress is not None:
                return progress
        if rounds:
            raise CheckpointError(f"every checkpoint in {self._folder} is damaged", hint="remove the run folder and start again")
        return None

    def _load(self, number: int, server: Server) -> Progress | None:
        folder = self._folder / f"round-{number:06d}"
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
            payload = (folder / _TENSORS).read_bytes()
        except (OSError, ValueError):
            return None
        if not isinstance(manifest, dict) or manifest.pop("manifest_sha256", None) != _seal(manifest) or manifest["round"] != number:
            return None
        if manifest["sha256"] != hashlib.sha256(payload).hexdigest():
            return None
        if manifest["layout"] != server.layout.digest:
            raise CheckpointError(f"the checkpoint {folder} holds another model", hint="start the run in a new folder")
        tensors = load(payload)
        server.shared, server.private = tensors.pop("shared"), tensors.pop("private")
        server.tensors = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
        server.own = {name.removeprefix("own."): t for name, t in tensors.items() if name.startswith("own.")}
        server.experts = {name.removeprefix("expert."): t for name, t in tensors.items() if name.startswith("expert.")}
        server.round = manifest["round"]
        kept = manifest["progress"]
        return Progress(**{**kept, "best_loss": float("inf") if kept["best_loss"] is None else kept["best_loss"]})

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self._folder.iterdir() if (match := _NAME.fullmatch(entry.name)))


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(server: Server) -> str:
    """Return the SHA-256 of the server's weights: two runs ended alike when their digests agree."""
    hasher = hashlib.sha256()
    of_sites = (group[name] for group in (server.own, server.experts) for name in sorted(group))
    for tensor in (server.shared, server.private, *of_sites):
        hasher.update(tensor.to(torch.float32).numpy().tobytes())
    return hasher.hexdigest()
