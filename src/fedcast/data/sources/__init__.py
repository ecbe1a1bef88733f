"""Recipes that turn raw recordings into the catalogue's datasets."""

from __future__ import annotations

from fedcast.data.sources.dataset import CLEAN_LICENCES, NOT_SHIPPED, Dataset
from fedcast.data.sources.raw import Series, long_frame
from fedcast.data.sources.recipes import DATASETS, catalogue_domains

__all__ = ["CLEAN_LICENCES", "DATASETS", "NOT_SHIPPED", "Dataset", "Series", "catalogue_domains", "long_frame"]
