"""Seconds a round: fedcast beside the loops of its peers, rounds taken in turn in one run, machine's ceilings measured in the same run.

Every contestant is a process of its own with its own torch, threads and allocator, asleep while others run a round. All train the same
model from the same weights with the same loss, learning rate and number of steps, on windows of the same series. A round of fedcast is
what its run logs (``seconds``: select, send, train, screen, average); its checkpoint, which no peer writes, is shown apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import floor, machine
from benchmarks.peers.common import Setting
from benchmarks.peers.data import write_data
from benchmarks.peers.processes import Contestant, ContestantError, Running
from benchmarks.tables import markdown, write_json

PEERS = {
    "pfllib": Contestant("PFLlib's loop, no evaluation", "pfllib"),
    "pfllib-shipped": Contestant("PFLlib's loop as shipped", "pfllib", {"shipped": True}),
    "pfl-research": Contestant("pfl-research", "pfl-research"),
    "flower": Contestant("Flower simulation (Ray), 1 core a client", "flower", {"cpus": 1}, apart=True),
    "flower-default": Contestant("Flower simulation (Ray), default 2 cores a client", "flower", {"cpus": 2}, apart=True),
    "plain": Contestant("plain PyTorch", "plain"),
    "plain-fused": Contestant("plain PyTorch, fused AdamW", "plain", {"fused": True}),
    "plain-autocast": Contestant("plain PyTorch, fused AdamW, autocast bfloat16", "plain", {"fused": True, "autocast": True}),
}
DEFAULT = ["pfllib", "pfllib-shipped", "pfl-research", "flower", "plain"]
FEDCAST = [["auto"], ["float32", "training.precision=float32"]]


@dataclass
class Measured:
    """What one contestant did in one setting: a report a round, its last word, or why it did not run."""

    contestant: Contestant
    reports: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    missing: str = ""

    @property
    def seconds(self) -> list[float]:
        """Seconds of each round; fedcast's as its run logs them."""
        return [report.get("own_seconds", report["seconds"]) for report in self.reports]

    def median(self, name: str) -> float | None:
        """Return the median of a number over the rounds, ``None`` where it is not reported."""
        values = [report[name] for report in self.reports if name in report]
        return statistics.median(values) if values else None

    def times(self, base: Measured) -> float:
        """Return how many times ``base``'s seconds a round takes: the median over pairs of rounds that ran in turn."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, base.seconds, strict=True))


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Return who takes part, fedcast first."""
    found = [Contestant(f"fedcast, {name}", "fedcast", {"overrides": overrides}) for name, *overrides in arguments.fedcast or FEDCAST]
    pythons = {"flower": arguments.flower_python, "pfl-research": arguments.pfl_python}
    for name in arguments.peers:
        peer = PEERS[name]
        found.append(replace(peer, python=pythons[peer.kind] or "") if peer.kind in pythons else peer)
    return found


def compare(setting: Setting, who: Sequence[Contestant], warmup: int) -> list[Measured]:
    """Measure all contestants in one setting: rounds in turn, each time from another contestant on."""
    results = [Measured(contestant) for contestant in who]
    for result in results:
        kind = result.contestant.kind
        if not Path(result.contestant.python).is_file():
            result.missing = f"needs an environment of its own: see README.md, and give --{kind.removesuffix('-research')}-python"
    here = [result for result in results if not result.missing and not result.contestant.apart]
    running = [Running(result.contestant, setting) for result in here]
    try:
        for process in running:
            process.wait()
        for number in range(setting.rounds):
            # Those that run apart do so in the middle: what drifts over the run then cancels to first order.
            if number == warmup + (setting.rounds - warmup) // 2:
                for result in results:
                    if result.contestant.apart and not result.missing:
                        _run_apart(result, setting, warmup)
            for turn in range(len(here)):
                place = (turn + number) % len(here)
                report = running[place].round()
                if number >= warmup:
                    here[place].reports.append(report)
        for result, process in zip(here, running, strict=True):
            result.last = process.stop()
    finally:
        for process in running:
            process.close()
    return results


def _run_apart(result: Measured, setting: Setting, warmup: int) -> None:
    process = Running(result.contestant, setting)
    try:
        process.wait()
        result.reports = [process.round() for _ in range(setting.rounds)][warmup:]
        result.last = process.stop()
    except ContestantError as error:
        result.missing = f"failed: {error.args[0].strip().splitlines()[-1]}"
    finally:
        process.close()


COLUMNS = [
    "",
    "seconds a round",
    "times fedcast",
    "CPU-seconds",
    "messages, MB",
    "outside steps",
    "checkpoint, s",
    "GFLOP/s",
    "of bfloat16 ceiling",
    "of float32 ceiling",
    "memory, MB",
    "held-out loss",
]


