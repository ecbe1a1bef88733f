"""A rule in the place of the weighted mean that a few sites, whatever they send, cannot lead far away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedcast.errors import QuorumError, ScreenError, SpecError
from fedcast.federated.guards.base import Arrival, Guard, GuardRound
from fedcast.methods.base import Mean
from fedcast.registry import hyper
from fedcast.training.aggregate import LARGEST_VALUE, Vectors, krum, median, trimmed_mean
from fedcast.training.robust import bulyan, fltrust, geometric_median

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

_RESUMES = "mend the sites and run the same command again: it resumes from the last round"


@dataclass(frozen=True)
class Robust(Guard):
    """The rule takes the place of every mean of weights. All sites weigh alike in it: a claim of training points buys no influence."""

    name: ClassVar[str] = "robust"
    summary: ClassVar[str] = "a rule in place of the mean that a minority of sites cannot lead astray: median, Krum, FLTrust and others"

    rule: Literal["median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "fltrust"] = hyper(
        "trimmed_mean", "what takes the place of the mean"
    )
    malicious: Annotated[int, Field(ge=1)] | None = hyper(None, "how many sites may send anything at all; from `share` where it is not set")
    share: Annotated[float, Field(gt=0, lt=0.5)] = hyper(0.2, "share of the sites asked that may; at least one site")
    keep: Annotated[int, Field(ge=1)] | None = hyper(None, "rows that multi_krum averages; all honest ones where it is not set")
    root: str | None = hyper(None, "the trusted site whose update fltrust measures the others by: the server has no data of its own")

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse methods and tunings whose server step takes more than means, and options that do not belong together."""
        method = plan.method
        if method.pooled or not method.averages:
            raise SpecError(
                f"a robust rule cannot protect method {method.name!r}, whose server step is more than means of what sites send",
                hint="choose a method that takes means alone, such as fedavg, or leave out the guard 'robust'",
            )
        if method.unseen() != "shadow" and method.exports() != "never" and plan.layout.private_size:
            raise SpecError(
                f"a robust rule cannot protect method {method.name!r}, which serves unseen domains by each site's own private weights",
                hint="set method.serving = 'shadow' where the method has it, or leave out the guard 'robust'",
            )
        if plan.answer_shapes:
            raise SpecError(
                f"a robust rule cannot protect tuning {plan.tuning.name!r}, in which sites vote on what is kept",
                hint="choose another tuning, such as lora",
            )
        if (self.rule == "fltrust") != (self.root is not None):
            raise SpecError("the option root belongs to rule = 'fltrust', and that rule needs it", hint="name the trusted site in root")
        if self.rule == "fltrust" and plan.layout.private_size:
            raise SpecError(
                f"fltrust measures updates of shared weights, and method {method.name!r} sends private ones too", hint="choose another rule"
            )
        if self.keep is not None and self.rule != "multi_krum":
            raise SpecError("the option keep belongs to rule = 'multi_krum'", hint="leave it out")

    def check_sites(self, plan: Plan, sites: Sequence[str]) -> None:
        """Refuse a run in which a round has too few sites for the rule, or may miss the trusted one."""
        federation = plan.spec.federation
        asked = federation.selected(len(sites))
        if self.rule == "fltrust" and (self.root not in sites or asked < len(sites)):
            raise SpecError(
                f"the trusted site {self.root!r} is not asked in every round",
                hint=f"name one of {', '.join(sites)} in root, and leave federation.participation at 1",
            )
        needed = self._needed(self._malicious(asked))
        if asked < needed:
            raise SpecError(
                f"rule {self.rule!r} against {self._malicious(asked)} malicious sites needs {needed} sites, and a round asks {asked}",
                hint="lower malicious or share, choose another rule, or have more sites",
            )

    def inspect(self, arrival: Arrival) -> None:
        """Drop a reply with a value that no rule can compute with; the streaming mean has the same bound."""
        for name, tensor in arrival.tensors.items():
            if tensor.numel() and not float(tensor.abs().max()) < LARGEST_VALUE:
                raise ScreenError(f"{name} has a value beyond {LARGEST_VALUE:.0f} in magnitude", hint="lower the site's learning rate")

    def mean(self, round: GuardRound) -> Mean:
        """Return the rule; :class:`~fedcast.errors.QuorumError` where too few replies are left for it."""
        malicious, began = self._malicious(len(round.selected)), round.server.shared

        def rule(name: str, vectors: Sequence[Tensor], weights: Sequence[float], sites: Sequence[str]) -> Tensor:
            needed = self._needed(malicious)
            if len(sites) < needed:
                raise QuorumError(f"rule {self.rule!r} has {len(sites)} usable replies and needs {needed}", hint=_RESUMES)
            if self.root is not None and self.root not in sites:
                raise QuorumError(f"rule {self.rule!r} has no usable reply of {self.root!r}", hint=_RESUMES)
            combined, chosen = self._apply(Vectors(vectors), malicious, sites, began)
            if chosen is not None and name == "shared":
                round.server.log["robust"] = chosen
            return combined

        return rule

    def finish(self, round: GuardRound, before: Tensor) -> None:
        """Take the sites' shares of the weight out of the round's row: the rule gives them none."""
        round.server.log.pop("weights", None)

    def _apply(
        self, rows: Vectors, malicious: int, sites: Sequence[str], began: Tensor
    ) -> tuple[Tensor, dict[str, float] | list[str] | None]:
        """Return what the rule makes of the rows, and for the log whom it chose or trusted."""
        if self.rule == "median":
            return median(rows), None
        if self.rule == "trimmed_mean":
            # A half more, so that no rounding takes a row less off.
            return trimmed_mean(rows, (malicious + 0.5) / rows.n), None
        if self.rule == "geometric_median":
            return geometric_median(rows), None
        if self.root is not None:
            combined, trust = fltrust(rows, sites.index(self.root), began)
            return combined, dict(zip(sites, trust, strict=True))
        if self.rule == "bulyan":
            combined, chosen = bulyan(rows, malicious)
        else:
            keep = 1 if self.rule == "krum" else min(self.keep or rows.n, rows.n - malicious)
            combined, chosen = krum(rows, malicious, keep)
        return combined, [sites[number] for number in chosen]

    def _malicious(self, asked: int) -> int:
        # Rounded first: 0.29 * 100 is a little less than 29 in floating point.
        return self.malicious or max(1, int(round(self.share * asked, 9)))

    def _needed(self, malicious: int) -> int:
        """Return the replies without which the rule promises nothing against so many malicious ones."""
        if self.rule == "bulyan":
            return 4 * malicious + 3
        if self.rule in ("krum", "multi_krum"):
            return 2 * malicious + 3
        return 2 if self.rule == "fltrust" else 2 * malicious + 1
