"""Robust rules beside those of :mod:`fedcast.training.aggregate`: Bulyan, the geometric median, and FLTrust.

Each reads its rows a block of columns at a time; what else it needs are inner products, ``[n, n]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcast.errors import SpecError
from fedcast.training.aggregate import Rows, blocks, gram, pairwise_distances, weighted_mean

_SMOOTHING = 1e-6
_ITERATIONS = 1000
_SETTLED = 1e-12


def bulyan(rows: Rows, malicious: int) -> tuple[Tensor, list[int]]:
    """Return Bulyan's mean of rows, and the numbers of the rows it chose (El Mhamdi et al., ICML 2018, algorithm 2 over Krum).

    Krum chooses ``n - 2 malicious`` rows, one after another, by the distances to at least two neighbours (with fewer, the last choices
    would be between equals); of those, each column's mean is taken over the
    ``n - 4 malicious`` values that lie closest to their median.

    Parameters
    ----------
    rows
        The vectors.
    malicious
        How many of them may be anything at all.

    Returns
    -------
    tuple
        The mean, float32 ``[size]``, and the numbers of the rows that were chosen.

    Raises
    ------
    SpecError
        When there are fewer than ``4 * malicious + 3`` rows.
    """
    if malicious < 0 or rows.n < 4 * malicious + 3:
        raise SpecError(f"Bulyan against {malicious} malicious rows needs {4 * malicious + 3}, there are {rows.n}", hint="lower malicious")
    chosen = _chosen(pairwise_distances(rows).square(), rows.n - 2 * malicious, malicious)
    keep, mean = rows.n - 4 * malicious, torch.empty(rows.size)
    for start, stop, block in blocks(rows):
        mean[start:stop] = _around_the_median(block[chosen], keep)
    return mean, chosen


def geometric_median(rows: Rows, smoothing: float = _SMOOTHING) -> Tensor:
    """Return the point with the smallest sum of distances to the rows, float32 ``[size]``, by the smoothed Weiszfeld algorithm.

    The point is a weighted mean of the rows with weights ``1 / max(distance, floor)`` (Pillutla et al., 2022, algorithm 2). Its distances
    follow from the rows' inner products, so that the iteration runs in as many dimensions as there are rows.

    Parameters
    ----------
    rows
        The vectors.
    smoothing
        The floor of a distance, as a share of the median distance. That is taken anew in every step: of the distances to the mean, from
        which the steps begin, one huge row would make a floor below which all others count alike.

    Raises
    ------
    SpecError
        When there are no rows.
    """
    if rows.n == 0:
        raise SpecError("there is no geometric median of no rows", hint="give at least one vector")
    products = gram(rows, centred=True)
    weights = torch.full((rows.n,), 1 / rows.n, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        distances = _distances(products, weights)
        floor = smoothing * float(distances.median())
        if not floor:
            break  # half of the rows are this point, and no other is closer to all
        last, weights = weights, 1 / distances.clamp_min(floor)
        weights /= weights.sum()
        if float((weights - last).abs().max()) < _SETTLED:
            break
    return weighted_mean(rows, weights.tolist())


def fltrust(rows: Rows, root: int, start_from: Tensor) -> tuple[Tensor, list[float]]:
    """Return where the updates lead that point as the trusted one does, and each row's trust (Cao et al., NDSS 2021, equations 2 to 4).

    A row's update is its difference to ``start_from``. Its trust is the cosine to the trusted update, or 0 where that is negative; updates
    are brought to the length of the trusted one and averaged by trust.

    Parameters
    ----------
    rows
        The vectors.
    root
        The number of the trusted row; it takes part with trust 1.
    start_from
        What all of them began from, float32 ``[size]``.

    Returns
    -------
    tuple
        The new vector, float32 ``[size]``, and the trust in each row, from 0 to 1.
    """
    dots, squares = torch.zeros(rows.n, dtype=torch.float64), torch.zeros(rows.n, dtype=torch.float64)
    for begin, end, block in blocks(rows):
        update = block.sub_(start_from[begin:end])
        dots += update @ update[root]
        squares += update.square().sum(1)
    lengths = squares.sqrt()
    length = lengths[root]
    cosines = torch.where(dots == 0, dots, dots / (lengths * length)).clamp_(0, 1)
    trust = torch.where(length > 0, cosines, torch.zeros_like(cosines))
    scales = torch.where(trust > 0, trust * length / lengths, trust) / trust.sum().clamp_min(torch.finfo(torch.float64).tiny)
    moved = torch.empty(rows.size)
    for begin, end, block in blocks(rows):
        centre = start_from[begin:end]
        moved[begin:end] = centre + scales.float() @ block.sub_(centre)
    return moved, trust.tolist()


def _chosen(squares: Tensor, count: int, malicious: int) -> list[int]:
    """Return the numbers of the rows that Krum chooses one after another, sorted, from squared distances ``[n, n]``."""
    left, chosen = list(range(len(squares))), list[int]()
    while len(chosen) < count:
        nearest = squares[left][:, left].sort(dim=1).values[:, 1 : 1 + max(2, len(left) - malicious - 2)]
        best = left[int(nearest.sum(1).sort(stable=True).indices[0])]
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


def _around_the_median(block: Tensor, keep: int) -> Tensor:
    """Return the mean of the ``keep`` values of each column that lie closest to the column's median, float64 ``[columns]``."""
    n, columns = len(block), block.T.contiguous()
    # numpy's sort of short contiguous rows is vectorised, torch's is not.
    columns.numpy().sort(axis=1)
    values = columns.T.double()
    middle = (values[(n - 1) // 2] + values[n // 2]) / 2
    # Sorted, the closest values stand side by side: one of few stretches.
    best, mean = torch.full_like(middle, torch.inf), torch.zeros_like(middle)
    for first in range(n - keep + 1):
        stretch = values[first : first + keep]
        farthest = torch.maximum(middle - stretch[0], stretch[-1] - middle)
        closer = farthest < best
        best = torch.where(closer, farthest, best)
        mean = torch.where(closer, stretch.mean(0), mean)
    return mean


def _distances(products: Tensor, weights: Tensor) -> Tensor:
    """Return the distance of each row to the weighted mean of all, float64 ``[n]``, from inner products ``[n, n]``."""
    across = products @ weights
    return (weights @ across - 2 * across + products.diagonal()).clamp_min(0).sqrt()
