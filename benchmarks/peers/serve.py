"""A contestant's process: ``python -m benchmarks.peers.serve KIND OPTIONS READ WRITE``, started by ``round_time.py``.

The setting comes in the environment, where a contestant's own processes find it too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from benchmarks.peers.common import Gate, Setting, heldout_loss
from fedcast.models.patch import PatchTransformer

SETTING = "FEDCAST_BENCHMARK_SETTING"


def setting_from(text: str) -> Setting:
    """Read a setting that :meth:`Setting.to_json` wrote."""
    return Setting(**json.loads(text))


def run_kind(kind: str, setting: Setting, gate: Gate, options: dict[str, Any]) -> PatchTransformer:
    """Run a contestant of a kind; what it needs is imported only here, for some have environments of their own."""
    if kind == "fedcast":
        from benchmarks.peers.fedcast_rounds import run
    elif kind == "pfllib":
        from benchmarks.peers.pfllib import run
    elif kind == "plain":
        from benchmarks.peers.plain import run
    elif kind == "pfl-research":
        from benchmarks.peers.pfl_research import run
    elif kind == "flower":
        from benchmarks.peers.flower import run
    else:
        raise ValueError(f"no contestant of the kind {kind!r}")
    return run(setting, gate, **options)


def main() -> None:
    """Serve rounds until told to stop, then say how well the model came out."""
    kind, options, reading, writing = sys.argv[1:]
    gate = Gate(int(reading), int(writing))
    setting = setting_from(os.environ[SETTING])
    model = run_kind(kind, setting, gate, json.loads(options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gate.send({"heldout_loss": heldout_loss(model, setting), "peak_kib": peak})


if __name__ == "__main__":
    main()
