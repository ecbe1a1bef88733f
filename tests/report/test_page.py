"""The page of a run: complete in itself, safe against hostile names, and drawn by a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from tests.report.conftest import SPEC, TRAINING

from fedcast.errors import RunError
from fedcast.report.page import write_report

HOSTILE = """<script>document.title='owned'</script><a href="https://example.org/">x</a>'"{{ 7 * 7 }}%{y}"""
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MakeRun = Callable[..., Path]


class _Elements(HTMLParser):
    """Collects elements and attributes outside of script text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def count(self, css_class: str) -> int:
        return sum(css_class in (attributes.get("class") or "").split() for _, attributes in self.elements)


def figures_in(page: str) -> dict[str, object]:
    """The figures that a page carries, by name."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures: dict[str, object] = json.loads(found.group(1))["figures"]
    return figures


def test_when_a_run_is_complete_then_every_section_is_there(make_run: MakeRun) -> None:
    file = write_report(make_run())
    page = file.read_text(encoding="utf-8")
    assert file.name == "report.html"
    assert {"results", "forecasts", "loss", "similarity", "conflict", "weights", "measures", "costs"} <= _Elements(page).ids()
    assert page.startswith("<!doctype html>")
    for fact in ("FedTRL trained a nano patch transformer over 8 sites in 20 rounds.", "342 MB", "1 min 36 s", "0.1.0 4be1c09d77aa"):
        assert fact in page
    assert {"dots", "train-loss", "validation-loss", "similarity", "weights", "bytes", "seconds", "fan-11"} <= set(figures_in(page))


def test_when_a_page_is_written_then_it_loads_nothing_and_stays_small(make_run: MakeRun) -> None:
    run = make_run()
    start = time.process_time()
    file = write_report(run)
    assert time.process_time() - start < 2
    assert file.stat().st_size < 6e6
    page = file.read_text(encoding="utf-8")
    elements = _Elements(page).elements
    assert not [
        (tag, a) for tag, a in elements if a.get("src") or (a.get("href") or "#")[0] != "#" or tag in ("link", "iframe", "object", "base")
    ]
    assert "default-src 'none'" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_when_a_page_is_written_twice_then_the_bytes_are_the_same(make_run: MakeRun) -> None:
    run = make_run()
    assert write_report(run).read_bytes() == write_report(run, run / "again.html").read_bytes()
    assert [path.name for path in run.iterdir() if path.name.endswith(".part")] == []


def test_when_a_name_holds_markup_then_it_stays_text(make_run: MakeRun) -> None:
    run = make_run(training=(HOSTILE, "energy"), held_out=(HOSTILE + "2",), rounds=2)
    page = write_report(run).read_text(encoding="utf-8")
    assert "<script>document.title" not in page
    assert "</script><a" not in page
    tags = [tag for tag, _ in _Elements(page).elements]
    assert tags.count("script") == 3
    assert not [a for tag, a in _Elements(page).elements if tag == "a" and not (a["href"] or "").startswith("#")]
    assert str(escape(HOSTILE))[:40] in page
    assert "49" not in re.findall(r'class="chip"[^>]*>', page)[0]


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"samples": False}, {"forecasts"}),
        ({"models": ()}, {"results"}),
        ({"rounds": 0}, {"loss", "similarity", "conflict", "weights", "measures", "costs"}),
        ({"conflict": False}, {"conflict"}),
        (
            {"rounds": 0, "models": (), "samples": False},
            {"results", "forecasts", "loss", "similarity", "conflict", "weights", "measures", "costs"},
        ),
    ],
)
def test_when_a_part_of_the_record_is_missing_then_its_section_is_left_out(
    make_run: MakeRun, options: dict[str, object], absent: set[str]
) -> None:
    page = write_report(make_run(**options)).read_text(encoding="utf-8")
    everything = {"results", "forecasts", "loss", "similarity", "conflict", "weights", "measures", "costs"}
    assert everything & {i for i in _Elements(page).ids() if i} == everything - absent


def test_when_an_accuracy_has_a_chance_level_then_their_difference_is_drawn(make_run: MakeRun) -> None:
    page = write_report(make_run()).read_text(encoding="utf-8")
    assert "Discriminator accuracy above chance" in page
    assert "Discriminator chance" not in page
    assert "Feature variance" in page
    assert "Temperature (server)" in page


