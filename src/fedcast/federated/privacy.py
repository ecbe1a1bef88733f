"""How much privacy a run has spent: events, their epsilon by dp-accounting, and the ledger of all releases.

Neighbours are federations that differ in one record, which in one of them is a record that contributes 0 ("zero-out", dp-accounting's
``REPLACE_SPECIAL``): how many records there are is no secret, and no divisor depends on the record. What a record is (a site, or a
window of a site), the guard says.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from fedcast.errors import MissingExtraError, ResumeError

Accountant = Literal["pld", "rdp"]
LEDGER = "privacy.jsonl"
"""Name of the ledger in a run folder."""
# Privacy losses are kept on a grid of this width; results are upper bounds on any. With little noise losses are large: on the fine grid
# they take seconds a round, and epsilon differs in the fifth digit.
_FINE, _COARSE, _SMALL = 1e-4, 1e-3, 0.5
# Beyond it epsilon says nothing, and the distributions are so wide that they take minutes; Renyi takes a second whatever a site claims.
_VAST = 1000.0


@dataclass(frozen=True)
class Spending:
    """What one site's records have been through.

    Attributes
    ----------
    noise
        Noise multiplier: standard deviation over what one record moves at most.
    rate
        Chance of a record to be in a step's batch, each independently of the others (Poisson sampling); 1: it always is.
    steps
        How many such steps.
    """

    noise: float
    rate: float
    steps: int


@lru_cache(maxsize=4096)
def epsilon(spending: tuple[Spending, ...], delta: float, accountant: Accountant = "pld") -> float:
    """Return epsilon at ``delta`` of adaptively composed Gaussian steps; infinite where a step has no noise.

    Steps without sampling compose to one Gaussian mechanism, whose epsilon is exact (Balle and Wang, 2018, arXiv 1805.06530). Sampled
    ones are composed by the privacy loss distribution (``"pld"``), or by Renyi divergence (``"rdp"``: looser, and faster where the noise
    is small). All are upper bounds. Where ``"rdp"`` gives more than 1,000, that is returned for both.

    Parameters
    ----------
    spending
        What is composed.
    delta
        Between 0 and 1.
    accountant
        Which of dp-accounting's accountants composes sampled steps.

    Raises
    ------
    MissingExtraError
        When dp-accounting is not installed.
    """
    library = accounting()
    used = [part for part in spending if part.steps and part.rate > 0]
    if not used:
        return 0.0
    if any(part.noise <= 0 for part in used):
        return math.inf
    if all(part.rate >= 1 for part in used):
        whole = math.fsum(part.steps / part.noise**2 for part in used) ** -0.5
        return float(library.get_epsilon_gaussian(whole, delta))
    relation = library.NeighboringRelation.REPLACE_SPECIAL
    loose = _composed(library, library.rdp.RdpAccountant(neighboring_relation=relation), used).get_epsilon(delta)
    if accountant == "rdp" or loose > _VAST:
        return float(loose)
    grid = _COARSE if min(part.noise for part in used) < _SMALL else _FINE
    return float(_composed(library, library.pld.PLDAccountant(relation, grid), used).get_epsilon(delta))


def _composed(library: Any, accountant: Any, spending: Iterable[Spending]) -> Any:
    """Return one of dp-accounting's accountants after it has taken in all steps."""
    for part in spending:
        step = library.GaussianDpEvent(part.noise)
        event = step if part.rate >= 1 else library.PoissonSampledDpEvent(part.rate, step)
        accountant.compose(library.SelfComposedDpEvent(event, part.steps))
    return accountant


def accounting() -> Any:
    """Return the library dp-accounting; :class:`MissingExtraError` where it is not installed."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise MissingExtraError.of("dp-accounting", "privacy") from error
    return dp_accounting


@dataclass(frozen=True)
class Release:
    """One line of the ledger: what is about to leave those who may see it.

    Attributes
    ----------
    round
        The round.
    level
        What is protected: see :class:`fedcast.federated.guards.dp.Dp`.
    noise
        Noise multiplier, as accounted.
    sites
        Rate and steps of each site that may be part of it.
    seeded
        Whether the noise is drawn from the run's seed. The same seeded release, made again after a kill, is the same bytes.
    """

    round: int
    level: str
    noise: float
    sites: Mapping[str, tuple[float, int]]
    seeded: bool

    def to_json(self) -> str:
        """Return the release as a line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line; ``ValueError``, ``TypeError``, ``KeyError`` or ``AttributeError`` where it is none."""
        read = json.loads(line)
        sites = {str(site): (float(rate), int(steps)) for site, (rate, steps) in read.pop("sites").items()}
        return cls(**read, sites=sites)


class Ledger:
    """An append-only file of releases, each on disk before it is made.

    A round that was killed and run again is two releases, whose noise is not the same, and costs twice. Only where noise is drawn from
    seeds, in simulation, the second one is the same bytes and costs nothing.

    Parameters
    ----------
    folder
        The run folder.

    Raises
    ------
    ResumeError
        When a line cannot be read: what was spent is then not known.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        self._whole = 0
        self._releases = list(self._read())

    def __len__(self) -> int:
        """Return the number of releases."""
        return len(self._releases)

    def add(self, release: Release) -> None:
        """Write a release and wait until it is on disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            # A line that a kill cut short was never released, since a release waits for its whole line.
            file.truncate(self._whole)
            file.write(f"{release.to_json()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        if is_new:
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self._releases.append(release)

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return rate and steps of each site in its last release."""
        return {site: sampling for release in self._releases for site, sampling in release.sites.items()}

    def epsilon(self, delta: float, accountant: Accountant, also: Release | None = None) -> float:
        """Return what the site that has spent most has spent, with one more release where ``also`` is given."""
        totals: dict[str, Counter[tuple[float, float]]] = {}
        for release in self._counted(also):
            for site, (rate, steps) in release.sites.items():
                totals.setdefault(site, Counter())[release.noise, rate] += steps
        spent = {tuple(Spending(noise, rate, steps) for (noise, rate), steps in sorted(total.items())) for total in totals.values()}
        return max((epsilon(one, delta, accountant) for one in _undominated(spent)), default=0.0)

    def _counted(self, also: Release | None) -> Iterator[Release]:
        seen: set[str] = set()
        for release in [*self._releases, *([] if also is None else [also])]:
            line = release.to_json()
            if not (release.seeded and line in seen):
                yield release
            seen.add(line)

    def _read(self) -> Iterator[Release]:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            self._whole += len(line) + 1
            try:
                yield Release.from_json(line.decode())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ResumeError(
                    f"line {number} of {self._path} is no release: what this run has spent is not known",
                    hint="restore the file, or start another run in another folder",
                ) from error


def _undominated(spent: Iterable[tuple[Spending, ...]]) -> list[tuple[Spending, ...]]:
    """Leave out who spent no more than another in every way: whatever the sites are, few figures are then computed."""
    kinds = list(spent)

    def below(one: tuple[Spending, ...], other: tuple[Spending, ...]) -> bool:
        simple = len(one) == len(other) == 1 and one != other
        return simple and one[0].noise >= other[0].noise and one[0].rate <= other[0].rate and one[0].steps <= other[0].steps

    return [one for one in kinds if not any(below(one, other) for other in kinds)]
