"""The report of a run: one self-contained HTML page that needs no network and no other file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from fedcast.errors import SourceError
from fedcast.report import conflict, figures
from fedcast.report.record import Row, RunRecord, by_site, conflict_of, read_record, similarity_of, sites_of
from fedcast.report.tables import (
    METRICS,
    ScoreTable,
    format_bytes,
    format_score,
    format_seconds,
    held_out_mask,
    horizons_note,
    is_number,
    numeric_metrics,
    own_models,
    pretty_key,
    pretty_name,
    score_table,
)

_SITE_KEYS: Final = ("loss", "steps", "samples", "seconds", "weight")
_MOST_FANS: Final = 24
_MOST_MEASURES: Final = 12
_GLYPHS: Final = {
    "circle": "●",
    "circle-open": "○",
    "diamond-open": "◇",
    "square-open": "□",
    "triangle-up-open": "△",
    "x-thin-open": "×",
    "cross-thin-open": "+",
    "star-open": "☆",
    "hexagon-open": "⬡",
}


def write_report(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run.

    Parameters
    ----------
    run_folder
        A run folder; what is not in it yet is left out of the page.
    output
        Where to write; ``report.html`` in the run folder by default. The file is written aside and renamed.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    RunError
        When the folder is no run folder or its record is damaged.
    SourceError
        When the page cannot be written.
    """
    folder = Path(run_folder)
    target = Path(output) if output is not None else folder / "report.html"
    return write_page(render(read_record(folder)), target)


def write_page(page: str, target: Path) -> Path:
    """Write a page aside and rename it; return the file.

    Raises
    ------
    SourceError
        When it cannot be written.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise SourceError(f"cannot write {target}: {error.strerror}", hint="choose another file with -o") from error
    return target


def render(record: RunRecord) -> str:
    """Return the page as text."""
    composer = _Composer(record)
    return render_page(composer.context(), composer.drawn)


def render_page(context: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Any]]) -> str:
    """Fill the template.

    Parameters
    ----------
    context
        What ``template.html`` names: ``title``, ``lede``, ``facts``, ``verdicts``, ``sections``, ``chips``, ``spec_text``, ``visible``.
    drawn
        The figures by name and view; see :func:`document_of`.
    """
    template = resources.files("fedcast.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        **context, figures_json=_script_json({"template": figures.template(), "figures": drawn}), plotly_js=get_plotlyjs()
    )


def document_of(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as the page carries it: JSON-ready, without the template that the page lays under every figure."""
    document: dict[str, Any] = json.loads(str(figure.to_json()))
    del document["layout"]["template"]
    return document


