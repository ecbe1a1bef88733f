"""Other ways to serve unseen domains from a finished run: the same training, scored again."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch

from fedcast.data.catalogue import load_domains
from fedcast.data.splits import split_store
from fedcast.errors import RunError
from fedcast.evaluate.metrics import score
from fedcast.evaluate.windows import EvaluationSet, evaluation_set
from fedcast.federated.scoring import forecast_windows
from fedcast.methods.base import build_method
from fedcast.models.architectures import build_model
from fedcast.models.architectures.prototype import PrototypeTransformer
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer
from fedcast.run.folder import RunFolder

Serving = Literal["shadow", "mixture", "quantisation", "each", "oracle"]


def serve_otherwise(folder: RunFolder, serving: Serving) -> pd.DataFrame:
    """Score a run's held-out domains with another model for unseen domains.

    Parameters
    ----------
    folder
        A finished run whose final model is a mixture.
    serving
        ``"shadow"``: the mean of the experts, with the weights of the last round; ``"mixture"``: each window weights them by how well
        they forecast its own last patches; ``"quantisation"``: each window takes the one with the smallest quantisation error (FeDPM);
        ``"each"``: the mean of their scores; ``"oracle"``: the expert with the smallest test MSE on a domain, which nobody could know
        beforehand: a bound to name as such, no result.

    Returns
    -------
    pandas.DataFrame
        The run's result rows of the trained model, those of held-out domains scored anew; scores that this gives no value for are NaN.

    Raises
    ------
    RunError
        When the final model is no mixture, or its experts cannot be served so.
    """
    final = load_checkpoint(folder.final)
    if not isinstance(final, DomainMixture):
        raise RunError(f"{folder.path} has one model for all domains, no mixture", hint="choose a run whose method serves a mixture")
    models = _served(final, serving, folder)
    spec, rows = folder.spec(), folder.results()
    rows = rows[rows.model == rows.method].reset_index(drop=True)
    for index, row in rows[rows.held_out].iterrows():
        store = load_domains(spec.data, [row.domain])[row.domain]
        splits = split_store(store, spec.data, spec.model.horizon)
        test = evaluation_set(store, splits, "test", context=spec.model.context, horizon=int(row.horizon), limit=spec.evaluation.windows)
        scores = _scores(models, test)
        best = min(scores, key=lambda each: each["mse"])
        mean = {name: sum(each[name] for each in scores) / len(scores) for name in best}
        for name in rows.columns:
            if name in best:
                rows.loc[index, name] = (best if serving == "oracle" else mean)[name]
            elif str(name).startswith("reconstruction"):
                rows.loc[index, name] = float("nan")
    return rows


def _served(final: DomainMixture, serving: Serving, folder: RunFolder) -> list[PatchTransformer | DomainMixture]:
    """Return the models whose scores are averaged."""
    experts = [final.expert(name) for name in final.names]
    prototypes = [expert for expert in experts if isinstance(expert, PrototypeTransformer)]
    if serving in ("each", "oracle"):
        return [*experts]
    if serving == "shadow":
        if build_method(folder.spec().method).reorders:
            raise RunError(
                f"the models of {folder.path} have no mean: their memories hold prototypes in another order at each site",
                hint="ask for 'each' or 'oracle'",
            )
        weights = {site: float(row.get("weight", 1.0)) for site, row in folder.rows("round")[-1]["sites"].items()}
        return [_shadow(final, weights)]
    if serving == "quantisation" and not prototypes:
        raise RunError(f"the models of {folder.path} quantise nothing", hint="ask for 'mixture', or choose a run of fedpm")
    for expert in prototypes:
        expert.settings = expert.settings.model_copy(update={"serving": serving})
    return [final]


def _scores(models: list[PatchTransformer | DomainMixture], test: EvaluationSet) -> list[dict[str, float]]:
    scores: list[dict[str, Any]] = [score(test, *forecast_windows(model, test.context, test.target.shape[1])) for model in models]
    return [{name: float(value) for name, value in each.items()} for each in scores]


def _shadow(mixture: DomainMixture, weights: dict[str, float]) -> PatchTransformer:
    """Return the weighted mean of the experts."""
    mass = sum(weights[name] for name in mixture.names)
    shadow = build_model(mixture.config)
    with torch.no_grad():
        for key, parameter in shadow.named_parameters():
            total = sum(weights[name] / mass * mixture.expert(name).get_parameter(key).double() for name in mixture.names)
            parameter.copy_(torch.as_tensor(total))
    return shadow
