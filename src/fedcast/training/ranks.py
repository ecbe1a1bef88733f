"""One client on several devices: ranks that share every batch, and take the same steps.

This is what DistributedDataParallel does with one bucket (Li et al., VLDB 2020, arXiv 2006.15704): each rank computes the gradient of its
part of a batch, and one all-reduce a step adds the gradients up. The parameters are one flat vector here, so no wrapper is needed. Where
DDP takes the plain mean over ranks, each rank's loss is weighted by the observed targets it has, so that the sum is the loss of the
whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.training.flat import FlatParameters


class Ranks:
    """This process's place among those that train one model.

    Parameters
    ----------
    rank, size
        Its number, from 0, and how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._buffer: Tensor | None = None

    def part(self, batch: Batch) -> Batch:
        """Return this rank's rows of a batch, in the order of the ranks; they differ by one row at most."""
        rows = len(batch.windows)
        return batch.rows(slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size))

    def backward(self, loss: Callable[[Batch], Tensor], batch: Batch, parameters: FlatParameters) -> Tensor:
        """Compute the gradient of a batch's loss into ``parameters`` and return the loss, both the same on every rank.

        Parameters
        ----------
        loss
            Mean over the observed targets of a batch.
        batch
            The whole batch: every rank has it.
        parameters
            The weights, the same on every rank; their gradient is zero.
        """
        part = self.part(batch)
        value = loss(part) * share_of(part, batch)
        value.backward()  # type: ignore[no-untyped-call]
        if self._buffer is None:
            self._buffer = parameters.vector.new_empty(parameters.layout.size + 1)
        # In float32, and the loss along with the gradient: one exchange a step.
        self._buffer[:-1], self._buffer[-1] = parameters.gradient, value.detach()
        dist.all_reduce(self._buffer)
        parameters.gradient.copy_(self._buffer[:-1])
        return self._buffer[-1].clone()


def share_of(part: Batch, whole: Batch) -> Tensor:
    """Return the share of a batch's observed targets that a part has, a scalar; 0 where there are none, as the loss is then."""
    return part.target_mask.sum() / whole.target_mask.sum().clamp_min(1)


@contextmanager
def joined(meeting: Path) -> Iterator[Ranks]:
    """Join the ranks that torchrun started beside this process, by NCCL where each has a CUDA device, else by gloo.

    Parameters
    ----------
    meeting
        A file that is not there yet, in a folder that all of them see: they find each other by it.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if cuda else "gloo", init_method=meeting.absolute().as_uri(), rank=rank, world_size=size)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()
