"""What a site has for a run, counted and checked before anything trains: the same for sites here and on other machines."""

from __future__ import annotations

from dataclasses import dataclass

from fedcast.data.splits import MIN_CONTEXT, Splits, split_store
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler
from fedcast.errors import SplitError
from fedcast.federated.site import SiteRole
from fedcast.spec import RunSpec


@dataclass(frozen=True)
class Survey:
    """What a site has.

    Attributes
    ----------
    samples
        Its training points, or 1 where all sites weigh alike: what it may weigh at most.
    series
        How many series it has.
    left_out
        How many of them are too short to be split, or to be trained on at the site's share of them.
    fingerprint
        SHA-256 over its data.
    sampler
        Its windows.
    """

    samples: int
    series: int
    left_out: int
    fingerprint: str
    sampler: WindowSampler


def survey(role: SiteRole, store: SeriesStore, spec: RunSpec) -> Survey:
    """Look at a site before anything trains: a domain that is too short must not fail at the end of a long run.

    Raises
    ------
    SplitError
        When the site has no series to train, validate or test on.
    """
    try:
        splits = split_store(store, spec.data, spec.model.horizon)
    except SplitError as error:
        raise SplitError(f"site {role.name}: {error.message}", hint=error.hint) from error
    sampler = WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon)
    if role.evaluates:
        _check_scored(role.name, store, splits, spec)
    if role.trains and spec.data.share < 1:
        _check_used(role.name, sampler, spec)
    samples = 1 if spec.federation.weights == "equal" else sampler.n_points
    used = splits.trained if role.trains else splits.kept
    return Survey(samples, len(store.ids), int((~(used | splits.only_tested)).sum()), store.fingerprint, sampler)


def _check_scored(site: str, store: SeriesStore, splits: Splits, spec: RunSpec) -> None:
    for horizon in spec.evaluation.horizons:
        if not len(WindowSampler(store, splits, context=spec.model.context, horizon=horizon).evaluation("test", 1)):
            raise SplitError(
                f"site {site}: no test part holds {horizon} steps",
                hint="take that horizon out of evaluation.horizons, or raise model.horizon or data.test",
            )


def _check_used(site: str, sampler: WindowSampler, spec: RunSpec) -> None:
    if not sampler.n_windows:
        splits = sampler.splits
        raise SplitError(
            f"site {site}: no series has a window to train on in the latest {spec.data.share:g} of its train part "
            f"(the longest train part has {int(splits.train_end[splits.kept].max())} steps, a window {spec.model.horizon + MIN_CONTEXT})",
            hint="raise data.share, lower model.horizon, or leave that domain out of data.domains",
        )
