"""Secure sum: the server learns the sum of the sites' updates, and no update (:mod:`fedcast.federated.secure.protocol`)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from fedcast.errors import QuorumError, ScreenError, SecureSumError, SpecError
from fedcast.federated.guards.base import Arrival, Declared, Guard, GuardRound, Outgoing
from fedcast.federated.messages import Reply, Task
from fedcast.federated.secure.masks import KEY_BYTES, require_cryptography
from fedcast.federated.secure.protocol import SEALED_BYTES, PublicKeys, Revealed, Rule, ServerRound, SiteRound
from fedcast.federated.secure.quantise import BESIDE, Grid
from fedcast.federated.secure.shares import SHARE_BYTES
from fedcast.registry import hyper

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

Bytes = npt.NDArray[np.uint8]
_MASKED = "guard.secure_sum.masked"
_SHARES, _ATTEMPT = "shares", "attempt"
_ATTEMPT_BYTES = 16
_SESSIONS = 2
_RETELL = "check that both sides run the same version of fedcast"
_READERS = ("decode", "inspect", "pack")

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class SecureSum(Guard):
    """Masks that cancel in the sum of all sites, with shares of the secrets behind them for sites that drop out.

    A site sends its update times its weight, and the weight, as integers, see :class:`~fedcast.federated.secure.quantise.Grid`; what the
    server opens is their sum, so the new weights are exact over the cut and rounded updates, in whatever order and by whatever fleet
    they arrive. No single update can be judged: what a faulty site sends goes into the sum, and shows only where the sum is beyond what
    all sites could have sent.

    The server is trusted to keep to the protocol, and not to invent sites or to put keys of its own in the place of theirs.
    """

    name: ClassVar[str] = "secure_sum"
    summary: ClassVar[str] = "the server learns the sum of the updates and no update: masks and shares between the sites"

    bound: Annotated[float, Field(gt=0)] = hyper(1.0, "largest magnitude of a value of an update; values beyond it are cut")
    bits: Literal[32, 64] = hyper(32, "integers are taken modulo 2^bits: 32 or 64")
    threshold: Annotated[float, Field(gt=0.5, le=1)] = hyper(2 / 3, "share of the selected sites that must stay to the end of a round")
    least: Annotated[int, Field(ge=3)] = hyper(3, "fewest sites in a sum")

    @property
    def rule(self) -> Rule:
        """How many sites a sum takes."""
        return Rule(self.threshold, self.least)

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse what would leave a site beside the masked update, or would read it."""
        require_cryptography()
        place = [guard.name for guard in guards].index(self.name)
        for number, guard in enumerate(guards):
            has = {hook for hook in ("encode", *_READERS) if getattr(type(guard), hook) is not getattr(Guard, hook)}
            # What a guard does at the site, such as to clip, it still does; one that needs more says so, one that only judges does nothing.
            blind = "inspect" not in has or getattr(guard, "blind", "encode" in has)
            if number != place and (has & {"decode", "pack"} or not blind):
                raise SpecError(
                    f"the guard {guard.name!r} reads single replies at the server, and with 'secure_sum' nobody can",
                    hint="leave one of them out",
                )
            if number > place and "encode" in has:
                raise SpecError(f"the guard {guard.name!r} would change a masked update", hint=f"list {guard.name!r} before 'secure_sum'")
        shapes: Declared = {"shared": ((plan.layout.shared_size,), torch.float32)}
        shapes |= {name: (shape, torch.float32) for name, shape in {**plan.method.reply_shapes(plan.shape), **plan.answer_shapes}.items()}
        if plan.layout.private_size and plan.method.exports() != "never":
            shapes["private"] = ((plan.layout.private_size,), torch.float32)
        for guard in guards[:place]:
            shapes = guard.declare(shapes)
        if set(shapes) != {"shared"}:
            named = ", ".join(sorted(set(shapes) - {"shared"})) or "codes"
            raise SpecError(
                f"with method {plan.method.name!r} and these guards a site sends more than shared weights ({named}), in the clear",
                hint="choose a method that sends shared weights alone, such as fedavg, and no guard that sends anything beside them",
            )
        if plan.spec.evaluation.conflict:
            raise SpecError(
                "evaluation.conflict has every site send a sketch of its gradient, in the clear", hint="set evaluation.conflict = 0"
            )

    def check_sites(self, plan: Plan, sites: Sequence[str]) -> None:
        """Refuse a run whose rounds have too few sites for a sum that hides them."""
        asked = plan.spec.federation.selected(len(sites))
        if asked < self.least:
            raise SpecError(
                f"a round asks {asked} of {len(sites)} sites, and a secure sum is over at least {self.least}",
                hint="have more sites, or raise federation.participation",
            )

    def encode(self, outgoing: Outgoing) -> None:
        """Put masked integers in the place of the shared weights."""
        if "shared" not in outgoing.tensors:
            return
        if f"guard.{self.name}.{_ATTEMPT}" not in outgoing.received:
            raise SecureSumError(f"site {outgoing.site} was not part of the exchange of keys", hint="it takes part again in the next round")
        attempt = _bytes_of(outgoing.received, f"guard.{self.name}.{_ATTEMPT}", (_ATTEMPT_BYTES,)).tobytes().hex()
        session = _session(outgoing.memory, attempt, outgoing.site)
        rows = _bytes_of(outgoing.received, f"guard.{self.name}.{_SHARES}", (len(session.site_names), 1 + SEALED_BYTES))
        boxes = {name: row[1:].tobytes() for name, row in zip(session.site_names, rows, strict=True) if row[0]}
        session.round.receive(boxes)
        grid = Grid(self.bits, self.bound, len(session.site_names), session.total)
        update = outgoing.tensors.pop("shared") - outgoing.received["shared"]
        words = grid.quantise(update.numpy(), outgoing.samples)
        session.round.mask(words)
        outgoing.tensors[_MASKED] = torch.from_numpy(words.view(f"<i{self.bits // 8}"))
        outgoing.meta[self.name] = attempt

    def declare(self, shapes: Declared) -> Declared:
        """Return the masked integers in the place of the shared weights."""
        if "shared" not in shapes:
            return shapes
        (size,), _ = shapes["shared"]
        masked = ((size + BESIDE,), torch.int32 if self.bits == 32 else torch.int64)
        return {**{name: kind for name, kind in shapes.items() if name != "shared"}, _MASKED: masked}

    def begin(self, round: GuardRound) -> dict[str, dict[str, Tensor]]:
        """Let the sites exchange keys and shares; return the shares that each of them is to open."""
        if round.server.own:
            raise SpecError("sites of this method have shared weights of their own, which have no sum", hint="choose fedavg")
        grid = Grid(self.bits, self.bound, len(round.selected), sum(round.samples.values()))
        total = np.zeros(round.server.shared.numel() + BESIDE, dtype=grid.dtype)
        asking = _Asking(self.name, round, secrets.token_hex(_ATTEMPT_BYTES))
        server = ServerRound(round.run, round.number, self.rule.threshold(len(round.selected)), total)
        with asking.explained():
            keys = asking.ask("keys", round.selected, (2,))
            server.advertise({site: PublicKeys(*(row.tobytes() for row in rows)) for site, (rows,) in keys.items()})
            names = sorted(server.keys)
            told = {"sites": names, "threshold": server.threshold, "total": grid.total}
            table = _table([server.keys[name].seal + server.keys[name].mask for name in names], 2 * KEY_BYTES)
            boxes = asking.ask("shares", names, (len(names),), told, {"keys": table})
            sealed = {site: {n: row.tobytes() for n, row in zip(names, rows, strict=True) if n != site} for site, (rows,) in boxes.items()}
            relayed = server.relay(sealed)
        round.memory[self.name] = _Sum(server, asking, grid, round)
        attempt = torch.frombuffer(bytearray.fromhex(asking.attempt), dtype=torch.uint8)
        empty = bytes(1 + SEALED_BYTES)
        return {
            site: {_ATTEMPT: attempt, _SHARES: _table([b"\x01" + mine[name] if name in mine else empty for name in names], len(empty))}
            for site, mine in relayed.items()
        }

    def inspect(self, arrival: Arrival) -> None:
        """Drop a reply whose masks are of an attempt at this round that was given up."""
        attempt = arrival.sent.get(f"guard.{self.name}.{_ATTEMPT}")
        if attempt is None or arrival.meta.get(self.name) != attempt.numpy().tobytes().hex():
            raise ScreenError("its masks are not of this sum", hint="the reply is dropped and the round goes on without it")

    def accumulator(self, round: GuardRound, sizes: Mapping[str, int]) -> _Sum | None:
        """Return what sums masked integers and opens the sum."""
        summing: _Sum = round.memory[self.name]
        return summing

    def answer(self, task: Task, site: str, memory: dict[str, Any]) -> Reply:
        """Answer a step of the protocol at a site; what is asked twice is answered alike."""
        meta = task.meta
        stage, run, attempt = (_text(meta, key) for key in ("stage", "run", "attempt"))
        if memory.setdefault("run", run) != run:
            raise SecureSumError(f"site {site} takes part in another run", hint="start the site anew to let it take part in this one")
        if stage == "keys":
            sessions: dict[str, _Session] = memory.setdefault("sessions", {})
            if attempt not in sessions:
                sessions[attempt] = _Session(SiteRound(site, run, task.round, self.rule))
                for old in list(sessions)[:-_SESSIONS]:
                    del sessions[old]
            public = sessions[attempt].round.public()
            return Reply({"keys": _table([public.seal, public.mask], KEY_BYTES)})
        session = _session(memory, attempt, site)
        if stage == "shares":
            return self._share(session, task)
        if stage == "reveal":
            return self._reveal(session, task, memory)
        raise SecureSumError(f"the guard {self.name!r} has no step {stage!r}", hint=_RETELL)

    def _share(self, session: _Session, task: Task) -> Reply:
        names, threshold, total = _names(task.meta, "sites"), task.meta.get("threshold"), task.meta.get("total")
        if not (type(threshold) is int and type(total) is int and 0 < total < 2**62 and names == sorted(names)):
            raise SecureSumError("the list of sites is not as declared", hint=_RETELL)
        rows = _bytes_of(task.tensors, "keys", (len(names), 2 * KEY_BYTES))
        keys = {n: PublicKeys(row[:KEY_BYTES].tobytes(), row[KEY_BYTES:].tobytes()) for n, row in zip(names, rows, strict=True)}
        sealed = session.round.share(keys, threshold)
        session.site_names, session.total = names, total
        return Reply({"shares": _table([sealed.get(name, bytes(SEALED_BYTES)) for name in names], SEALED_BYTES)})

    def _reveal(self, session: _Session, task: Task, memory: dict[str, Any]) -> Reply:
        arrived, missing = _names(task.meta, "arrived"), _names(task.meta, "missing")
        # A round that is repeated after a crash has the same updates: two sums of it over other sites differ by updates of single sites.
        opened: dict[int, list[str]] = memory.setdefault("opened", {})
        if opened.get(session.round.round, sorted(arrived)) != sorted(arrived):
            raise SecureSumError(
                f"round {session.round.round} was opened before, over other sites: both sums together would show single updates",
                hint="let the same sites take part; to allow it all the same, start the sites anew",
            )
        revealed = session.round.reveal(arrived, missing)
        opened[session.round.round] = sorted(arrived)
        seeds, masks = ([shares[name] for name in sorted(shares)] for shares in (revealed.seeds, revealed.masks))
        return Reply({"seeds": _table(seeds, SHARE_BYTES), "masks": _table(masks, SHARE_BYTES)})


