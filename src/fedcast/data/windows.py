"""Windows: which (series, end) pairs exist, drawing them at random or evenly, and gathering a batch of them in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from fedcast.data.splits import MIN_CONTEXT, Splits
from fedcast.data.store import SeriesStore
from fedcast.errors import SplitError

FLOOR_CONTEXT = 8
Balance = Literal["none", "dataset", "domain"]
Part = Literal["train", "validation", "test"]
_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Places in a store.

    Attributes
    ----------
    series
        int64 ``[B]``: the series.
    end
        int64 ``[B]``: index, within the series, of the first target step; the context ends just before it.
    """

    series: _Ints
    end: _Ints

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.series)


@dataclass
class Batch:
    """A batch of windows in the units of the data.

    Attributes
    ----------
    context
        float32 ``[B, L]``: zeros where missing or before the series starts.
    mask
        bool ``[B, L]``: True where observed.
    target
        float32 ``[B, H]``: zeros where missing.
    target_mask
        bool ``[B, H]``: True where observed.
    windows
        Where the rows come from.
    dataset, domain
        int64 ``[B]``: labels of the series, as in the store.
    """

    context: Tensor
    mask: Tensor
    target: Tensor
    target_mask: Tensor
    windows: Windows
    dataset: Tensor
    domain: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; to CUDA it is copied from pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        names = ("context", "mask", "target", "target_mask", "dataset", "domain")
        return replace(self, **{name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in names})

    def split(self, size: int, *, rest: bool = False) -> Iterator[Batch]:
        """Yield pieces of ``size`` rows, which are views of this batch; what is left over at the end only where ``rest`` asks for it."""
        for start in range(0, len(self.windows) if rest else len(self.windows) - size + 1, size):
            yield self.rows(slice(start, start + size))

    def rows(self, rows: slice) -> Batch:
        """Return some of the rows, as views of this batch."""
        return Batch(
            context=self.context[rows],
            mask=self.mask[rows],
            target=self.target[rows],
            target_mask=self.target_mask[rows],
            windows=Windows(self.windows.series[rows], self.windows.end[rows]),
            dataset=self.dataset[rows],
            domain=self.domain[rows],
        )


