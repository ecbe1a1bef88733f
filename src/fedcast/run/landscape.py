"""The loss around the final models of runs, on the same windows of one domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.data.catalogue import load_domains, split_domains
from fedcast.data.splits import split_store
from fedcast.data.windows import Batch, WindowSampler
from fedcast.errors import RunError, SplitError
from fedcast.methods.base import build_method
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.mixture import DomainMixture
from fedcast.run.folder import RunFolder
from fedcast.spec import RunSpec
from fedcast.tasks.objectives import Objective, build_task
from fedcast.training.landscape import Landscape, Sharpness, loss_landscape, sharpness

PROBES = 32
"""Random vectors that the trace and the norm of the Hessian are estimated with."""


@dataclass(frozen=True)
class Surroundings:
    """The loss at a run's final model and around it.

    Attributes
    ----------
    run, domain
        The run folder, and the domain whose windows the loss is of.
    loss
        The loss at the model itself.
    sharpness
        How sharply it bends there.
    landscape
        The loss on a plane, where it was asked for.
    """

    run: Path
    domain: str
    loss: float
    sharpness: Sharpness
    landscape: Landscape | None


def surroundings(
    runs: Sequence[str | Path],
    *,
    domain: str | None = None,
    part: Literal["validation", "test"] = "test",
    windows: int = 64,
    grid: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Surroundings]:
    """Return the loss around the final model of each run, on the same windows.

    The loss is the one that the model trains with, so losses of different model families do not compare.

    Parameters
    ----------
    runs
        Run folders over the same data, context and horizon.
    domain
        One that the runs trained on or held out; the first one they trained on when absent.
    part
        The part of the series that the windows lie in.
    windows
        The most windows.
    grid
        Points along each direction of the plane; ``None``: no plane.
    seed
        Seed of the plane's directions and of the estimates.
    progress
        Called with the number of losses that were computed so far, of ``grid ** 2 + 2`` a run.

    Raises
    ------
    RunError
        When the runs differ in data, context or horizon, or a run has no single final model.
    SplitError
        When the domain has no such window.
    """
    folders = [RunFolder(run) for run in runs]
    specs = [folder.spec() for folder in folders]
    data = {folder.about()["data_fingerprint"] for folder in folders}
    if len(data) != 1 or len({(spec.model.context, spec.model.horizon) for spec in specs}) != 1:
        raise RunError("the runs differ in data, context or horizon", hint="name one or more runs over the same windows")
    name = domain if domain is not None else split_domains(specs[0].data)[0][0]
    batch = _windows(specs[0], name, part, windows)
    done = count(1)

    def tell() -> None:
        if progress is not None:
            progress(next(done))

    return [
        _around(folder, build_task(spec.model.objective), name, batch, grid, seed, tell)
        for folder, spec in zip(folders, specs, strict=True)
    ]


def _around(
    folder: RunFolder, task: Objective, domain: str, batch: Batch, grid: int | None, seed: int, tell: Callable[[], None]
) -> Surroundings:
    if build_method(folder.spec().method).unseen() == "each":
        raise RunError(f"{folder.path} ends in one model a site", hint="choose a run whose final model is a single one")
    model = load_checkpoint(folder.path)
    if isinstance(model, DomainMixture):
        raise RunError(f"{folder.path} ends in a mixture of models", hint="choose a run whose final model is a single one")

    def loss() -> Tensor:
        tell()
        # Whatever it draws, it draws alike at every point.
        return task.step(model, batch, lambda: torch.Generator().manual_seed(seed))[0]

    plane = None if grid is None else loss_landscape(model, loss, grid=grid, seed=seed)
    return Surroundings(folder.path, domain, loss().item(), sharpness(model, loss, probes=PROBES, seed=seed), plane)


def _windows(spec: RunSpec, domain: str, part: Literal["validation", "test"], limit: int) -> Batch:
    store = load_domains(spec.data, [domain])[domain]
    splits = split_store(store, spec.data, spec.model.horizon)
    sampler = WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon)
    batch = sampler.gather(sampler.evaluation(part, limit))
    if not len(batch.windows):
        raise SplitError(f"domain {domain!r} has no {part} window", hint="choose another domain or part")
    return batch
