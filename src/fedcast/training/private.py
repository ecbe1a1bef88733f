"""Differentially private gradients: one gradient a window, clipped, summed, noised (DP-SGD, Abadi et al., 2016, arXiv 1607.00133).

The gradients of single windows come from opacus' hooks, which take one backward pass, or from one pass a window. The hooks are wrong,
without saying so, for models that mix the windows of a batch or use a weight outside a layer they know. Their gradients are therefore
compared with those of single windows (:func:`choose`) before any of them counts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedcast.data.windows import Batch, Windows
from fedcast.errors import MissingExtraError, ModelError
from fedcast.models.layers import Linear
from fedcast.models.patch import PatchTransformer
from fedcast.training.flat import FlatParameters

Loss = Callable[[Batch], Tensor]
Reduction = Literal["observed", "windows"]
"""What a loss averages over: all observed targets of a batch, or first those of each window and then the windows."""
PER_SAMPLE = ("auto", "opacus", "micro_batch")
"""How the gradients of single windows are computed."""
_CHECKED = 4
_ROOM = 2**26  # elements of the gradients that are held at once: 256 MiB
_CHUNK = 2**20
_SLACK = 1e-5
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Piece:
    """Gradients of b windows of a batch.

    Attributes
    ----------
    blocks
        Float32 ``[b, n]`` each; side by side, in the order of the flat vector, they are ``[b, size]``. They are not copied together: a
        step would spend most of its time on that.
    factor
        What each window's gradient is to be multiplied by, float32 ``[b]``.
    loss
        Mean loss of the windows.
    """

    blocks: Sequence[Tensor]
    factor: Tensor
    loss: Tensor

    @property
    def rows(self) -> Tensor:
        """The gradients ``[b, size]``, multiplied, as one new tensor."""
        return torch.cat(list(self.blocks), dim=1) * self.factor[:, None]


class PerSample(Protocol):
    """Computes the gradients of single windows."""

    def gradients(self, batch: Batch) -> Iterator[Piece]:
        """Yield gradients piece by piece, each overwritten by the next one; the pieces make up the batch."""
        ...


class Looped:
    """One pass a window: right for every model, and as many times slower as there are windows.

    Parameters
    ----------
    parameters, loss
        What trains, and its loss.
    """

    def __init__(self, parameters: FlatParameters, loss: Loss) -> None:
        self._parameters, self._loss = parameters, loss

    def gradients(self, batch: Batch) -> Iterator[Piece]:
        """Yield the gradient of one window after another; see :class:`PerSample`."""
        gradient = self._parameters.gradient
        for window in batch.split(1, rest=True):
            gradient.zero_()
            value = self._loss(window)
            value.backward()  # type: ignore[no-untyped-call]
            yield Piece([gradient[None].float()], torch.ones(1, device=gradient.device), value.detach())
        gradient.zero_()


class Hooked:
    """All windows in one pass, by opacus' ``GradSampleModule``.

    Native models compute by torch's layers then, without packing: neither compiled kernels nor packed rows know single windows. Their
    two weights that belong to no layer, the decoder's queries and learned positions, are read off the gradient of what they are
    added to.

    Parameters
    ----------
    model, parameters, loss
        What trains, and its loss.
    reduction
        What the loss averages over.

    Raises
    ------
    MissingExtraError
        When opacus is not installed.
    """

    def __init__(self, model: nn.Module, parameters: FlatParameters, loss: Loss, reduction: Reduction = "observed") -> None:
        module = _grad_sample_module()
        self._parameters, self._loss, self.reduction = parameters, loss, reduction
        self._named = {name: p for name, p in model.named_parameters() if name in parameters.layout.names}
        unhook(model)
        self._bare: dict[nn.Parameter, list[Tensor]] = {}
        if isinstance(model, PatchTransformer):
            model.use_native(False)
            model.packs = False
            self._watch(model)
        for parameter in self._bare:
            parameter.requires_grad_(False)
        self._hooks = module(model, loss_reduction="sum", strict=False)
        for parameter in self._bare:
            parameter.requires_grad_(True)
        self._hooks.disable_hooks()

    def gradients(self, batch: Batch) -> Iterator[Piece]:
        """Yield the gradients of as many windows at once as there is room for; see :class:`PerSample`."""
        most = max(1, _ROOM // self._parameters.layout.size)
        for piece in batch.split(most, rest=True):
            yield self._together(piece)
        self._parameters.gradient.zero_()

    def _together(self, batch: Batch) -> Piece:
        for parameter in self._named.values():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        for caught in self._bare.values():
            caught.clear()
        self._hooks.enable_hooks()
        try:
            value = self._loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
        finally:
            self._hooks.disable_hooks()
        count = len(batch.windows)
        blocks = [self._of(name, count) for name in self._parameters.layout.names]
        observed = batch.target_mask.sum(dim=1).float()
        share = observed / observed.sum() if self.reduction == "observed" else torch.full_like(observed, 1 / count)
        # The loss of a batch weighs each window: undone, a gradient is that of the window alone, whatever else is in the batch.
        return Piece(blocks, 1 / share.clamp_min(1e-9), value.detach())

    def _of(self, name: str, count: int) -> Tensor:
        """Return the gradients of one parameter, float32 ``[count, numel]``; zeros where the loss does not use it."""
        parameter = self._named.get(name)
        if parameter is None:
            raise ModelError(f"{name} is no weight of the model", hint="choose a method without modules of its own")
        found = self._caught(parameter) if parameter in self._bare else getattr(parameter, "grad_sample", None)
        if found is None:
            return torch.zeros(count, parameter.numel(), device=parameter.device)
        if not isinstance(found, Tensor) or tuple(found.shape) != (count, *parameter.shape):
            raise ModelError(f"opacus gives {name} gradients of another number of windows", hint="set per_sample = 'micro_batch'")
        return found.flatten(1).float()

    def _caught(self, parameter: nn.Parameter) -> Tensor | None:
        caught = self._bare[parameter]
        if not caught:
            return None
        gradient = caught[0]
        whole = gradient.new_zeros(len(gradient), *parameter.shape)
        rows = slice(0, gradient.shape[1]) if self._first[parameter] else slice(len(parameter) - gradient.shape[1], None)
        whole[:, rows] = gradient
        return whole

    def _watch(self, model: PatchTransformer) -> None:
        """Catch the gradient of what enters the first block: the decoder's queries, and patches with their positions added."""
        self._first: dict[nn.Parameter, bool] = {}
        pairs = [(model.decoder.queries, model.decoder.blocks[0], True), (model.encoder.positions, model.encoder.blocks[0], False)]
        handles: list[object] = []
        model.__dict__["per_sample_watches"] = handles
        for parameter, block, first in pairs:
            if parameter is None or not parameter.requires_grad:
                continue
            caught: list[Tensor] = []
            self._bare[parameter], self._first[parameter] = caught, first
            handles.append(block.register_forward_pre_hook(_catcher(caught)))


