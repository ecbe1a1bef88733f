"""Combining the vectors of many sites: a mean that streams, and robust rules that never hold all vectors in memory.

:class:`StreamingMean` takes vectors as they arrive and forgets them. Every other rule needs all vectors at once; it reads them from
:class:`Rows` a block of columns at a time, so that a block stays in the processor's cache and the vectors may lie on disk
(:class:`Spool`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedcast.errors import FederationError, ScreenError, SpecError

LARGEST_VALUE = 2.0**16
"""Largest magnitude of a value that :class:`StreamingMean` adds up exactly."""

_GRID = 2.0**36
_CHUNK = 2**16  # with float64 temporaries, half of a 1 MiB second-level cache
_BLOCK, _NARROWEST = 2**20, 2**12  # elements of a block over all rows; its least width, in columns
_NETWORK_ROWS = 48  # from here on sorting is faster than a sorting network (benchmarks/aggregation.py)


class StreamingMean:
    """Weighted means of named float32 vectors that arrive one at a time, the same bytes in whatever order they arrive.

    Every term ``weight / total * value`` is rounded to a multiple of 2^-36, and the multiples are added as integers in float64.
    Such sums are exact below 2^53, so their order does not matter. The rounding moves a mean of all by at most 2^-37 (7e-12) a
    vector. A vector costs one pass and is not kept: the state is one float64 vector a name.

    Parameters
    ----------
    sizes
        Names and lengths of the vectors.
    total
        Upper bound on the sum of all weights, known before the first vector arrives.
    """

    def __init__(self, sizes: Mapping[str, int], total: float) -> None:
        self._sums = {name: np.zeros(size) for name, size in sizes.items()}
        self._total = total
        self._weights: list[float] = []
        self._used = 0.0
        self._term = torch.empty(min(_CHUNK, max(sizes.values(), default=0)), dtype=torch.float64)

    def add(self, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add one vector a name, all with the same weight; either all of them are added or none.

        Parameters
        ----------
        vectors
            Float32 vectors of the declared lengths; other names are ignored.
        weight
            Their weight, 0 or more.

        Raises
        ------
        ScreenError
            When a value is not finite or its magnitude is :data:`LARGEST_VALUE` or more, when a vector has another length, or when
            the weights exceed the declared total.
        """
        for name, total in self._sums.items():
            _check(vectors[name], total.size)
            if total.size and not max(map(abs, _extremes(vectors[name]))) < LARGEST_VALUE:
                raise ScreenError(f"{name} has a value beyond {LARGEST_VALUE:.0f} in magnitude", hint="lower the site's learning rate")
        if not 0 <= weight <= (self._total - self._used) + 1e-9 * self._total:
            raise ScreenError(f"the weight {weight} exceeds what is left of {self._total}", hint="declare the sum of all weights")
        self._weights.append(weight)
        self._used += weight
        scale = weight / self._total * _GRID
        for name, total in self._sums.items():
            _add_rounded(torch.from_numpy(total), vectors[name], scale, self._term)

    def means(self) -> dict[str, Tensor]:
        """Return the weighted mean of what has arrived, float32, by name; afterwards nothing more can be added.

        A mean takes the place of its sum in memory, and what is left over is given back.

        Raises
        ------
        FederationError
            When nothing with a weight has arrived.
        """
        # The correctly rounded sum does not depend on the order either.
        mass = _mass(self._weights) / self._total * _GRID
        means = {}
        while self._sums:
            name, total = self._sums.popitem()
            means[name] = _narrowed(total, mass, self._term)
        return means