class _Composer:
    """Turns a record into what the template shows; ``drawn`` collects the figures by name and view."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.drawn: dict[str, dict[str, Any]] = {}
        sites = {str(name) for row in (*record.rounds, *record.validations) for name in sites_of(row)}
        domains = [str(sample.get("domain", "")) for sample in record.samples]
        if "domain" in record.results.columns:
            mask = held_out_mask(record.results)
            domains += [str(name) for part in (~mask, mask) for name in record.results.loc[part, "domain"].unique()]
        self.sites = sorted(sites)
        self.styles = figures.styles_of([*self.sites, *sorted(set(domains) - sites)])

    def context(self) -> dict[str, Any]:
        sections = {
            "results": self._results(),
            "forecasts": self._forecasts(),
            "loss": self._loss(),
            "similarity": self._similarity(),
            "conflict": self._conflict(),
            "weights": self._weights(),
            "measures": self._measures(),
            "costs": self._costs(),
        }
        return {
            "title": self.record.name,
            "lede": _lede(self.record, len(self.sites)),
            "facts": _facts(self.record),
            "verdicts": _verdicts(self.record.results),
            "sections": {name: section for name, section in sections.items() if section},
            "chips": [self._chip(name, i) for i, name in enumerate(self.sites)],
            "spec_text": self.record.spec_text,
            "visible": figures.VISIBLE,
        }

    def _chip(self, name: str, position: int) -> dict[str, Any]:
        return legend_key(name, self.styles[name]) | {"shown": position < figures.VISIBLE}

    def _draw(self, name: str, figure: go.Figure, view: str = "only") -> dict[str, Any]:
        document = document_of(figure)
        self.drawn.setdefault(name, {})[view] = document
        return {"figure": name, "view": view, "height": document["layout"].get("height", 300)}

    def _results(self) -> dict[str, Any] | None:
        results = self.record.results
        metrics = [m for m in METRICS if score_table(results, m.key) is not None]
        if not metrics:
            return None
        groups = []
        for held_out, title in ((True, "Held-out domains"), (False, "Training domains")):
            tables = [(m, score_table(results, m.key, held_out=held_out)) for m in metrics]
            views = [
                _table_view(table, own_models(results)[:1], horizons_note(results, m.key)) | {"key": m.key}
                for m, table in tables
                if table is not None
            ]
            if views:
                groups.append({"title": title, "held_out": held_out, "tables": views})
        dots: dict[str, Any] | None = None
        for metric in reversed(metrics):
            figure = figures.relative_dots(results, metric)
            dots = self._draw("dots", figure, metric.key) if figure is not None else dots
        symbols = [
            {"glyph": _GLYPHS[s], "name": pretty_name(m), "leading": s == "circle"} for m, s in figures.model_symbols(results).items()
        ]
        return {"metrics": metrics, "groups": groups, "dots": dots, "symbols": symbols}

    def _forecasts(self) -> dict[str, Any] | None:
        by_domain: dict[str, list[Row]] = {}
        for sample in sorted(self.record.samples, key=lambda s: (not s.get("held_out"), str(s.get("domain")))):
            by_domain.setdefault(str(sample.get("domain", "")), []).append(sample)
        cards = []
        for i, (domain, samples) in enumerate(list(by_domain.items())[:_MOST_FANS]):
            style = self.styles[domain]
            views = [self._draw(f"fan-{i}", figures.fan(sample, style), str(j)) for j, sample in enumerate(samples)]
            series = [str(sample.get("series", "")) for sample in samples]
            cards.append({"domain": domain, "held_out": bool(samples[0].get("held_out")), "hue": style.hue, "series": series} | views[0])
        return {"cards": cards, "left_out": len(by_domain) - len(cards)} if cards else None

    def _loss(self) -> dict[str, Any] | None:
        train = by_site(self.record.rounds, "loss")
        validation = by_site(self.record.validations, "loss")
        parts = [("Training loss", "train-loss", train), ("Validation loss", "validation-loss", validation)]
        drawn = [{"title": t} | self._draw(n, figures.site_lines(s, self.styles, unit="")) for t, n, s in parts if s]
        return {"figures": drawn} if drawn else None

    def _similarity(self) -> dict[str, Any] | None:
        rows = [row for row in self.record.rounds if similarity_of(row) is not None]
        if not rows:
            return None
        matrix, names = similarity_of(rows[-1]) or ([], [])
        drawn = [{"title": f"Cosine of prototypes, round {rows[-1]['round']}"} | self._draw("similarity", figures.heatmap(matrix, names))]
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            matrix, names = similarity_of(row) or ([], [])
            for i, name in enumerate(names):
                others = [float(v) for j, v in enumerate(matrix[i]) if j != i and is_number(v)]
                if others and name in self.styles:
                    series.setdefault(name, []).append((int(row["round"]), sum(others) / len(others)))
        if len(rows) > 1 and series:
            lines = figures.site_lines(series, self.styles, unit="mean cosine to the other sites", height=400)
            drawn.append({"title": "Closeness to the other sites"} | self._draw("closeness", lines))
        return {"figures": drawn}

    def _conflict(self) -> dict[str, Any] | None:
        rows = [row for row in self.record.conflicts if conflict_of(row) is not None]
        if not rows:
            return None
        heat = conflict.conflict_map(*(conflict_of(rows[-1]) or ([], [])))
        drawn = [
            {"title": "Over the rounds"} | self._draw("conflict", conflict.conflict_lines(rows)),
            {"title": f"Cosine of gradients, round {rows[-1]['round']}"} | self._draw("conflict-map", heat),
        ]
        return {"figures": drawn, "lines": [legend_key(name, style) for name, style in conflict.LINES.values()]}

    def _weights(self) -> dict[str, Any] | None:
        weights = by_site(self.record.rounds, "weight")
        if not weights:
            return None
        lines = figures.site_lines(weights, self.styles, unit="", percent=True, mean=False)
        last = max(self.record.rounds, key=lambda row: (sum(is_number(v.get("weight")) for v in sites_of(row).values()), row["round"]))
        latest = {name: float(v["weight"]) for name, v in sites_of(last).items() if is_number(v.get("weight"))}
        samples = {name: float(v["samples"]) for name, v in sites_of(last).items() if is_number(v.get("samples"))}
        if len(latest) > 1:
            figures.reference_line(lines, 1 / len(latest), "equal share")
        drawn = [{"title": "Weight in the aggregate"} | self._draw("weights", lines)]
        if len(latest) <= 2 * figures.VISIBLE:
            share = figures.weights_against_share(latest, samples, self.styles)
            drawn.append({"title": f"Weight against share of samples, round {last['round']}"} | self._draw("weight-share", share))
        return {"figures": drawn, "shares": len(drawn) > 1 and set(samples) == set(latest)}

    def _measures(self) -> dict[str, Any] | None:
        site_rows = [values for row in self.record.rounds for values in sites_of(row).values()]
        drawn: list[dict[str, Any]] = []
        keys = numeric_metrics(site_rows, _SITE_KEYS)
        for key, chance in _with_chance(keys):
            series = by_site(self.record.rounds, key)
            title = pretty_key(key)
            if chance is not None:
                series = _difference(series, by_site(self.record.rounds, chance))
                title = f"{title} above chance"
            figure = figures.site_lines(series, self.styles, unit="", percent=chance is not None)
            if chance is not None:
                figures.reference_line(figure, 0, "chance", above=False)
            drawn.append({"title": title} | self._draw(f"measure-{len(drawn)}", figure))
        servers = [row["server"] for row in self.record.rounds if isinstance(row.get("server"), dict)]
        for key in numeric_metrics(servers, ()):
            points = [
                (int(row["round"]), float(row["server"][key]))
                for row in self.record.rounds
                if is_number((row.get("server") or {}).get(key))
            ]
            style = {"server": figures.Style(0, "solid")}
            figure = figures.site_lines({"server": points}, style, unit="")
            drawn.append({"title": f"{pretty_key(key)} (server)"} | self._draw(f"measure-{len(drawn)}", figure))
        return {"figures": drawn[:_MOST_MEASURES]} if drawn else None

    def _costs(self) -> dict[str, Any] | None:
        rounds = [int(row["round"]) for row in self.record.rounds]
        drawn: list[dict[str, Any]] = []
        traffic = {
            name: [_number(row, key) for row in self.record.rounds]
            for name, key in (("from sites", "bytes_up"), ("to sites", "bytes_down"))
        }
        if any(any(values) for values in traffic.values()):
            figure = figures.stacked_bars(rounds, traffic, unit="B", as_bytes=True)
            drawn.append({"title": "Bytes sent a round", "parts": list(traffic)} | self._draw("bytes", figure))
        overhead = [_number(row, "overhead_seconds") for row in self.record.rounds]
        work = [max(_number(row, "seconds") - extra, 0.0) for row, extra in zip(self.record.rounds, overhead, strict=True)]
        if any(work):
            parts = {"work": work, "overhead": overhead} if any(overhead) else {"work": work}
            drawn.append(
                {"title": "Seconds a round", "parts": list(parts)} | self._draw("seconds", figures.stacked_bars(rounds, parts, unit="s"))
            )
        return {"figures": drawn} if drawn else None


def legend_key(name: str, style: figures.Style) -> dict[str, Any]:
    """Return a line's entry in a legend: ``name``, ``hue`` and ``dash``."""
    return {"name": name, "hue": style.hue, "dash": "" if style.dash == "solid" else style.dash.replace("px", "")}


