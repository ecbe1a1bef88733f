"""What adapters of models built on Hugging Face's transformers share: drawing and reading weights, dropout, features on the way."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from fedcast.errors import CheckpointError
from fedcast.models.seeding import GLOBAL_STATE, seeded


def drawn(kind: Any, config: Any, seed: int) -> nn.Module:
    """Return a network of a transformers class with weights drawn from ``seed`` as the class draws them; without dropout, float32."""
    with seeded(seed):
        return without_dropout(kind(copy.deepcopy(config)))


def read_network(kind: Any, folder: Path) -> nn.Module:
    """Read a network of a transformers class from a folder, in float32 and without dropout.

    Weights are read from safetensors files only: nothing in them can be executed.

    Raises
    ------
    CheckpointError
        When there is no such file, or parameters are missing from it, which the library would draw at random.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no weights in a safetensors file",
            hint="get the checkpoint's model.safetensors; files of pickled weights are not read, as they can execute code",
        )
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as content:
            stored.update(content.keys())
    with seeded(0), _without_bars():
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    # Tied weights have several names and are stored under one of them.
    names = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    missing = [alike[0] for alike in names.values() if stored.isdisjoint(alike)]
    if not stored <= {name for alike in names.values() for name in alike}:
        # The library reads parameters that were stored under other names, so it alone knows which it did not find.
        missing = [name for name in missing if name in info["missing_keys"]]
    if missing:
        raise CheckpointError(
            f"the weights in {folder} lack {len(missing)} of {len(names)} parameters, such as {missing[0]}",
            hint="fetch the checkpoint again; config.json and weights must belong together",
        )
    return without_dropout(network)


def write_network(network: Any, folder: Path) -> None:
    """Write a transformers network: ``model.safetensors`` and ``config.json`` (and ``generation_config.json`` where it generates)."""
    with GLOBAL_STATE, _without_bars():
        network.save_pretrained(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Read and write without transformers' progress bars; they are switched for the whole process, hence one thread at a time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def without_dropout(network: nn.Module) -> nn.Module:
    """Switch dropout off, in training mode too: that of modules, and the rates that attention keeps for itself; return the network."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = cast(Any, 0.0)
    return network


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Give a list to which every pass through a module adds its output, where the network does not return it."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def silence(message: str) -> None:
    """Ignore a library's warning from now on: those whose text begins with ``message``.

    ``warnings.catch_warnings`` would put back whatever filters it found, also those that another thread has set meanwhile.
    """
    warnings.filterwarnings("ignore", message=message, category=UserWarning)