@dataclass
class _Session:
    """A site's side of an attempt at a round, and what it was told of it."""

    round: SiteRound
    site_names: list[str] = field(default_factory=list)
    total: int = 0


class _Asking:
    """Asks the sites of a round for the steps of the protocol, and notes why some do not answer."""

    def __init__(self, guard: str, round: GuardRound, attempt: str) -> None:
        self._guard, self._round, self.attempt = guard, round, attempt
        self.reasons: dict[str, str] = {}

    def ask(
        self,
        stage: str,
        sites: Sequence[str],
        heights: tuple[int, ...],
        told: Mapping[str, Any] = _NOTHING,
        tensors: Mapping[str, Tensor] = _NOTHING,
    ) -> dict[str, tuple[Bytes, ...]]:
        """Return the tables of bytes that each site answers with, of so many rows; sites whose answers are of another form are left out."""
        layout = _ANSWERS[stage]
        beside = {"guard": self._guard, "stage": stage, "run": self._round.run, "attempt": self.attempt}
        tasks = {site: Task("guard", self._round.number, tensors, {**beside, **told}) for site in sites}
        replies = self._round.exchange(tasks)
        answers = {}
        for site in sorted(tasks):
            reply = replies.get(site, Reply(error="no answer before the deadline"))
            try:
                if reply.error is not None or reply.tensors.keys() != layout.keys():
                    raise SecureSumError(reply.error or "its answer is not as declared", hint=_RETELL)
                answers[site] = tuple(
                    _bytes_of(reply.tensors, name, (height, width)) for (name, width), height in zip(layout.items(), heights, strict=True)
                )
            except SecureSumError as error:
                self.reasons[site] = error.message
        return answers

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say with a :class:`~fedcast.errors.QuorumError` why sites are missing."""
        try:
            yield
        except QuorumError as error:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.reasons.items()))
            raise QuorumError(f"{error.message} ({reasons})" if reasons else error.message, hint=error.hint) from error


_ANSWERS = {
    "keys": {"keys": KEY_BYTES},
    "shares": {"shares": SEALED_BYTES},
    "reveal": {"seeds": SHARE_BYTES, "masks": SHARE_BYTES},
}
"""Names of an answer's tensors, uint8, each with the length of its rows."""


