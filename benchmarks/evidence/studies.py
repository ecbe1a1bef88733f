"""What is trained for each table: a study is a spec and its rows, a row a method with its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MASKED = ("model.objective=reconstruct",)
PROBED = ("evaluation.conflict=10",)
SHORT = ("federation.rounds=10",)


@dataclass(frozen=True)
class Row:
    """One row of a study.

    Attributes
    ----------
    method
        The ``[method]`` section.
    overrides
        Further assignments, such as ``"model.objective=reconstruct"``.
    """

    method: Mapping[str, Any]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Rows over one spec.

    Attributes
    ----------
    spec
        File of the spec.
    rows
        Rows by label. Studies of one spec share a folder, so a label that two of them have is one run.
    seeds
        Seeds a row.
    overrides
        Assignments for all rows.
    folder
        Folder of the runs, where overrides make them others than the spec's; the spec's name when empty.
    """

    spec: str
    rows: Mapping[str, Row]
    seeds: int = 3
    overrides: tuple[str, ...] = ()
    folder: str = ""

    def path(self) -> Path:
        """Return the file of the spec."""
        return HERE / f"{self.spec}.toml"


def _row(name: str, *overrides: str, **options: Any) -> Row:
    return Row({"name": name, **options}, overrides)


# Methods with personal parts serve domains that no site has seen by the same mixture, so that serving does not stand in for the method.
FORECASTERS = {
    "fedtrl": _row("fedtrl", *PROBED),
    "fedavg": _row("fedavg", *PROBED),
    "fedprox": _row("fedprox"),
    "scaffold": _row("scaffold"),
    "feddyn": _row("feddyn"),
    "fedper": _row("fedper", serving="mixture"),
    "fedavg_encoder": _row("fedavg_encoder", serving="mixture"),
    "ffts": _row("ffts"),
    "fedal": _row("fedal", *MASKED),
    "fedpm": _row("fedpm"),
    "central": _row("central", *PROBED),
    "central_balanced": _row("central_balanced"),
    "local": _row("local", serving="mixture"),
    # FeDaL is a reconstructor: what that alone does to its forecasts, FedAvg of the same reconstructor shows.
    "fedavg, masked": _row("fedavg", *MASKED),
}

# The same reconstructor for all but FFTS, which has its own and learns to forecast beside it.
RECONSTRUCTORS = {
    "local, masked": _row("local", *MASKED, serving="each"),
    "central, masked": _row("central", *MASKED),
    "fedavg, masked": FORECASTERS["fedavg, masked"],
    "fedprox, masked": _row("fedprox", *MASKED),
    "fedtrl, masked": _row("fedtrl", *MASKED, serving="shadow"),
    "ffts": FORECASTERS["ffts"],
    "fedal": FORECASTERS["fedal"],
}

# One linear layer from all tokens to all points would be 10.6 million weights at 816 points.
IN_DOMAIN = {**{name: Row(row.method) for name, row in FORECASTERS.items() if name != "fedavg, masked"}, "ffts": _row("ffts", head="patch")}
IN_DOMAIN["fedal"] = _row("fedal", *MASKED, coreset=32, match_steps=10, refresh=10)  # core-sets take most of its time
# Scored once: it is the same for all rows.
IN_DOMAIN["fedavg"] = _row("fedavg", 'evaluation.baselines=["seasonal_naive"]')

# Small core-sets, learnt quickly: they take most of FeDaL's time.
_QUICK = {"coreset": 32, "match_steps": 10}
FEDAL = {
    "fedal, quick": _row("fedal", *MASKED, **_QUICK),
    "no bias alignment": _row("fedal", *MASKED, **_QUICK, align=0.0),
    "no DBE": _row("fedal", *MASKED, **_QUICK, dbe=False),
    "no core-set tuning": _row("fedal", *MASKED, coreset=0),
    "no gradient correction": _row("fedal", *MASKED, **_QUICK, dynamics="none"),
    "no GBE": _row("fedal", *MASKED, gbe=False),
    "neither DBE nor GBE": _row("fedal", *MASKED, dbe=False, gbe=False),
    "dyn_literal": _row("fedal", *MASKED, **_QUICK, dynamics="dyn_literal"),
    "dyn_scaled": _row("fedal", *MASKED, **_QUICK, dynamics="dyn_scaled"),
    "alpha 0.3": _row("fedal", *MASKED, **_QUICK, alpha=0.3),
}

FFTS = {
    "ffts": FORECASTERS["ffts"],
    "no ATM": _row("ffts", experts="none"),
    "no alignment": _row("ffts", alignment=0.0),
    "no moving average": _row("ffts", server_rate=1.0),
    "no reconstruction": _row("ffts", mask_ratio=0.0),
}

FEDPM = {
    "fedpm": _row("fedpm"),
    "row-wise mean": _row("fedpm", aggregation="fedavg"),
    "no exchange": _row("fedpm", aggregation="none"),
    "random fill": _row("fedpm", fill="random_isolated"),
    "no fill": _row("fedpm", fill="none"),
    "no mean/std head": _row("fedpm", statistics=0),
    **{f"{name} backbone": _row("fedpm", backbone=name) for name in ("cnn", "fc")},
    "64 prototypes": _row("fedpm", prototypes=64),
    "patch 8": _row("fedpm", patch=8),
    "delta 0.9": _row("fedpm", delta=0.9),
    "dead-code restart": _row("fedpm", restart=True),
    "as released": _row("fedpm", as_released=True),
    "standardised units": _row("fedpm", units="data"),
}

STUDIES: dict[str, Study] = {
    "many-domains": Study("many_domains", FORECASTERS),
    "reconstruction": Study("many_domains", RECONSTRUCTORS),
    "in-domain": Study("in_domain", IN_DOMAIN),
    "fedal": Study("many_domains", FEDAL, 1, SHORT, "many_domains-short"),
    "ffts": Study("many_domains", FFTS, 1, ("federation.rounds=5",), "many_domains-shorter"),
    "fedpm": Study("in_domain", FEDPM, 1, SHORT, "in_domain-short"),
}