class Rows(Protocol):
    """Vectors of one length that can be read a block of columns at a time."""

    @property
    def n(self) -> int:
        """How many vectors there are."""
        ...

    @property
    def size(self) -> int:
        """Their length."""
        ...

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy columns ``start`` to ``stop`` of every vector into ``out``, float32 ``[n, stop - start]`` with contiguous rows."""
        ...


class Vectors:
    """Rows that lie in memory, in the order given.

    Parameters
    ----------
    vectors
        Float32 vectors ``[size]``.
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._vectors = list(vectors)
        self.n = len(self._vectors)
        self.size = self._vectors[0].numel() if self._vectors else 0
        for vector in self._vectors:
            _check(vector, self.size)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy columns; see :class:`Rows`."""
        for row, vector in zip(out, self._vectors, strict=True):
            row.copy_(vector[start:stop])


class Spool:
    """Rows in a file without a name, which is gone when the spool is closed or its process dies.

    Rows are read in the order of their names, so that a rule gives the same bytes in whatever order they were appended.

    Parameters
    ----------
    folder
        Where the file lies; it takes ``n * size * 4`` bytes there.
    size
        Length of the vectors.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._places: dict[str, int] = {}
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()

    @property
    def n(self) -> int:
        """How many vectors there are."""
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """Names of the rows, in the order in which they are read."""
        return sorted(self._places)

    def append(self, name: str, vector: Tensor) -> None:
        """Append a row.

        Raises
        ------
        ScreenError
            When the vector is not float32 ``[size]`` or the name was there before.
        FederationError
            When it cannot be written.
        """
        _check(vector, self.size)
        if name in self._places:
            raise ScreenError(f"{name} has a row already", hint="append every site once a round")
        try:
            self._file.seek(self.n * self.size * 4)
            self._file.write(vector.contiguous().numpy().data)
        except OSError as error:
            raise FederationError(f"the row of {name} cannot be spooled: {error}", hint="free space on that disk") from error
        self._places[name] = self.n

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy columns; see :class:`Rows`."""
        for row, name in zip(out.numpy(), self.names, strict=True):
            self._file.seek((self._places[name] * self.size + start) * 4)
            self._file.readinto(row[: stop - start].data)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def __enter__(self) -> Spool:
        """Return the spool."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Delete the file."""
        self.close()