class _Sum:
    """Sums masked integers as they arrive, whoever they are from, and opens the sum."""

    def __init__(self, server: ServerRound, asking: _Asking, grid: Grid, round: GuardRound) -> None:
        self._server, self._asking, self._grid, self._round = server, asking, grid, round

    def add(self, site: str, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add a site's integers; its weight is among them."""
        try:
            self._server.add(site, vectors[_MASKED].contiguous().numpy().view(self._grid.dtype))
        except SecureSumError as error:
            raise ScreenError(error.message, hint=error.hint) from error

    def means(self) -> dict[str, Tensor]:
        """Open the sum with what the sites reveal; :class:`~fedcast.errors.QuorumError` where too few are left."""
        server, round = self._server, self._round
        arrived, missing = sorted(server.arrived), server.missing
        with self._asking.explained():
            server.close()
            answers = self._asking.ask("reveal", arrived, (len(arrived), len(missing)), {"arrived": arrived, "missing": missing})
            server.unmask({site: Revealed(_by_name(arrived, seeds), _by_name(missing, masks)) for site, (seeds, masks) in answers.items()})
        opened = self._grid.open(server.total, sum(round.samples[site] for site in arrived), len(arrived))
        round.server.log["secure_sum"] = {"sites": len(arrived), "cut": opened.cut}
        return {"shared": torch.from_numpy(opened.added_to(round.server.shared.numpy()))}


def _session(memory: Mapping[str, Any], attempt: str, site: str) -> _Session:
    session: _Session | None = memory.get("sessions", {}).get(attempt)
    if session is None:
        raise SecureSumError(
            f"site {site} has no keys for this sum: it was started anew since, or the round began anew",
            hint="nothing is to be done: it takes part again in the next round",
        )
    return session


def _table(rows: Sequence[bytes], width: int) -> Tensor:
    """Return rows of bytes as uint8 ``[rows, width]``."""
    return torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), width).copy())


def _by_name(names: Sequence[str], rows: Bytes) -> dict[str, bytes]:
    return {name: row.tobytes() for name, row in zip(names, rows, strict=True)}


def _bytes_of(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Bytes:
    """Return a uint8 tensor of that shape; :class:`~fedcast.errors.SecureSumError` where there is none."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
        raise SecureSumError(f"{name} is missing, or is not uint8 {shape}", hint=_RETELL)
    return tensor.contiguous().numpy()


def _text(meta: Mapping[str, Any], key: str) -> str:
    value = meta.get(key)
    if not isinstance(value, str):
        raise SecureSumError(f"the task's {key} is no text", hint=_RETELL)
    return value


def _names(meta: Mapping[str, Any], key: str) -> list[str]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SecureSumError(f"the task's {key} are no names", hint=_RETELL)
    if len(set(value)) < len(value):
        raise SecureSumError(f"the task names one of its {key} twice", hint=_RETELL)
    return list(value)