def row_of(result: Measured, base: Measured, setting: Setting, ceilings: machine.Ceilings) -> tuple[list[str], dict[str, Any]]:
    """Return a contestant's row as text and as JSON values."""
    name = result.contestant.name
    if result.missing:
        return [name, f"not run: {result.missing}", *[""] * (len(COLUMNS) - 2)], {"name": name, "missing": result.missing}
    need, sent = floor.step(setting.config(), setting.batch), floor.round_bytes(setting.config(), setting.clients)
    seconds = statistics.median(result.seconds)
    rate = need.products * setting.clients * setting.steps / seconds
    own = result.median("bytes_up")
    record: dict[str, Any] = {
        "name": name,
        "options": dict(result.contestant.options),
        "seconds": seconds,
        "times_fedcast": result.times(base),
        "cpu_seconds": result.median("cpu_seconds"),
        "message_bytes": sent if own is None else own + (result.median("bytes_down") or 0),
        "overhead_seconds": result.median("overhead_seconds"),
        "checkpoint_seconds": result.median("checkpoint_seconds"),
        "flops": rate,
        "share_bfloat16": rate / ceilings.products("bfloat16"),
        "share_float32": rate / ceilings.products("float32"),
        "memory_bytes": max(report["memory_bytes"] for report in result.reports),
        "heldout_loss": result.last.get("heldout_loss"),
        "rounds": result.reports,
    }
    shares = [report["overhead_seconds"] / report["own_seconds"] for report in result.reports if "overhead_seconds" in report]
    record["overhead_share"] = statistics.median(shares) if shares else None
    text = [
        name,
        f"{seconds:.2f}",
        f"{record['times_fedcast']:.2f}",
        f"{record['cpu_seconds']:.2f}",
        f"{record['message_bytes'] / 1e6:.0f}",
        "" if record["overhead_share"] is None else f"{100 * record['overhead_share']:.1f} %",
        "" if record["checkpoint_seconds"] is None else f"{record['checkpoint_seconds']:.3f}",
        f"{rate / 1e9:.0f}",
        f"{100 * record['share_bfloat16']:.0f} %",
        f"{100 * record['share_float32']:.0f} %",
        f"{record['memory_bytes'] / 1e6:.0f}",
        f"{record['heldout_loss']:.3f}",
    ]
    return text, record


def report(setting: Setting, results: Sequence[Measured], ceilings: machine.Ceilings) -> dict[str, Any]:
    """Print one setting's table; return it as JSON values."""
    base = results[0]
    rows = [row_of(result, base, setting, ceilings) for result in results]
    count = floor.parameters(setting.config())
    print(f"\n**{setting.size} ({count / 1e6:.1f} M parameters), batch {setting.batch}**\n")
    print(markdown(COLUMNS, [text for text, _ in rows]), flush=True)
    need = floor.step(setting.config(), setting.batch)
    least = setting.clients * setting.steps * need.seconds(ceilings.products("bfloat16"), ceilings.copy)
    print(f"\nFloor at the bfloat16 ceiling: {least:.2f} s a round.", flush=True)
    about: Mapping[str, Any] = {"size": setting.size, "batch": setting.batch, "parameters": count, "floor_seconds": least}
    return {**about, "rows": [record for _, record in rows]}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["micro", "mini"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="local steps a client and round")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that do not count")
    parser.add_argument(
        "--fedcast",
        action="append",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="a row of fedcast with overrides of its spec; may be given more than once, the first is what others are compared with",
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=DEFAULT)
    parser.add_argument("--flower-python", default=os.environ.get("FLOWER_PYTHON"), help="python of an environment with flwr[simulation]")
    parser.add_argument("--pfl-python", default=os.environ.get("PFL_PYTHON"), help="python of an environment with pfl")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, in seconds: does the script work?")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        tiny = {"sizes": ["nano"], "batches": [4], "clients": 2, "steps": 2, "context": 64, "horizon": 16, "repeats": 2, "warmup": 1}
        vars(arguments).update(tiny)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting and print its table."""
    arguments = parse(argv)
    who = contestants(arguments)
    ceilings = machine.measure(quick=arguments.quick)
    shape = f"{arguments.clients} clients x {arguments.steps} local AdamW steps, context {arguments.context}, horizon {arguments.horizon}"
    print(f"{shape}; median of {arguments.repeats} rounds taken in turn after {arguments.warmup} of warm-up.", flush=True)
    tables = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            with tempfile.TemporaryDirectory() as folder:
                rounds = arguments.warmup + arguments.repeats
                shape_of = (arguments.steps, arguments.clients, arguments.context, arguments.horizon)
                setting = Setting(folder, size, batch, *shape_of, rounds)
                write_data(setting)
                results = compare(setting, who, arguments.warmup)
            ceilings = ceilings.best(machine.measure(quick=arguments.quick))
            tables.append(report(setting, results, ceilings))
    print(f"\n{ceilings.sentence()}")
    about = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str | list) and not name.endswith("_python")}
    write_json(arguments.output, {"machine": ceilings.to_dict(), "arguments": about, "tables": tables})


if __name__ == "__main__":
    main()