def test_when_a_reconstructing_run_is_scored_at_two_horizons_then_the_page_says_so(make_run: MakeRun) -> None:
    run = make_run(training=("a", "b"), rounds=1, spec=SPEC + "\n[evaluation]\nhorizons = [48, 96]\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [row | {"horizon": 96} for row in rows if row["kind"] == "result"]
    scored += [row | ({"reconstruction_mse": 0.375} if row.get("model") == "fedtrl" else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "256 → 48, 96" in page
    tables = re.findall(r'<div data-for-metric="(\w+)"(.*?)</div>\s*<p class="note">([^<]*)<', page, re.DOTALL)
    assert len(tables) == 2 * 7
    for metric, table, note in tables:
        assert ("Scores are means over the horizons 48, 96." in note) == (metric != "reconstruction_mse"), note
        if metric == "reconstruction_mse":
            assert re.findall(r">([^<>]+)</td>", table)[0] == "0.375"
            assert "bad-" not in table
    assert "reconstruction_mse" not in figures_in(page)["dots"]


def test_when_nothing_but_rows_of_another_method_are_there_then_the_page_holds(make_run: MakeRun) -> None:
    run = make_run(rounds=0, samples=False, models=(), spec="not = [toml")
    rows = [
        {"kind": "round", "round": 1, "sites": {"a": {"loss": 1.0, "note": "text", "flag": True}}, "server": None},
        {"kind": "validation", "round": 1, "sites": {"a": {"loss": float("nan")}}, "mean": float("nan")},
        {"kind": "result", "model": "local", "domain": "a", "mse": 0.4},
        {"kind": "unheard of"},
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert _Elements(page).ids() & {"results", "loss", "costs", "similarity", "weights"} == {"results", "loss"}
    assert "Relative to the seasonal naive" not in page


def test_when_a_round_was_repeated_or_its_line_cut_then_the_last_whole_one_counts(make_run: MakeRun) -> None:
    run = make_run(rounds=3)
    record = run / "metrics.jsonl"
    repeated = {"kind": "round", "round": 3, "sites": {"cloud": {"loss": 123.0}}}
    record.write_text(record.read_text(encoding="utf-8") + json.dumps(repeated) + '\n{"kind": "rou', encoding="utf-8")
    figures = json.dumps(figures_in(write_report(run).read_text(encoding="utf-8"))["train-loss"])
    assert "123.0" in figures


def test_when_many_sites_are_trained_then_twelve_are_shown_and_the_rest_can_be_chosen(make_run: MakeRun) -> None:
    page = write_report(make_run(training=[f"site-{i:03d}" for i in range(30)], rounds=2, samples=False)).read_text(encoding="utf-8")
    loss = page[page.index('<section id="loss"') : page.index('<section id="similarity"')]
    assert loss.count('aria-pressed="true"') == 12
    assert loss.count('aria-pressed="false"') == 18
    assert "12 of 30 sites are drawn at first" in loss


def test_when_the_folder_is_no_run_then_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_when_a_line_in_the_middle_is_damaged_then_the_error_names_it(make_run: MakeRun) -> None:
    run = make_run(rounds=2)
    record = run / "metrics.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:30]
    record.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RunError, match="line 2 is not JSON"):
        write_report(run)


def dump_dom(page: Path, profile: Path, *, dark: bool = False) -> tuple[str, str]:
    """Open a page in the browser; return the document after its scripts ran, and what the browser logged."""
    quiet = [
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    command = [str(BROWSER), "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", "--window-size=1200,900"]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=30000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=150, check=True)
    return done.stdout, done.stderr


CLICKS = """<script>addEventListener("load", async () => {
  const wait = async () => { while (document.documentElement.dataset.state !== "drawn") await new Promise((r) => setTimeout(r, 50)); };
  await wait();
  const log = {}, $ = (q) => document.querySelector(q), all = (q) => [...document.querySelectorAll(q)], click = (q) => $(q).click();
  const plot = (name) => $(`.plot[data-figure="${name}"]`);
  click('[data-metric="coverage80"]');
  log.metric = all("[data-for-metric]:not([hidden])").map((b) => b.dataset.forMetric);
  log.coverageAxis = plot("dots")._fullLayout.xaxis.type;
  click('[data-metric="mse"]');
  const names = () => [...$("table.scores").tBodies[0].rows].map((r) => r.cells[0].textContent);
  log.before = names(); $("table.scores thead th:nth-child(2) button").click(); log.after = names();
  click('.pager button[data-step="1"]'); log.series = $(".pager .series").textContent;
  const site = $(".chip[data-site]").dataset.site; click(".chip[data-site]");
  log.hidden = plot("train-loss").data.filter((t) => t.visible === false).map((t) => t.meta === site);
  const ink = () => plot("train-loss")._fullData.at(-1).line.color;
  log.auto = ink(); $("#theme").click(); $("#theme").click(); log.dark = ink(); log.theme = document.documentElement.dataset.theme;
  dispatchEvent(new Event("beforeprint")); log.print = ink();
  log.printWidth = plot("dots")._fullLayout.width; dispatchEvent(new Event("afterprint"));
  log.screen = ink();
  const out = document.createElement("output"); out.id = "log"; out.textContent = JSON.stringify(log); document.body.append(out);
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["light", "dark"])
def test_when_a_browser_opens_the_page_then_every_figure_is_drawn_every_control_works_and_no_name_is_run(
    dark: bool, make_run: MakeRun, tmp_path: Path
) -> None:
    file = write_report(make_run(training=(HOSTILE, "<b>bold</b>", *TRAINING[2:])))
    clicked = tmp_path / "clicked.html"
    clicked.write_text(file.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    document, messages = dump_dom(clicked, tmp_path / "profile", dark=dark)
    elements = _Elements(document)
    assert elements.count("plot") > 20
    assert elements.count("js-plotly-plot") == elements.count("plot")
    assert elements.count("failed") == 0
    assert "CONSOLE" not in messages
    assert "<title>demo" in document
    assert not [a for tag, a in elements.elements if tag == "a" and not (a.get("href") or a.get("xlink:href") or "").startswith("#")]
    found = re.search(r'<output id="log">(.*?)</output>', document, re.DOTALL)
    assert found is not None
    log = json.loads(html.unescape(found.group(1)))
    assert log["metric"] == ["coverage80", "coverage80"]
    assert log["coverageAxis"] == "linear"
    assert log["before"] == log["after"][::-1]
    assert log["series"] == "hospital-2"
    assert log["hidden"] == [True]
    assert log["theme"] == "dark"
    assert log["print"] != log["dark"] == log["screen"]
    assert log["auto"] == log["dark" if dark else "print"]
    assert 600 < log["printWidth"] < 720
