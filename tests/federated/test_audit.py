from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.federations import DOMAINS, small_spec, train_small

from fedcast.cli.main import run as run_command
from fedcast.errors import AuditError
from fedcast.federated.audit import START, AuditLog, verify
from fedcast.run.pretrain import pretrain


def written(path: Path, lines: int = 10) -> list[bytes]:
    """Write a log and return its lines."""
    log = AuditLog(path)
    for number in range(lines):
        log.append("task-sent", site="Zürich", number=number, share=0.1 * number, loss=float("nan"))
    log.close()
    return path.read_bytes().splitlines()


def sealed(line: bytes, **changes: object) -> bytes:
    """Alter a line and give it a hash that is right."""
    record = {**json.loads(line), **changes}
    del record["hash"]
    spelt = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    record["hash"] = hashlib.sha256(spelt.encode()).hexdigest()
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_when_nothing_was_altered_then_the_log_holds_together(tmp_path: Path) -> None:
    lines = written(tmp_path / "audit.jsonl")
    found = verify(tmp_path / "audit.jsonl")
    assert (found.lines, found.events) == (10, {"task-sent": 10})
    assert json.loads(lines[-1])["hash"] == found.head
    assert json.loads(lines[0])["prev"] == START
    assert json.loads(lines[3])["fields"] == {"site": "Zürich", "number": 3, "share": 0.1 * 3, "loss": None}


ALTERED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a value": (lambda lines: [*lines[:4], lines[4].replace(b'"number":4', b'"number":5'), *lines[5:]], "line 5 .* altered"),
    "a hash": (lambda lines: [*lines[:4], lines[4].replace(b'"hash":"', b'"hash":"0'), *lines[5:]], "line 5 .* altered"),
    "a value and its hash": (lambda lines: [*lines[:4], sealed(lines[4], event="nothing"), *lines[5:]], "line 5 .* altered"),
    "a space": (lambda lines: [*lines[:4], lines[4].replace(b":", b": ", 1), *lines[5:]], "line 5 .* altered"),
    "a key twice": (lambda lines: [*lines[:4], b'{"seq":5,' + lines[4][1:], *lines[5:]], "line 5 .* altered"),
    "removed": (lambda lines: lines[:4] + lines[5:], "line 5 .* number 6 where 5 is due: lines before it are missing"),
    "several removed": (lambda lines: lines[:4] + lines[8:], "line 5 .* number 9"),
    "first removed": (lambda lines: lines[1:], "line 1 .* number 2"),
    "two change places": (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], "line 5 .* number 6"),
    "one stands twice": (lambda lines: lines[:5] + lines[4:], "line 6 .* number 5 where 6 is due"),
    "put in": (lambda lines: [*lines[:4], b"{}", *lines[4:]], "line 5 .* altered"),
    "removed and counted anew": (
        lambda lines: lines[:4] + [sealed(line, seq=place) for place, line in enumerate(lines[5:], 5)],
        "line 4 .* altered: the line after it was written after another one",
    ),
    "cut short": (lambda lines: [*lines[:-1], lines[-1][:-20]], "line 10 .* cut short"),
    "end altered": (lambda lines: [*lines[:-1], lines[-1].replace(b'"number":9', b'"number":8')], "line 10 .* altered"),
    "another beginning": (lambda lines: [sealed(lines[0], prev="1" * 64)], "line 1 .* is not the first"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_when_a_line_was_altered_then_the_first_one_is_named(what: str, tmp_path: Path) -> None:
    change, message = ALTERED[what]
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"\n".join(change(written(path))) + b"\n")
    with pytest.raises(AuditError, match=message):
        verify(path)


def test_when_any_byte_is_altered_then_its_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path, 3)
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 7):
        if whole[place : place + 1] == b"\n":
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        number = 1 + whole[:place].count(b"\n")
        with pytest.raises(AuditError, match=f"line {number} "):
            verify(path)
    assert len(lines) == 3


