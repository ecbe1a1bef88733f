"""What adapters share: drawing, reading and writing weights, with Hugging Face's transformers and without; dropout, features on the way."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from fedcast.errors import CheckpointError
from fedcast.models.files import CONFIG, WEIGHTS, check_tensors, inside, read_weights
from fedcast.models.published.base import Published, read_json
from fedcast.models.seeding import GLOBAL_STATE, seeded
from fedcast.safe import shown
from fedcast.tensors import check_file


class TransformersModel(Published):
    """A published model whose network transformers, or a library built on it, draws, reads and writes."""

    @classmethod
    @abstractmethod
    def network_class(cls) -> Any:
        """Return the library's class of the network."""

    @classmethod
    @abstractmethod
    def around(cls, network: Any) -> Self:
        """Return the model that a network of that class computes."""

    @classmethod
    def drawn(cls, settings: Any, seed: int) -> Self:
        """Return a model of the shape that a configuration of the class says; see :meth:`Published.drawn`."""
        return cls.around(draw_network(cls.network_class(), settings, seed))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint of the library; see :func:`read_network`."""
        return cls.around(read_network(cls.network_class(), folder))

    def write(self, folder: Path) -> None:
        """Write the files that ``from_pretrained`` of the library reads; see :func:`write_network`."""
        write_network(self.network, folder)


def draw_network(kind: Any, config: Any, seed: int) -> nn.Module:
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
    stored: set[str] = set()
    for file in _weight_files(folder):
        stored |= check_file(inside(file))
    _check_config(folder)
    with seeded(0), _quietly():
        network, info = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise CheckpointError(
            f"the weights in {folder} have another shape: {name} is {tuple(found)}, and config.json makes it {tuple(wanted)}",
            hint="fetch the checkpoint again; config.json and weights must belong together",
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
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"the weights in {folder} are not finite: {name}", hint="fetch the checkpoint again")
    return without_dropout(network)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the library will read: they lie in the folder, so that its digest covers them."""
    index = folder / f"{WEIGHTS}.index.json"
    shards = read_json(index).get("weight_map", {}) if index.is_file() and not (folder / WEIGHTS).is_file() else {}
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) and shards else [WEIGHTS]
    for name in names:
        if Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{index} names a file outside its folder: {shown(name)}", hint="fetch the checkpoint again")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no weights in a safetensors file {name}",
                hint="get the checkpoint's model.safetensors; files of pickled weights are not read, as they can execute code",
            )
    return [folder / name for name in names]


def _check_config(folder: Path) -> None:
    """Refuse what would let the library read, fetch or run more than the folder's own weights."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter beside its model, which the library would put into it",
            hint="merge the adapter into the model with peft and save that, or move adapter_config.json away",
        )
    config = read_json(folder / CONFIG)
    for key in ("attn_implementation", "_attn_implementation", "quantization_config"):
        if config.get(key) not in (None, "eager", "sdpa"):
            raise CheckpointError(
                f"{folder / CONFIG} asks for {key} = {config[key]!r}, which fedcast does not run", hint=f"remove {key} from config.json"
            )


def write_network(network: Any, folder: Path) -> None:
    """Write a transformers network: ``model.safetensors`` and ``config.json`` (and ``generation_config.json`` where it generates)."""
    with GLOBAL_STATE, _quietly():
        network.save_pretrained(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Read and write without transformers' progress bars and reports; both are switched for the whole process, one thread at a time."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
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


def load_weights(network: nn.Module, folder: Path, own: tuple[str, ...] = (), unused: tuple[str, ...] = ()) -> None:
    """Fill a module with the weights of a checkpoint's folder.

    Parameters
    ----------
    network
        The module.
    folder
        Holds ``model.safetensors``.
    own
        Prefixes of tensors that the module keeps as it built them, whatever the file holds.
    unused
        Prefixes of tensors that the file may hold and the module does not have.

    Raises
    ------
    CheckpointError
        When the file is missing or damaged, or a tensor is missing, surplus, of another shape or not finite.
    """
    state = {name: tensor for name, tensor in read_weights(folder / WEIGHTS).items() if not name.startswith((*own, *unused))}
    built = network.state_dict()
    state |= {name: tensor for name, tensor in built.items() if name.startswith(own)}
    check_tensors(folder, built, state)
    network.load_state_dict(state)


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors to the ``model.safetensors`` of a folder that exists."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
