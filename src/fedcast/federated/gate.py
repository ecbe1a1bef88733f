"""The guards of one round at the server: what they send, what they let in, and what stands in the place of the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcast.federated.guards.base import Accumulator, Arrival, Declared, Guard, GuardRound, Guards, prefix_of
from fedcast.federated.messages import Reply, Task, screen
from fedcast.methods.base import MODEL_PARTS, Server


class GuardedRound:
    """The guards' part in a round, from its tasks to its end.

    Parameters
    ----------
    guards
        The guards.
    server
        The server's state.
    initial
        The model's weights before any training, shared ones first.
    samples
        What each of the sites that are asked may weigh at most.
    seed, folder, simulated, run, steps
        See :class:`~fedcast.federated.guards.base.GuardRound`.
    send
        Sends one task a site and yields the replies that come before the deadline.

    Attributes
    ----------
    bytes_up, bytes_down
        Bytes of the tensors of the guards' own exchanges, less what packing saves.
    """

    def __init__(
        self,
        guards: Guards,
        server: Server,
        initial: Tensor,
        samples: Mapping[str, int],
        *,
        seed: int,
        folder: Path,
        simulated: bool,
        send: Callable[[Mapping[str, Task]], Iterable[tuple[str, Reply]]],
        run: str = "",
        steps: Mapping[str, int] | None = None,
    ) -> None:
        self.guards, self.initial, self._send = guards, initial, send
        self.bytes_up = self.bytes_down = 0
        self.view = GuardRound(
            number=server.round,
            rounds=server.rounds,
            selected=sorted(samples),
            samples=samples,
            server=server,
            seed=seed,
            folder=folder,
            simulated=simulated,
            exchange=self._exchange,
            run=run,
            steps=steps or {},
        )

    def begin(self, tasks: Mapping[str, Task]) -> dict[str, Task]:
        """Let every guard prepare the round; return the tasks with what the guards send along."""
        begun = dict(tasks)
        for guard in self.guards:
            for site, tensors in guard.begin(self.view).items():
                named = {f"{prefix_of(guard)}{name}": tensor for name, tensor in tensors.items()}
                begun[site] = replace(begun[site], tensors={**begun[site].tensors, **named})
        self.view.server.rule = self.guards.rule(self.view)
        return begun

    def pack(self, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        """Return the tasks as they travel; what that saves is taken off ``bytes_down``."""
        packed = tasks
        for guard in self.guards:
            packed = guard.pack(packed)
        self.bytes_down += sum(packed[site].nbytes - task.nbytes for site, task in tasks.items())
        return packed

    def finish(self, before: Tensor, taken: Sequence[str]) -> None:
        """Let every guard change the server's state; ``before`` are the shared weights before the aggregation of the sites ``taken``."""
        self.view.taken = taken
        for guard in self.guards:
            guard.finish(self.view, before)

    def _exchange(self, tasks: Mapping[str, Task]) -> dict[str, Reply]:
        self.bytes_down += sum(task.nbytes for task in tasks.values())
        replies = {}
        for site, reply in self._send(tasks):
            if site in tasks and site not in replies:
                replies[site] = reply
                self.bytes_up += reply.nbytes
        return replies


class Gate:
    """What a round's replies pass on their way in: every guard's decoding, the screen of every run, every guard's judgement.

    Where a guard adds up the replies itself, what it and the guards before it in the list did at the site is not undone: the screen
    then demands what :meth:`~fedcast.federated.guards.base.Guard.declare` says such replies hold, and the guards before it judge nothing.

    Parameters
    ----------
    guarded
        The guards' part in the round, or ``None`` where there are none.
    shapes
        Names and shapes of a reply's tensors before any guard.
    sent
        What each site was sent; read where there are guards.

    Attributes
    ----------
    accumulator
        What adds up the replies in place of the streaming mean, or ``None``.
    ruled
        Whether a rule takes the place of the weighted mean.
    """

    def __init__(
        self, guarded: GuardedRound | None, shapes: Mapping[str, tuple[int, ...]], sent: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self._sent = sent
        self._initial = torch.zeros(0)
        self._memory: dict[str, Any] = {}
        self._declared: Declared = {name: (shape, torch.float32) for name, shape in shapes.items()}
        self._decoding: tuple[Guard, ...] = ()
        self._inspecting: tuple[Guard, ...] = ()
        self.accumulator: Accumulator | None = None
        self.ruled = False
        if guarded is None:
            return
        guards, view, self._initial = tuple(guarded.guards), guarded.view, guarded.initial
        self._memory = view.memory
        self._decoding = self._inspecting = guards
        self.ruled = view.server.rule is not None
        sizes = {name: shapes[name][0] for name in MODEL_PARTS if name in shapes}
        for number, guard in enumerate(guards):
            self.accumulator = guard.accumulator(view, sizes)
            if self.accumulator is not None:
                for inner in guards[: number + 1]:
                    self._declared = inner.declare(self._declared)
                self._decoding, self._inspecting = guards[number + 1 :], guards[number:]
                return

    def admit(self, site: str, reply: Reply, largest_samples: int) -> Mapping[str, Tensor]:
        """Return the tensors of a reply, decoded and screened.

        Raises
        ------
        ScreenError
            Naming the first thing for which the reply is dropped.
        """
        shapes = {name: shape for name, (shape, _) in self._declared.items()}
        types = {name: dtype for name, (_, dtype) in self._declared.items()}
        if not self._inspecting or reply.error is not None:
            screen(reply, shapes, types, largest_samples=largest_samples)
            return reply.tensors
        arrival = Arrival(site, dict(reply.tensors), reply.meta, self._sent[site], largest_samples, self._initial, self._memory)
        for guard in reversed(self._decoding):
            guard.decode(arrival)
        screen(replace(reply, tensors=arrival.tensors), shapes, types, largest_samples=largest_samples)
        for guard in self._inspecting:
            guard.inspect(arrival)
        return arrival.tensors
