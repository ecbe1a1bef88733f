"""Plain PyTorch: what a person writes first. A DataLoader a client, AdamW as it comes, state dicts averaged by name."""

from __future__ import annotations

import copy

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.common import Gate, Network, Setting, load_windows, run_rounds
from fedcast.models.patch import PatchTransformer


class Plain:
    """The loop.

    Parameters
    ----------
    setting
        The row.
    shuffle
        Whether a client's windows come in random order; tests switch it off to compare loops.
    fused, autocast
        Two steps that PyTorch's tuning guide names: AdamW's fused kernel, and bfloat16 where autocast allows it.
    """

    def __init__(self, setting: Setting, *, shuffle: bool = True, fused: bool = False, autocast: bool = False) -> None:
        self.setting, self.shuffle, self.fused, self.autocast = setting, shuffle, fused, autocast
        self.network = Network(setting)
        self.clients = [TensorDataset(*load_windows(setting, client)) for client in range(setting.clients)]

    def round(self) -> None:
        """Train a copy of the model at every client, then average."""
        states = [self._train(dataset) for dataset in self.clients]
        mean = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
        self.network.load_state_dict(mean)

    def _train(self, dataset: TensorDataset) -> dict[str, torch.Tensor]:
        network = copy.deepcopy(self.network)
        network.train()
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.setting.rate, fused=self.fused or None)
        for contexts, targets in DataLoader(dataset, self.setting.batch, shuffle=self.shuffle):
            optimiser.zero_grad()
            with torch.autocast("cpu", enabled=self.autocast):
                loss = network.loss(contexts, targets)
            loss.backward()
            optimiser.step()
        return network.state_dict()


def run(setting: Setting, gate: Gate, *, fused: bool = False, autocast: bool = False) -> PatchTransformer:
    """Run rounds; return the global model."""
    plain = Plain(setting, fused=fused, autocast=autocast)
    run_rounds(gate, plain.round)
    return plain.network.model
