"""Low-rank modules with a gate and a mask each, and how much the loss needs each of them (TRACE, arXiv 2503.16991).

A frozen linear map W becomes ``h = W x + z g (s / r) B A x``: rank r, scale s = 2 r, a gate g that trains, and a mask z that is 0 or 1
and does not (trace.md B2.2; the scale is a reconstruction). Hugging Face's peft has no gates, so the module is fedcast's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import ModelError
from fedcast.models.contract import Model

SCALE = 2.0
"""s / r."""

LINEAR_MAPS = (
    *("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "fc_gate", "ff0", "ff1"),
    *("feed_forward.hidden", "feed_forward.out"),
)
"""What attention's and the feed-forward part's maps are called: in T5 and its descendants, in other models, in the native ones."""

M = TypeVar("M", bound=nn.Module)


class GatedLinear(nn.Module):
    """A linear map with a gated low-rank addition; it starts as the map alone, since B is zero.

    Parameters
    ----------
    linear
        The map, with weight [out, in].
    rank
        Rank of the addition.
    generator
        Draws A (Kaiming).

    Attributes
    ----------
    lora_A, lora_B
        [rank, in] and [out, rank].
    gate
        g, [1].
    mask
        z, a scalar 1 or 0: a buffer, which neither trains nor travels with the weights.
    """

    mask: Tensor

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        like = linear.weight
        drawn = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(drawn.to(like))
        self.lora_B = nn.Parameter(like.new_zeros(linear.out_features, rank))
        self.gate = nn.Parameter(like.new_ones(1))
        self.register_buffer("mask", torch.ones((), device=like.device))

    @property
    def weight(self) -> Tensor:
        """The weight that the sum amounts to [out, in]: for libraries that read it, and for merging."""
        return self.linear.weight + (self.mask * self.gate * SCALE) * (self.lora_B @ self.lora_A)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the linear map."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        plain: Tensor = self.linear(x)
        addition = F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.mask * self.gate * SCALE)
        # under autocast the product with the gate would be float32
        return plain + addition.to(plain.dtype)


def gated(model: nn.Module) -> dict[str, GatedLinear]:
    """Return the gated maps of a model by name, in its order: the order of masks and importances."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedLinear)}


def add_gates(model: Model, targets: Sequence[str], rank: int, seed: int, run: Callable[[], Tensor]) -> list[str]:
    """Freeze a model and put gated additions around linear maps before its head, in place; return their names.

    Parameters
    ----------
    targets
        Names of linear maps, or their ends.
    rank, seed
        Of the additions.
    run
        Gives a scalar that depends on the model as the loss does. Maps without an effect on it, such as those of a decoder whose head
        was replaced, are left alone.

    Raises
    ------
    ModelError
        When no linear map of such a name has an effect.
    """
    ends = tuple(f".{target}" for target in targets)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{name}".endswith(ends)]
    names = _effective(model, [name for name in linear if not model.head(f"{name}.weight")], run)
    if not names:
        raise ModelError(
            f"no linear map before the head of {type(model).__name__} is named {', '.join(targets)}",
            hint="set tuning.targets to the ends of names of linear maps that it has",
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        _put(model, name, GatedLinear(cast(nn.Linear, model.get_submodule(name)), rank, generator))
    return names


def _effective(model: nn.Module, names: Sequence[str], run: Callable[[], Tensor]) -> list[str]:
    weights = [cast(nn.Linear, model.get_submodule(name)).weight for name in names]
    if not weights:
        return []
    with torch.enable_grad():
        slopes = torch.autograd.grad(run(), weights, allow_unused=True)
    return [name for name, slope in zip(names, slopes, strict=True) if slope is not None]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def merged(model: M) -> M:
    """Return a copy of a model, all of it trainable, with the gated additions that are kept added to the weights; without any gates."""
    plain = copy.deepcopy(model)
    for name, module in gated(plain).items():
        with torch.no_grad():
            module.linear.weight.copy_(module.weight)
        _put(plain, name, module.linear)
    return plain.requires_grad_(True)


def get_mask(model: nn.Module) -> Tensor:
    """Return the masks of a model's gated maps, [K], on the CPU."""
    return torch.stack([module.mask.cpu() for module in gated(model).values()])


def set_mask(model: nn.Module, mask: Tensor) -> None:
    """Set the masks of a model's gated maps, [K], in place."""
    for module, value in zip(gated(model).values(), mask, strict=True):
        module.mask.copy_(value)


def draw_masks(modules: int, kept: int, draws: int, key: Sequence[int]) -> Tensor:
    """Draw masks [draws, modules] uniformly among those with exactly ``kept`` ones; the same ones for the same ``key``."""
    rng = np.random.default_rng(list(key))
    return torch.from_numpy(rng.permuted(np.tile(np.arange(modules) < kept, (draws, 1)), axis=1).astype(np.float32))


def importances(model: nn.Module, loss: Callable[[Batch], Tensor], batches: Sequence[Batch], masks: Tensor) -> Tensor:
    """Return the mean size of the loss's first-order change if a module that is kept were switched off, [K], on the CPU.

    ``I_m = sum_j z_m^(j) |g_m dL(z^(j)) / dg_m| / max(1, sum_j z_m^(j))`` (TRACE's DSIC, trace.md B2.2, reconstructed). With random
    masks the change is measured beside as many other modules as will be left; with one mask of ones it is the naive importance,
    measured beside all of them.

    Parameters
    ----------
    model
        A model with gated maps, whose gates require a gradient; its masks are afterwards as before, its gradients untouched.
    loss
        Loss of a batch.
    batches
        At least one; L is the mean over their windows.
    masks
        z^(j), [J, K].
    """
    gates = [module.gate for module in gated(model).values()]
    values = torch.cat([gate.detach() for gate in gates]).float().cpu()
    before, total, count = get_mask(model), torch.zeros(len(gates)), sum(len(batch.windows) for batch in batches)
    try:
        for mask in masks:
            set_mask(model, mask)
            slope = torch.zeros(len(gates))
            for batch in batches:
                slopes = torch.autograd.grad(loss(batch), gates, allow_unused=True, materialize_grads=True)
                slope += torch.cat(slopes).float().cpu() * (len(batch.windows) / count)
            total += mask * (values * slope).abs()
    finally:
        set_mask(model, before)
    return total / masks.sum(dim=0).clamp_min(1.0)


def leave_one_out(model: nn.Module, loss: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """Return by how much the loss rises when one module that is kept is switched off, the others staying as they are, by its name.

    What :func:`importances` estimates; parameters as there.
    """
    names, before = list(gated(model)), get_mask(model)
    count = sum(len(batch.windows) for batch in batches)

    def mean(mask: Tensor) -> float:
        set_mask(model, mask)
        return sum(loss(batch).item() * len(batch.windows) for batch in batches) / count

    with torch.no_grad():
        try:
            whole = mean(before)
            kept = [index for index, on in enumerate(before.tolist()) if on]
            return {names[index]: mean(before.index_fill(0, torch.tensor([index]), 0.0)) - whole for index in kept}
        finally:
            set_mask(model, before)
