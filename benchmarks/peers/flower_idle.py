"""Flower's simulation (Ray) with clients that send back the weights they got: its rounds without training, for ``benchmarks/engine.py``.

``python flower_idle.py CLIENTS PARAMETERS ROUNDS`` prints the seconds of each round as JSON. The strategy is Flower's FedAvg with every
client in every round and without evaluation at clients; rounds are told apart by ``evaluate_fn``, which Flower calls after each.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came."""
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


def main(words: list[str]) -> None:
    """Run the rounds and print their seconds."""
    clients, parameters, rounds = (int(word) for word in words)
    server, laps = ServerApp(), [time.perf_counter()]

    def lap(number: int, arrays: ArrayRecord) -> None:
        laps.append(time.perf_counter())

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        weights = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        strategy.start(grid, ArrayRecord({"weights": Array(weights)}), num_rounds=rounds, evaluate_fn=lap)

    run_simulation(server, app, num_supernodes=clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    print(json.dumps(list(np.diff(laps[1:]))))


if __name__ == "__main__":
    main(sys.argv[1:])