class Sketch:
    """Projects vectors to a few thousand dimensions so that inner products, hence cosines, stay about the same.

    A count-sketch (Charikar et al., 2002): every coordinate is added to one bucket with a random sign. Coordinates are taken
    ``dims`` at a time; each such run has its own random rotation of buckets and of signs, so that the state is of size ``dims``
    and a vector costs one pass. The error of a cosine is about ``1 / sqrt(dims)``. Whoever knows the seed can hide from it.

    Parameters
    ----------
    size
        Length of the vectors.
    dims
        Length of a sketch.
    seed
        Two sketches can be compared when their seeds are the same.
    """

    def __init__(self, size: int, dims: int = 2**14, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        signs = torch.from_numpy(rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=dims))
        self._signs = torch.cat([signs, signs])
        self._size, self._dims = size, dims
        self._rotations = rng.integers(0, dims, size=(-(-size // dims), 2)).tolist()

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the sketch ``[dims]`` of a float32 vector ``[size]``."""
        _check(vector, self._size)
        wide = torch.zeros(2 * self._dims)
        for run, (bucket, sign) in zip(torch.split(vector, self._dims), self._rotations, strict=True):
            width = run.numel()
            wide[bucket : bucket + width].addcmul_(run, self._signs[sign : sign + width])
        return wide[: self._dims] + wide[self._dims :]


def weighted_mean(rows: Rows, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of rows, float32 ``[size]``, added up in float64 in the order of the rows.

    Raises
    ------
    FederationError
        When no row has a weight.
    """
    mass, mean = _mass(weights), torch.empty(rows.size)
    for start, stop, block in blocks(rows):
        total, term = torch.zeros(stop - start, dtype=torch.float64), torch.empty(stop - start, dtype=torch.float64)
        for row, weight in zip(block, weights, strict=True):
            total.add_(term.copy_(row).mul_(weight))
        mean[start:stop] = total.div_(mass)
    return mean


def trimmed_mean(rows: Rows, share: float) -> Tensor:
    """Return the mean of each column without its smallest and largest values, float32 ``[size]`` (Yin et al., 2018).

    Parameters
    ----------
    rows
        The vectors.
    share
        Share of the rows to leave out at each end; ``int(share * n)`` of them, as :func:`scipy.stats.trim_mean` has it.

    Raises
    ------
    SpecError
        When nothing would be left.
    """
    cut = int(share * rows.n)
    if share < 0 or 2 * cut >= rows.n:
        raise SpecError(f"trimming {share} of {rows.n} rows at each end leaves nothing", hint="choose a share from 0 to below 0.5")
    return _mean_of_ranks(rows, cut, rows.n - cut)


def median(rows: Rows) -> Tensor:
    """Return the median of each column, float32 ``[size]``; of an even number of rows the mean of the middle two.

    Raises
    ------
    SpecError
        When there are no rows.
    """
    if rows.n == 0:
        raise SpecError("there is no median of no rows", hint="give at least one vector")
    return _mean_of_ranks(rows, (rows.n - 1) // 2, rows.n // 2 + 1)


def pairwise_cosines(rows: Rows) -> Tensor:
    """Return the cosine of every pair of rows, float64 ``[n, n]``; 0 where a row is all zero."""
    products = gram(rows, centred=False)
    norms = products.diagonal().sqrt()
    return torch.where(products == 0, products, products / torch.outer(norms, norms)).clamp_(-1, 1)


def pairwise_distances(rows: Rows) -> Tensor:
    """Return the Euclidean distance of every pair of rows, float64 ``[n, n]``."""
    # Rows of weights differ little from one another: without what they share, no digits are lost in the differences of the Gram matrix.
    products = gram(rows, centred=True)
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min_(0).fill_diagonal_(0).sqrt()


def krum(rows: Rows, malicious: int, keep: int = 1) -> tuple[Tensor, list[int]]:
    """Return the mean of the rows that lie closest to their nearest neighbours: Krum, or Multi-Krum where ``keep`` is above 1.

    A row's score is the sum of its squared distances to its ``n - malicious - 2`` nearest rows (Blanchard et al., 2017).

    Parameters
    ----------
    rows
        The vectors.
    malicious
        How many of them may be anything at all.
    keep
        How many rows with the lowest scores are averaged.

    Returns
    -------
    tuple
        The mean, float32 ``[size]``, and the numbers of the rows in it.

    Raises
    ------
    SpecError
        When there are fewer than ``2 * malicious + 3`` rows, or ``keep`` is not between 1 and the number of honest rows.
    """
    if malicious < 0 or rows.n < 2 * malicious + 3:
        raise SpecError(f"Krum against {malicious} malicious rows needs {2 * malicious + 3}, there are {rows.n}", hint="lower malicious")
    if not 1 <= keep <= rows.n - malicious:
        raise SpecError(f"Krum cannot keep {keep} of {rows.n} rows", hint=f"choose keep from 1 to {rows.n - malicious}")
    nearest = pairwise_distances(rows).square().sort(dim=1).values[:, 1 : rows.n - malicious - 1]
    chosen = sorted(nearest.sum(1).sort(stable=True).indices[:keep].tolist())
    return weighted_mean(rows, [float(number in chosen) for number in range(rows.n)]), chosen


def length(vector: Tensor) -> float:
    """Return the Euclidean length of a float32 vector ``[size]``: chunks in float32, their sum in float64.

    :func:`torch.linalg.vector_norm` is off by 2e-4 for 8M values, since it adds up in float32.
    """
    squares = math.fsum(float(torch.dot(chunk, chunk)) for chunk in torch.split(vector, _CHUNK))
    # Squares of values that float32 holds may be too large for it.
    return math.sqrt(squares) if math.isfinite(squares) else float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _add_rounded(total: Tensor, vector: Tensor, scale: float, term: Tensor) -> None:
    """Add ``round(vector * scale)`` to a float64 vector, a cached chunk of ``term`` at a time."""
    for part, values in zip(torch.split(total, _CHUNK), torch.split(vector, _CHUNK), strict=True):
        part.add_(term[: values.numel()].copy_(values).mul_(scale).round_())


def _narrowed(total: npt.NDArray[np.float64], mass: float, term: Tensor) -> Tensor:
    """Return ``total / mass`` as float32 ``[n]``, in the first half of the sum's own memory; ``total`` must not be used afterwards."""
    size = total.size
    sums, halves = torch.from_numpy(total), torch.from_numpy(total.view(np.float32))
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        # read before written: the mean at i covers the sum at i / 2
        halves[start:stop].copy_(torch.div(sums[start:stop], mass, out=term[: stop - start]))
    del sums, halves
    total.resize((size + 1) // 2, refcheck=False)
    return torch.from_numpy(total.view(np.float32)[:size])


def _check(vector: Tensor, size: int) -> None:
    if vector.dtype != torch.float32 or tuple(vector.shape) != (size,):
        raise ScreenError(f"a vector is {vector.dtype} {tuple(vector.shape)}, expected is float32 ({size},)", hint="send the flat weights")


def _extremes(vector: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN where there is any."""
    smallest, largest = torch.aminmax(vector)
    return float(smallest), float(largest)


def _mass(weights: Sequence[float]) -> float:
    mass = math.fsum(weights)
    if not mass > 0:
        raise FederationError("there is nothing to average: the weights sum to 0", hint="give at least one vector a weight above 0")
    return mass


def blocks(rows: Rows) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start, stop and the columns between them, float32 ``[n, stop - start]``, in a buffer that is used again."""
    width = min(max(_BLOCK // max(rows.n, 1), _NARROWEST), _CHUNK, rows.size)
    buffer = torch.empty(rows.n, width)
    for start in range(0, rows.size, max(width, 1)):
        stop = min(start + width, rows.size)
        block = buffer[:, : stop - start]
        rows.read(start, stop, block)
        yield start, stop, block


def gram(rows: Rows, *, centred: bool) -> Tensor:
    """Return the inner products of all rows, float64 ``[n, n]``; if ``centred``, of the rows as seen from one of them.

    That one is the shortest, block by block, and not the mean: one huge row would lead the mean so far away that the differences of the
    others were lost in rounding, and whoever sends it beside a second row could hide that one among them.
    """
    products = torch.zeros(rows.n, rows.n, dtype=torch.float64)
    for _, _, block in blocks(rows):
        if not centred:
            products += block @ block.T
        elif rows.n:
            part = block.double()
            part -= part[int(part.square().sum(1).argmin())].clone()
            products += part @ part.T
    return products


def _mean_of_ranks(rows: Rows, low: int, high: int) -> Tensor:
    """Return the mean of each column's sorted values ``low`` to ``high``, float32 ``[size]``."""
    mean = torch.empty(rows.size)
    pick = _by_network if rows.n <= _NETWORK_ROWS else _by_sorting
    for start, stop, block in blocks(rows):
        mean[start:stop] = pick(block, low, high)
    return mean


def _by_sorting(block: Tensor, low: int, high: int) -> Tensor:
    # numpy's sort of short contiguous rows is vectorised, torch's is not.
    columns = block.T.contiguous()
    columns.numpy().sort(axis=1)
    return columns[:, low:high].mean(1, dtype=torch.float64)


def _by_network(block: Tensor, low: int, high: int) -> Tensor:
    """Sort the rows of a block elementwise, in place, by minima and maxima of whole rows."""
    wires, spare = list(block.unbind()), torch.empty(block.shape[1])
    for i, j, smaller, larger in _network(len(wires), low, high):
        if smaller and larger:
            torch.minimum(wires[i], wires[j], out=spare)
            torch.maximum(wires[i], wires[j], out=wires[j])
            wires[i], spare = spare, wires[i]
        elif smaller:
            torch.minimum(wires[i], wires[j], out=wires[i])
        else:
            torch.maximum(wires[i], wires[j], out=wires[j])
    total, term = torch.zeros(block.shape[1], dtype=torch.float64), torch.empty(block.shape[1], dtype=torch.float64)
    for wire in wires[low:high]:
        total.add_(term.copy_(wire))
    return total.div_(high - low)


@cache
def _network(n: int, low: int, high: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparators of Batcher's odd-even merge sort that a mean over ranks ``low`` to ``high`` needs.

    Each is two wires and whether the smaller and the larger value are read later. Values that only enter the same sum, or are
    never read, need no order among themselves.
    """
    use: list[str] = ["summed" if low <= wire < high else "unread" for wire in range(n)]
    needed = []
    for i, j in reversed(list(_batcher(n))):
        if use[i] == use[j] != "compared":
            continue
        needed.append((i, j, use[i] != "unread", use[j] != "unread"))
        use[i] = use[j] = "compared"
    return tuple(reversed(needed))


def _batcher(n: int) -> Iterator[tuple[int, int]]:
    """Yield the comparators of Batcher's odd-even merge sort of ``n`` wires (Knuth, volume 3, algorithm 5.2.2M)."""
    sorted_, step = 1, 1
    while sorted_ < n:
        step = sorted_
        while step >= 1:
            for first in range(step % sorted_, n - step, 2 * step):
                for i in range(first, min(first + step, n - step)):
                    if i // (2 * sorted_) == (i + step) // (2 * sorted_):
                        yield i, i + step
            step //= 2
        sorted_ *= 2