def _catcher(caught: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def catch(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: caught.append(gradient.detach()))  # type: ignore[no-untyped-call]

    return catch


def unhook(model: nn.Module) -> None:
    """Take all hooks for the gradients of single windows off a model, and what a failed pass left on it."""
    for name in ("autograd_grad_sample_hooks", "per_sample_watches"):
        for handle in model.__dict__.pop(name, []):
            handle.remove()
    for module in model.modules():
        for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            module.__dict__.pop(name, None)
    for parameter in model.parameters():
        for name in ("_current_grad_sample", "grad_sample", "_forward_counter"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def choose(wanted: str, model: nn.Module, parameters: FlatParameters, loss: Loss, batch: Batch, name: str) -> PerSample:
    """Return what computes the gradients of single windows.

    Opacus' gradients of up to four windows of a real batch are compared with those of one pass a window, once as the windows are and
    once with some of their values left out: a loss whose weights follow what is observed would else pass by chance.

    Parameters
    ----------
    wanted
        ``"opacus"``, ``"micro_batch"``, or ``"auto"``: opacus where its gradients are right, else one pass a window.
    model, parameters, loss
        What trains, and its loss.
    batch
        A real batch; its first windows are used.
    name
        The model's name, for the error.

    Raises
    ------
    ModelError
        When ``"opacus"`` is wanted and its gradients are wrong: naming the model and the first parameter.
    MissingExtraError
        When opacus is wanted and not installed.
    """
    looped = Looped(parameters, loss)
    if wanted == "micro_batch":
        return looped
    _grad_sample_module()
    few = next(batch.split(min(_CHECKED, len(batch.windows)), rest=True))
    reasons = []
    reductions: tuple[Reduction, ...] = ("observed", "windows")
    for reduction in reductions:
        try:
            hooked = Hooked(model, parameters, loss, reduction)
            reason = next(filter(None, (_differs(hooked, looped, parameters, part) for part in (few, _with_gaps(few)))), None)
        except Exception as error:  # hooks fail in as many ways as there are models
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is None:
            return hooked
        reasons.append(reason)
    unhook(model)
    parameters.gradient.zero_()
    if wanted == "opacus":
        raise ModelError(
            f"opacus gives {name} wrong gradients of single windows ({reasons[0]})",
            hint="set per_sample = 'auto' or 'micro_batch' in the guard dp: one pass a window is right for every model",
        )
    return looped


def private_gradient(
    source: PerSample, batch: Batch, parameters: FlatParameters, *, norm: float, noise: float, size: int, rng: np.random.Generator | None
) -> Tensor:
    """Compute a private gradient into ``parameters`` and return the mean loss of the windows.

    Each window's gradient is clipped to ``norm`` over all weights, and they are summed; noise of standard deviation ``noise * norm`` is
    added, and the sum is divided by ``size``. A gradient that is not finite counts as 0.

    Parameters
    ----------
    source
        Where the gradients of single windows come from.
    batch
        The windows of this step: any number, also none.
    parameters
        Whose gradient it is.
    norm, noise
        Bound on a window's gradient, and the noise multiplier.
    size
        The expected number of windows; a divisor that depended on those drawn would not be covered by the noise.
    rng
        Where noise is drawn from; ``None``: from the operating system.
    """
    total = torch.zeros(parameters.layout.size, dtype=torch.float64, device=parameters.gradient.device)
    losses = torch.zeros((), device=total.device)
    for piece in source.gradients(batch):
        squares = torch.stack([torch.linalg.vector_norm(block, dim=1).double() for block in piece.blocks]).square().sum(dim=0)
        lengths = squares.sqrt() * piece.factor
        finite = lengths.isfinite()
        # Lengths are computed in float32, so that they may be too short by less than this.
        scale = torch.where(finite, (norm / lengths.clamp_min(1e-300) * (1 - _SLACK)).clamp(max=1.0) * piece.factor, 0.0).float()
        whole, start = bool(finite.all()), 0
        for block in piece.blocks:
            stop = start + block.shape[1]
            total[start:stop] += scale @ (block if whole else block.masked_fill(~finite[:, None], 0.0))
            start = stop
        losses += piece.loss.float() * len(scale) / len(batch.windows)
    add_noise(total, noise * norm, rng)
    parameters.gradient.copy_(total / size)
    return losses


def clip_update(after: Tensor, before: Tensor, norm: float) -> Tensor:
    """Return weights whose difference from ``before`` is that of ``after``, shortened to a Euclidean length of at most ``norm``.

    Weights are float32, so that a shortened difference is rounded, and could come out longer by a little; it is then shortened once
    more. The bound therefore holds for the weights that are returned.

    Parameters
    ----------
    after, before
        float32 ``[size]``, finite.
    norm
        The bound, above 0.
    """
    start = before.double()
    for slack in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        update = after.double() - start
        length = float(torch.linalg.vector_norm(update))
        if length <= norm:
            break
        after = (start + update * (norm / length * (1 - slack))).float()
    return after


def add_noise(vector: Tensor, std: float, rng: np.random.Generator | None) -> None:
    """Add independent Gaussian noise to a float64 vector in place.

    Parameters
    ----------
    vector
        ``[size]``.
    std
        Standard deviation; 0 adds nothing.
    rng
        Where it is drawn from; ``None``: from the operating system's generator, so that nobody who has seen some of it can compute the
        rest. The generators of numpy and torch are no such generators: the state of a Mersenne Twister follows from 2.5 kB of its output.
    """
    if std == 0:
        return
    for start in range(0, len(vector), _CHUNK):
        piece = vector[start : start + _CHUNK]
        drawn = rng.standard_normal(len(piece)) if rng is not None else system_normal(len(piece))
        piece.add_(torch.from_numpy(drawn).to(piece.device), alpha=std)


def system_normal(size: int) -> NDArray[np.float64]:
    """Return standard normal values ``[size]`` from the operating system's generator (Box and Muller, 1958)."""
    half = (size + 1) // 2
    bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64).reshape(2, half)
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1], so that its logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:size]


