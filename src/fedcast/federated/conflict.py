"""How much the domains' gradients contradict each other while a model trains (fedtrl.md A7, motivation figure).

Every domain takes the gradient of the task's loss with respect to the encoder's weights, at the server's model and through its own
private weights where it has any, on the same windows every time. Where the cosine of two of them is negative, a step that helps one
domain harms the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fedcast.data.windows import Batch, WindowSampler
from fedcast.errors import ScreenError, SpecError
from fedcast.federated.messages import Reply, all_finite
from fedcast.methods.base import Method
from fedcast.models.architectures import build_model
from fedcast.models.architectures.causal import CausalTransformer
from fedcast.models.contract import Model
from fedcast.spec import RunSpec
from fedcast.tasks.objectives import Objective
from fedcast.training.aggregate import Sketch, Vectors, pairwise_cosines
from fedcast.training.flat import Layout

PROBES = 64
"""Validation windows of a domain that its gradient is taken on, whatever ``evaluation.validation_windows`` says."""

SKETCH = 2**18
"""Length of a sketch of a gradient. See :class:`GradientProbe`."""


class GradientProbe:
    """A site's side of the report: answers with a sketch of its encoder gradient.

    A gradient longer than :data:`SKETCH` is sent as a count-sketch (:class:`~fedcast.training.aggregate.Sketch`) of 1 MiB, in place of
    1.7 MB (nano) to some 250 MB (base); a shorter one is sent whole. Measured on 14 bundled domains with five seeds of the sketch
    (FedAvg at nano, tiny and small, central at nano, early in training), a cosine of sketches is off by 0.0003 to 0.0013 (root mean
    square), 0.0045 at most, and the mean over the 91 pairs by 0.0004 at most; at most 0.2 % of the pairs change their sign. At 256 KiB
    the errors are about twice as large.

    Parameters
    ----------
    sampler
        The site's windows.
    spec
        The run; ``evaluation.conflict`` must be above 0, or the site refuses: a gradient can tell of the data it was taken on.
    """

    def __init__(self, sampler: WindowSampler, spec: RunSpec) -> None:
        self._sampler, self._spec = sampler, spec
        self._batch: Batch | None = None

    def answer(self, model: Model, task: Objective) -> dict[str, Tensor]:
        """Return the sketch, float32, at most :data:`SKETCH` long, as ``"gradient"``; nothing where there is no validation window.

        Raises
        ------
        ScreenError
            When the run's spec does not ask for it.
        """
        if self._spec.evaluation.conflict == 0:
            raise ScreenError("no gradient leaves the site", hint="set evaluation.conflict in the spec of the run")
        if self._batch is None:
            self._batch = probe_batch(self._sampler).to(model.device)
        if not len(self._batch.windows):
            return {}
        gradient = encoder_gradient(model, task, self._batch).cpu()
        # No longer than the gradient, a sketch only reorders it and turns signs.
        return {"gradient": Sketch(gradient.numel(), min(SKETCH, gradient.numel()), self._spec.seed)(gradient)}


def probe_batch(sampler: WindowSampler) -> Batch:
    """Return the windows that a domain's gradient is taken on: the same ones at every call."""
    return sampler.gather(sampler.evaluation("validation", PROBES))


