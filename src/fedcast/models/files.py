"""Model folders: ``model.safetensors`` beside a ``config.json`` that names its format and carries the SHA-256 of the weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import ModelConfig
from fedcast.safe import UnsafeError, read_json_file
from fedcast.tensors import check_file, read_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_READ_BY_LIBRARIES = (CONFIG, f"{WEIGHTS}.index.json", "generation_config.json", "adapter_config.json")
_INDEX_LIMIT = 1 << 24


class Document(BaseModel):
    """What every ``config.json`` says; a format adds its own keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: str
    version: Literal[1]
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


D = TypeVar("D", bound=Document)


def write_model(folder: Path, form: str, keys: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a model folder.

    A new folder appears complete or not at all. In an existing one each file is replaced whole, the weights first; the
    configuration carries their SHA-256, so a mixture of two models is refused when it is read.

    Parameters
    ----------
    folder
        Where to; made with its parents when it does not exist.
    form
        Name of the format.
    keys
        The format's own keys of ``config.json``.
    state
        Named tensors.
    """
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    document = {"format": form, "version": 1, "weights_sha256": hashlib.sha256(weights).hexdigest(), **keys}
    files = {WEIGHTS: weights, CONFIG: (json.dumps(document, indent=2) + "\n").encode()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{os.getpid()}.aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for name, content in files.items():
            _write(aside / name, content)
        if folder.exists():
            for name in files:
                os.replace(aside / name, folder / name)
        else:
            os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def model_format(folder: Path) -> str:
    """Return the format a model folder names.

    Raises
    ------
    CheckpointError
        When there is no such folder or its configuration is damaged.
    """
    document = _read_json(folder / CONFIG)
    return str(document.get("format")) if isinstance(document, dict) else ""


def read_model(folder: Path, form: type[D]) -> tuple[D, dict[str, Tensor]]:
    """Read a model folder of a known format.

    Raises
    ------
    CheckpointError
        When a file is missing or damaged, or the configuration is not of that format.
    """
    path = folder / CONFIG
    content = _read_json(path)
    try:
        document = form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its root"
        raise CheckpointError(f"{path} is refused at {where}: {first['msg']}", hint=_AGAIN) from error
    return document, read_weights(folder / WEIGHTS, document.weights_sha256)


_AGAIN = "copy the model folder again, or save the model again with this version of fedcast"


def read_config(folder: Path, keys: Mapping[str, Any]) -> ModelConfig:
    """Build the model's configuration from its part of ``config.json``; :class:`CheckpointError` when it is refused."""
    try:
        return ModelConfig.from_dict(keys)
    except ModelError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error.message}", hint=_AGAIN) from error


def _read_json(path: Path) -> Any:
    try:
        return read_json_file(inside(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnsafeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint=_AGAIN) from error


def inside(path: Path) -> Path:
    """Return where a file of a model folder lies, links followed; :class:`CheckpointError` when that is outside the folder.

    A folder in the cache of the Hugging Face hub holds links to the files beside it, which are followed.
    """
    folder = path.parent.resolve()
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere", hint=_AGAIN) from error
    cached = folder.parent.name == "snapshots" and found.is_relative_to(folder.parent.parent / "blobs")
    if not (cached or found.is_relative_to(folder)):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder", hint="copy the file into the folder, if it is to be trusted"
        )
    return found


def check_folder(folder: Path) -> None:
    """Check a model folder that a library is about to read.

    Raises
    ------
    CheckpointError
        When something in it is a link that leads out of it, or the header of a safetensors file or a JSON file is refused.
    """
    for path in sorted(folder.iterdir()):
        found = inside(path)
        try:
            if path.suffix == ".safetensors" and not found.is_dir():
                check_file(found)
            elif path.name in _READ_BY_LIBRARIES and not found.is_dir():
                read_json_file(found, _INDEX_LIMIT)
        except OSError as error:
            raise _unreadable(path, error) from error
        except UnsafeError as error:
            raise CheckpointError(f"{path} is damaged: {error}", hint=_AGAIN) from error


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = "does not exist" if isinstance(error, FileNotFoundError | NotADirectoryError) else f"cannot be read: {error.strerror}"
    return CheckpointError(f"{path} {reason}", hint="give the folder that save_pretrained wrote, or a run folder with final/")


def read_weights(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; :class:`CheckpointError` when it is missing, damaged, or its SHA-256 is not ``digest``."""
    hint = "copy the model folder again; the two files belong together"
    try:
        content = read_file(inside(path), digest=digest is not None)
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnsafeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint=hint) from error
    if digest is not None and content.sha256 != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}", hint=hint)
    return content.tensors


def check_tensors(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, surplus, of another shape, of several types or not finite, by :class:`CheckpointError`."""
    path = folder if folder.is_file() else folder / WEIGHTS
    hint = f"use the {CONFIG} that was saved beside these weights"
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        parts = [
            f"{word} {len(names)} tensors, first {names[0]!r}"
            for word, names in (("lacks", missing), ("has a surplus of", surplus))
            if names
        ]
        raise CheckpointError(f"{path} {' and '.join(parts)}", hint=hint)
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}", hint=hint)
        if not tensor.dtype.is_floating_point or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{path}: tensor {name!r} holds values that are not finite numbers", hint="go back to an earlier checkpoint"
            )
    if len({tensor.dtype for tensor in found.values()}) != 1:
        raise CheckpointError(f"{path} mixes tensor types", hint="save the model again with all parameters of one type")
