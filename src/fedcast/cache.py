"""Where fedcast keeps what it can make again: built stores, compiled kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return ``FEDCAST_CACHE``, or the platform's cache folder for fedcast."""
    value = os.environ.get("FEDCAST_CACHE", "")
    if value:
        return Path(value).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "fedcast"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/fedcast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedcast"
