"""Every error fedcast raises on purpose, in one tree.

::

    FedcastError                      1  anything below
    ├── SpecError                    10  a spec says something that cannot be run
    │   └── UnknownNameError         11  a name that no registry, catalogue or spec knows
    ├── DataError                    20  data cannot be used as it is
    │   ├── FrameError               21  a frame is malformed: file, column, series, row and repair are named
    │   ├── SourceError              22  a file or folder cannot be found or read
    │   └── SplitError               23  too few points are left to train, validate or test on
    ├── ModelError                   30  a model cannot do what was asked
    │   ├── CheckpointError          31  a model folder is missing, damaged or of another shape
    │   └── QuantileError            32  a quantile level outside the levels the model learnt
    ├── FederationError              40  a round cannot go on
    │   ├── ScreenError              41  a message does not match its declared layout
    │   ├── WireError                42  bytes are not a message
    │   ├── QuorumError              43  too few usable replies
    │   ├── SiteError                44  a site failed; its message carries no traceback
    │   ├── ConsortiumError          45  a kit of a consortium is missing, damaged or does not fit
    │   │   ├── UnreachableError     46  a coordinator does not answer
    │   │   ├── CertificateError     47  a coordinator's certificate is not to be trusted: its authority, dates or host name
    │   │   └── IdentityError        48  a site's key is not one that the coordinator has registered
    │   ├── SecureSumError           49  masks or shares of a sum do not open, or would open more than the sum
    │   └── PrivacyBudgetError       70  the next round would spend more privacy than the budget has left
    ├── RunError                     50  a run folder cannot be used
    │   ├── ResumeError              51  a run folder belongs to another spec
    │   └── AuditError               52  an audit log does not hold together: the first line that does not is named
    └── MissingExtraError            60  an optional library is not installed

Every class has a ``code`` (stable, kebab-case), an ``exit_code`` (the number ``fedcast`` exits with), a sentence that names the
thing, and a ``hint``: what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Final

_MOST_NAMES: Final = 20


class FedcastError(Exception):
    """Base of every error raised on purpose.

    Parameters
    ----------
    message
        One sentence that names the thing, without a final period.
    hint
        The next step, without a final period.
    """

    code: ClassVar[str] = "fedcast"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def to_json(self) -> dict[str, object]:
        """Return the error as a JSON-ready dict (for ``--json``)."""
        return {"error": self.code, "exit_code": self.exit_code, "message": self.message, "hint": self.hint}


class SpecError(FedcastError):
    """A spec says something that cannot be run."""

    code = "spec"
    exit_code = 10


class UnknownNameError(SpecError):
    """A name that no registry, catalogue or spec knows."""

    code = "unknown-name"
    exit_code = 11

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], *, otherwise: str | None = None) -> UnknownNameError:
        """Build the error from the names that are known, with a suggestion when one is close.

        Parameters
        ----------
        kind
            What the name should have named, such as ``"method"``.
        name
            The unknown name.
        known
            All names that would have been accepted.
        otherwise
            The hint where no name is close; by default the first names that are known.
        """
        names = sorted(known)
        if close := get_close_matches(name, names, n=1):
            hint = f"did you mean {close[0]!r}?"
        elif otherwise is not None:
            hint = otherwise
        else:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            hint = f"known: {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"
        return cls(f"unknown {kind} {name!r}", hint=hint)


class DataError(FedcastError):
    """Data cannot be used as it is."""

    code = "data"
    exit_code = 20


@dataclass(frozen=True)
class FrameProblem:
    """One thing that is wrong with a frame.

    Attributes
    ----------
    kind
        Stable kebab-case name, such as ``"duplicate-stamps"``.
    message
        What is wrong, in one sentence.
    repair
        The command or code that repairs it.
    column, series, row, count
        Where: the column, the first series, the first row (0-based position in the file's data rows) and how many rows; ``None``
        where it does not apply.
    """

    kind: str
    message: str
    repair: str
    column: str | None = None
    series: str | None = None
    row: int | None = None
    count: int | None = None

    def where(self) -> str:
        """Return the place in words, such as ``column 'y', series 'T1', row 7``."""
        parts = []
        if self.column is not None:
            parts.append(f"column {self.column!r}")
        if self.series is not None:
            parts.append(f"series {self.series!r}")
        if self.row is not None:
            parts.append(f"row {self.row}")
        return ", ".join(parts)


class FrameError(DataError):
    """A frame is malformed; file, column, series, first row and the repair are named."""

    code = "frame"
    exit_code = 21

    def __init__(self, source: str, problems: Sequence[FrameProblem]) -> None:
        lines = [f"{source} cannot be used: {len(problems)} problem{'s' if len(problems) != 1 else ''}"]
        for problem in problems:
            where = problem.where()
            lines.append(f"  {problem.kind}: {problem.message}{f' ({where})' if where else ''}")
            lines.append(f"    repair: {problem.repair}")
        super().__init__("\n".join(lines), hint=problems[0].repair)
        self.source = source
        self.problems = tuple(problems)


class SourceError(DataError):
    """A file or folder cannot be found or read."""

    code = "source"
    exit_code = 22


class SplitError(DataError):
    """Too few points are left to train, validate or test on."""

    code = "split"
    exit_code = 23


class ModelError(FedcastError):
    """A model cannot do what was asked."""

    code = "model"
    exit_code = 30


class CheckpointError(ModelError):
    """A model folder is missing, damaged or of another shape."""

    code = "checkpoint"
    exit_code = 31


class QuantileError(ModelError):
    """A quantile level outside the levels the model learnt."""

    code = "quantile"
    exit_code = 32


class FederationError(FedcastError):
    """A round cannot go on."""

    code = "federation"
    exit_code = 40


class ScreenError(FederationError):
    """A message does not match its declared layout."""

    code = "screen"
    exit_code = 41


class WireError(FederationError):
    """Bytes are not a message."""

    code = "wire"
    exit_code = 42


class QuorumError(FederationError):
    """Too few usable replies came back."""

    code = "quorum"
    exit_code = 43


class SiteError(FederationError):
    """A site failed; its message carries no traceback, since a traceback can leak data."""

    code = "site"
    exit_code = 44


class ConsortiumError(FederationError):
    """A kit of a consortium is missing, damaged or does not fit."""

    code = "consortium"
    exit_code = 45


class UnreachableError(ConsortiumError):
    """A coordinator does not answer."""

    code = "unreachable"
    exit_code = 46


class CertificateError(ConsortiumError):
    """A coordinator's certificate is not to be trusted: its authority, its dates or its host name; or there is no TLS at all."""

    code = "certificate"
    exit_code = 47


class IdentityError(ConsortiumError):
    """A site's key is not one that the coordinator has registered."""

    code = "identity"
    exit_code = 48


class SecureSumError(FederationError):
    """Masks or shares of a secure sum do not open, or would open more than the sum."""

    code = "secure-sum"
    exit_code = 49


class PrivacyBudgetError(FederationError):
    """The next round would spend more privacy than the budget has left; the model is as it was."""

    code = "privacy-budget"
    exit_code = 70


class RunError(FedcastError):
    """A run folder cannot be used."""

    code = "run"
    exit_code = 50


class ResumeError(RunError):
    """A run folder belongs to another spec."""

    code = "resume"
    exit_code = 51


class AuditError(RunError):
    """An audit log does not hold together; the first line that does not is named."""

    code = "audit"
    exit_code = 52


class MissingExtraError(FedcastError):
    """An optional library is not installed."""

    code = "missing-extra"
    exit_code = 60

    @classmethod
    def of(cls, library: str, extra: str) -> MissingExtraError:
        """Build the error from the missing library and the extra that brings it."""
        return cls(f"{library} is not installed", hint=f"pip install 'fedcast[{extra}]'")
