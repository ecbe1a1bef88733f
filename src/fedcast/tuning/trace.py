"""TRACE (arXiv 2503.16991): gated low-rank additions, of which only the important ones are kept, and optionally a smaller head.

Additions, gates and head train together. Then the importance of every addition is measured on validation windows, by the gradient of
its gate, averaged over random choices of those that stay (DSIC): what an addition is worth depends on which others are there. The
most important ones are kept, the others masked; masked ones may come back, until the last choice, which stands.

Found (trace.md B2): gates, masks, gate gradients, random maskings, validation data, reversibility, and M = 8. Reconstructed: the
formulas, which maps are adapted, the scale, half of them kept after four choices, one choice a round. The paper has one site and no
rounds; here every site measures with the same maskings after its steps, and the server takes the mean, weighted by training points.
There is no choice after the first round: before it B is zero, and so is every importance. Left out: dropout in the additions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch, Windows
from fedcast.errors import QuorumError, SpecError
from fedcast.models.contract import Model, OwnLossModel
from fedcast.models.reheaded import Reheaded
from fedcast.models.seeding import seeded
from fedcast.registry import hyper
from fedcast.training.gates import LINEAR_MAPS, add_gates, draw_masks, gated, importances, merged, set_mask
from fedcast.tuning.base import Tuning

_PROBE = 64


@dataclass(frozen=True)
class Trace(Tuning):
    """Gated low-rank additions train, with a head; the most important additions are kept.

    A masked addition has no gradient. Weight decay and moments that the optimiser keeps can still move it a little.
    """

    name: ClassVar[str] = "trace"
    summary: ClassVar[str] = "gated low-rank additions and the head train; additions that matter on validation windows are kept (TRACE)"
    rewires: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = hyper(2, "rank of the additions (r)")
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = hyper(0.5, "share of the additions that is kept in the end")
    selections: Annotated[int, Field(ge=1)] = hyper(4, "how often they are chosen (S): after rounds 2, 3, ..., with fewer each time")
    draws: Annotated[int, Field(ge=1)] = hyper(8, "random maskings that an importance is averaged over (M)")
    selection: Literal["dsic", "naive", "random"] = hyper("dsic", "importance beside as many others as stay, beside all, or by chance")
    targets: tuple[str, ...] = hyper((), "linear maps to adapt: ends of their names; by default those of attention and feed-forward parts")
    head: Literal["own", "depthwise", "flatten"] = hyper("own", "the model's head, or a new one: TRACE's (long horizons) or MOMENT's")
    width: Annotated[int, Field(ge=1)] = hyper(64, "width to which the head 'depthwise' narrows the features (d')")
    context: Annotated[int, Field(ge=0)] = hyper(0, "steps of the fixed context that a new head reads; 0: the longest of the model")
    horizon: Annotated[int, Field(ge=0)] = hyper(0, "steps that a new head forecasts in one pass; 0: as many as the model")
    batches: Annotated[int, Field(ge=1)] = hyper(32, "most validation batches for each masking")

    def check(self, rounds: int) -> None:
        """Refuse a run of fewer than three rounds; see :meth:`turn`."""
        self.turn(rounds, rounds)

    def prepare(self, model: Model, seed: int) -> Model:
        """Put gated additions around linear maps, in place, and a new head on the model where asked for; freeze the rest.

        Raises
        ------
        ModelError
            When no linear map of such a name has an effect on the loss.
        """
        if self.head != "own":
            model = Reheaded.on(model, self.head, width=self.width, context=self.context, horizon=self.horizon, seed=seed)
        heads = [parameter for name, parameter in model.named_parameters() if model.head(name)]
        add_gates(model, self.targets or (*model.lora_targets, *LINEAR_MAPS), self.rank, seed, lambda: _outcome(model))
        for parameter in heads:
            parameter.requires_grad_(True)
        return model

    def plain(self, model: Model) -> Model:
        """Return a copy with the kept additions, times their gates, in the weights; a new head stays."""
        return merged(model)

    def state_shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Return the shape of the mask [K], 1 where an addition is kept, in the order of the model's modules."""
        return {"mask": (len(gated(model)),)}

    def apply(self, model: Model, state: Mapping[str, Tensor]) -> None:
        """Mask the additions; without a state all are kept."""
        set_mask(model, state["mask"] if "mask" in state else torch.ones(len(gated(model))))

    def answer_shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the importances [K], and of whether the site could measure them [1]."""
        return {"importance": (len(gated(model)),), "measured": (1,)}

    def answer(
        self, model: Model, loss: Callable[[Batch], Tensor], batches: Callable[[], Sequence[Batch]], *, round: int, rounds: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the importances after the site's steps, zeros in rounds without a choice; see :meth:`Tuning.answer`."""
        modules = len(gated(model))
        turn = self.turn(round, rounds)
        if turn is None:
            return {"importance": torch.zeros(modules), "measured": torch.zeros(1)}
        if self.selection == "random":
            # the same at every site, and so is their mean
            chance = np.random.default_rng([seed, round]).random(modules, dtype=np.float32)
            return {"importance": torch.from_numpy(chance), "measured": torch.ones(1)}
        found = _spread(batches(), self.batches)
        if not found:
            return {"importance": torch.zeros(modules), "measured": torch.zeros(1)}
        if self.selection == "naive":
            masks = torch.ones(1, modules)
        else:
            masks = draw_masks(modules, self.kept(modules, *turn), self.draws, (seed, round))
        return {"importance": importances(model, loss, found, masks), "measured": torch.ones(1)}

    def decide(
        self,
        state: Mapping[str, Tensor],
        answers: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        *,
        round: int,
        rounds: int,
        seed: int,
    ) -> dict[str, Tensor]:
        """Return the mask of the next round: the additions with the largest mean importance.

        Raises
        ------
        QuorumError
            When additions are to be chosen and no site that answered has validation windows.
        """
        turn = self.turn(round, rounds)
        if turn is None:
            return dict(state) or {"mask": torch.ones_like(answers[0]["importance"])}
        total, mean = 0.0, torch.zeros(answers[0]["importance"].shape, dtype=torch.float64)
        for answer, weight in zip(answers, weights, strict=True):
            if float(answer["measured"]) <= 0.5:
                continue
            mean += weight * answer["importance"].double().clamp_min(0)
            total += weight
        if total <= 0:
            raise QuorumError(
                f"no site that answered round {round} has validation windows, by which additions are chosen",
                hint="give sites longer series or more validation windows, or set tuning.selection = 'random'",
            )
        best = torch.argsort(mean / total, descending=True, stable=True)[: self.kept(len(mean), *turn)]
        return {"mask": torch.zeros(len(mean)).index_fill_(0, best, 1.0)}

    def turn(self, round: int, rounds: int) -> tuple[int, int] | None:
        """Return which choice follows a round and how many there are, both from 1; ``None`` where none follows.

        Where a run has fewer rounds than choices and two more, there are as many as it has room for: what is kept trains on after the
        last one.

        Raises
        ------
        SpecError
            When a run of fewer than three rounds has no room for any.
        """
        if rounds < 3:
            raise SpecError(
                f"tuning 'trace' chooses after the second round and trains on, and the run has {rounds} with exchange",
                hint="set federation.rounds to at least 3",
            )
        turns = min(self.selections, rounds - 2)
        return (round - 1, turns) if 1 <= round - 1 <= turns else None

    def kept(self, modules: int, turn: int, turns: int) -> int:
        """Return k_t, how many of K modules are kept after a choice: linearly fewer, at the last one the share ``keep``."""
        final = max(1, round(self.keep * modules))
        return modules - round((modules - final) * turn / turns)


def _spread(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Return at most so many batches, evenly spread: they are ordered by dataset and series."""
    count = min(most, len(batches))
    return [batches[index * len(batches) // count] for index in range(count)]


def _outcome(model: Model) -> Tensor:
    """Return the loss of one window, or for a model without a loss of its own its forecast."""
    context = torch.sin(torch.arange(min(_PROBE, model.config.context), device=model.device))[None]
    seen = torch.ones_like(context, dtype=torch.bool)
    with seeded(0):
        if isinstance(model, OwnLossModel):
            label = torch.zeros(1, dtype=torch.int64, device=model.device)
            place = Windows(np.zeros(1, dtype=np.int64), np.full(1, context.shape[1]))
            batch = Batch(context, seen, context[:, :1], seen[:, :1], place, label, label)
            return model.step(batch, lambda: torch.Generator(model.device).manual_seed(0))[0]
        return model(context, seen, 1).point.sum()
