"""The catalogue's table: every raw dataset with its domain, licence, source, and what is taken of it.

A domain holds at most about two million points. Left out on purpose: the M4 hourly set (its series come from unnamed domains, some of
which are held out here), the simulated engines, the market indices and the classification archives.
"""

from __future__ import annotations

from fedcast.data.sources import recipes_physical as physical
from fedcast.data.sources import recipes_social as social
from fedcast.data.sources.dataset import Dataset

DATASETS: tuple[Dataset, ...] = (
    *physical.ENERGY,
    *physical.WIND,
    *social.TRAFFIC,
    *social.RETAIL,
    *social.HEALTH,
    *physical.MEDICAL,
    *social.CLOUD,
    *physical.NATURE,
    *social.ECONOMICS,
    *physical.ACTIVITY,
    *physical.SPACECRAFT,
    *social.FINANCE,
    *physical.ETT,
    *physical.WEATHER,
    *social.TOURISM,
    *social.TRANSPORT,
    *social.WEB,
)
"""Every dataset of the catalogue, in order."""


def catalogue_domains() -> dict[str, tuple[Dataset, ...]]:
    """Return the catalogue's domains in order, each with its datasets."""
    names = dict.fromkeys(dataset.domain for dataset in DATASETS)
    return {name: tuple(dataset for dataset in DATASETS if dataset.domain == name) for name in names}