def _table_view(table: ScoreTable, lead: Sequence[str], horizons: str) -> dict[str, Any]:
    """A score table as the template wants it: texts, sort keys and shades."""
    best, leaders = table.best(), [table.best_in(d) for d in range(len(table.domains))]
    rows = []
    for i, model in enumerate(table.models):
        cells = [_cell(table, table.values[i, d], table.raw[i, d], i in leaders[d]) for d in range(len(table.domains))]
        mean = _cell(table, table.mean[i], math.nan, i in best)
        rows.append(
            {
                "model": pretty_name(model),
                "best": i in best,
                "own": model in lead,
                "cells": [mean, *cells],
            }
        )
    kind = "geometric mean" if table.metric.relative else "mean"
    part = (
        "all domains"
        if table.shared == len(table.domains)
        else f"the {table.shared} of {len(table.domains)} domains in which every model is scored"
    )
    unit = "Relative to the seasonal naive: below 1 is better." if table.relative else ""
    scores = f"Scores are {horizons}." if horizons else ""
    note = " ".join(filter(None, (table.metric.about, unit, scores, f"Mean: {kind} over {part}.")))
    return {"columns": ["mean", *table.domains], "rows": rows, "note": note}


def _cell(table: ScoreTable, value: float, raw: float, leads: bool) -> dict[str, Any]:
    shade = ""
    if math.isfinite(value) and table.relative:
        distance = math.log(max(value, 1e-9))
        level = sum(abs(distance) > bound for bound in (0.03, 0.16, 0.36))
        shade = f"{'good' if distance < 0 else 'bad'}-{level}" if level else ""
    elif math.isfinite(value) and table.metric.share:
        level = sum(abs(value - table.metric.goal) > bound for bound in (0.05, 0.12, 0.25))
        shade = f"bad-{level}" if level else ""
    rank = abs(value - table.metric.goal) if math.isfinite(value) else 1e300
    title = f"{table.metric.label} {raw:.4g}" if math.isfinite(raw) and table.relative else ""
    return {"text": format_score(value, table), "rank": repr(float(rank)), "shade": shade, "leads": leads, "title": title}


