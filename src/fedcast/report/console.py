"""What the terminal shows: progress while a run trains, and tables; every meaning that a colour carries is in the text as well."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedcast.errors import FrameProblem
from fedcast.report.tables import (
    BASELINES,
    FIT_COLUMNS,
    NAIVE,
    PARTS,
    ScoreTable,
    fit_cells,
    format_bytes,
    format_score,
    format_seconds,
    horizons_note,
    is_number,
    metric_of,
    own_models,
    pretty_name,
    score_table,
    value_cells,
)

if TYPE_CHECKING:
    from fedcast.run.scaling import Scaling

WIDTH: Final = 100
_BEST: Final = "*"
_NUMBER_WIDTH: Final = 9
_NAMED: Final = 8
_LONGEST_NUMBER: Final = 10
_PHASES: Final = {
    "select": "choosing sites",
    "client": "training",
    "aggregate": "combining",
    "evaluate": "validating",
    "probe": "comparing gradients",
    "checkpoint": "saving",
    "checkpoint-rename": "saving",
    "log": "saving",
    "test": "scoring on test data",
}


class ProgressObserver:
    """Shows a run's progress: one bar over the rounds with the latest losses, one over the sites inside a round.

    Where the console is no terminal, it writes one plain line a round instead. It implements the run's observer protocol and may be
    called from several threads.

    Parameters
    ----------
    console
        Where to write; stderr by default, so that stdout stays free for results.
    label
        What is run, where one command runs several specs; a row of kind ``candidate`` sets it too.
    """

    def __init__(self, console: Console | None = None, *, label: str = "") -> None:
        self.console = console or Console(stderr=True)
        self._label = label
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._round_bar = TaskID(0)
        self._site_bar = TaskID(0)
        self._rounds = 0
        self._sites = 0
        self._train = ""
        self._validation = ""
        self._privacy = ""

    def start(self, rounds: int, sites: Sequence[str]) -> None:
        """Begin a run of so many rounds over these sites."""
        self.finish()
        with self._lock:
            self._rounds, self._sites, self._train, self._validation = rounds, len(sites), "", ""
            if not self.console.is_terminal:
                return
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                transient=False,
            )
            self._round_bar = self._progress.add_task(f"{self._label} rounds".lstrip(), total=rounds, note="")
            self._site_bar = self._progress.add_task(" sites", total=len(sites), note="")
            self._progress.start()

    def site_done(self, round: int, site: str) -> None:
        """Count one site's reply in this round."""
        with self._lock:
            if self._progress is not None:
                self._progress.update(self._site_bar, advance=1, note=f"round {round}: {site}")

    def row(self, row: Mapping[str, Any]) -> None:
        """Take one row of the run's record: a round's loss and cost, or a validation; or the name of the candidate that comes next."""
        with self._lock:
            if row.get("kind") == "round":
                self._round(row)
            elif row.get("kind") == "validation":
                self._validated(row)
            elif row.get("kind") == "candidate":
                self._label = str(row["label"])

    def phase(self, name: str, round: int) -> None:
        """Show what the run is doing in this round."""
        with self._lock:
            if self._progress is None:
                return
            if name == "select":
                self._progress.reset(self._site_bar, total=self._sites)
            self._progress.update(self._site_bar, note=f"round {round}: {_PHASES.get(name, name)}")

    def finish(self) -> None:
        """Stop the bars and leave them as they are."""
        with self._lock:
            if self._progress is not None:
                self._progress.update(self._site_bar, visible=False)
                self._progress.stop()
                self._progress = None

    def _round(self, row: Mapping[str, Any]) -> None:
        number = int(row["round"])
        losses = [values["loss"] for values in (row.get("sites") or {}).values() if is_number(values.get("loss"))]
        self._train = f"loss {sum(losses) / len(losses):.4f}" if losses else ""
        spent = (row.get("server") or {}).get("epsilon")
        self._privacy = f"epsilon {spent:.4g}" if is_number(spent) else ""
        without = _reasons(row.get("dropped"))
        if self._progress is not None:
            if without:
                self._line(f"round {number} without {without}")
            self._progress.update(self._round_bar, completed=number, note=self._note())
            self._progress.reset(self._site_bar, total=self._sites)
            return
        sent = sum(row[key] for key in ("bytes_up", "bytes_down") if is_number(row.get(key)))
        parts = [f"round {number}/{self._rounds}", self._train, self._privacy, f"{len(row.get('sites') or {})} sites"]
        parts += [format_seconds(row["seconds"])] if is_number(row.get("seconds")) else []
        parts += [f"{format_bytes(sent)} sent"] if sent else []
        parts += [f"without {without}"] if without else []
        self._line("  ".join(part for part in parts if part))

    def _validated(self, row: Mapping[str, Any]) -> None:
        if without := _reasons(row.get("missing")):
            self._line(f"validation {row['round']} without {without}")
        if not is_number(row.get("mean")):
            return
        self._validation = f"validation {row['mean']:.4f}"
        if self._progress is not None:
            self._progress.update(self._round_bar, note=self._note())
        elif int(row.get("round", 0)) == self._rounds:
            self._line(self._validation)

    def _note(self) -> str:
        return "  ".join(part for part in (self._train, self._validation, self._privacy) if part)

    def _line(self, text: str) -> None:
        text = f"{self._label}  {text}" if self._label else text
        (self.console if self._progress is None else self._progress.console).print(text, markup=False, highlight=False, soft_wrap=True)


