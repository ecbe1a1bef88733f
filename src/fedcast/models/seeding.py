"""Building modules reproducibly, although their libraries draw from torch's global random stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Threads share the global stream, and torch.compile's caches.
GLOBAL_STATE = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let code that draws from torch's global random stream draw from ``seed``; the stream itself does not move.

    One thread at a time: everything in fedcast that draws from the global stream does so in here.
    """
    with GLOBAL_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
