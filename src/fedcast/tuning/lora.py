"""Low-rank adaptation (LoRA, Hu et al., arXiv 2106.09685), by Hugging Face's peft.

A frozen linear map ``W x`` becomes ``W x + (alpha / rank) B A x``; only A and B train. B starts at zero, so training starts from the
forecasts of the untouched model. There is no dropout: the same batch gives the same gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, ClassVar

import safetensors.torch
from pydantic import Field
from torch import nn

from fedcast.errors import MissingExtraError, ModelError
from fedcast.models.contract import Model
from fedcast.models.published.base import Published
from fedcast.models.seeding import seeded
from fedcast.registry import hyper
from fedcast.tuning.base import Tuning

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "adapter"
"""Folder, within a saved model's, of the adapter alone."""

ALL = ("all-linear",)
"""The targets that stand for every linear map."""

_ROOT = "network"
_SHOWN = 12


@dataclass(frozen=True)
class LoRA(Tuning):
    """Low-rank additions to linear maps train, and the head where asked for; everything else is frozen."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank additions to linear maps train (LoRA), everything else is frozen"
    rewires: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = hyper(8, "rank of the additions")
    alpha: Annotated[float, Field(gt=0.0)] = hyper(16.0, "the additions are scaled by alpha / rank")
    targets: tuple[str, ...] = hyper(
        (), "linear maps to adapt: the ends of their names, or just 'all-linear'; by default those that suit the model"
    )
    head: bool = hyper(False, "train the forecasting head too, fully")

    def prepare(self, model: Model, seed: int) -> Model:
        """Put adapters around the linear maps, in place, and freeze the rest.

        Raises
        ------
        MissingExtraError
            When peft is not installed.
        ModelError
            When no linear map of the model has such a name.
        """
        peft = _peft()
        # peft asks a transformers model for its embedding, which some time series models do not have; of a bare module it asks nothing.
        holder = nn.Module()
        holder.add_module(_ROOT, _network(model)[0])
        config = self._config(peft, [f"{_ROOT}.{name}" for name in self._chosen(model)])
        with seeded(seed):
            peft.inject_adapter_in_model(config, holder)
        for name, parameter in model.named_parameters():
            if self.head and model.head(name):
                parameter.requires_grad_(True)
        return model

    def plain(self, model: Model) -> Model:
        """Return a copy with the additions merged into the weights; the model itself stays as it is."""
        merged = copy.deepcopy(model)
        network, _ = _network(merged)
        for name, layer in _adapted(network).items():
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, layer.get_base_layer())
        return merged.requires_grad_(True)

    def save(self, model: Model, folder: Path) -> None:
        """Write the merged model, and in ``adapter`` the additions in peft's format.

        ``peft.PeftModel.from_pretrained`` puts these, and a head that was trained, onto the model before tuning, as its own library
        reads it.
        """
        super().save(model, folder)
        adapter = folder / ADAPTER
        adapter.mkdir(exist_ok=True)
        network, prefix = _network(model)
        parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
        head = [name for name in parameters if self.head and model.head(prefix + name)]
        config = self._config(_peft(), list(_adapted(network)), list(dict.fromkeys(name.rpartition(".")[0] for name in head)))
        config.inference_mode = True
        config.save_pretrained(str(adapter))
        trained = [*(name for name in parameters if ".lora_A." in name or ".lora_B." in name), *head]
        state = {f"base_model.model.{name.replace('.default.', '.')}": parameters[name].to("cpu", copy=True) for name in trained}
        safetensors.torch.save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    def _config(self, peft: ModuleType, names: list[str], whole: list[str] | None = None) -> LoraConfig:
        """Return peft's settings: the linear maps to adapt, and the modules that are trained as a whole."""
        config: LoraConfig = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=names, modules_to_save=whole or None)
        return config

    def _chosen(self, model: Model) -> list[str]:
        """Return the names, within the network, of the linear maps to adapt."""
        network, prefix = _network(model)
        tied = _tied(network)
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and id(module.weight) not in tied]
        targets = self.targets or model.lora_targets
        ends = tuple(f".{target}" for target in targets)
        names = [
            name
            for name in linear
            if (targets == ALL or f".{name}".endswith(ends)) and not (self.head and model.head(f"{prefix}{name}.weight"))
        ]
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:_SHOWN])
            raise ModelError(
                f"no linear map of {type(model).__name__} is named {' or '.join(targets) or 'as one that LoRA adapts'}",
                hint=f"set tuning.targets to {list(ALL)} or some of: {known}" if known else "choose another tuning, such as full",
            )
        return names


def _network(model: Model) -> tuple[nn.Module, str]:
    """Return what a library knows as the model, to which names in an adapter are relative, and what stands before them in the model."""
    return (model.network, f"{_ROOT}.") if isinstance(model, Published) else (model, "")


def _tied(network: nn.Module) -> set[int]:
    """Return the ids of parameters that have several names: an addition to one of their uses could not be merged into the weight."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in network.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _adapted(network: nn.Module) -> dict[str, LoraLayer]:
    """Return the linear maps that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("LoRA needs the library peft", hint="pip install peft") from error
    module: ModuleType = peft
    return module
