"""pfl-research itself (the package ``pfl``): its SimulatedBackend, FederatedAveraging and PyTorchModel, in an environment of its own.

Settings are its defaults for such a run: one process, users in turn, no privacy, no evaluation (``evaluation_frequency`` past the last
round, so that only the warm-up round is evaluated). A user's windows lie in memory as tensors, cut into batches once.
"""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.peers.common import Gate, Network, Setting, load_windows
from fedcast.models.patch import PatchTransformer


class PflNetwork(Network):
    """The model with the metrics that pfl asks for."""

    def metrics(self, contexts: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        """Return the loss as a weighted mean."""
        with torch.no_grad():
            return {"loss": Weighted(self.loss(contexts, targets).item() * len(contexts), len(contexts))}


class _Laps(TrainingProcessCallback):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._gate.lap()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int) -> tuple[bool, Metrics]:
        return not self._gate.lap(), Metrics()


def run(setting: Setting, gate: Gate) -> PatchTransformer:
    """Run rounds; return the global model."""
    network = PflNetwork(setting)
    users = {n: PyTorchTensorDataset(load_windows(setting, n), user_id=str(n)) for n in range(setting.clients)}
    federated = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    server = torch.optim.SGD(network.parameters(), lr=1.0)  # adds the mean difference to the model
    model = PyTorchModel(network, local_optimizer_create=torch.optim.AdamW, central_optimizer=server)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=setting.rounds + 1,
            evaluation_frequency=setting.rounds + 2,
            train_cohort_size=setting.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=federated, val_data=federated),
        model=model,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=setting.rate, local_batch_size=setting.batch),
        model_eval_params=NNEvalHyperParams(local_batch_size=setting.batch),
        callbacks=[_Laps(gate)],
        send_metrics_to_platform=False,
    )
    return network.model