def encoder_gradient(model: Model, task: Objective, batch: Batch) -> Tensor:
    """Return the gradient of the task's loss with respect to the ``encoder.*`` parameters, in their order, as one vector."""
    encoder = [parameter for name, parameter in model.named_parameters() if name.startswith("encoder.")]
    frozen = [parameter for parameter in encoder if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        # Whatever a task draws, such as hidden patches, it draws alike for every domain and round.
        loss, _ = task.step(model, batch, lambda: torch.Generator().manual_seed(0))
        pieces = torch.autograd.grad(loss, encoder, materialize_grads=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return torch.cat([piece.reshape(-1) for piece in pieces])


def cosines_of(gradients: Sequence[Tensor]) -> tuple[Tensor, float | None, float | None]:
    """Return the cosines of all gradients, float64 ``[K, K]``, the mean over pairs and the share of negative pairs.

    The cosine with a gradient that is zero counts as 0. Mean and share are ``None`` where there is no pair.
    """
    cosines = pairwise_cosines(Vectors(gradients))
    if len(gradients) < 2:
        return cosines, None, None
    rows, columns = torch.triu_indices(len(gradients), len(gradients), offset=1)
    pairs = cosines[rows, columns]
    return cosines, float(pairs.mean()), float((pairs < 0).double().mean())


def conflict_row(round_: int, answers: Mapping[str, Reply], layout: Layout, bytes_down: int) -> dict[str, Any]:
    """Return the log's row of one report.

    Parameters
    ----------
    round_
        The round.
    answers
        The sites' replies; one without a usable gradient is left out and named in ``dropped``.
    layout
        The model's layout.
    bytes_down
        Bytes of the models that were sent for it.

    Returns
    -------
    dict
        ``sites``; ``cosines`` of their gradients, in that order, to 4 digits; their ``mean`` and the share of ``negative`` ones over all
        pairs; ``bytes_probe``, what travelled for it, which no other row counts.
    """
    size = min(SKETCH, encoder_size(layout))
    gradients: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for site, reply in sorted(answers.items()):
        tensor = reply.tensors.get("gradient")
        if tensor is None:
            dropped[site] = "no validation window"
        elif tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,) or not all_finite(tensor):
            dropped[site] = f"its gradient is not finite float32 ({size},)"
        else:
            gradients[site] = tensor
    cosines, mean, negative = cosines_of(list(gradients.values()))
    return {
        "kind": "conflict",
        "round": round_,
        "sites": list(gradients),
        # JSON knows a negative zero, which reads oddly.
        "cosines": [[round(value, 4) + 0.0 for value in row] for row in cosines.tolist()],
        "mean": None if mean is None else round(mean, 4) + 0.0,
        "negative": None if negative is None else round(negative, 4),
        "dropped": dropped,
        "bytes_probe": bytes_down + sum(reply.nbytes for reply in answers.values()),
    }


def encoder_size(layout: Layout) -> int:
    """Return how many weights the encoder has."""
    return sum(prod(shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if name.startswith("encoder."))


def check_reportable(spec: RunSpec, method: Method, trains: Mapping[str, bool], samplers: Mapping[str, WindowSampler]) -> None:
    """Refuse a run whose domains' gradients cannot be compared, before anything trains.

    Parameters
    ----------
    spec, method
        What is run.
    trains
        Every domain that evaluates and is not held out, and whether it trains.
    samplers
        Its windows.

    Raises
    ------
    SpecError
        When the model has no gradient to compare, when fewer than two domains have validation windows, or when none has the private weights
        that its gradient would be taken through.
    """
    off = "or set evaluation.conflict = 0"
    if spec.model.checkpoint is not None or spec.tuning.name != "full":
        raise SpecError("gradients are compared where a model is trained from scratch, not where one is fine-tuned", hint=off[3:])
    with torch.device("meta"):
        model = build_model(method.model_config(spec.model))
    layout = Layout.of(dict(model.named_parameters()), method.shares)
    if spec.model.objective == "reconstruct" and not isinstance(model, CausalTransformer):
        raise SpecError(f"{method.name} trains no masked reconstruction by itself", hint=f"leave model.objective at 'forecast', {off}")
    if encoder_size(layout) == 0:
        raise SpecError(
            f"the model of {method.name} has no encoder whose gradients could be compared", hint=f"choose another method, {off}"
        )
    if layout.private_size and not all(trains.values()):
        raise SpecError(
            f"no domain trains alone, and {method.name} keeps weights at its clients: a domain has none to take its gradient through",
            hint=f"set data.partition = 'domain', {off}",
        )
    if sum(len(samplers[name].evaluation("validation", 1)) > 0 for name in trains) < 2:
        raise SpecError("fewer than two domains have validation windows to compare gradients on", hint=f"train on more domains, {off}")
