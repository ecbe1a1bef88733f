"""What a site allows a run to ask of it: its own rules, in its own ``site.toml``, which no coordinator can change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcast.errors import ConsortiumError, SpecError
from fedcast.federated.plan import Plan


class Policy(BaseModel):
    """A site's rules. What shows single values of its data, or gradients, is refused unless the site says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: tuple[str, ...] = Field((), description="methods that may be run; empty: any")
    guards: tuple[str, ...] = Field((), description="guards that every run must have")
    rounds: int = Field(10_000, ge=1, description="most rounds of a run")
    samples: int = Field(0, ge=0, description="most forecasts, with their truth, that may leave for a report (evaluation.samples)")
    conflict: bool = Field(False, description="whether sketches of gradients may leave (evaluation.conflict)")
    decoders: bool = Field(True, description="whether private weights may leave where a method serves unseen domains with them")

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> Policy:
        """Return the rules of a ``site.toml``.

        Raises
        ------
        ConsortiumError
            When a rule is unknown or has no such value.
        """
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConsortiumError(
                f"site.toml: policy.{key} is refused: {first['msg']}", hint=f"the rules are {', '.join(cls.model_fields)}"
            ) from error

    def check(self, plan: Plan) -> None:
        """Refuse a run that breaks a rule.

        Raises
        ------
        SpecError
            Naming the rule.
        """
        spec = plan.spec
        listed = {guard.name for guard in spec.guards}
        missing = [guard for guard in self.guards if guard not in listed]
        exports = plan.method.exports() != "never" and plan.layout.private_size > 0
        broken = {
            f"method {spec.method.name!r} (policy.methods)": bool(self.methods) and spec.method.name not in self.methods,
            f"a run without the guard {missing[0] if missing else ''!r} (policy.guards)": bool(missing),
            f"{spec.federation.rounds} rounds (policy.rounds = {self.rounds})": spec.federation.rounds > self.rounds,
            f"evaluation.samples = {spec.evaluation.samples} (policy.samples = {self.samples})": spec.evaluation.samples > self.samples,
            "evaluation.conflict (policy.conflict = false)": spec.evaluation.conflict > 0 and not self.conflict,
            f"private weights to leave it, as in {spec.method.name!r} (policy.decoders = false)": exports and not self.decoders,
        }
        for what, breaks in broken.items():
            if breaks:
                raise SpecError(f"this site does not allow {what}", hint="change the run's spec, or agree with the site on its site.toml")
