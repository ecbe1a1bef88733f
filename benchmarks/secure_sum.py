"""What a secure sum costs beside sending the weights as they are: CPU seconds at a site and at the server, and bytes.

All sites take every step of the protocol one after the other in this process, on one thread, with updates drawn at random; `gone` of
them are lost after they shared their secrets, which is what costs the server most. The opened sum is compared with the plain one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json
from fedcast.errors import FederationError
from fedcast.federated.secure.protocol import SEALED_BYTES, Rule, ServerRound, SiteRound
from fedcast.federated.secure.quantise import BESIDE, Grid
from fedcast.federated.secure.shares import SHARE_BYTES

RULE = Rule(share=2 / 3, least=3)
WEIGHT = 10_000
T = TypeVar("T")


def measure(count: int, values: int, bits: int, gone: int) -> dict[str, Any]:
    """Return median CPU seconds a site and CPU seconds of the server in one round, and bytes a site beside those of its weights."""
    times: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, work: Callable[[], T]) -> T:
        start = time.process_time()
        result = work()
        times[what].append(time.process_time() - start)
        return result

    grid = Grid(bits, 1.0, count, count * WEIGHT)
    update = np.random.default_rng(0).normal(0, 0.01, values).astype(np.float32)
    sites = {f"site-{index:04d}": SiteRound(f"site-{index:04d}", "run", 1, RULE) for index in range(count)}
    server = ServerRound("run", 1, RULE.threshold(count), np.zeros(values + BESIDE, dtype=grid.dtype))
    server.advertise({name: timed("keys", site.public) for name, site in sites.items()})
    sealed = {name: timed("shares", lambda s=site: s.share(server.keys, server.threshold)) for name, site in sites.items()}  # type: ignore[misc]
    boxes = timed("relay", lambda: server.relay(sealed))
    plain = np.zeros_like(server.total)
    for index, (name, site) in enumerate(sites.items()):
        timed("open shares", lambda s=site, n=name: s.receive(boxes[n]))  # type: ignore[misc]
        words = timed("quantise", lambda: grid.quantise(update, WEIGHT))
        masked = words.copy()
        timed("mask", lambda s=site, m=masked: s.mask(m))  # type: ignore[misc]
        if index >= gone:
            plain += words
            timed("add", lambda n=name, m=masked: server.add(n, m))  # type: ignore[misc]
    server.close()
    revealed = {name: timed("reveal", lambda s=sites[name]: s.reveal(server.arrived, server.missing)) for name in server.arrived}  # type: ignore[misc]
    timed("unmask", lambda: server.unmask(revealed))
    timed("open", lambda: grid.open(server.total, count * WEIGHT, count - gone))
    if not np.array_equal(server.total, plain):
        raise FederationError("the opened sum is not the plain one", hint="report this with the options of the script")
    at_site = sum(statistics.median(times[step]) for step in ("keys", "shares", "open shares", "quantise", "mask", "reveal"))
    at_server = sum(sum(times[step]) for step in ("relay", "add", "unmask", "open"))
    return {
        "sites": count,
        "values": values,
        "bits": bits,
        "gone": gone,
        "site_seconds": at_site,
        "server_seconds": at_server,
        "masked_bytes": (values + BESIDE) * bits // 8,
        "plain_bytes": values * 4,
        "up_bytes_beside": 64 + count * (SEALED_BYTES + SHARE_BYTES),
        "down_bytes_beside": count * (64 + 1 + SEALED_BYTES) + 16,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=500_000, help="values of an update")
    parser.add_argument("--quick", action="store_true", help="five sites and a short update")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    given = parser.parse_args(words)
    cases = [(5, 32, 1)] if given.quick else [(20, 32, 0), (20, 32, 6), (20, 64, 0), (100, 32, 0), (100, 32, 33)]
    rows = [measure(count, 1000 if given.quick else given.values, bits, gone) for count, bits, gone in cases]
    write_json(given.output, {"processor": processor_name(), "rows": rows})
    head = ["sites", "values", "bits", "gone", "CPU seconds a site", "of the server", "MB up a site", "plain", "KB beside up", "down"]
    table = [
        [
            str(row["sites"]),
            f"{row['values']:,}",
            str(row["bits"]),
            str(row["gone"]),
            f"{row['site_seconds']:.3f}",
            f"{row['server_seconds']:.3f}",
            f"{row['masked_bytes'] / 1e6:.2f}",
            f"{row['plain_bytes'] / 1e6:.2f}",
            f"{row['up_bytes_beside'] / 1e3:.1f}",
            f"{row['down_bytes_beside'] / 1e3:.1f}",
        ]
        for row in rows
    ]
    print(f"{processor_name()}, one thread.\n")
    print(markdown(head, table))


if __name__ == "__main__":
    main()