def _reasons(sites: Mapping[str, str] | None) -> str:
    return ", ".join(f"{site} ({reason})" for site, reason in (sites or {}).items())


def results_table(results: pd.DataFrame, metric: str = "mse", *, width: int = WIDTH) -> Table:
    """Show models and domains in one table, relative to the seasonal naive where it was scored.

    Models are rows where that fits the width, else domains are. Where the rows say which domains were held out, those stand apart from
    training domains, each with its own mean; the best of each row or column of one domain is bold and has a star.

    Parameters
    ----------
    results
        Result rows.
    metric
        Key of the metric.
    width
        Columns of the terminal.
    """
    groups: list[tuple[str, bool | None]] = [("held-out", True), ("training", False)]
    if "held_out" not in results.columns:
        groups = [("all", None)]
    both = [(title, score_table(results, metric, held_out=held)) for title, held in groups]
    parts = [(title, table) for title, table in both if table is not None]
    if not parts:
        return _one_line("no results")
    first = parts[0][1]
    what = f"{first.metric.label} relative to seasonal naive, below 1 is better" if first.relative else first.metric.label
    if not first.metric.relative:
        what += f", {format_score(first.metric.goal, first)} is right" if first.metric.share else ", lower is better"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=what, title_justify="left", title_style="bold", caption_justify="left", caption_style=""
    )
    scored = dict.fromkeys(model for _, part in parts for model in part.models)
    order = sorted(scored, key=lambda model: (model == NAIVE, model in BASELINES, model not in own_models(results)[:1]))
    need = 22 + sum(max(_NUMBER_WIDTH, len(name) + 2) for _, part in parts for name in ("mean", *part.domains))
    if len(order) > 1:
        means = "; means are geometric" if first.metric.relative else ""
        table.caption = f"{_BEST} best of its {'column' if need <= width else 'row'}{means}{_shared_note(parts)}"
    notes = (table.caption, horizons_note(results, metric), _exposure_note(results))
    table.caption = "\n".join(str(note) for note in notes if note) or None
    if need <= width:
        _models_as_rows(table, parts, order)
    else:
        _domains_as_rows(table, parts, order)
    return table


def scaling_tables(scaling: Scaling) -> list[Table]:
    """Show what runs that differ in one number scored, and the curve that fits them."""
    metric = metric_of(scaling.metric).label
    title = f"{pretty_name(scaling.method)}: {metric} relative to seasonal naive, geometric mean over domains, below 1 is better"
    columns, rows = value_cells(scaling.points, scaling.over, scaling.axis)
    fits = [[PARTS[held_out], *fit_cells(fit, "{}\n{}")] for held_out, fit in sorted(scaling.fits.items(), reverse=True)]
    curve = f"E = E_inf + a x^-p, x = {scaling.axis}; 95 % intervals from a bootstrap over the residuals"
    parts = ((title, columns, rows, ""), (curve, ["domains", *FIT_COLUMNS], fits, "\n".join(scaling.notes)))
    tables = []
    for words, names, cells, caption in parts:
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=Text(words), title_justify="left", title_style="bold"
        )
        for i, name in enumerate(names):
            # rich breaks lines at a non-breaking space too
            table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=name in PARTS.values())
        for row in cells:
            table.add_row(*row)
        table.caption, table.caption_justify, table.caption_style = Text(caption) if caption else None, "left", ""
        tables.append(table)
    return tables


