"""Fewer bytes: a site sends codes of its update, the change of the shared weights, in place of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcast.errors import ScreenError, SpecError
from fedcast.federated.guards.base import Arrival, Declared, Guard, Outgoing
from fedcast.federated.messages import Task
from fedcast.registry import hyper
from fedcast.training.codecs import BFloat16, BitDifference, Codec, CodeLayout, Int8, TopK, deflate, inflate

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

_CODES = "shared."
_RESIDUAL = "residual"


@dataclass(frozen=True)
class Compress(Guard):
    """Codes of the update, made by :mod:`fedcast.training.codecs`, and zstd over their bytes.

    The update is what the site has after its steps less what it began from; the server adds what the codes say to what it sent.
    What a codec leaves out of an update is kept at the site and added to its next one (error feedback), so nothing is lost for good.
    Private weights, and a method's own tensors, travel as they are.

    Where the shared weights reach the sites in bfloat16, the server still adds updates to its own, exact ones: it holds the master copy,
    as in mixed-precision training (Micikevicius et al., ICLR 2018, arXiv 1710.03740). Added to the rounded ones, an update of less than
    half a step of bfloat16 would be lost in every round.
    """

    name: ClassVar[str] = "compress"
    summary: ClassVar[str] = "updates travel as bfloat16, int8 or their largest values, with error feedback; zstd over the bytes"

    codec: Literal["bf16", "int8", "top_k", "none"] = hyper("int8", "codes of the update; none: lossless, with zstd alone")
    share: Annotated[float, Field(gt=0, le=1)] = hyper(0.05, "share of the update's values that top_k keeps")
    block: Annotated[int, Field(ge=16, le=65536)] = hyper(256, "values that share a scale in int8")
    rounding: Literal["nearest", "stochastic"] = hyper("nearest", "of int8: to the nearest step, or up or down at random, right on average")
    feedback: bool = hyper(True, "whether what the codes left out is added to the site's next update")
    zstd: Annotated[int, Field(ge=0, le=19)] = hyper(0, "level of zstd over the codes' bytes; 0: none")
    direction: Literal["up", "both"] = hyper("up", "both: the shared weights reach the sites as bfloat16")

    def __post_init__(self) -> None:
        if self.codec == "none" and not self.zstd:
            raise SpecError("the guard 'compress' without a codec and without zstd does nothing", hint='set zstd = 3, or codec = "int8"')
        if self.codec == "none" and self.direction == "both":
            raise SpecError("the guard 'compress' is lossless without a codec, and bfloat16 is not", hint='set direction = "up"')

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse guards that would work on codes, and error feedback where weights change their places between rounds."""
        after = guards[[guard.name for guard in guards].index(self.name) + 1 :]
        for guard in guards:
            if type(guard).accumulator is not Guard.accumulator:
                raise SpecError(f"the guard {guard.name!r} adds up replies unread, and codes do not add up", hint="leave out 'compress'")
            if guard in after and type(guard).encode is not Guard.encode:
                raise SpecError(f"the guard {guard.name!r} would change codes", hint="list 'compress' after it")
        if plan.method.reorders and self.feedback and self.codec != "none":
            raise SpecError(
                f"method {plan.method.name!r} gives shared weights other places, and error feedback is by place",
                hint="set feedback = false in the guard 'compress'",
            )

    def encode(self, outgoing: Outgoing) -> None:
        """Put codes of the update in the place of the shared weights."""
        if "shared" not in outgoing.tensors:
            return
        weights, received = outgoing.tensors.pop("shared"), outgoing.received["shared"]
        codec = self._codec
        if codec is None:
            codes = BitDifference().encode(weights, received)
        else:
            update = weights - received
            if self.feedback and _RESIDUAL in outgoing.state:
                update += outgoing.state[_RESIDUAL]
            codes = codec.encode(update, outgoing.rng)
            if self.feedback:
                outgoing.state[_RESIDUAL] = update - codec.decode(codes, len(update))
        if self.zstd:
            codes = {"zstd": deflate(codes, self.zstd)}
        outgoing.tensors |= {f"{_CODES}{name}": code for name, code in codes.items()}

    def pack(self, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        """Send the shared weights as bfloat16, where both directions are compressed."""
        if self.direction == "up":
            return tasks
        halves: dict[int, Tensor] = {}  # sites that are sent the same vector share its copy
        packed = {}
        for site, task in tasks.items():
            shared = task.tensors["shared"]
            if id(shared) not in halves:
                halves[id(shared)] = shared.to(torch.bfloat16)
            packed[site] = replace(task, tensors={**task.tensors, "shared": halves[id(shared)]})
        return packed

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Begin from the weights as they came, in float32."""
        if self.direction == "both" and "shared" in tensors:
            if tensors["shared"].dtype != torch.bfloat16:
                raise ScreenError("the task's shared weights are not bfloat16", hint="check that both sides run the same spec")
            tensors["shared"] = tensors["shared"].float()

    def declare(self, shapes: Declared) -> Declared:
        """Return the codes in the place of the shared weights; a zstd frame, and the gaps of top_k, may be shorter."""
        if "shared" not in shapes:
            return shapes
        (size,), _ = shapes["shared"]
        layout = self._layout(size)
        if self.zstd:
            # Of bytes that do not compress a frame is a little longer (ZSTD_COMPRESSBOUND).
            raw = sum(shape[0] * dtype.itemsize for shape, dtype in layout.values())
            layout = {"zstd": ((raw + (raw >> 8) + 64,), torch.uint8)}
        return {name: kind for name, kind in shapes.items() if name != "shared"} | {f"{_CODES}{n}": kind for n, kind in layout.items()}

    def decode(self, arrival: Arrival) -> None:
        """Add the update that the codes say to the weights that the site was sent."""
        if "shared" in arrival.tensors:
            raise ScreenError("its weights did not travel as codes", hint="check that both sides run the same spec")
        sent = arrival.sent["shared"]
        names = [name for name in arrival.tensors if name.startswith(_CODES)]
        codes = {name.removeprefix(_CODES): arrival.tensors.pop(name) for name in names}
        arrival.tensors["shared"] = self._weights(codes, sent)

    def _weights(self, codes: dict[str, Tensor], sent: Tensor) -> Tensor:
        if self.zstd:
            if codes.keys() != {"zstd"}:
                raise ScreenError("its codes are not one zstd frame", hint="check that both sides run the same spec")
            codes = inflate(codes["zstd"], self._layout(len(sent)))
        codec = self._codec
        return BitDifference().decode(codes, sent) if codec is None else codec.decode(codes, len(sent)).add_(sent)

    @property
    def _codec(self) -> Codec | None:
        known: dict[str, Codec] = {
            "bf16": BFloat16(),
            "int8": Int8(self.block, self.rounding == "stochastic"),
            "top_k": TopK(self.share),
        }
        return known.get(self.codec)

    def _layout(self, size: int) -> CodeLayout:
        codec = self._codec
        return BitDifference().layout(size) if codec is None else codec.layout(size)
