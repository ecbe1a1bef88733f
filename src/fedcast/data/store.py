"""The series store: every series of a domain in one contiguous float32 array with offsets, in memory or memory-mapped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcast.errors import DataError, SourceError

if TYPE_CHECKING:
    from fedcast.data.frames import LongFrame

FORMAT = 1
_BLOCK = 1 << 22
_RENAMES = 8
_ARRAYS = ("values", "offsets", "dataset", "domain", "season_lengths")
_LISTS = ("ids", "starts", "dataset_names", "freqs", "domain_names")
_DTYPES: Mapping[str, type[np.generic]] = {
    "values": np.float32,
    "offsets": np.int64,
    "dataset": np.int32,
    "domain": np.int32,
    "season_lengths": np.int32,
}

_DAY = 86_400
_SECONDS = {"h": 3600, "H": 3600, "min": 60, "T": 60, "s": 1, "S": 1, "D": _DAY}
_PER_YEAR = {"W": 52, "SM": 24, "SMS": 24, "SME": 24}
_PER_YEAR |= dict.fromkeys(("M", "ME", "MS", "BM", "BMS", "BME", "CBM", "CBMS", "CBME"), 12)
_PER_YEAR |= dict.fromkeys(("Q", "QE", "QS", "BQ", "BQS", "BQE"), 4)
_FREQ = re.compile(r"(\d*)([A-Za-z]+)(?:-[A-Za-z0-9-]+)?")


def season_length(freq: str | int) -> int:
    """Return the number of steps in the main season of a frequency.

    Parameters
    ----------
    freq
        A pandas offset alias, with or without a multiple and in the old or the new spelling (``"h"``, ``"30min"``, ``"W-SUN"``,
        ``"MS"``), or an integer step.

    Returns
    -------
    int
        A day for steps from a minute to less than a day, a week for days, five days for business days, a year for anything
        slower; 1 where the season is not a whole number of steps, for steps under a minute, for integers and for unknown aliases.

    Examples
    --------
    >>> [season_length(freq) for freq in ("h", "30min", "D", "W-SUN", "MS", "QS-OCT", "YE", "s", 1)]
    [24, 48, 7, 52, 12, 4, 1, 1, 1]
    """
    match = _FREQ.fullmatch(freq.strip()) if isinstance(freq, str) else None
    if match is None:
        return 1
    multiple, unit = int(match[1] or 1), match[2]
    if multiple < 1:
        return 1
    if unit in ("B", "C"):
        return _whole(5, multiple)
    if unit in _PER_YEAR:
        return _whole(_PER_YEAR[unit], multiple)
    step = multiple * _SECONDS.get(unit, 0)
    if step < 60:
        return 1
    if step < _DAY:
        return _whole(_DAY, step)
    return 52 if step == 7 * _DAY else _whole(7 * _DAY, step)


def _whole(span: int, step: int) -> int:
    return span // step if span % step == 0 else 1


@dataclass(frozen=True, eq=False)
class SeriesStore:
    """The series of one domain, or of one client.

    Arrays are read-only. The constructor checks shapes and labels, not values; build stores with :meth:`from_frames`,
    :meth:`open` or :meth:`concat`.

    Attributes
    ----------
    values
        float32 ``[total]``: all series end to end, each in order of time, ``NaN`` where missing; memory-mapped when opened.
    offsets
        int64 ``[n + 1]``: series ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
    ids
        The name of each series; unique within a dataset.
    starts
        The first time of each series, in ISO format, or its first index as text.
    dataset, domain
        int32 ``[n]``: index of each series into ``dataset_names`` and ``domain_names``.
    dataset_names, domain_names
        Names; two datasets of different domains may share one.
    freqs
        Frequency of each dataset, as text.
    season_lengths
        int32 ``[number of datasets]``, see :func:`season_length`.

    Raises
    ------
    DataError
        When the parts do not fit together, or no series is given.
    """

    values: NDArray[np.float32]
    offsets: NDArray[np.int64]
    ids: list[str]
    starts: list[str]
    dataset: NDArray[np.int32]
    dataset_names: list[str]
    freqs: list[str]
    season_lengths: NDArray[np.int32]
    domain: NDArray[np.int32]
    domain_names: list[str]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            # a plain read-only view: np.memmap is slower to index, and the cached fingerprint needs values that stay
            view = np.asarray(getattr(self, name), dtype=dtype).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        problem = self._problem()
        if problem is not None:
            raise DataError(f"a series store does not hold together: {problem}", hint="build it again from its source files")

    def _problem(self) -> str | None:
        n, n_datasets = len(self.ids), len(self.dataset_names)
        if n == 0:
            return "it has no series"
        if self.offsets.shape != (n + 1,) or self.offsets[0] != 0 or self.values.shape != (int(self.offsets[-1]),):
            return f"offsets do not cover {self.values.size} values of {n} series"
        if np.any(np.diff(self.offsets) < 0):
            return "offsets decrease"
        if not len(self.starts) == len(self.dataset) == len(self.domain) == n:
            return f"labels are not given for each of {n} series"
        if not len(self.freqs) == len(self.season_lengths) == n_datasets:
            return f"frequencies are not given for each of {n_datasets} datasets"
        for name, labels, count in (("dataset", self.dataset, n_datasets), ("domain", self.domain, len(self.domain_names))):
            if labels.min() < 0 or labels.max() >= count:
                return f"a {name} label lies outside the {count} known ones"
        return None

    def __len__(self) -> int:
        """Return the number of series."""
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 ``[n]``: time steps of each series, missing ones included."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over values, offsets and ids; the same wherever the store lies."""
        digest = hashlib.sha256()
        for array in (self.values.astype("<f4", copy=False), self.offsets.astype("<i8", copy=False)):
            digest.update(f"{array.size};".encode())
            digest.update(array.data)
        digest.update(json.dumps(self.ids).encode())
        return digest.hexdigest()

    def series(self, i: int) -> NDArray[np.float32]:
        """Return series ``i`` as a view, float32 ``[length]`` with ``NaN`` where missing.

        Raises
        ------
        IndexError
            When there is no such series.
        """
        at = range(len(self))[i]
        return self.values[self.offsets[at] : self.offsets[at + 1]]

    def blocks(self) -> Iterator[slice]:
        """Yield slices of neighbouring series, about four million points each, for work that copies values."""
        # a series belongs to the block in which it starts
        firsts = np.flatnonzero(np.diff(self.offsets[:-1] // _BLOCK, prepend=-1)).tolist()
        for first, last in zip(firsts, [*firsts[1:], len(self)], strict=True):
            yield slice(first, last)

    @classmethod
    def from_frames(cls, domain: str, frames: Mapping[str, LongFrame]) -> SeriesStore:
        """Build the store of one domain.

        Parameters
        ----------
        domain
            The domain's name.
        frames
            Dataset name to checked long frame; datasets keep the order given, series the order of their frame.

        Raises
        ------
        DataError
            When there is no series, or a value is too large for float32 (3.4e38).
        """
        values, lengths, counts = [], [], []
        ids: list[str] = []
        starts: list[str] = []
        for name, long in frames.items():
            frame = long.frame
            names = frame["unique_id"].to_numpy()
            firsts = np.flatnonzero(np.r_[len(names) > 0, names[1:] != names[:-1]][: len(names)])
            values.append(_float32(frame["y"].to_numpy(), f"{domain}/{name} ({long.source})"))
            ids.extend(str(value) for value in names[firsts])
            starts.extend(_iso(value) for value in frame["ds"].iloc[firsts])
            lengths.append(np.diff(np.r_[firsts, len(names)]))
            counts.append(len(firsts))
        if not ids:
            raise DataError(f"domain {domain!r} has no series", hint="give at least one frame with at least one row")
        freqs = [long.freq for long in frames.values()]
        return cls(
            values=np.concatenate(values),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
            ids=ids,
            starts=starts,
            dataset=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            dataset_names=list(frames),
            freqs=[str(freq) for freq in freqs],
            season_lengths=np.array([season_length(freq) for freq in freqs], dtype=np.int32),
            domain=np.zeros(len(ids), dtype=np.int32),
            domain_names=[domain],
        )

    def save(self, folder: str | Path) -> None:
        """Write the store to a folder: ``.npy`` arrays and ``meta.json``, written aside, synced and renamed.

        An existing store in that place is replaced; maps that are open on it stay valid.

        Raises
        ------
        SourceError
            When the folder holds something that is not a store, or cannot be written.
        """
        target = Path(folder).absolute()
        if target.exists() and not (target / "meta.json").is_file() and (not target.is_dir() or any(target.iterdir())):
            raise SourceError(f"{target} exists and is not a series store", hint="choose another folder, or move that one away")
        aside = _beside(target)
        try:
            aside.mkdir(parents=True)
            self._write(aside)
            _replace(aside, target)
        except OSError as error:
            raise SourceError(
                f"cannot write the store to {target}: {error.strerror or error}", hint="check space and permissions"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        for name in _ARRAYS:
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        meta = {"format": FORMAT, "fingerprint": self.fingerprint} | {name: getattr(self, name) for name in _LISTS}
        with (folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> SeriesStore:
        """Open a saved store; its values stay on disk, memory-mapped and read-only.

        Parameters
        ----------
        folder
            Where :meth:`save` wrote it.
        verify
            Read all values and compare their fingerprint with the one saved.

        Raises
        ------
        SourceError
            When the folder is missing, damaged, of another format, or fails the verification.
        """
        path = Path(folder)
        hint = "build the store again from its source files"
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        except FileNotFoundError as error:
            raise SourceError(f"no series store at {path}: {Path(error.filename).name} is missing", hint="check the path") from error
        except (OSError, ValueError, EOFError) as error:
            raise SourceError(f"the series store at {path} cannot be read: {error}", hint=hint) from error
        problem = _meta_problem(meta) or _dtype_problem(arrays)
        if problem is not None:
            raise SourceError(f"the series store at {path} is damaged: {problem}", hint=hint)
        try:
            store = cls(**arrays, **{name: meta[name] for name in _LISTS})
        except DataError as error:
            raise SourceError(f"the series store at {path} is damaged: {error.message}", hint=hint) from error
        if verify and store.fingerprint != meta["fingerprint"]:
            raise SourceError(f"the series store at {path} is damaged: its fingerprint differs from the one saved", hint=hint)
        return store

    @classmethod
    def concat(cls, parts: Sequence[tuple[SeriesStore, ArrayLike]]) -> SeriesStore:
        """Join chosen series of several stores into one, with their labels.

        Parameters
        ----------
        parts
            Pairs of a store and the indices of its chosen series, int ``[k]``, in the order wanted.

        Returns
        -------
        SeriesStore
            In memory. Only datasets and domains that have a chosen series are listed; a dataset is one and the same when its
            domain, name, frequency and season agree.

        Raises
        ------
        DataError
            When no series is chosen.
        IndexError
            When an index is outside its store.
        """
        picks = [(store, np.asarray(chosen, dtype=np.int64).reshape(-1)) for store, chosen in parts]
        picks = [(store, np.arange(len(store))[chosen]) for store, chosen in picks if chosen.size]
        if not picks:
            raise DataError("no series is chosen", hint="choose at least one series")
        datasets: dict[tuple[str, str, str, int], int] = {}
        domains: dict[str, int] = {}
        labels = [_relabel(store, chosen, datasets, domains) for store, chosen in picks]
        lengths = np.concatenate([store.lengths[chosen] for store, chosen in picks])
        return cls(
            values=np.concatenate([piece for store, chosen in picks for piece in _pieces(store, chosen)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            ids=[store.ids[i] for store, chosen in picks for i in chosen.tolist()],
            starts=[store.starts[i] for store, chosen in picks for i in chosen.tolist()],
            dataset=np.concatenate([dataset for dataset, _ in labels]),
            dataset_names=[key[1] for key in datasets],
            freqs=[key[2] for key in datasets],
            season_lengths=np.array([key[3] for key in datasets], dtype=np.int32),
            domain=np.concatenate([domain for _, domain in labels]),
            domain_names=list(domains),
        )


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _replace(new: Path, target: Path) -> None:
    """Rename folder ``new`` to ``target``; what was there is moved away first, and moved back when the renaming fails."""
    for _ in range(_RENAMES):
        old = _beside(target)
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            new.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster: its store is replaced in turn
                continue
            if old.exists():
                old.rename(target)
            raise
        finally:
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
        return
    raise OSError(errno.EBUSY, "other processes keep writing there")


def _iso(stamp: Any) -> str:
    return str(stamp.isoformat()) if hasattr(stamp, "isoformat") else str(stamp)


def _float32(y: NDArray[Any], source: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values = y.astype(np.float32)
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        raise DataError(
            f"{source}: the value {y[row]!r} in sorted row {row} does not fit float32", hint="rescale the target, or mark it as missing"
        )
    values[np.isnan(values)] = np.nan  # one bit pattern for missing, so that equal data has equal bytes
    return values


def _meta_problem(meta: Any) -> str | None:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return f"meta.json is not of format {FORMAT}"
    for name in _LISTS:
        if not isinstance(meta.get(name), list) or not all(isinstance(item, str) for item in meta[name]):
            return f"meta.json has no list of texts {name!r}"
    return None if isinstance(meta.get("fingerprint"), str) else "meta.json has no fingerprint"


def _dtype_problem(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    for name, array in arrays.items():
        if array.dtype != _DTYPES[name] or array.ndim != 1:
            return f"{name}.npy is {array.dtype} of {array.ndim} dimensions"
    return None


def _relabel(
    store: SeriesStore, chosen: NDArray[np.int64], datasets: dict[tuple[str, str, str, int], int], domains: dict[str, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    # few distinct (dataset, domain) pairs, so Python only loops over those
    pairs = store.dataset[chosen].astype(np.int64) * len(store.domain_names) + store.domain[chosen]
    distinct, inverse = np.unique(pairs, return_inverse=True)
    new_dataset = np.empty(len(distinct), dtype=np.int32)
    new_domain = np.empty(len(distinct), dtype=np.int32)
    for k, pair in enumerate(distinct.tolist()):
        d, domain = divmod(pair, len(store.domain_names))
        name = store.domain_names[domain]
        key = (name, store.dataset_names[d], store.freqs[d], int(store.season_lengths[d]))
        new_dataset[k] = datasets.setdefault(key, len(datasets))
        new_domain[k] = domains.setdefault(name, len(domains))
    return new_dataset[inverse], new_domain[inverse]


def _pieces(store: SeriesStore, chosen: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    # runs of neighbouring series are one slice; views only, so nothing is copied twice
    breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
    first, last = chosen[np.r_[0, breaks]], chosen[np.r_[breaks, len(chosen)] - 1]
    bounds = zip(store.offsets[first].tolist(), store.offsets[last + 1].tolist(), strict=True)
    return [store.values[start:stop] for start, stop in bounds]