def problems_table(problems: Sequence[FrameProblem], source: str) -> Table:
    """Show what is wrong with a frame: where, what and the repair.

    Parameters
    ----------
    problems
        Problems found by the frame check.
    source
        The file, or what else the frame was read from.
    """
    count = len(problems)
    if not count:
        return _one_line(f"{source}: usable as it is")
    title = Text(f"{source}: {count} problem{'s' if count != 1 else ''}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("problem", style="bold", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("what is wrong, and the repair", overflow="fold", ratio=1)
    for problem in problems:
        rows = f" ({problem.count} rows)" if problem.count is not None and problem.count > 1 else ""
        what = Text.assemble(f"{problem.message}{rows}", ("\nrepair: ", "dim"), problem.repair)
        table.add_row(Text(problem.kind), Text(problem.where() or "–"), what, end_section=True)
    return table


def methods_table(methods: Sequence[Mapping[str, Any]], kind: str = "method") -> Table:
    """Show methods, or what else is chosen by name, with their summaries and parameters.

    Parameters
    ----------
    methods
        What :func:`fedcast.registry.describe` gives: ``name``, ``summary`` and ``parameters``, each of those with ``name``,
        ``type``, ``default`` and ``description``.
    kind
        What they are: ``"method"``, ``"tuning"`` or ``"guard"``.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{kind.capitalize()}s", title_justify="left", title_style="bold")
    table.add_column(kind, style="bold", no_wrap=True)
    table.add_column("what it does, and its parameters", overflow="fold", ratio=1)
    for method in methods:
        text = Text(str(method["summary"]))
        for parameter in method["parameters"]:
            text.append(f"\n  {parameter['name']}", style="bold")
            text.append(f"{_default(parameter['default'])}  ({parameter['type']})", style="dim")
            text.append(f"  {parameter['description']}".rstrip())
        table.add_row(Text(str(method["name"])), text, end_section=True)
    return table


def _default(value: object) -> str:
    """Return a default as a spec would have it; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f" = {str(value).lower()}"
    text = str(value)
    return f" = {value:.4g}" if isinstance(value, float) and len(text) > _LONGEST_NUMBER else f" = {text}"


def _one_line(text: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(Text(text, style="bold"))
    return table


def _models_as_rows(table: Table, parts: Sequence[tuple[str, ScoreTable]], models: Sequence[str]) -> None:
    table.add_column("model", no_wrap=True)
    for title, part in parts:
        table.add_column(Text(f"{title}\nmean"), justify="right", style="bold")
        for domain in part.domains:
            table.add_column(Text(f"\n{domain}"), justify="right", no_wrap=True)
    for model in models:
        cells = [cell for _, part in parts for cell in _row_of(part, model)]
        table.add_row(Text(pretty_name(model)), *cells)


def _domains_as_rows(table: Table, parts: Sequence[tuple[str, ScoreTable]], models: Sequence[str]) -> None:
    table.add_column("domain", overflow="ellipsis", max_width=32)
    for model in models:
        table.add_column(Text(pretty_name(model)), justify="right", overflow="fold")
    for title, part in parts:
        columns = [_row_of(part, model) for model in models]
        table.add_row(Text(f"{title} mean", style="bold"), *(column[0] for column in columns))
        for index, domain in enumerate(part.domains):
            table.add_row(Text(f"  {domain}"), *(column[index + 1] for column in columns), end_section=index == len(part.domains) - 1)


def _row_of(part: ScoreTable, model: str) -> list[Text]:
    """The mean and then every domain's score of one model as text."""
    if model not in part.models:
        return [Text("–")] * (len(part.domains) + 1)
    row = part.models.index(model)
    cells = [_score(float(part.mean[row]), part, row in part.best())]
    return cells + [_score(float(part.values[row, d]), part, row in part.best_in(d)) for d in range(len(part.domains))]


def _score(value: float, part: ScoreTable, best: bool) -> Text:
    text = format_score(value, part)
    return Text(f"{text}{_BEST}", style="bold") if best else Text(f"{text} ")


def _exposure_note(results: pd.DataFrame) -> str:
    """Name the domains whose recordings the model was trained on, where that is not said by their being training domains."""
    if "exposure" not in results.columns:
        return ""
    training = results["held_out"].eq(False) if "held_out" in results.columns else False
    names = list(dict.fromkeys(results.loc[results["exposure"].eq("seen") & ~np.asarray(training, dtype=bool), "domain"]))
    return f"trained on recordings of {', '.join(names[:_NAMED])}{' and others' if len(names) > _NAMED else ''}" if names else ""


def _shared_note(parts: Sequence[tuple[str, ScoreTable]]) -> str:
    notes = [f"{part.shared} of {len(part.domains)} {title}" for title, part in parts if part.shared < len(part.domains)]
    return f" and over the domains that every model has ({', '.join(notes)})" if notes else ""