class WindowSampler:
    """Draws and gathers the windows of one store.

    A window is valid when its target lies wholly in its part of the series and has an observed step, and when its context has at
    least 16 steps, one of them observed. Only where a part leaves no room for 16 steps of context, 8 to 15 are enough.
    A train window, its context too, begins at ``splits.train_start`` or later: what lies before counts as missing.
    The valid places are kept as ranges of ``end``, one for each series and one more for each long gap, so that a draw is exact,
    without rejection.

    Parameters
    ----------
    store
        The series.
    splits
        Their parts; windows are taken from kept series only.
    context, horizon
        Steps of context ``L`` (at least 8) and of target ``H`` (at least 1).
    balance
        ``"none"``: train windows are drawn uniformly; ``"dataset"``: first a dataset uniformly among those with a train window, then
        a window of it uniformly; ``"domain"``: first a domain, then a dataset of it, then a window, each uniformly.

    Attributes
    ----------
    n_windows
        Number of valid train windows.
    n_points
        Number of observed values in the train parts of kept series, from ``splits.train_start`` on.
    """

    def __init__(self, store: SeriesStore, splits: Splits, *, context: int, horizon: int, balance: Balance = "none") -> None:
        if context < FLOOR_CONTEXT or horizon < 1:
            raise ValueError(f"context {context} and horizon {horizon} must be at least {FLOOR_CONTEXT} and 1")
        if balance not in ("none", "dataset", "domain"):
            raise ValueError(f"balance {balance!r} is not 'none', 'dataset' or 'domain'")
        self.store, self.splits = store, splits
        self.context, self.horizon, self.balance = context, horizon, balance
        self._lengths = store.lengths
        self._contexts, self._targets = _rows(store.values, context), _rows(store.values, horizon)
        self._shortest = min(MIN_CONTEXT, context)
        runs = _missing_runs(store)
        begin = np.minimum(splits.train_start, splits.train_end)
        self.n_points = _observed(runs, np.where(splits.kept, splits.train_end, 0)) - _observed(runs, np.where(splits.kept, begin, 0))
        self._bad = _bad_ends(runs, context, horizon, np.zeros_like(begin))
        self._late = bool(begin.any())
        train = self._ranges("train")
        self.n_windows = train.total
        self._chances: NDArray[np.float64] | None = None
        if balance == "none":
            self._train, self._groups = train, np.array([[0, train.total]])
        else:
            self._train, self._groups = _grouped(train, store.dataset)
            if balance == "domain" and len(self._groups):
                # A domain evenly, then one of its datasets evenly: the share that its own site would give each of them.
                owner = store.domain[self._train.at(self._groups[:, 0]).series]
                _, inverse, count = np.unique(owner, return_inverse=True, return_counts=True)
                self._chances = 1.0 / (len(count) * count[inverse])

    def draw(self, size: int, rng: np.random.Generator) -> Windows:
        """Draw train windows at random, with replacement.

        Parameters
        ----------
        size
            Number of windows ``B``.
        rng
            The only source of randomness.

        Raises
        ------
        SplitError
            When the store has no valid train window.
        """
        if self.n_windows == 0:
            raise SplitError(
                f"{', '.join(self.store.domain_names)} has no train window with {self.horizon} target steps and an observed context",
                hint="lower model.horizon, or give longer series with fewer missing values",
            )
        groups = self._groups
        if len(groups) == 1:
            position = rng.integers(0, self.n_windows, size)
        else:
            even = self._chances is None
            chosen = groups[rng.integers(0, len(groups), size) if even else rng.choice(len(groups), size, p=self._chances)]
            position = rng.integers(chosen[:, 0], chosen[:, 1])
        return self._train.at(position)

    def rates(self, size: int) -> NDArray[np.float64]:
        """Return the chance of a window of each group (``balance``) to be in a batch of :meth:`poisson`, float64 ``[G]``."""
        room = self._groups[:, 1] - self._groups[:, 0]
        chances = 1.0 / len(room) if self._chances is None else self._chances
        rates: NDArray[np.float64] = np.minimum(1.0, size * chances / np.maximum(room, 1))
        return rates

    def poisson(self, size: int, rng: np.random.Generator) -> Windows:
        """Draw train windows, each independently of all others: ``size`` of them in the mean, none twice, and sometimes none at all.

        Differentially private training counts on this way of drawing. The balance is that of :meth:`draw`.

        Parameters
        ----------
        size
            Expected number of windows.
        rng
            The only source of randomness.
        """
        position = [
            first + rng.choice(last - first, rng.binomial(last - first, rate), replace=False, shuffle=False)
            for (first, last), rate in zip(self._groups.tolist(), self.rates(size).tolist(), strict=True)
        ]
        return self._train.at(np.concatenate([np.empty(0, dtype=np.int64), *position]))

    def evenly(self, limit: int) -> Windows:
        """Return train windows spread evenly over all of them, without randomness: all, where there are no more than ``limit``."""
        count = min(limit, self.n_windows)
        return self._train.at(np.arange(count, dtype=np.int64) * self.n_windows // max(count, 1))

    def evaluation(self, part: Literal["validation", "test"], limit: int) -> Windows:
        """Choose windows of a part, without randomness.

        The limit is shared out evenly over datasets, then over the series of each, then over time; where one has fewer windows
        than its share, the others get the rest. When there are no more than ``limit`` windows, all are taken. None is taken twice.

        Parameters
        ----------
        part
            The part in which targets lie wholly; contexts may reach back before it.
        limit
            The most windows to take.

        Returns
        -------
        Windows
            Ordered by dataset, series and time; empty when the part has no valid window.
        """
        if part not in ("validation", "test"):
            raise ValueError(f"part {part!r} is not 'validation' or 'test'")
        if limit < 1:
            raise ValueError(f"limit {limit} must be at least 1")
        ranges, groups = _grouped(self._ranges(part), self.store.dataset)
        if len(groups) == 0:
            return Windows(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        shares = _share(groups[:, 1] - groups[:, 0], limit)
        chosen = []
        for (first, last), share in zip(groups.tolist(), shares.tolist(), strict=True):
            rows = slice(*np.searchsorted(ranges.before, [first, last]).tolist())
            starts = np.flatnonzero(np.diff(ranges.series[rows], prepend=-1))
            begins = ranges.before[rows][starts]  # first position of each series
            room = np.diff(np.r_[begins, last])
            taken = _share(room, share)
            step = np.arange(int(taken.sum())) - np.repeat(np.cumsum(taken) - taken, taken)
            room, begins, taken = (np.repeat(array, taken) for array in (room, begins, taken))
            chosen.append(begins + (2 * step + 1) * room // (2 * taken))
        return ranges.at(np.concatenate(chosen))

    def gather(self, windows: Windows) -> Batch:
        """Read windows from the store.

        Any window may be given: steps before the start of its series or after its end are missing, and in the context of a train
        window those before ``splits.train_start``.

        Returns
        -------
        Batch
            Own memory, contiguous; nothing in it is a view of the store.
        """
        series, end = windows.series, windows.end
        context, mask = self._take(series, end - self.context, self._contexts)
        if self._late:
            splits = self.splits
            # Targets of the later parts begin at train_end or later; their contexts reach back as far as ever, whatever is trained on.
            first = np.where(end < splits.train_end[series], splits.train_start[series], 0) - (end - self.context)
            unused = np.arange(self.context) < first[:, None]
            context[unused], mask[unused] = 0.0, False
        target, target_mask = self._take(series, end, self._targets)
        return Batch(
            context=torch.from_numpy(context),
            mask=torch.from_numpy(mask),
            target=torch.from_numpy(target),
            target_mask=torch.from_numpy(target_mask),
            windows=windows,
            dataset=torch.from_numpy(self.store.dataset[series].astype(np.int64)),
            domain=torch.from_numpy(self.store.domain[series].astype(np.int64)),
        )

    def _take(self, series: _Ints, begin: _Ints, view: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        rows, width = view.shape
        first = self.store.offsets[series] + begin
        values = view[first.clip(0, rows - 1)] if rows else np.empty((len(first), width), dtype=np.float32)
        steps = np.arange(width)
        if first.size and (first.min() < 0 or first.max() >= rows):
            # rows that reach over the edge of the whole array, where a shifted row would be read
            over = np.flatnonzero((first < 0) | (first >= rows))
            values[over] = self.store.values.take(first[over, None] + steps, mode="clip")
        mask = np.isfinite(values)
        if begin.size and begin.min() < 0:
            mask &= steps >= -begin[:, None]
        room = self._lengths[series] - begin
        if begin.size and room.min() < width:
            mask &= steps < room[:, None]
        if not mask.all():
            np.copyto(values, 0.0, where=~mask)
        return values, mask

    def _ranges(self, part: Part) -> _Ranges:
        """Return the valid ends of a part, as ranges ordered by series and time."""
        splits, n = self.splits, len(self.store)
        start, stop = {
            "train": (splits.train_start, splits.train_end),
            "validation": (splits.train_end, splits.validation_end),
            "test": (splits.test_start, self._lengths),
        }[part]
        begin, bad = np.zeros(n, dtype=np.int64), self._bad
        if part == "train" and self._late:
            begin, bad = start, _bad_ends(_missing_runs(self.store), self.context, self.horizon, start)
        high = stop - self.horizon
        # a context of 8 to 15 steps only where the part has no room for 16
        low = np.maximum(start, begin + np.clip(high - begin, FLOOR_CONTEXT, self._shortest))
        kept = np.flatnonzero(splits.kept & (low <= high))
        return _without(kept, low, high, bad)


def _rows(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """View ``values`` as every row of ``width`` neighbours, ``[total - width + 1, width]``; an index into it copies whole rows."""
    if values.size < width:
        return np.empty((0, width), dtype=np.float32)
    return sliding_window_view(values, width)


@dataclass(frozen=True)
class _Ranges:
    """Ranges of valid ends: ``first[k]`` onwards in ``series[k]``; windows are numbered through, from ``before[k]`` on."""

    series: _Ints
    first: _Ints
    before: _Ints
    total: int

    @classmethod
    def of(cls, series: _Ints, first: _Ints, count: _Ints) -> _Ranges:
        after = np.cumsum(count)
        return cls(series, first, after - count, int(after[-1]) if len(after) else 0)

    def at(self, position: _Ints) -> Windows:
        k = np.searchsorted(self.before, position, side="right") - 1
        return Windows(self.series[k], self.first[k] + position - self.before[k])


@dataclass(frozen=True)
class _Spans:
    """Spans ``[start, stop)`` of time steps within series, ordered by series and time, never overlapping."""

    series: _Ints
    start: _Ints
    stop: _Ints

    def where(self, some: NDArray[np.bool_]) -> _Spans:
        return _Spans(self.series[some], self.start[some], self.stop[some])


def _missing_runs(store: SeriesStore) -> _Spans:
    """Find every run of missing values; a run does not cross from one series into the next."""
    found = [_runs(store, block) for block in store.blocks()]
    return _Spans(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _runs(store: SeriesStore, block: slice) -> tuple[_Ints, _Ints, _Ints]:
    offsets = store.offsets[block.start : block.stop + 1]
    missing = np.isnan(store.values[offsets[0] : offsets[-1]])
    if not missing.any():
        return (np.empty(0, dtype=np.int64),) * 3
    firsts = offsets[:-1][np.diff(offsets) > 0] - offsets[0]
    opens, closes = missing.copy(), missing.copy()
    opens[1:] &= ~missing[:-1]
    opens[firsts] = missing[firsts]
    closes[:-1] &= ~missing[1:]
    closes[firsts[1:] - 1] = missing[firsts[1:] - 1]
    start, last = np.flatnonzero(opens) + offsets[0], np.flatnonzero(closes) + offsets[0]
    series = np.searchsorted(store.offsets, start, side="right") - 1
    base = store.offsets[series]
    return series, start - base, last + 1 - base


def _observed(runs: _Spans, until: _Ints) -> int:
    end = until[runs.series]
    return int(until.sum() - (np.minimum(runs.stop, end) - np.minimum(runs.start, end)).sum())


def _bad_ends(runs: _Spans, context: int, horizon: int, begin: _Ints) -> _Spans:
    """Turn missing runs into spans of ends whose target, or whose context from ``begin[series]`` on, is missing as a whole."""
    leading = (runs.start <= begin[runs.series]) & (begin[runs.series] < runs.stop)
    relevant = leading | (runs.stop - runs.start >= min(context, horizon))
    series, start, stop, leading = runs.series[relevant], runs.start[relevant], runs.stop[relevant], leading[relevant]
    # no target: end in [start, stop - H]; no context: end in [start + L, stop], and in [start, stop] for a run that holds the beginning
    no_target = np.maximum(stop - horizon + 1, start)
    no_context = np.where(leading, start, np.minimum(start + context, stop + 1))
    first = (series, start, no_target)
    second = (series, np.maximum(no_context, no_target), stop + 1)
    both = _Spans(*(np.stack(pair, axis=1).reshape(-1) for pair in zip(first, second, strict=True)))
    return both.where(both.stop > both.start)


def _without(kept: _Ints, low: _Ints, high: _Ints, bad: _Spans) -> _Ranges:
    """Take the bad spans of ends out of ``[low, high]`` of each kept series."""
    inside = np.zeros(len(low), dtype=np.bool_)
    inside[kept] = True
    start, stop = np.maximum(bad.start, low[bad.series]), np.minimum(bad.stop, high[bad.series] + 1)
    bad = _Spans(bad.series, start, stop).where(inside[bad.series] & (stop > start))
    series = np.r_[kept, bad.series]
    opens, closes = np.r_[low[kept], bad.stop], np.r_[high[kept] + 1, bad.start]
    if len(bad.series):
        # within a series spans neither overlap nor touch out of order, so the k-th opening belongs to the k-th closing
        opens, closes = opens[np.lexsort((opens, series))], closes[np.lexsort((closes, series))]
        series = np.sort(series, kind="stable")
    some = closes > opens
    return _Ranges.of(series[some], opens[some], (closes - opens)[some])


def _grouped(ranges: _Ranges, labels: NDArray[np.int32]) -> tuple[_Ranges, _Ints]:
    """Order ranges by the label of their series; return them with the window numbers ``[G, 2]`` from and to of each label."""
    group = labels[ranges.series]
    order = np.argsort(group, kind="stable")
    count = np.diff(np.r_[ranges.before, ranges.total])
    ordered = _Ranges.of(ranges.series[order], ranges.first[order], count[order])
    edges = ordered.before[np.flatnonzero(np.diff(group[order], prepend=-1))]
    return ordered, np.stack([edges, np.r_[edges[1:], ordered.total][: len(edges)]], axis=1)


def _share(room: _Ints, total: int) -> _Ints:
    """Share ``total`` out over places with ``room`` each, as evenly as their room allows."""
    total = min(total, int(room.sum()))
    low, high = 0, int(room.max())
    while low < high:  # the highest level that every place can be filled to
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.minimum(room, level).sum()) <= total else (low, level - 1)
    share = np.minimum(room, low)
    rest = total - int(share.sum())
    if rest:
        open_places = np.flatnonzero(room > low)
        share[open_places[(2 * np.arange(rest) + 1) * len(open_places) // (2 * rest)]] += 1
    return share
