"""``fedcast forecast``: its options, what it writes and what it shows while it works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedcast.cli.output import progress_bar
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.patch import PatchTransformer

COLUMNS = ("--time", "date", "--id", "shop", "--target", "sales")
CONFIG = ModelConfig(d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)


@pytest.fixture
def words(own_data: Path, tmp_path: Path) -> tuple[Any, ...]:
    """The command line of a small forecast."""
    PatchTransformer(CONFIG, seed=4).save_pretrained(tmp_path / "model")
    return ("forecast", "--model", tmp_path / "model", "--data", own_data / "north.csv", *COLUMNS, "--horizon", "5")


def test_when_the_options_are_given_then_python_gives_the_same(fedcast: Callable[..., Any], words: tuple[Any, ...], tmp_path: Path) -> None:
    options = ("--precision", "bfloat16", "--batch-size", "1", "--workers", "2", "-o")
    assert fedcast(*words, *options, tmp_path / "a.parquet").code == 0
    expected = Forecaster.from_pretrained(words[2]).predict(
        words[4], 5, time="date", id="shop", target="sales", precision="bfloat16", batch_size=1
    )
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), expected, check_exact=True)


def test_when_csv_is_written_then_file_and_stdout_have_the_text_of_pandas(
    fedcast: Callable[..., Any], words: tuple[Any, ...], tmp_path: Path
) -> None:
    answer = fedcast(*words)
    assert answer.err == ""
    expected = Forecaster.from_pretrained(words[2]).predict(words[4], 5, time="date", id="shop", target="sales").to_csv(index=False)
    assert answer.out == expected
    assert fedcast(*words, "-o", tmp_path / "a.csv").code == 0
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("option", [("--precision", "float16"), ("--batch-size", "0"), ("--workers", "0"), ("--workers", "many")])
def test_when_an_option_makes_no_sense_then_it_is_refused_by_name(fedcast: Callable[..., Any], words: tuple[Any, ...], option: Any) -> None:
    answer = fedcast(*words, *option)
    assert answer.code == 2
    assert answer.err.startswith("error[usage]: ")
    assert option[0] in answer.err
    assert answer.err.endswith("hint: fedcast forecast --help\n")


def on_a_terminal(words: tuple[Any, ...], **environment: str) -> tuple[str, str]:
    """Run ``fedcast`` with a terminal on stderr; return stdout and what the terminal got."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    line = [sys.executable, "-m", "fedcast", *map(str, words)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=slave, env=environment, text=True) as process:
        os.close(slave)
        shown = bytearray()
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
        out = process.stdout.read() if process.stdout is not None else ""
    os.close(master)
    assert process.returncode == 0, shown.decode()
    return out, shown.decode()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_when_stderr_is_a_terminal_then_a_bar_is_shown_there_and_taken_away(words: tuple[Any, ...], no_color: str) -> None:
    out, shown = on_a_terminal(words, NO_COLOR=no_color)
    assert out.splitlines()[0] == "shop,date,forecast,q0.1,q0.5,q0.9"
    assert "forecasting" in shown
    assert "2/2" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # its line is erased
    assert ("\x1b[38;" in shown) == (not no_color)


def test_when_stderr_is_no_terminal_or_nobody_wants_a_bar_then_there_is_none(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    with progress_bar("working", show=False) as progress:
        assert progress is None
    monkeypatch.delenv("FORCE_COLOR")
    with progress_bar("working") as progress:
        assert progress is None
    assert capfd.readouterr() == ("", "")