def _lede(record: RunRecord, sites: int) -> str:
    method = str((record.spec.get("method") or {}).get("name") or _first(record.results, "method") or "")
    model = record.spec.get("model") or {}
    shape = f"a {model['size']} patch transformer" if "size" in model else "one model"
    planned = (record.spec.get("federation") or {}).get("rounds")
    done = int(record.rounds[-1]["round"]) if record.rounds else 0
    rounds = f"{done} of {planned} rounds so far" if planned and 0 < done < planned else f"{done} round{'s' if done != 1 else ''}"
    where = f" over {sites} site{'s' if sites != 1 else ''}" if sites else ""
    spent = f" in {rounds}" if done else ""
    return f"{pretty_name(method)} trained {shape}{where}{spent}." if method else f"A run of fedcast{where}{spent}."


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    results, spec = record.results, record.spec
    facts: list[tuple[str, str]] = []
    if "domain" in results.columns:
        mask = held_out_mask(results)
        for title, part in (("Training domains", ~mask), ("Held-out domains", mask)):
            names = sorted({str(name) for name in results.loc[part, "domain"]})
            if names:
                facts.append((title, str(len(names))))
    seconds = _largest(results, "wall_seconds") or sum(_number(row, "seconds") for row in record.rounds)
    sent = _largest(results, "bytes_total") or sum(_number(row, "bytes_up") + _number(row, "bytes_down") for row in record.rounds)
    steps = _largest(results, "gradient_steps") or sum(_number(v, "steps") for row in record.rounds for v in sites_of(row).values())
    seeds = sorted({int(s) for s in results["seed"]}) if "seed" in results.columns else []
    seed = ", ".join(map(str, seeds)) or str(spec.get("seed", ""))
    code = " ".join(filter(None, (_first(results, "version"), _first(results, "code")[:12].replace("unknown", ""))))
    model = spec.get("model") or {}
    horizons = (spec.get("evaluation") or {}).get("horizons") or [model.get("horizon", "")]
    shape = f"{model['context']} → {', '.join(map(str, horizons))}" if {"context", "horizon"} <= set(model) else ""
    facts += [
        ("Context → horizon", shape),
        ("Seed", seed),
        ("Gradient steps", f"{steps:,.0f}".replace(",", "\u202f") if steps else ""),
        ("Wall time", format_seconds(seconds) if seconds else ""),
        ("Bytes sent", format_bytes(sent) if sent else ""),
        ("Code version", code),
        ("Data fingerprint", _first(results, "data_fingerprint")[:12]),
    ]
    return [(term, text) for term, text in facts if text]


