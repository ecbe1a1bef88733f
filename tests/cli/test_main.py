from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcast.cli.main import app, run
from fedcast.errors import FedcastError

VERBS = [
    "benchmark",
    "check",
    "compare",
    "evaluate",
    "finetune",
    "forecast",
    "guards",
    "init",
    "landscape",
    "leakage",
    "machine",
    "methods",
    "models",
    "pretrain",
    "report",
    "run",
    "tunings",
    "version",
]
GROUPS = {
    "audit": ["verify"],
    "consortium": ["add", "init", "remove", "renew", "status"],
    "coordinator": ["start"],
    "site": ["start"],
}
"""Words with verbs behind them."""
HEAVY = {"torch", "flwr", "cryptography", "pandas", "numpy", "pydantic", "plotly", "pyarrow", "statsforecast", "scipy"}


def test_when_verbs_are_counted_then_all_are_there() -> None:
    assert sorted(command.name or "" for command in app.registered_commands) == VERBS
    behind = {group.name: sorted(verb.name or "" for verb in group.typer_instance.registered_commands) for group in app.registered_groups}
    assert behind == GROUPS


@pytest.mark.parametrize("verb", VERBS)
def test_when_a_verb_is_asked_for_help_then_it_answers_and_takes_json(fedcast: Callable[..., object], verb: str) -> None:
    answer = fedcast(verb, "--help")
    assert answer.code == 0
    assert "--json" in answer.out
    assert answer.err == ""


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_when_nothing_or_help_is_asked_then_every_verb_is_listed(fedcast: Callable[..., object], words: list[str]) -> None:
    answer = fedcast(*words)
    assert answer.code == 0
    assert all(f" {verb} " in answer.out for verb in (*VERBS, *GROUPS))


@pytest.mark.parametrize(("word", "verbs"), GROUPS.items())
def test_when_a_word_with_verbs_behind_it_is_asked_for_help_then_they_are_listed(
    fedcast: Callable[..., object], word: str, verbs: list[str]
) -> None:
    answer = fedcast(word, "--help")
    assert answer.code == 0
    assert all(f" {verb} " in answer.out for verb in verbs)


def test_when_help_is_shown_then_no_heavy_library_is_imported() -> None:
    code = """
import contextlib, io, json, sys
from fedcast.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    run(["--help"])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(json.loads(done.stdout))


def test_when_a_verb_is_misspelt_then_the_right_one_is_named(fedcast: Callable[..., object]) -> None:
    answer = fedcast("pretrian", "spec.toml")
    assert answer.code == 2
    assert answer.err.startswith("error[usage]: ")
    assert "pretrain" in answer.err
    assert answer.err.endswith("hint: fedcast --help\n")


def test_when_an_argument_is_missing_then_the_hint_names_the_verbs_help(fedcast: Callable[..., object]) -> None:
    answer = fedcast("pretrain")
    assert answer.code == 2
    assert "SPEC.toml" in answer.err
    assert answer.err.endswith("hint: fedcast pretrain --help\n")


def test_when_an_option_of_a_verb_behind_a_word_is_missing_then_the_hint_names_that_verbs_help(fedcast: Callable[..., object]) -> None:
    answer = fedcast("consortium", "init", "anywhere")
    assert answer.code == 2
    assert answer.err.endswith("hint: fedcast consortium init --help\n")


def test_when_the_command_line_cannot_be_read_under_json_then_stdout_holds_the_error(fedcast: Callable[..., object]) -> None:
    answer = fedcast("forecast", "--json", "--horizon", "none")
    assert answer.code == 2
    assert answer.err == ""
    assert answer.json()["error"] == "usage"


def test_when_a_spec_is_missing_then_error_and_hint_stand_on_lines_of_their_own(fedcast: Callable[..., object]) -> None:
    answer = fedcast("pretrain", "none.toml")
    assert answer.code == 10
    assert answer.out == ""
    assert answer.err.splitlines() == [
        "error[spec]: no spec at none.toml",
        "hint: write one with `fedcast init SPEC.toml`, or check the path",
    ]


def test_when_a_spec_is_missing_under_json_then_stdout_holds_the_error(fedcast: Callable[..., object]) -> None:
    answer = fedcast("pretrain", "none.toml", "--json")
    assert answer.code == 10
    assert answer.err == ""
    assert answer.json()["error"] == "spec"
    assert set(answer.json()) == {"error", "exit_code", "message", "hint"}


def test_when_an_exception_is_no_fedcast_error_then_it_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("fedcast.version.code_version", explode)
    with pytest.raises(ZeroDivisionError):
        run(["version"])


def test_when_an_error_carries_a_code_then_the_process_exits_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddError(FedcastError):
        code = "odd"
        exit_code = 77

    def explode() -> str:
        raise OddError("odd", hint="even")

    monkeypatch.setattr("fedcast.version.code_version", explode)
    assert run(["version"]) == 77


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_when_a_run_is_interrupted_then_the_hint_says_how_to_resume(verb: str, tmp_path: Path) -> None:
    code = f"""
import signal, sys, time
# A shell starts background jobs with Ctrl-C ignored, and a child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
import fedcast.spec
from fedcast.cli.main import run
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
fedcast.spec.load_spec = wait
sys.exit(run(["{verb}", "spec.toml"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            pytest.fail(process.communicate()[1])
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-2:] == ["interrupted", "hint: resume with the same command"]


def test_when_the_module_is_run_then_it_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fedcast", "version", "--json"], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {"version", "code"}


def test_when_no_color_is_set_then_errors_carry_no_escapes() -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fedcast", "pretrain", "none.toml"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 10
    assert "\x1b" not in done.stderr
