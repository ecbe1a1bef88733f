"""The package's version, and the code version that result rows carry."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

__version__ = "0.1.0"


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return what names the running code as exactly as possible.

    Returns
    -------
    str
        The git commit of the checkout this package runs from, with ``+changed`` where tracked files differ from it; the package's
        version where there is no such checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "src" / "fedcast").is_dir():
        return __version__
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{commit}+changed" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
