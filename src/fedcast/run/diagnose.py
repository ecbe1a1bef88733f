"""Why a run went as it did: how much the domains' gradients contradict each other."""

from __future__ import annotations

import torch

from fedcast.data.splits import split_by_time
from fedcast.data.windows import WindowSampler
from fedcast.errors import RunError
from fedcast.models.forecaster import load_model
from fedcast.models.mixture import DomainMixture
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import load_training
from fedcast.tasks.forecast import ForecastTask

_PROBES = 64


def gradient_conflict(folder: RunFolder) -> tuple[float, float]:
    """Return the share of negative pairwise cosines between domains' encoder gradients, and their mean cosine.

    The gradients are those of the task's loss at the final model, on the same 64 validation windows a domain for every run
    (fedtrl.md A7, motivation figure). Where decoders are personal, each domain's gradient is taken through its own.
    """
    spec = folder.spec()
    if spec.data.partition != "domain":
        raise RunError("domains' gradients need one site a domain", hint="choose a run with data.partition = 'domain'")
    task = ForecastTask()
    gradients = []
    for name, store in sorted(load_training(spec.data).items()):
        splits = split_by_time(store, horizon=spec.model.horizon, validation=spec.data.validation, test=spec.data.test)
        sampler = WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon)
        batch = sampler.gather(sampler.evaluation("validation", _PROBES))
        own = folder.sites / name / "model"
        model = load_model(own if own.is_dir() else folder.final)
        if isinstance(model, DomainMixture):
            raise RunError(f"site {name} has no model of its own", hint="finish the run, and keep data.partition = 'domain'")
        encoder = [parameter for key, parameter in model.named_parameters() if key.startswith("encoder.")]
        loss = task.loss(model.normalised(batch.context, batch.mask, spec.model.horizon), batch)
        pieces = torch.autograd.grad(loss, encoder)
        gradients.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)  # [K, n]
    rows, columns = torch.triu_indices(len(unit), len(unit), offset=1)
    cosines = (unit @ unit.T)[rows, columns]
    return float((cosines < 0).float().mean()), float(cosines.mean())
