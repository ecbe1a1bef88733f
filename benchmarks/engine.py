"""What carrying a round costs without training: seconds and peak memory of each fleet, and the server's memory against clients.

Sites take no step (``federation.local_steps = 0``) and send back the weights they were sent, so that a round is what moves, screens,
averages and writes them. Every contestant runs all its rounds by itself, one after the other in one run of this script; memory is the
proportional set size of its whole tree of processes, read ten times a second. Flower's simulation runs in an environment of its own
(``--flower-python``), with Flower's FedAvg and clients that send back what they got.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4
WIRE_ROUNDS = 2
FEDCAST = [sys.executable, "-m", "fedcast"]
COLUMNS = ["", "seconds a round", "first round", "all, with start and scores", "CPU-seconds", "peak memory, MB"]


class MemoryWatch(threading.Thread):
    """Reads the memory and processor time of a tree of processes until it is stopped; those that left are remembered."""

    def __init__(self, *roots: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._roots, self._over = roots, threading.Event()
        self._spent: dict[tuple[int, float], float] = {}
        self.peak = 0

    def run(self) -> None:
        """Read until stopped."""
        while not self._over.wait(0.1):
            held = 0
            for process in self._tree():
                try:
                    held += process.memory_full_info().pss
                    times = process.cpu_times()
                    self._spent[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue  # it ended between two looks
            self.peak = max(self.peak, held)

    def _tree(self) -> Iterator[psutil.Process]:
        for root in self._roots:
            try:
                yield root
                yield from root.children(recursive=True)
            except psutil.Error:
                continue

    def stop(self) -> tuple[int, float]:
        """Stop reading; return the peak in bytes and the processor seconds that were seen."""
        self._over.set()
        self.join()
        return self.peak, sum(self._spent.values())


def write_sites(folder: Path, clients: int) -> list[str]:
    """Write a CSV of one short random walk a client; return the sites' names."""
    rng = np.random.default_rng(0)
    names = [f"site-{number:02d}" for number in range(clients)]
    for name in names:
        stamps = pd.date_range("2024-01-01", periods=400, freq="h")
        pd.DataFrame({"unique_id": name, "ds": stamps, "y": rng.standard_normal(400).cumsum()}).to_csv(folder / f"{name}.csv", index=False)
    return names


def write_spec(folder: Path, data: Path, size: str, rounds: int) -> Path:
    """Write the spec of rounds without training."""
    path = folder / "engine.toml"
    path.write_text(
        f'name = "engine"\n[data]\nsource = "{data}"\n[model]\nsize = "{size}"\ncontext = 64\nhorizon = 16\n'
        '[method]\nname = "fedavg"\n[training]\nmoments = "reset"\nprecision = "float32"\nproducts = "default"\ndevice = "cpu"\n'
        f"[federation]\nrounds = {rounds}\nlocal_steps = 0\nworkers = 2\n"
        f"[evaluation]\nevery = {rounds}\nwindows = 1\nvalidation_windows = 1\nbaselines = []\n",
        encoding="utf-8",
    )
    return path


@contextmanager
def watched(
    name: str, folder: Path, command: Sequence[str], environment: dict[str, str], *others: psutil.Process
) -> Iterator[dict[str, Any]]:
    """Run a command to its end, its output in a log, and note its cost."""
    found: dict[str, Any] = {"name": name}
    start = time.perf_counter()
    with (folder / f"{name.replace(' ', '-')}.log").open("wb") as log:
        process = psutil.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        watch = MemoryWatch(process, *others)
        watch.start()
        code = process.wait()
    found["wall"] = time.perf_counter() - start
    found["memory"], found["cpu"] = watch.stop()
    if code:
        said = Path(log.name).read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{name} ended with {code}: {said[-2000:]}")
    yield found


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a contestant."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **quiet, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", **more}


def fedcast(fleet: str, spec: Path, folder: Path) -> dict[str, Any]:
    """Run the rounds with a fleet of this machine, through the command line."""
    out = folder / f"run-{fleet}"
    command = [*FEDCAST, "pretrain", str(spec), "--federation.fleet", fleet, "-o", str(out), "--json"]
    with watched(f"fedcast, {fleet}", folder, command, environment()) as found:
        found["rounds"] = seconds_of(out)
    return found


