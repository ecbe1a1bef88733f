"""Why a run went as it did, and what it gave away: the domains' gradients, and how close core-sets lie to data."""

from __future__ import annotations

import pandas as pd

from fedcast.data.splits import split_store
from fedcast.data.windows import WindowSampler
from fedcast.errors import RunError
from fedcast.federated.conflict import cosines_of, encoder_gradient, probe_batch
from fedcast.federated.site import METHOD
from fedcast.federated.state import SiteStates
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.mixture import DomainMixture
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import load_training
from fedcast.tasks.objectives import build_task


def gradient_conflict(folder: RunFolder) -> tuple[float, float]:
    """Return the share of negative pairwise cosines between domains' encoder gradients, and their mean cosine.

    The gradients are those of the task's loss at the final model, on the same 64 validation windows a domain for every run
    (fedtrl.md A7, motivation figure). Where decoders are personal, each domain's gradient is taken through its own.

    Raises
    ------
    RunError
        When a domain has no model of its own, or there are fewer than two domains.
    """
    spec = folder.spec()
    if spec.data.partition != "domain":
        raise RunError("domains' gradients need one site a domain", hint="choose a run with data.partition = 'domain'")
    task = build_task(spec.model.objective)
    gradients = []
    for name, store in sorted(load_training(spec.data).items()):
        splits = split_store(store, spec.data, spec.model.horizon)
        sampler = WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon)
        own = folder.sites / name / "model"
        model = load_checkpoint(own if own.is_dir() else folder.final)
        if isinstance(model, DomainMixture):
            raise RunError(f"site {name} has no model of its own", hint="finish the run, and keep data.partition = 'domain'")
        gradients.append(encoder_gradient(model, task, probe_batch(sampler)))
    _, mean, negative = cosines_of(gradients)
    if mean is None or negative is None:
        raise RunError(f"{folder.path} trained on one domain only", hint="choose a run over two domains or more")
    return negative, mean


def conflict_rows(folder: RunFolder) -> pd.DataFrame:
    """Return how the domains' gradients conflicted while a run trained, as it was logged; see ``evaluation.conflict``.

    Returns
    -------
    pandas.DataFrame
        A row a report: ``round``, ``mean`` cosine over pairs of domains, and share of ``negative`` ones. Empty where the run kept none.
    """
    return pd.DataFrame(folder.rows("conflict"), columns=["round", "mean", "negative"])


def coreset_distances(folder: RunFolder) -> pd.DataFrame:
    """Return how far each core-set vector of a FeDaL run lies from its nearest training window, as the sites keep it to themselves.

    Returns
    -------
    pandas.DataFrame
        A row a vector: ``site``, ``vector`` and ``distance`` (see :func:`fedcast.training.coreset.nearest_distances`: 0 for a copy, 1.41
        for an unrelated window; of a site with very many windows an upper bound). Empty where there are no core-sets.
    """
    rows = []
    for site in sorted(path for path in folder.sites.glob("*") if path.is_dir()):
        distances = SiteStates(site).newest().get(f"{METHOD}coreset_nearest")
        if distances is not None:
            rows += [{"site": site.name, "vector": number, "distance": value} for number, value in enumerate(distances.tolist())]
    return pd.DataFrame(rows, columns=["site", "vector", "distance"])