def _verdicts(results: pd.DataFrame) -> list[dict[str, str]]:
    """The headline numbers: the trained model against the seasonal naive on held-out and on training domains."""
    own = own_models(results)
    verdicts = []
    for held_out, where in ((True, "held-out"), (False, "training")):
        table = score_table(results, "mse", held_out=held_out)
        if not own or table is None or not table.relative or own[0] not in table.models:
            continue
        row = table.models.index(own[0])
        better, count = table.beats_naive(row)
        if not math.isfinite(table.mean[row]):
            continue
        others = []
        for key, words in (("wql", "WQL {}"), ("coverage80", "80 % interval covers {}")):
            other = score_table(results, key, held_out=held_out)
            if other is not None and own[0] in other.models and (other.relative or not other.metric.relative):
                others.append(words.format(format_score(float(other.mean[other.models.index(own[0])]), other)))
        verdicts.append(
            {
                "value": f"{table.mean[row]:.2f}",
                "tone": "good" if table.mean[row] < 0.995 else "bad" if table.mean[row] > 1.005 else "even",
                "title": f"times the seasonal naive's MSE on {count} {where} domain{'s' if count != 1 else ''}",
                "detail": f"{pretty_name(own[0])} is better in {better} of {count}" + "".join(f" · {other}" for other in others),
            }
        )
    return verdicts


def _with_chance(keys: Sequence[str]) -> list[tuple[str, str | None]]:
    """Pair each accuracy with the key that holds its chance level, which then gets no figure of its own."""
    pairs = {
        key: next((c for c in (key.replace("accuracy", "chance"), f"{key}_chance", "chance") if c in keys and c != key), None)
        for key in keys
        if "accuracy" in key
    }
    return [(key, pairs.get(key)) for key in keys if key not in pairs.values()]


def _difference(
    a: Mapping[str, Sequence[tuple[int, float]]], b: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, list[tuple[int, float]]]:
    levels = {name: dict(points) for name, points in b.items()}
    return {name: [(x, y - levels[name][x]) for x, y in points if x in levels.get(name, {})] for name, points in a.items()}


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if is_number(value) else 0.0


def _largest(results: pd.DataFrame, key: str) -> float:
    if key not in results.columns:
        return 0.0
    value = pd.to_numeric(results[key], errors="coerce").max()
    return float(value) if value == value else 0.0


def _first(results: pd.DataFrame, key: str) -> str:
    own = results[results["model"].isin(own_models(results))] if "model" in results.columns else results
    values = own[key].dropna() if key in own.columns else pd.Series(dtype=object)
    return str(values.iloc[0]) if len(values) else ""


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element: nothing in it can close the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
