"""The run folder: what a run leaves behind, and the only thing reports and comparisons read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from fedcast.errors import ResumeError, RunError
from fedcast.spec import RunSpec, load_spec


class RunFolder:
    """A run folder on disk.

    Layout::

        spec.toml            the spec, as it was run
        run.json             spec fingerprint, precision, code version, machine
        metrics.jsonl        one self-describing row a result
        checkpoints/         the server's last two checkpoints
        sites/<site>/        what each site keeps to itself
        final/, best/        models, loadable by Forecaster.from_pretrained
        results.parquet      the test scores
        samples.json         forecasts beside their truth, for the report
        report.html          the page
        audit.jsonl          what was sent, received, dropped and kept
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def sites(self) -> Path:
        """Folder of the sites' own folders."""
        return self.path / "sites"

    @property
    def stores(self) -> Path:
        """Folder of the series stores that worker processes map into memory."""
        return self.path / "stores"

    @property
    def final(self) -> Path:
        """Folder of the model after the last round."""
        return self.path / "final"

    @property
    def best(self) -> Path:
        """Folder of the model with the smallest validation loss."""
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        """File of the rows."""
        return self.path / "metrics.jsonl"

    def spec(self) -> RunSpec:
        """Read the spec that was run."""
        path = self.path / "spec.toml"
        if not path.is_file():
            raise RunError(
                f"{self.path} is no run folder: it has no spec.toml",
                hint="name the folder that `fedcast pretrain` or `fedcast finetune` wrote",
            )
        return load_spec(path)

    def command(self, spec: RunSpec) -> str:
        """Return the command that goes on with this run, for a hint."""
        return f"`fedcast {verb(spec)} {self.path}/spec.toml -o {self.path}`"

    def about(self) -> dict[str, Any]:
        """Read ``run.json``."""
        path = self.path / "run.json"
        if not path.is_file():
            raise RunError(f"{self.path} has no run.json", hint=f"start it again with {self.command(self.spec())}")
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return about

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two processes in one run folder would overwrite each other's checkpoints."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written to: {error.strerror}", hint="choose another --output") from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path} is in use by another process", hint="wait for it, or choose another --output") from error
            yield

    def claim(self, spec: RunSpec, about: dict[str, Any]) -> bool:
        """Write the spec into a fresh folder, or check that the folder holds the same run.

        Returns
        -------
        bool
            Whether the folder already held this run.

        Raises
        ------
        ResumeError
            When it holds another run.
        """
        if (self.path / "run.json").is_file():
            held = self.about()
            for key, what in (("spec_fingerprint", "spec"), ("data_fingerprint", "data"), ("checkpoint_sha256", "checkpoint")):
                if held.get(key) != about.get(key):
                    raise ResumeError(
                        f"{self.path} holds a run of another {what}", hint="choose another --output, or remove the folder to start afresh"
                    )
            return True
        write_text(self.path / "spec.toml", spec.to_toml())
        write_text(self.path / "run.json", json.dumps(about, indent=2) + "\n")
        return False

    def append(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Read the rows, all or of one kind; a last line that a kill cut short is left out."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if kind is None or row["kind"] == kind:
                rows.append(row)
        return rows

    def rewind(self, round_: int, missing: Sequence[dict[str, Any]]) -> None:
        """Drop the rows of rounds after a checkpoint and of results, and add the checkpoint's own rows where a kill kept them back."""
        kept = [row for row in self.rows() if row["kind"] != "result" and row["round"] <= round_]
        if not any(row["round"] == round_ for row in kept):
            kept += missing
        elif sum(row["round"] == round_ for row in kept) < len(missing):
            kept = [row for row in kept if row["round"] < round_] + list(missing)
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def results(self) -> pd.DataFrame:
        """Return the test scores, one row a model and domain."""
        return pd.DataFrame(self.rows("result"))


def verb(spec: RunSpec) -> str:
    """Return the verb of ``fedcast`` that runs a spec."""
    if spec.federation.fleet == "flower":
        return "run"
    return "pretrain" if spec.model.checkpoint is None else "finetune"


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a killed process leaves the old file or the new one."""
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
