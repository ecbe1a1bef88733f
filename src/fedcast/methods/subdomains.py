"""Labels of the sub-domains inside a site, for the domain discriminator of FedTRL.

Not a method: the helper that turns windows into sub-domain labels (``y^dom`` in fedtrl.md A3b, a reconstruction).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcast.data.windows import Batch, WindowSampler

LabelKind = Literal["auto", "dataset", "kmeans", "segment", "random"]
Labeller = Callable[[Batch], Tensor]

_FIT_WINDOWS = 1024


def choose_labels(kind: LabelKind, sampler: WindowSampler) -> Literal["dataset", "kmeans", "segment", "random"]:
    """Resolve ``"auto"``: the source data set where the site has several, else k-means on window descriptors."""
    if kind != "auto":
        return kind
    return "dataset" if len(sampler.store.dataset_names) > 1 else "kmeans"


def count_labels(kind: LabelKind, sampler: WindowSampler, clusters: int) -> int:
    """Return how many sub-domains a site has under a kind of label."""
    return len(sampler.store.dataset_names) if choose_labels(kind, sampler) == "dataset" else clusters


def make_labeller(kind: LabelKind, sampler: WindowSampler, clusters: int, seed: int) -> Labeller:
    """Return a function from a batch to labels ``[B]`` (int64, below :func:`count_labels`).

    Parameters
    ----------
    kind
        ``"dataset"``: source data set of the window; ``"kmeans"``: nearest of ``clusters`` centres of window descriptors, fitted
        once on raw train windows; ``"segment"``: contiguous stretch of time; ``"random"``: a fixed pseudo-random label a window,
        the control that shows whether the label matters; ``"auto"``: see :func:`choose_labels`.
    sampler
        The site's train windows.
    clusters
        Number of labels, for every kind but ``"dataset"``.
    seed
        Seed of the k-means start.
    """
    chosen = choose_labels(kind, sampler)
    if chosen == "dataset":
        return lambda batch: batch.dataset
    if chosen == "segment":
        first = sampler.splits.train_start
        used = np.maximum(sampler.splits.train_end - first, 1)
        return lambda batch: torch.from_numpy(
            np.minimum((batch.windows.end - first[batch.windows.series]) * clusters // used[batch.windows.series], clusters - 1)
        )
    if chosen == "random":
        return lambda batch: torch.from_numpy(_hash(batch.windows.series, batch.windows.end) % clusters)
    return _KMeansLabeller(sampler, clusters, seed)


def _hash(series: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Scatter places by the finaliser of SplitMix64 (Steele et al., 2014): neighbours get unrelated labels."""
    x = series.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + end.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


class _KMeansLabeller:
    def __init__(self, sampler: WindowSampler, clusters: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        batch = sampler.gather(sampler.draw(_FIT_WINDOWS, rng))
        raw = describe_windows(batch.context, batch.mask)
        self._shift = raw.mean(0)
        self._scale = raw.std(0).clamp_min(1e-6)
        points = ((raw - self._shift) / self._scale).double().numpy()
        centres = _fit_centres(points, clusters, rng)
        self._centres = torch.from_numpy(centres).float()

    def __call__(self, batch: Batch) -> Tensor:
        if self._centres.device != batch.context.device:
            # Once: where batches lie on another device, all of a site's do.
            self._shift, self._scale, self._centres = (x.to(batch.context.device) for x in (self._shift, self._scale, self._centres))
        points = (describe_windows(batch.context, batch.mask) - self._shift) / self._scale  # [B, 8]
        return torch.cdist(points, self._centres).argmin(1)


def _fit_centres(points: NDArray[np.float64], clusters: int, rng: np.random.Generator) -> NDArray[np.float64]:
    # Loaded only where it is needed: it takes most of a second.
    from scipy.cluster.vq import ClusterError, kmeans2

    # Series that hardly vary have fewer distinct windows than clusters; one cluster always fits.
    for count in range(clusters, 1, -1):
        try:
            centres: NDArray[np.float64] = kmeans2(points, count, seed=rng, minit="++", missing="raise")[0]
        except ClusterError:
            continue
        return centres
    mean: NDArray[np.float64] = points.mean(0, keepdims=True)
    return mean


def describe_windows(context: Tensor, mask: Tensor) -> Tensor:
    """Return eight descriptors a window, on raw values (fedtrl.md A3b).

    Parameters
    ----------
    context
        Values ``[B, L]``, zero where missing.
    mask
        True where observed ``[B, L]``.

    Returns
    -------
    Tensor
        ``[B, 8]``: signed log mean, log standard deviation, lag-1 autocorrelation, slope over the window in standard deviations,
        and the share of spectral energy in four equal bands.
    """
    context = context.double()  # squares of large float32 values leave float32
    weight = mask.to(context.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    mean = (context * weight).sum(1, keepdim=True) / count
    centred = (context - mean) * weight  # [B, L]
    variance = (centred**2).sum(1, keepdim=True) / count
    deviation = variance.sqrt().clamp_min(1e-6)
    z = centred / deviation
    lag = (z[:, 1:] * z[:, :-1]).sum(1) / count.squeeze(1)
    time = torch.linspace(-1, 1, context.shape[1], dtype=context.dtype, device=context.device)
    slope = (z * time).sum(1) / (weight * time**2).sum(1).clamp_min(1e-6)
    energy = torch.fft.rfft(z).abs()[:, 1:] ** 2  # [B, L / 2]
    bands = torch.stack([band.sum(1) for band in energy.tensor_split(4, dim=1)], dim=1)
    bands = bands / bands.sum(1, keepdim=True).clamp_min(1e-6)
    log_mean = mean.squeeze(1).sign() * mean.squeeze(1).abs().log1p()
    return torch.cat([torch.stack([log_mean, deviation.squeeze(1).log(), lag, slope], dim=1), bands], dim=1).float()
