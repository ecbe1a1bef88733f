"""Flower's simulation runtime with Ray, the real one, in an environment of its own; client and server as its PyTorch quickstart has them.

A client's windows are read once in each Ray actor and kept, as the quickstart keeps its dataset. The strategy is Flower's FedAvg with
every client in every round and without evaluation; ``evaluate_fn``, which Flower calls after each round, is where rounds are let in.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.common import Gate, Network, Setting, load_windows
from benchmarks.peers.serve import SETTING, setting_from
from fedcast.models.patch import PatchTransformer

app = ClientApp()


@cache
def _setting() -> Setting:
    return setting_from(os.environ[SETTING])


@cache
def _dataset(client: int) -> TensorDataset:
    return TensorDataset(*load_windows(_setting(), client))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model for one epoch of this client's windows."""
    setting = _setting()
    network = Network(setting)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=setting.rate)
    dataset = _dataset(int(context.node_config["partition-id"]))
    for contexts, targets in DataLoader(dataset, setting.batch, shuffle=True):
        optimiser.zero_grad()
        network.loss(contexts, targets).backward()
        optimiser.step()
    content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": len(dataset)})}
    return Message(content=RecordDict(content), reply_to=message)


def run(setting: Setting, gate: Gate, *, cpus: int = 1) -> PatchTransformer:
    """Run rounds with ``cpus`` cores a client; return the global model."""
    network = Network(setting)
    server = ServerApp()

    def lap(round_: int, arrays: ArrayRecord) -> None:
        if round_ <= setting.rounds:
            gate.lap()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=setting.clients, min_available_nodes=setting.clients)
        result = strategy.start(grid, ArrayRecord(network.state_dict()), num_rounds=setting.rounds, evaluate_fn=lap)
        network.load_state_dict(result.arrays.to_torch_state_dict())

    resources = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}
    run_simulation(server, app, num_supernodes=setting.clients, backend_config=resources)
    return network.model
