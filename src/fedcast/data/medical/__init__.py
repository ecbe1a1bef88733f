"""Medical waveforms by client: the three partitions of Ali et al. 2025 (arXiv 2502.09744), on real and on synthesised recordings.

``strategies`` says which client holds what, ``recordings`` which real recordings there are, ``readers`` how they are read, ``synthesis``
how subjects are made where none was recorded, ``parts`` what is trained and tested on. See ``docs/medical.md``.
"""

from __future__ import annotations

SUBSTITUTES = ("medical-subjects", "medical-modality", "medical-sites", "medical-real")
"""Sources that use the recordings at hand, filled up with synthesised ones; ``medical-real`` has real ones alone."""

SYNTHETIC = ("medical-subjects-synthetic", "medical-modality-synthetic")
"""The same partitions over synthesised subjects alone: they need no raw recordings."""

ORIGINALS = ("vital-signs-subjects", "vital-signs-modality", "ptbxl-sites")
"""The partitions over the data sets of the paper, for those who have them."""

RATES = {"": None, "-250hz": 250.0, "-100hz": 100.0}
"""Suffix of a source to the rate its recordings are resampled to; ``None``: their own, as in the paper."""

MEDICAL_SOURCES = tuple(f"{name}{suffix}" for name in (*SUBSTITUTES, *SYNTHETIC) for suffix in RATES) + ORIGINALS
"""Every value of ``data.source`` that this package serves."""