def test_when_lines_at_the_end_are_gone_then_only_a_head_kept_elsewhere_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    head = verify(path).head
    path.write_bytes(b"\n".join(lines[:7]) + b"\n")
    assert verify(path).lines == 7
    with pytest.raises(AuditError, match=r"no line .* has the hash"):
        verify(path, head)
    early = json.loads(lines[4])["hash"]
    assert verify(path, early).found == 5


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_when_the_last_line_is_torn_then_the_log_goes_on_and_says_so(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    torn = lines[-1][:kept]
    path.write_bytes(b"\n".join([*lines[:-1], torn]))
    log = AuditLog(path)
    log.append("run-resumed")
    log.close()
    found = verify(path)
    assert found.events == {"task-sent": 9, "recovered": 1, "run-resumed": 1}
    recovered = json.loads(path.read_bytes().splitlines()[10])
    assert recovered["fields"] == {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
    path.write_bytes(path.read_bytes().replace(torn + b"\n", torn[:-1] + b"?\n"))
    with pytest.raises(AuditError, match="line 10 "):
        verify(path)


def test_when_the_end_is_zeros_or_lacks_its_line_feed_then_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for end, events in ((bytes(5_000), 1), (b"", 0)):
        lines = written(path)
        path.write_bytes(b"\n".join(lines) + (b"\n" + end if end else b""))
        log = AuditLog(path)
        log.append("run-resumed")
        log.close()
        found = verify(path)
        assert (found.lines, found.events.get("recovered", 0)) == (11 + events, events)
        path.unlink()


def test_when_even_the_first_line_is_torn_then_the_log_begins_after_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"event"')
    log = AuditLog(path)
    log.append("run-started")
    log.close()
    assert verify(path).events == {"recovered": 1, "run-started": 1}


def test_when_the_last_whole_line_is_damaged_then_nothing_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    with path.open("ab") as file:
        file.write(b"x\n")
    with pytest.raises(AuditError, match="last line"):
        AuditLog(path).append("run-resumed")
    assert path.read_bytes().endswith(b"x\n")


def test_when_several_threads_append_then_the_chain_holds(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    threads = [threading.Thread(target=lambda: [log.append("x", number=number) for number in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify(tmp_path / "audit.jsonl").lines == 800
    assert log.head == verify(tmp_path / "audit.jsonl").head


def test_when_there_is_no_log_then_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes(b"x" * (3 << 20))
    for name, message in (("none", "cannot be read"), ("empty", "no line"), ("long", "line 1 .* more than"), (".", "cannot be read")):
        with pytest.raises(AuditError, match=message):
            verify(tmp_path / name)


def test_when_a_run_ends_and_is_checked_then_its_log_tells_what_was_sent_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_small(small_spec("fedavg", rounds=2), tmp_path)
    path = run.folder / "audit.jsonl"
    found = verify(path)
    assert found.events["run-started"] == found.events["run-finished"] == 1
    assert found.events["checkpoint"] == 2
    assert found.events["task-sent"] == found.events["reply-received"] >= 2 * len(DOMAINS)
    last = json.loads(path.read_bytes().splitlines()[-1])
    assert last["fields"]["weights_sha256"] == run.results().weights_sha256.iloc[0]
    for site in DOMAINS:
        events = [json.loads(line) for line in (run.folder / "sites" / site / "audit.jsonl").read_bytes().splitlines()]
        assert verify(run.folder / "sites" / site / "audit.jsonl").lines == len(events)
        left = [event["fields"]["tensors"] for event in events if event["event"] == "reply-sent"]
        assert left[0] == ["shared"]
        assert [] in left  # scores leave as values, without tensors
    (run.folder / "results.parquet").unlink()
    pretrain(small_spec("fedavg", rounds=2), output=run.folder)
    assert verify(path, found.head).events["run-resumed"] == 1
    assert run_command(["audit", "verify", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"head {verify(path).head}" in shown
    assert run_command(["audit", "verify", str(path), "--head", found.head, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head_found_in_line"] == found.lines
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert run_command(["audit", "verify", str(path), "--json"]) == AuditError.exit_code == 52
    assert json.loads(capsys.readouterr().out)["message"].startswith("line 4 ")


def test_when_a_log_is_kept_then_the_models_bytes_do_not_know_of_it(tmp_path: Path) -> None:
    runs = [train_small(small_spec("fedavg", rounds=1), tmp_path / name) for name in ("one", "two")]
    assert (runs[0].final / "model.safetensors").read_bytes() == (runs[1].final / "model.safetensors").read_bytes()
    assert verify(runs[0].folder / "audit.jsonl").head != verify(runs[1].folder / "audit.jsonl").head
