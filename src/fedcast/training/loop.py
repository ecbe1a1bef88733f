"""The local training loop: a fixed number of AdamW steps on random windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.spec import TrainingSpec
from fedcast.training.flat import FlatAdamW, FlatParameters


@dataclass(frozen=True)
class TrainingRecord:
    """What a call of :func:`train` did: mean loss, and seconds inside forward, backward and optimiser."""

    loss: float
    compute_seconds: float


def learning_rate(training: TrainingSpec, step: int, total: int) -> float:
    """Return the learning rate at a step of ``total``: linear warm-up, then cosine, linear or constant."""
    warmup = max(1, round(training.warmup * total))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    progress = min(1.0, progress)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if training.schedule == "cosine" else 1 - progress
    return training.learning_rate * (training.final_rate + (1 - training.final_rate) * fall)


def train(
    parameters: FlatParameters,
    optimiser: FlatAdamW,
    batches: Iterator[Batch],
    loss: Callable[[Batch], Tensor],
    *,
    steps: int,
    rate: Callable[[int], float],
    correction: Callable[[], Tensor | None] = lambda: None,
    backward: Callable[[Batch], Tensor | None] = lambda _: None,
) -> TrainingRecord:
    """Take ``steps`` steps.

    Parameters
    ----------
    parameters, optimiser
        What is trained and how; gradients are accumulated into ``parameters.gradient`` in place.
    batches
        Training batches, drawn as they are needed.
    loss
        Scalar loss of a batch.
    steps
        Number of gradient steps.
    rate
        Learning rate of a local step.
    correction
        What is added to the gradient of each step, float32 ``[size]``; called after the backward pass.
    backward
        Computes a step's gradient in place of the backward pass and returns its loss; ``None``: it does not.
    """
    losses: list[Tensor] = []
    seconds = 0.0
    for step in range(steps):
        batch = next(batches)
        start = time.perf_counter()
        parameters.gradient.zero_()
        value = backward(batch)
        if value is None:
            value = loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
        optimiser.step(rate(step), correction())
        losses.append(value.detach())
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    # Read once: every reading waits for the device.
    mean = float(torch.stack(losses).double().mean()) if losses else 0.0
    return TrainingRecord(loss=mean, compute_seconds=seconds + time.perf_counter() - start)
