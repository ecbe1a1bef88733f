"""Train and test parts of medical recordings: series of their own, each scaled to [0, 1] by its own values.

A recording is cut after 60 % of it (PTB-XL, a record: trained on whole, or tested on whole), and both parts are scaled by their own
minimum and maximum, as the paper's code does. The test part's scale therefore uses test values, targets too: a mild leak, kept because
the numbers of the paper have it. As a series of its own, a test part has contexts from inside itself alone. The first 512 steps are
only ever context, so every model, whatever its context, is scored on the same targets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcast.data.sources.raw import Floats, Series, resampled
from fedcast.data.splits import MIN_CONTEXT, Splits
from fedcast.data.store import SeriesStore
from fedcast.errors import SpecError, SplitError
from fedcast.spec import DataSpec

CONTEXT, HORIZON = 512, 64
"""Steps seen and forecast in the paper."""

TRAIN_SHARE = 0.6
"""Share of a recording that is trained on, its first."""

_TRAIN, _TEST = ":train", ":test"


def scaled(values: Floats) -> Floats:
    """Return values moved and stretched to [0, 1], float64 [T]; missing ones stay missing, a constant becomes 0."""
    low, high = np.nanmin(values), np.nanmax(values)
    result: Floats = (values - low) / (high - low if high > low else 1.0)
    return result


def cut(name: str, values: Floats, rate: float, to: float | None = None) -> list[Series]:
    """Return train and test part of a recording, [T] at ``rate`` Hz.

    Parameters
    ----------
    name
        The parts are called ``<name>:train`` and ``<name>:test``.
    to
        Rate to resample each part to; each by itself, so that the filter does not reach over the border.
    """
    border = int(len(values) * TRAIN_SHARE)
    return [whole(name, values[:border], rate, to, test=False), whole(name, values[border:], rate, to, test=True)]


def whole(name: str, values: Floats, rate: float, to: float | None = None, *, test: bool) -> Series:
    """Return a recording, or a part of one, that is trained on or tested on as a whole; see :func:`cut`."""
    values = values if to is None or to == rate else resampled(values, rate, to)
    return Series(f"{name}{_TEST if test else _TRAIN}", 0, scaled(values))


def is_test(store: SeriesStore) -> NDArray[np.bool_]:
    """Return which series of a medical store are test parts, bool ``[n]``."""
    return np.array([name.endswith(_TEST) for name in store.ids])


def split_parts(store: SeriesStore, data: DataSpec, horizon: int) -> Splits:
    """Split a medical store: train parts into train and validation, test parts are tested on from step 512 on.

    Parameters
    ----------
    store
        Of one of the medical sources; every series is a train part or a test part.
    data
        ``validation`` is a share of the whole recording: with 0.1, half of a recording is trained on and a tenth validated on. ``test``
        has no effect, the parts were cut when the store was made.
    horizon
        Steps of a target.

    Returns
    -------
    Splits
        A test part has no train part, so its scores are in its own units, [0, 1]: mean 0, deviation 1, no scale of MASE. It is kept when
        a target fits behind the first 512 steps; a train part, when ``horizon + 16`` steps remain to train on.

    Raises
    ------
    SpecError
        When the spec asks for another share of testing.
    SplitError
        When no train part is kept, or no test part.
    """
    if data.test not in (DataSpec.model_fields["test"].default, 1 - TRAIN_SHARE):
        hint = "leave out data.test"
        raise SpecError(f"the source {data.source!r} has the parts of its protocol, and data.test is {data.test:g}", hint=hint)
    lengths, test = store.lengths, is_test(store)
    # of PTB-XL, whole records are trained on
    share = data.validation / (1.0 if "sites" in data.source else TRAIN_SHARE)
    n_validation = np.maximum(np.rint(lengths * share).astype(np.int64), horizon)
    train_end = np.where(test, 0, np.maximum(lengths - n_validation, 0))
    kept = np.where(test, lengths >= CONTEXT + horizon, train_end >= horizon + MIN_CONTEXT)
    for name, part in (("train", ~test), ("test", test)):
        if part.any() and not (kept & part).any():
            raise SplitError(
                f"no {name} part of {', '.join(store.domain_names)} is long enough for {horizon} steps of forecast: "
                f"the longest has {int(lengths[part].max())}",
                hint="lower model.horizon or data.validation",
            )
    validation_end, test_start = np.where(test, 0, lengths), np.where(test, CONTEXT, lengths)
    return Splits(train_end=train_end, validation_end=validation_end, kept=kept, test_start=test_start)
