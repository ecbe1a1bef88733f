"""Splits by time into train, validation and test, and scalers fitted on the train part only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedcast.data.medical import MEDICAL_SOURCES
from fedcast.data.store import SeriesStore
from fedcast.errors import SpecError, SplitError
from fedcast.spec import DataSpec

MIN_CONTEXT = 16


@dataclass(frozen=True)
class Splits:
    """Where the parts of each series end: train ``[0, train_end)``, validation ``[train_end, validation_end)``, test the rest.

    Attributes
    ----------
    train_end, validation_end
        int64 ``[n]``, in time steps from the start of the series.
    kept
        bool ``[n]``: False for series that are too short or wholly missing in their train part; no window is taken from them.
    train_start
        int64 ``[n]``: where the part of the train part begins that is trained on, zeros when absent; ``train_end`` where a series
        is scored but not trained on. Scales and scores do not depend on it.
    test_start
        int64 ``[n]``: where test targets begin, ``validation_end`` when absent.
    """

    train_end: NDArray[np.int64]
    validation_end: NDArray[np.int64]
    kept: NDArray[np.bool_]
    train_start: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    test_start: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        """Train on the whole train part and test on the whole test part unless told otherwise."""
        if not self.train_start.size:
            object.__setattr__(self, "train_start", np.zeros_like(self.train_end))
        if not self.test_start.size:
            object.__setattr__(self, "test_start", self.validation_end)

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Which series are trained on, bool ``[n]``."""
        return self.kept & (self.train_start < self.train_end)

    @property
    def only_tested(self) -> NDArray[np.bool_]:
        """Which series have no train part on purpose, bool ``[n]``: test parts that are series of their own."""
        only: NDArray[np.bool_] = self.kept & (self.train_end == 0)
        return only


def split_by_time(store: SeriesStore, *, horizon: int, validation: float | NDArray[np.float64], test: float) -> Splits:
    """Split every series of a store by time.

    Parameters
    ----------
    store
        The series.
    horizon
        Steps of a target; the validation and the test part have at least as many.
    validation, test
        Shares of each series' length for validation (one for all, or ``[n]``) and, at its end, for testing.

    Returns
    -------
    Splits
        A series is kept when its train part has at least ``horizon + 16`` steps and at least one observed value.

    Raises
    ------
    SplitError
        When no series is kept.
    """
    lengths = store.lengths
    n_test = np.maximum(np.rint(lengths * test).astype(np.int64), horizon)
    n_validation = np.maximum(np.rint(lengths * validation).astype(np.int64), horizon)
    validation_end = np.maximum(lengths - n_test, 0)
    train_end = np.maximum(validation_end - n_validation, 0)
    kept = train_end >= horizon + MIN_CONTEXT
    if kept.any():
        observed, _ = _moments(store, train_end)
        kept &= observed > 0
        if not kept.any():
            raise SplitError(
                f"no series of {', '.join(store.domain_names)} has an observed value in its train part",
                hint="check the target column, or lower data.validation and data.test",
            )
        return Splits(train_end=train_end, validation_end=validation_end, kept=kept)
    raise SplitError(
        f"no series of {', '.join(store.domain_names)} is long enough: the longest has {int(lengths.max())} steps, "
        f"and a train part of {horizon + MIN_CONTEXT} must remain before {horizon} steps of validation and {horizon} of testing",
        hint=f"give series of at least {3 * horizon + MIN_CONTEXT} steps, or lower model.horizon, data.validation or data.test",
    )


def split_store(store: SeriesStore, data: DataSpec, horizon: int) -> Splits:
    """Split a store as a spec's ``[data]`` section asks for; see :func:`split_by_time`.

    The source ``"ltsf"`` has the split of its benchmark, by which its series are standardised as well. Test parts of the medical sources
    are series of their own, see :func:`fedcast.data.medical.parts.split_parts`.

    Of each train part only the latest ``data.share`` is trained on, and none of it where that has no room for one window
    (``horizon + 16`` steps). Scales (mean, deviation, that of MASE) are those of the whole train part whatever the share, and a series
    that is not trained on is scored all the same, so scores of different shares are over the same windows in the same units.

    Raises
    ------
    SpecError
        When a spec over ``"ltsf"`` or a medical source asks for another split.
    """
    validation: float | NDArray[np.float64] = data.validation
    if data.source == "ltsf":
        # needs scipy's signal processing, which other sources do not
        from fedcast.data.sources.ltsf import DEFAULT_VALIDATION, TEST, VALIDATION

        if (data.validation, data.test) != (DEFAULT_VALIDATION, TEST):
            raise SpecError("the source 'ltsf' has the split of its benchmark", hint="leave out data.validation and data.test")
        validation = np.array([VALIDATION.get(name, data.validation) for name in store.domain_names])[store.domain]
    if data.source in MEDICAL_SOURCES:
        from fedcast.data.medical.parts import split_parts

        splits = split_parts(store, data, horizon)
    else:
        splits = split_by_time(store, horizon=horizon, validation=validation, test=data.test)
    if data.share == 1:
        return splits
    used = np.rint(splits.train_end * data.share).astype(np.int64)
    return replace(splits, train_start=splits.train_end - np.where(used >= horizon + MIN_CONTEXT, used, 0))


def train_scale(store: SeriesStore, splits: Splits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each series over its observed train values.

    Returns
    -------
    tuple of float64 ``[n]``
        Mean, 0 where nothing is observed; population standard deviation, 1 where the series is constant or nothing is observed.
    """
    count, total = _moments(store, splits.train_end)
    mean = total / np.maximum(count, 1)
    _, squares = _moments(store, splits.train_end, centre=mean)
    std = np.sqrt(squares / np.maximum(count, 1))
    # sums of equal float32 values are exact in float64, so a constant series has a deviation of exactly zero
    return mean, np.where(std == 0, 1.0, std)


def _moments(
    store: SeriesStore, train_end: NDArray[np.int64], centre: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count and sum the observed train values of each series, or their squared distances from ``centre``."""
    count = np.zeros(len(store), dtype=np.int64)
    total = np.zeros(len(store), dtype=np.float64)
    for block in store.blocks():
        # reduceat cannot sum nothing, so series without a train part are left out; they keep a count and a sum of zero
        series = block.start + np.flatnonzero(train_end[block] > 0)
        if series.size == 0:
            continue
        first = store.offsets[series[0]]
        values = store.values[first : store.offsets[series[-1] + 1]].astype(np.float64)
        starts = store.offsets[series] - first
        # +1 at the start of each train part and -1 at its end, summed, marks its inside
        edges = np.zeros(len(values) + 1, dtype=np.int8)
        edges[starts] = 1
        edges[starts + train_end[series]] -= 1
        used = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_) & ~np.isnan(values)
        if centre is not None:
            values -= np.repeat(centre[series], np.diff(np.r_[starts, len(values)]))
            values *= values
        count[series] = np.add.reduceat(used, starts, dtype=np.int64)
        total[series] = np.add.reduceat(np.where(used, values, 0.0), starts)
    return count, total
