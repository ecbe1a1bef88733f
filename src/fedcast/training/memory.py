"""The most memory this process held at once."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Let the peak count from now on, where the system can do that (Linux)."""
    if _CLEAR.exists():
        # Some containers make it read-only: the peak then counts from the start of the process, an upper bound.
        try:
            _CLEAR.write_text("5")
        except OSError:
            return


def peak_bytes() -> int:
    """Return the largest resident set so far, in bytes; worker processes are not counted."""
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return 1024 * int(found[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
