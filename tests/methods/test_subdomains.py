from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcast.data.catalogue import load_domains
from fedcast.data.splits import split_by_time
from fedcast.data.windows import WindowSampler
from fedcast.methods.subdomains import count_labels, describe_windows, make_labeller
from fedcast.spec import DataSpec


def sampler_of(domain: str) -> WindowSampler:
    store = load_domains(DataSpec(), [domain])[domain]
    splits = split_by_time(store, horizon=16, validation=0.1, test=0.2)
    return WindowSampler(store, splits, context=64, horizon=16, balance="dataset")


@pytest.fixture(scope="module")
def energy() -> WindowSampler:
    return sampler_of("energy")


@pytest.mark.parametrize("kind", ["auto", "dataset", "kmeans", "segment", "random"])
def test_when_windows_are_labelled_then_labels_repeat_and_cover_the_sub_domains(kind: str, energy: WindowSampler) -> None:
    labeller = make_labeller(kind, energy, 4, seed=0)  # type: ignore[arg-type]
    batch = energy.gather(energy.draw(400, np.random.default_rng(0)))
    labels = labeller(batch)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert labels.max() < count_labels(kind, energy, 4)  # type: ignore[arg-type]
    assert len(labels.unique()) > 1
    assert torch.equal(labels, make_labeller(kind, energy, 4, seed=0)(batch))  # type: ignore[arg-type]


def test_when_a_site_has_one_dataset_then_auto_is_kmeans(energy: WindowSampler) -> None:
    assert count_labels("auto", energy, 7) == len(energy.store.dataset_names) == 3
    assert count_labels("auto", sampler_of("activity"), 7) == 7


def test_when_labels_are_segments_then_they_follow_time(energy: WindowSampler) -> None:
    batch = energy.gather(energy.draw(300, np.random.default_rng(1)))
    labels = make_labeller("segment", energy, 4, seed=0)(batch).numpy()
    for series in np.unique(batch.windows.series):
        own = batch.windows.series == series
        order = np.argsort(batch.windows.end[own], kind="stable")
        assert (np.diff(labels[own][order]) >= 0).all()


def test_when_labels_are_random_then_neighbours_tell_nothing(energy: WindowSampler) -> None:
    batch = energy.gather(energy.draw(4000, np.random.default_rng(2)))
    labels = make_labeller("random", energy, 4, seed=0)(batch).numpy()
    assert np.bincount(labels, minlength=4).min() > 850
    for period in (4, 7, 24, 256):
        phase = batch.windows.end % period
        hits = sum(np.bincount(labels[phase == p]).max(initial=0) for p in range(period))
        assert hits / len(labels) < 0.25 + 0.25 * np.sqrt(period / len(labels)) + 0.1


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_when_values_are_tiny_or_huge_then_descriptors_are_finite(scale: float) -> None:
    context = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * scale
    context[1] = scale
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[2] = False
    described = describe_windows(context, mask)
    assert described.shape == (5, 8)
    assert described.isfinite().all()


def test_when_a_window_is_a_line_then_its_slope_and_autocorrelation_say_so() -> None:
    line = torch.linspace(0, 1, 64)[None]
    rising, falling = (describe_windows(x, torch.ones_like(x, dtype=torch.bool))[0] for x in (line, -line))
    assert rising[3] > 1
    assert falling[3] == pytest.approx(-rising[3].item())
    assert rising[2] > 0.9
