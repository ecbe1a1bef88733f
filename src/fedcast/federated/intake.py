"""What a round keeps of its replies: each is screened as it arrives, and its weights are averaged at once where the method allows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedcast.errors import ScreenError
from fedcast.federated.gate import Gate
from fedcast.federated.messages import Reply
from fedcast.methods.base import MODEL_PARTS, Method, Server, Update
from fedcast.training.aggregate import StreamingMean

LATE = "no reply before the deadline"
"""Why a site that never answered is not part of a round."""
IN_MEMORY = 2**30
"""Bytes of weights of one round's replies that are kept in memory."""


class Intake:
    """The replies of one round.

    Where the method streams (:attr:`Method.streams`), memory does not grow with the number of sites, but for the private weights
    that serve unseen domains. Else every reply is kept until :meth:`aggregate`: in memory, or, where all of them would take more than
    :data:`IN_MEMORY`, in files that the system maps into memory page by page.

    Parameters
    ----------
    method
        The method.
    samples
        Declared training points of the sites that were asked.
    shapes
        Tensors that a reply must hold, with their shapes.
    folder
        Where a folder for such files may be made.
    gate
        What replies pass on their way in; the screen of every run where none is given.

    Attributes
    ----------
    meta
        JSON values of each usable reply, by site.
    nbytes
        Bytes of all tensors that arrived.
    """

    def __init__(
        self, method: Method, samples: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], folder: Path, gate: Gate | None = None
    ) -> None:
        self._method = method
        self._gate = gate or Gate(None, shapes, {})
        self._awaited = dict(samples)
        sizes = {name: shapes[name][0] for name in MODEL_PARTS if name in shapes}
        self._accumulator = self._gate.accumulator
        streams = self._accumulator is None and method.streams and sizes and not self._gate.ruled
        self._mean = StreamingMean(sizes, sum(samples.values())) if streams else None
        self._folder: TemporaryDirectory[str] | None = None
        if not self._forgets and 4 * sum(sizes.values()) * len(samples) > IN_MEMORY:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("replies-*/"):
                rmtree(left)  # of a process that was killed
            self._folder = TemporaryDirectory(prefix="replies-", dir=folder)
        self._keeps_private = "private" in shapes and method.unseen() != "shadow"
        self._updates: dict[str, Update] = {}
        self._experts: dict[str, Tensor] = {}
        self._refused: dict[str, str] = {}
        self.meta: dict[str, Mapping[str, Any]] = {}
        self.nbytes = 0

    def take(self, site: str, reply: Reply) -> None:
        """Screen a reply and take it in; only the first of a site that was asked counts."""
        if site not in self._awaited:
            return
        declared = self._awaited.pop(site)
        self.nbytes += reply.nbytes
        try:
            tensors = self._gate.admit(site, reply, declared)
            if self._accumulator is not None:
                self._accumulator.add(site, tensors, reply.meta["samples"])
            elif self._mean is not None:
                self._mean.add(tensors, reply.meta["samples"])
        except ScreenError as error:
            self._refused[site] = error.message
            return
        if self._keeps_private:
            self._experts[site] = tensors["private"]
        if self._forgets:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in MODEL_PARTS}
        elif self._folder is not None:
            tensors = {name: self._on_disk(tensor, f"{len(self.meta)}-{name}") for name, tensor in tensors.items()}
        self._updates[site] = Update(site, tensors, reply.meta["samples"])
        self.meta[site] = reply.meta

    @property
    def _forgets(self) -> bool:
        """Whether the model's vectors are added up as they arrive, and not kept."""
        return self._accumulator is not None or self._mean is not None

    @property
    def dropped(self) -> dict[str, str]:
        """Why sites are not part of the round, in the order of their names."""
        late = dict.fromkeys(self._awaited, LATE)
        return dict(sorted((self._refused | late).items()))

    def answers(self, prefix: str) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each usable reply whose names begin with ``prefix``, by site; before :meth:`aggregate`."""
        found = {site: {n: t for n, t in update.tensors.items() if n.startswith(prefix)} for site, update in self._updates.items()}
        return {site: tensors for site, tensors in found.items() if tensors}

    def aggregate(self, server: Server) -> None:
        """Bring the round into the server's state and let go of the vectors."""
        updates = [update for _, update in sorted(self._updates.items())]
        summed = self._accumulator or self._mean
        if summed is None:
            self._method.aggregate(server, updates)
        else:
            server.settle(summed.means(), {update.site: float(update.samples) for update in updates})
        server.experts |= self._experts
        self._mean, self._accumulator, self._updates, self._experts = None, None, {}, {}
        if self._folder is not None:
            self._folder.cleanup()

    def _on_disk(self, tensor: Tensor, name: str) -> Tensor:
        """Return a copy that lies in a file."""
        if self._folder is None or tensor.numel() == 0:
            return tensor
        path = Path(self._folder.name) / name
        return torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(tensor.shape)
