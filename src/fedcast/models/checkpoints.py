"""Reading a model from wherever it lies: a folder of fedcast's, a published checkpoint on disk, or one on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fedcast.models.published  # noqa: F401 - registers the adapters
from fedcast.errors import CheckpointError, FedcastError, MissingExtraError
from fedcast.models.contract import Model
from fedcast.models.files import CONFIG, check_folder, model_format
from fedcast.models.mixture import FORMAT as MIXTURE
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import model_class
from fedcast.models.published.base import FAMILIES, Published, read_json
from fedcast.models.published.heartgpt import HeartGPT
from fedcast.models.reheaded import FORMAT as REHEADED
from fedcast.models.reheaded import Reheaded

_SUFFIXES = (".safetensors", ".json")


def locate(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint; one that is named as on the hub is downloaded once and kept.

    A safetensors file of HeartGPT, whose weights are published without a configuration, stands for itself, a run folder for its
    ``final`` model. A name on the hub is ``owner/name``, or ``owner/name@revision`` for a branch, tag or commit. Only weights and
    configurations are downloaded, never code.

    Raises
    ------
    CheckpointError
        When there is no such folder, and the hub has no such checkpoint or cannot be reached.
    MissingExtraError
        When the name is one of the hub's and its client is not installed.
    """
    path = Path(checkpoint)
    if HeartGPT.published(path):
        return path
    if path.is_dir():
        final = path / "final"
        return final if final.is_dir() else path
    name = str(checkpoint)
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or owner.startswith(".") or path.is_absolute() or path.exists():
        raise CheckpointError(f"no checkpoint at {name}", hint="give a folder, or a name on the hub such as amazon/chronos-bolt-tiny")
    return _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise MissingExtraError(f"{name} lies on the Hugging Face hub", hint="pip install 'fedcast[published]'") from error
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"there is no folder {name}, and the hub has no such checkpoint that may be read",
            hint="check the name; for one behind a licence, accept that on the hub and log in with `hf auth login`",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name}, and the checkpoint cannot be had from the hub: {_first_line(error)}",
            hint=f"check the name and the network; where there is none, give a folder got by `hf download {repository} --local-dir FOLDER`",
        ) from error


def load_checkpoint(checkpoint: str | Path) -> Model | DomainMixture:
    """Read a model of any kind.

    Parameters
    ----------
    checkpoint
        A model folder, a run folder, a published checkpoint's folder, or its name on the hub.

    Raises
    ------
    CheckpointError
        When nothing there is a usable model.
    MissingExtraError
        When the model's library is not installed.
    """
    folder = locate(checkpoint)
    if folder.is_dir():
        check_folder(folder)
    sites = [] if (folder / CONFIG).exists() else sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
    if sites:
        raise CheckpointError(f"{folder} holds one model a site: {', '.join(sites)}", hint=f"name one of them, such as {folder / sites[0]}")
    family = recognise(folder)
    if family is not None:
        family.library.require(family.family)
        return _read(family, folder)
    form = model_format(folder)
    if form == MIXTURE:
        return DomainMixture.from_pretrained(folder)
    if form == REHEADED:
        return Reheaded.from_pretrained(folder, load_checkpoint)
    return model_class(folder).from_pretrained(folder)


def _read(family: type[Published], folder: Path) -> Published:
    try:
        return family.read(folder)
    except FedcastError:
        raise
    except Exception as error:  # a library raises whatever it likes where a file is damaged
        raise CheckpointError(
            f"{folder} cannot be read as a checkpoint of {family.family}: {_first_line(error)}",
            hint="fetch the checkpoint again; its configuration and weights must belong together",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def recognise(folder: Path) -> type[Published] | None:
    """Return the adapter of a published checkpoint; ``None`` for fedcast's own models, and where no configuration can be read.

    Raises
    ------
    CheckpointError
        When the configuration is neither fedcast's nor that of a family that fedcast knows.
    """
    if folder.is_file():
        return HeartGPT
    config = read_json(folder / CONFIG)
    if not config or str(config.get("format", "")).startswith("fedcast."):
        return None
    for _, family in sorted(FAMILIES.items()):
        if family.recognises(config):
            return family
    named = config.get("architectures") or config.get("model_type")
    raise CheckpointError(
        f"{folder / CONFIG} describes a model that fedcast has no adapter for{f': {named}' if named else ''}",
        hint="see `fedcast models` for the families it knows",
    )


def weights_digest(checkpoint: str | Path) -> str:
    """Return the SHA-256 over names and contents of a checkpoint's files: what every site must have alike."""
    folder = locate(checkpoint)
    hasher = hashlib.sha256()
    for path in sorted(p for p in (folder, *folder.rglob("*")) if p.suffix in _SUFFIXES and p.is_file()):
        hasher.update(f"{path.relative_to(folder).as_posix()}:{os.path.getsize(path)}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()