def seconds_of(run: Path) -> list[float]:
    """Return the seconds of each round of a run."""
    return [row["seconds"] for row in rows_of(run)]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's rounds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == "round"]


def simulation(python: str, parameters: int, clients: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Run the rounds on Flower's simulation."""
    script = str(ROOT / "benchmarks" / "peers" / "flower_idle.py")
    name = "Flower simulation (Ray), 1 core a client"
    home = folder / "ray-home"
    home.mkdir()
    with watched(name, folder, [python, script, str(clients), str(parameters), str(rounds)], environment(FLWR_HOME=str(home))) as found:
        lines = (folder / f"{name.replace(' ', '-')}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        found["rounds"] = json.loads(next(line for line in reversed(lines) if line.startswith("[")))
    return found


def server_memory(size: str, clients: int, folder: Path) -> dict[str, Any]:
    """Return how far the server's memory peaks above what it held before a round, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine", "--server-memory", size, str(clients)]
    done = subprocess.run(command, env=environment(), cwd=folder, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_server(size: str, clients: int) -> dict[str, Any]:
    """Take rounds of a server whose sites answer at once, and return its peak memory beside that of one model."""
    from benchmarks import growth  # imports fedcast: the parent of all contestants does not

    spec = growth.parse_spec(
        {
            "model": {"size": size, "context": 64, "horizon": 16},
            "method": {"name": "fedavg"},
            "training": {"device": "cpu"},
            "federation": {"rounds": 3},
            "evaluation": {"every": 4},
        }
    )
    with tempfile.TemporaryDirectory() as name:
        loop = growth.federation(spec, clients, growth.RunFolder(name), growth.Silent(), real=False)
        peak = growth.peak_growth(lambda: loop.run(growth.Progress()))
    return {"clients": clients, "model": 4 * loop.server.layout.size, "peak": peak}


@contextmanager
def consortium(names: Sequence[str], data: Path, folder: Path) -> Iterator[tuple[Path, list[psutil.Process]]]:
    """Run a real consortium on loopback: SuperLink with TLS and node authentication, nginx before it, and a SuperNode a site."""
    kits = folder / "consortium"
    first, second = free_ports(2)
    sites = [word for name in names for word in ("--site", name)]
    ports = ["--port", str(first), "--proxy-port", str(second)]
    subprocess.run([*FEDCAST, "consortium", "init", str(kits), "--host", "127.0.0.1", *sites, *ports], check=True, capture_output=True)
    commands = [("coordinator", ["coordinator", "start", "--kit", str(kits / "coordinator"), "--proxy"])]
    commands += [(name, ["site", "start", "--kit", str(kits / "sites" / name), "--data", str(data / f"{name}.csv")]) for name in names]
    running: list[psutil.Process] = []
    try:
        for name, words in commands:
            with (folder / f"{name}.log").open("wb") as log:
                running.append(psutil.Popen([*FEDCAST, *words], env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if name == "coordinator":
                time.sleep(20)
        yield kits / "coordinator", running
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(60)


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def deployment(spec: Path, data: Path, names: Sequence[str], folder: Path, *overrides: str) -> dict[str, Any]:
    """Run the rounds over a consortium; memory and processor time are those of coordinator, sites and run together."""
    with consortium(names, data, folder) as (kit, processes):
        return over(kit, processes, spec, folder, "Flower deployment, TLS", *overrides)


def over(kit: Path, processes: Sequence[psutil.Process], spec: Path, folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Run a spec over a consortium that runs."""
    out = folder / f"run-{name.replace(' ', '-').replace(',', '')}"
    words = ["run", str(spec), "--fleet", "flower", "--kit", str(kit), "--wait", "600", "-o", str(out), "--json"]
    settings = [word for override in overrides for word in ("--set", override)]
    with watched(f"fedcast, {name}", folder, [*FEDCAST, *words, *settings], environment(), *processes) as found:
        found["rounds"], found["rows"] = seconds_of(out), rows_of(out)
    return found


def wire(size: str, folder: Path) -> list[dict[str, Any]]:
    """Send a model over TLS to a site and back: raw, under codecs, and its adapter alone; note bytes and seconds of a round."""
    data = folder / "wire-data"
    data.mkdir()
    names = write_sites(data, 1)
    spec = write_spec(folder, data, size, WIRE_ROUNDS)
    settings = {
        "raw float32": [],
        "bf16 both ways": ['guards=[{name="compress", codec="bf16", direction="both"}]'],
        "int8 up": ['guards=[{name="compress", codec="int8"}]'],
        "LoRA alone": ["tuning.name=lora"],
    }
    found = []
    with consortium(names, data, folder) as (kit, processes):
        for name, overrides in settings.items():
            result = over(kit, processes, spec, folder, name, *overrides)
            row = result["rows"][-1]
            found.append({**result, "name": name, "bytes_up": row["bytes_up"], "bytes_down": row["bytes_down"]})
    return found


def line(found: dict[str, Any]) -> list[str]:
    """Return a contestant's line of the table."""
    first, *later = found["rounds"]
    median = f"{statistics.median(later or [first]):.2f}"
    return [found["name"], median, f"{first:.2f}", f"{found['wall']:.0f}", f"{found['cpu']:.0f}", f"{found['memory'] / 1e6:,.0f}"]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini", help="size of the model that is carried")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=["fleets", "memory", "wire"], choices=["fleets", "memory", "wire"])
    parser.add_argument("--flower-python", default=os.environ.get("FLOWER_PYTHON"), help="python of an environment with flwr[simulation]")
    parser.add_argument("--fleets", nargs="+", default=["threads", "processes", "flower", "simulation"], help="which of them")
    parser.add_argument("--wire-size", default="base", help="size of the model that is sent over TLS")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--server-memory", nargs=2, metavar=("SIZE", "CLIENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.server_memory:
        size, clients = arguments.server_memory
        print(json.dumps(measure_server(size, int(clients))))
        return
    found: dict[str, Any] = {"machine": processor_name()}
    with tempfile.TemporaryDirectory(prefix="engine-") as name:
        folder = Path(name)
        print(f"Machine: {processor_name()}, {os.cpu_count()} cores.\n")
        if "fleets" in arguments.parts:
            found["fleets"] = fleets(arguments, folder)
            print(f"{arguments.clients} sites, model of size {arguments.size}, no training.\n")
            print(markdown(COLUMNS, [line(each) for each in found["fleets"]]), "\n")
        if "memory" in arguments.parts:
            found["memory"] = [server_memory(arguments.size, clients, folder) for clients in (20, 100, 1000)]
            lines = [[str(each["clients"]), f"{each['peak'] / 1e6:.1f}", f"{each['peak'] / each['model']:.2f}"] for each in found["memory"]]
            print(markdown(["clients", "server's peak above what it held, MB", "in models, with the reply in hand"], lines), "\n")
        if "wire" in arguments.parts:
            found["wire"] = wire(arguments.wire_size, folder)
            lines = [
                [*line(each)[:3], f"{each['bytes_up'] / 1e6:.1f}", f"{each['bytes_down'] / 1e6:.1f}", line(each)[-1]]
                for each in found["wire"]
            ]
            print(markdown(["", "seconds a round", "first round", "MB up", "MB down", "peak memory of all, MB"], lines))
    if arguments.json:
        write_json(arguments.json, found)


def fleets(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run every contestant, one after the other."""
    data = folder / "data"
    data.mkdir()
    names = write_sites(data, arguments.clients)
    spec = write_spec(folder, data, arguments.size, ROUNDS)
    found = [fedcast(fleet, spec, folder) for fleet in ("threads", "processes") if fleet in arguments.fleets]
    if "flower" in arguments.fleets:
        found.append(deployment(spec, data, names, folder))
    if "simulation" in arguments.fleets and arguments.flower_python:
        from benchmarks import floor

        size = floor.parameters(floor.configuration(arguments.size, 64))
        found.append(simulation(arguments.flower_python, size, arguments.clients, ROUNDS, folder))
    return found


if __name__ == "__main__":
    main()
