"""The loop that PFLlib runs, written after its source: github.com/TsingZ0/PFLlib at d832e76f6a23b833038949ec1e4fdefe63a4d350.

Read were ``system/flcore/servers/serverbase.py`` and ``serveravg.py``, ``system/flcore/clients/clientbase.py`` and ``clientavg.py``,
``system/utils/data_utils.py``. Kept as there: every client owns a deep copy of the model and an optimiser for ever; the server clones
its parameters into all clients one by one; a round makes a new DataLoader over a list of (x, y) pairs; aggregation deep-copies the
first client's model, zeroes it and adds ``clone() * weight``; ``eval_gap = 1`` scores every client's test and training windows before
each round. Changed for the comparison: model, loss and AdamW (PFLlib has SGD and classifiers), the loss instead of accuracy and AUC as
the score (faster), arrays read without pickle. The row without evaluation also keeps each client's list of pairs in memory, where
PFLlib reads its file anew for every loader.
"""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers.common import Gate, Network, Setting, forecast_loss, load_windows, run_rounds
from fedcast.models.patch import PatchTransformer


class Client:
    """One client: its own model and optimiser, kept for ever."""

    def __init__(self, setting: Setting, number: int, model: nn.Module, *, rereads: bool, shuffle: bool) -> None:
        torch.manual_seed(0)
        self.setting, self.number, self.shuffle = setting, number, shuffle
        self.model = copy.deepcopy(model)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=setting.rate)
        self.samples = len(load_windows(setting, number)[0])
        self.pairs = None if rereads else self.read("train")
        self.send_seconds = self.train_seconds = 0.0

    def read(self, part: str) -> list[tuple[Tensor, Tensor]]:
        """Read a part as a list of (context, target)."""
        contexts, targets = load_windows(self.setting, self.number, part)
        return list(zip(contexts, targets, strict=True))

    def load_train_data(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a new loader of training windows."""
        pairs = self.read("train") if self.pairs is None else self.pairs
        return DataLoader(pairs, self.setting.batch, drop_last=True, shuffle=self.shuffle)

    def load_test_data(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a new loader of test windows."""
        return DataLoader(self.read("test"), self.setting.batch, drop_last=False, shuffle=self.shuffle)

    def set_parameters(self, model: nn.Module) -> None:
        """Take over the server's parameters, a clone of each."""
        for new, old in zip(model.parameters(), self.model.parameters(), strict=True):
            old.data = new.data.clone()

    def train(self) -> None:
        """Train for one epoch."""
        loader = self.load_train_data()
        self.model.train()
        start = time.time()
        for x, y in loader:
            loss = forecast_loss(self.model(x), y)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        self.train_seconds += time.time() - start

    def metrics(self, loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Return the sum of losses over a loader's windows, and how many windows they are."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for x, y in loader:
                total += forecast_loss(self.model(x), y).item() * y.shape[0]
                count += y.shape[0]
        return total, count


class PFLlib:
    """The server.

    Parameters
    ----------
    setting
        The row.
    shipped
        As PFLlib comes: evaluate before every round, and read a client's file for every loader.
    shuffle
        Whether a client's windows come in random order; tests switch it off to compare loops.
    """

    def __init__(self, setting: Setting, *, shipped: bool = False, shuffle: bool = True) -> None:
        self.shipped = shipped
        self.network = Network(setting)
        self.clients = [Client(setting, n, self.network, rereads=shipped, shuffle=shuffle) for n in range(setting.clients)]

    def round(self) -> None:
        """Run one round of ``FedAvg.train``."""
        selected = list(np.random.choice(self.clients, len(self.clients), replace=False))  # noqa: NPY002
        for client in self.clients:
            start = time.time()
            client.set_parameters(self.network)
            client.send_seconds += 2 * (time.time() - start)
        if self.shipped:
            self.evaluate()
        for client in selected:
            client.train()
        active = random.sample(selected, len(selected))
        total = sum(client.samples for client in active)
        self.aggregate([client.samples / total for client in active], [client.model for client in active])

    def evaluate(self) -> tuple[float, float]:
        """Return the mean test and training loss over all clients."""
        test = [client.metrics(client.load_test_data()) for client in self.clients]
        train = [client.metrics(client.load_train_data()) for client in self.clients]
        return _mean(test), _mean(train)

    def aggregate(self, weights: list[float], models: list[Network]) -> None:
        """Average models by weight."""
        self.network = copy.deepcopy(models[0])
        for parameter in self.network.parameters():
            parameter.data.zero_()
        for weight, model in zip(weights, models, strict=True):
            for mine, theirs in zip(self.network.parameters(), model.parameters(), strict=True):
                mine.data += theirs.data.clone() * weight


def _mean(scores: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in scores) / sum(count for _, count in scores)


def run(setting: Setting, gate: Gate, *, shipped: bool = False) -> PatchTransformer:
    """Run rounds; return the global model."""
    server = PFLlib(setting, shipped=shipped)
    run_rounds(gate, server.round)
    return server.network.model
