"""Runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedcast.errors import RunError
from fedcast.run.folder import RunFolder
from fedcast.spec import RunSpec


def compare(runs: Sequence[str | Path]) -> pd.DataFrame:
    """Return the test scores of runs in one frame.

    The trained model's rows carry the run's name where two runs trained by the same method with other settings, or its folder where they
    share the name; a baseline that was scored in several runs over the same data stands there once.

    Parameters
    ----------
    runs
        Run folders.

    Returns
    -------
    pandas.DataFrame
        Result rows (see :class:`fedcast.run.folder.RunFolder`), with a column ``run``.

    Raises
    ------
    RunError
        When a folder is no complete run, or the runs were scored on different data or windows.
    """
    frames: list[pd.DataFrame] = []
    shares: set[tuple[float, float]] = set()
    for path in runs:
        folder = RunFolder(path)
        spec = folder.spec()
        rows = folder.results()
        if rows.empty:
            raise RunError(f"{path} has no results yet", hint=f"finish it with {folder.command(spec)}")
        frames.append(rows.assign(run=spec.name, folder=str(path), settings=_settings(spec)))
        shares.add((spec.data.validation, spec.data.test))
    if not frames:
        raise RunError("no run to compare", hint="name one or more run folders")
    rows = pd.concat(frames, ignore_index=True)
    for column in ("data_fingerprint", "context"):
        if rows[column].nunique() > 1:
            raise RunError(f"the runs differ in {column}", hint="compare runs over the same data and horizon")
    if len({tuple(sorted(set(frame["horizon"]))) for frame in frames}) > 1:
        raise RunError("the runs differ in horizon", hint="compare runs over the same data and horizon")
    for column in ("held_out", "windows"):
        differs = rows.groupby(["domain", "horizon"])[column].nunique() > 1
        if differs.any():
            raise RunError(
                f"the runs differ in {column} of domain {differs[differs].index[0][0]!r}", hint="compare runs that were scored alike"
            )
    trained = rows["model"] == rows["method"]
    settings = rows[trained].groupby("model")["settings"].nunique()
    ambiguous = trained & rows["model"].isin(settings[settings > 1].index)
    # Runs of one method and one name: their folders tell them apart.
    named = rows[ambiguous].groupby("run")["settings"].nunique()
    rows["run"] = rows["run"].where(~rows["run"].isin(named[named > 1].index), rows["folder"])
    rows.loc[ambiguous, "model"] = rows["run"]
    if len(shares) > 1:
        raise RunError("the runs split their series differently", hint="compare runs with the same data.validation and data.test")
    # The same baseline on the same windows: one score, whichever run it came from.
    kept = rows[trained | ~rows.duplicated(["model", "domain", "horizon", "seed"])]
    return kept.drop(columns=["settings", "folder"]).reset_index(drop=True)


def _settings(spec: RunSpec) -> str:
    """Return what makes two runs of one method different models: everything but name, seed, fleet and workers."""
    return spec.model_copy(update={"seed": 0}).fingerprint()