def system_generator() -> np.random.Generator:
    """Return a generator whose seed comes from the operating system."""
    return np.random.default_rng(int.from_bytes(os.urandom(32)))


def _differs(hooked: Hooked, looped: Looped, parameters: FlatParameters, batch: Batch) -> str | None:
    """Return what is wrong with gradients of single windows, or ``None``."""
    found, wanted = (torch.cat([piece.rows for piece in source.gradients(batch)]) for source in (hooked, looped))
    tolerance = _TOLERANCE[parameters.gradient.dtype]
    least = 1e-3 * tolerance * float(wanted.abs().max())
    layout = parameters.layout
    for name, start, stop in zip(layout.names, layout.offsets, layout.offsets[1:], strict=False):
        right = wanted[:, start:stop]
        error, largest = float((found[:, start:stop] - right).abs().max()), float(right.abs().max())
        if not error <= tolerance * largest + least:
            return f"{name}: off by {error:.3g}, the largest is {largest:.3g}"
    return None


def _with_gaps(batch: Batch) -> Batch:
    """Return a batch with every second target of its first window left out, and the older half of the last one's context."""
    target_mask, mask = batch.target_mask.clone(), batch.mask.clone()
    observed = target_mask[0].nonzero()[:, 0]
    target_mask[0, observed[1::2]] = False
    seen = mask[-1].nonzero()[:, 0]
    mask[-1, seen[: len(seen) // 2]] = False
    return replace(
        batch,
        context=batch.context.masked_fill(~mask, 0.0),
        mask=mask,
        target=batch.target.masked_fill(~target_mask, 0.0),
        target_mask=target_mask,
        windows=Windows(batch.windows.series, batch.windows.end),
    )


def _grad_sample_module() -> Any:
    """Return opacus' class, which knows fedcast's linear layer as it knows torch's."""
    try:
        from opacus import GradSampleModule
    except ImportError as error:
        raise MissingExtraError.of("opacus", "privacy") from error
    # From now on, not only here: catch_warnings would also put back the filters that other threads have set meanwhile.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    GradSampleModule.GRAD_SAMPLERS[Linear] = GradSampleModule.GRAD_SAMPLERS[nn.Linear]
    return GradSampleModule
