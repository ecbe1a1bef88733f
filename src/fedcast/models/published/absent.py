"""Published models that fedcast has no adapter for, and why: so that nobody has to search for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Absent:
    """A model family without an adapter.

    Attributes
    ----------
    family, summary
        As of an adapter.
    weights
        Where its published weights lie.
    licence
        Licences of code and weights.
    reason
        Why there is no adapter, and what one would need.
    """

    family: str
    summary: str
    weights: str
    licence: str
    reason: str


ABSENT: dict[str, Absent] = {
    row.family: row
    for row in (
        Absent(
            family="moirai-1",
            summary="masked encoder over patches of several sizes; a mixture of distributions",
            weights="Salesforce/moirai-1.0-R-small, Salesforce/moirai-1.1-R-small and larger",
            licence="code Apache-2.0, weights CC-BY-NC-4.0",
            reason="its code in uni2ts 2.0.0 imports jax, for a type annotation only; use moirai-2",
        ),
        Absent(
            family="timesfm-2.0",
            summary="decoder over patches of 32 steps; point and nine quantiles of 128 steps in one pass",
            weights="google/timesfm-2.0-500m-pytorch",
            licence="code Apache-2.0, weights Apache-2.0",
            reason="another architecture than 2.5, with a frequency as input; transformers has it (TimesFmModelForPrediction), an adapter "
            "is not written",
        ),
        Absent(
            family="toto-2",
            summary="decoder with quantile outputs, 4 million to 2.5 billion parameters",
            weights="Datadog/Toto-2.0-22m and others",
            licence="code Apache-2.0, weights Apache-2.0",
            reason="its library, toto-models, needs Python 3.12; fedcast is tested with 3.11",
        ),
        Absent(
            family="units",
            summary="attention over time and variates with prompt tokens, for several tasks",
            weights="https://github.com/mims-harvard/UniTS/releases/tag/ckpt",
            licence="code MIT, weights: none stated",
            reason="no library on PyPI carries it, and its weights are pickled files, which can execute code when they are read and hold "
            "prompts of the datasets they were trained on; an adapter needs a package of the authors with weights in safetensors",
        ),
    )
}
"""The families by name."""
