"""Every reader refuses what is hostile: quickly, in little memory, and with its one kind of error."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federated.hostile import (
    MEBI,
    MESSAGES,
    READERS,
    REPLIES,
    TASKS,
    TENSORS,
    good_checkpoint,
    good_model,
    in_message,
    pack,
    reseal,
    server,
    unpack,
)

from fedcast.errors import CheckpointError, FedcastError, SpecError, UnknownNameError, WireError
from fedcast.federated.checkpoint import Checkpoints
from fedcast.federated.guards import Guards
from fedcast.federated.messages import Reply, Task
from fedcast.federated.site import SiteRole
from fedcast.federated.state import SiteStates
from fedcast.models.architectures import build_model
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.mixture import DomainMixture
from fedcast.models.published.heartgpt import HeartGPT
from fedcast.models.published.pretrained import read_network
from fedcast.spec import GuardSpec, TuningSpec, load_spec
from fedcast.training.memory import peak_bytes, reset_peak
from fedcast.tuning.base import build_tuning

SECONDS, TOLERANCE = 1.0, 64 * MEBI


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def refused(error: type[FedcastError], size: int) -> Iterator[None]:
    """Demand one kind of error, within a second of work and twice the attack's size in memory."""
    reset_peak()
    before, start, worked = resident(), time.perf_counter(), time.process_time()
    with pytest.raises(error) as raised:
        yield
    took, grown = time.process_time() - worked, peak_bytes() - before
    assert took < SECONDS, f"{took:.2f} s"
    assert time.perf_counter() - start < 30 * SECONDS  # other tests may run at the same time
    assert grown <= 2 * size + TOLERANCE, f"{grown / MEBI:.0f} MiB for an attack of {size / MEBI:.1f} MiB"
    assert isinstance(raised.value, error)
    assert len(str(raised.value)) < 2_000 + 2 * 300
    assert raised.value.message.isprintable()


@pytest.mark.parametrize("reader", READERS)
def test_when_bytes_are_good_then_every_reader_takes_them(reader: str, tmp_path: Path) -> None:
    way = READERS[reader]
    assert way.read(tmp_path, way.good(tmp_path)) is not None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attack", TENSORS)
def test_when_safetensors_are_hostile_then_every_reader_refuses_them(attack: str, reader: str, tmp_path: Path) -> None:
    way = READERS[reader]
    good = way.good(tmp_path)
    if len(unpack(good)[0]) < 2:
        good = READERS["Reply.decode"].good(tmp_path)  # an attack on a tensor needs one
    hostile = TENSORS[attack](good)
    assert hostile != good
    with refused(way.error, len(hostile)):
        way.read(tmp_path, hostile)


@pytest.mark.parametrize("reader", READERS)
def test_when_safetensors_are_cut_anywhere_then_every_reader_refuses_them(reader: str, tmp_path: Path) -> None:
    way = READERS[reader]
    good = way.good(tmp_path)
    header, body = unpack(good)
    ends = {8 + int.from_bytes(good[:8], "little") + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    inside = range(0, len(good), max(1, len(good) // 100))
    cuts = {0, 1, 7, 8, 9, *inside, *(end + step for end in ends | {len(good) - len(body)} for step in (-1, 0, 1))} - {len(good)}
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(good)):
        with pytest.raises(way.error):
            way.read(tmp_path, good[:cut])


@pytest.mark.parametrize("attack", TASKS)
def test_when_a_task_is_hostile_then_it_is_refused(attack: str) -> None:
    hostile = in_message(READERS["Task.decode"].good(Path()), TASKS[attack])
    with refused(WireError, len(hostile)):
        Task.decode(hostile)


@pytest.mark.parametrize("attack", REPLIES)
def test_when_a_reply_is_hostile_then_it_is_refused(attack: str) -> None:
    hostile = in_message(READERS["Reply.decode"].good(Path()), REPLIES[attack])
    with refused(WireError, len(hostile)):
        Reply.decode(hostile)


@pytest.mark.parametrize("attack", sorted(MESSAGES.keys() - {"values of 2 MB"}))
def test_when_scores_are_hostile_then_they_are_refused(attack: str) -> None:
    hostile = in_message(READERS["Reply.decode of scores"].good(Path()), REPLIES[attack])
    with refused(WireError, len(hostile)):
        Reply.decode(hostile, "evaluate")


def test_when_metadata_hold_more_than_a_message_then_it_is_refused() -> None:
    header, body = unpack(READERS["Task.decode"].good(Path()))
    for metadata in ({}, {**header["__metadata__"], "format": "pt"}, {"fedcast": "{}"}):
        with pytest.raises(WireError):
            Task.decode(pack({**header, "__metadata__": metadata}, body))


def test_when_scores_hold_forecasts_then_more_of_them_is_read_than_of_other_replies() -> None:
    payload = Reply(meta={"samples": [{"point": [1.25] * 300_000}]}, task="a").encode()
    assert Reply.decode(payload, "evaluate").meta["samples"][0]["point"][-1] == 1.25
    with pytest.raises(WireError):
        Reply.decode(payload)


def test_when_a_message_is_too_large_then_its_sender_hears_of_it() -> None:
    with pytest.raises(WireError, match=r"lower evaluation\.samples"):
        Reply(meta={"x": "x" * (17 * MEBI)}).encode()
    with pytest.raises(WireError, match="10001 tensors"):
        Reply({str(number): torch.zeros(0) for number in range(10_001)}).encode()


def test_when_a_number_of_a_reply_is_not_finite_then_it_travels_as_null() -> None:
    reply = Reply(meta={"loss": float("nan"), "deep": [{"x": float("inf")}, 1.5]})
    assert Reply.decode(reply.encode()).meta == {"loss": None, "deep": [{"x": None}, 1.5]}


def test_when_an_error_of_a_site_steers_the_terminal_then_it_cannot_when_read() -> None:
    back = Reply.decode(Reply(error="data: \x1b]0;x\x07 bad\nhint" + "x" * 5_000).encode())
    assert back.error is not None
    assert back.error.startswith("data: ?]0;x? bad\nhint")
    assert len(back.error) == 2_000


def test_when_a_large_message_is_read_then_it_takes_no_more_than_its_tensors_beside_it() -> None:
    payload = Task("train", 1, {"shared": torch.ones(64 * MEBI // 4), "private": torch.ones(36 * MEBI // 4)}).encode()
    reset_peak()
    before = resident()
    task = Task.decode(payload)
    assert peak_bytes() - before <= 1.1 * len(payload)
    assert task.nbytes == 100 * MEBI


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "deep manifest": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 200_000),
    "manifest that is a list": lambda folder: (folder / "manifest.json").write_bytes(b"[]"),
    "manifest of zeros": lambda folder: (folder / "manifest.json").write_bytes(bytes(500)),
    "manifest without its seal": lambda folder: (folder / "manifest.json").write_bytes(b'{"round": 1}'),
    "manifest of another round": lambda folder: reseal(folder.parent, round=2),
    "round that is a text": lambda folder: reseal(folder.parent, round="1"),
    "manifest without progress": lambda folder: reseal(folder.parent, progress=None),
    "progress with another key": lambda folder: reseal(folder.parent, progress={"code": "import os"}),
    "progress of another type": lambda folder: reseal(folder.parent, progress={"best_round": "2"}),
    "another key": lambda folder: reseal(folder.parent, code="import os"),
    "another size": lambda folder: reseal(folder.parent, size=4),
    "tensors of another server": lambda folder: reseal(
        folder.parent, pack({"shared": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    ),
    "manifest that is a pipe": lambda folder: _pipe(folder / "manifest.json"),
    "tensors that are a pipe": lambda folder: _pipe(folder / "server.safetensors"),
    "tensors that are a folder": lambda folder: _folder(folder / "server.safetensors"),
    "manifest that is a link": lambda folder: _linked(folder / "manifest.json"),
    "tensors that are a link": lambda folder: _linked(folder / "server.safetensors"),
    "checkpoint that is a link": lambda folder: _linked(folder),
}


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(path: Path) -> None:
    outside = path.parent.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("attack", MANIFESTS)
def test_when_a_checkpoint_is_hostile_then_it_is_refused(attack: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    good_checkpoint(folder)
    assert Checkpoints(folder).load(server()) is not None
    MANIFESTS[attack](folder / "round-000001")
    with refused(CheckpointError, 0):
        Checkpoints(folder).load(server())


@pytest.mark.parametrize("make", [_pipe, _folder, _linked])
def test_when_a_site_state_is_no_file_of_its_own_then_it_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    states = SiteStates(tmp_path / "run" / "site")
    states.save(1, {"private": torch.ones(3)}, 0)
    make(tmp_path / "run" / "site" / "state-000001.safetensors")
    with refused(CheckpointError, 0):
        states.newest()


def _config(**changes: Any) -> Callable[[Path], object]:
    def attack(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return attack


def _written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _huge(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _config(model={**config["model"], "d_model": 16384, "n_heads": 128, "encoder_layers": 256})(folder)


def _of_pickles(folder: Path) -> None:
    HeartGPT.tiny(0).save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


MODELS: dict[str, Callable[[Path], object]] = {
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "configuration that is no JSON": _written("config.json", b"format: x"),
    "configuration with a mark": lambda folder: _written("config.json", b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())(folder),
    "deep configuration": _written("config.json", b"[" * 200_000 + b"]" * 200_000),
    "configuration of 50 MB": _written("config.json", b'{"format":"' + b"x" * (50 * MEBI) + b'"}'),
    "key twice": lambda folder: _written("config.json", b'{"format":"x",' + (folder / "config.json").read_bytes()[1:])(folder),
    "configuration that is a list": _written("config.json", b"[]"),
    "configuration with NaN": _config(version=float("nan")),
    "format unknown": _config(format="fedcast.pickle"),
    "another key": _config(trust_remote_code=True),
    "code to import": _config(auto_map={"AutoModel": "evil.Model"}),
    "code of another library": _written(
        "config.json", b'{"model_type":"evil","auto_map":{"AutoModel":"evil.Model"},"trust_remote_code":true}'
    ),
    "architecture that leads up": _config(model={"architecture": "../../evil"}),
    "a model of 800 GB": _huge,
    "weights of another model": _config(weights_sha256="0" * 64),
    "pickled weights alone": _of_pickles,
    "deep index": _written("model.safetensors.index.json", b"[" * 200_000 + b"]" * 200_000),
    "weights that are a pipe": lambda folder: _pipe(folder / "model.safetensors"),
    "weights that are a folder": lambda folder: _folder(folder / "model.safetensors"),
    "configuration that is a pipe": lambda folder: _pipe(folder / "config.json"),
    "weights that are a link": lambda folder: _linked(folder / "model.safetensors"),
    "configuration that is a link": lambda folder: _linked(folder / "config.json"),
    "link to what never ends": lambda folder: _to(folder / "model.safetensors", "/dev/zero"),
    "link to itself": lambda folder: _to(folder / "model.safetensors", "model.safetensors"),
    "another file that is a link": lambda folder: (folder / "more.safetensors").symlink_to("/etc/passwd"),
    "another file with a bomb": _written("more.safetensors", b"\xff" * 100),
}


def _to(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("attack", MODELS)
def test_when_a_model_folder_is_hostile_then_it_is_refused(attack: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "final"
    good_model(folder)
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint ran')")
    MODELS[attack](folder)
    with refused(CheckpointError, 50 * MEBI if "50 MB" in attack else 0):
        Forecaster.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "/etc/passwd", "..", ".", "", "\0", "a\\b", "none.safetensors"])
def test_when_an_index_names_what_lies_elsewhere_then_the_library_is_not_asked(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with refused(CheckpointError, 0):
        read_network(None, tmp_path)


def test_when_a_model_lies_in_the_cache_of_the_hub_then_its_links_are_followed(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    good_model(cache / "blobs")
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert Forecaster.from_pretrained(snapshot)
    (tmp_path / "link").symlink_to(cache / "blobs")
    assert Forecaster.from_pretrained(tmp_path / "link")


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "a\\b", ".", "..", ".hidden", "", "a\0b", "a\nb", "x" * 300, "\ud800"])
def test_when_a_name_cannot_be_a_folders_then_no_site_and_no_expert_has_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no usable name"):
        SiteRole(name)
    config = ModelConfig(d_model=8, n_heads=2, encoder_layers=1, decoder_layers=1, context=16, horizon=8, patch=8)
    DomainMixture({"a": build_model(config), "b": build_model(config)}).save_pretrained(tmp_path)
    _config(experts=["a", name])(tmp_path)
    with pytest.raises(CheckpointError):
        Forecaster.from_pretrained(tmp_path)
    with pytest.raises(UnknownNameError):
        Guards.of([GuardSpec(name=name)])
    with pytest.raises(UnknownNameError):
        build_tuning(TuningSpec(name=name))


SPECS: dict[str, bytes] = {
    "deep list": b"a=" + b"[" * 100_000 + b"]" * 100_000,
    "deep tables": b"a={" * 50_000,
    "key of 10^5 parts": b"a." * 100_000 + b"a=1",
    "key of 10^5 quoted parts": b'"a".' * 60_000 + b"a=1",
    "table of 10^5 parts": b"[" + b"a." * 100_000 + b"a]",
    "long key behind a text": b"a={x='''\n\" ''', " + b"a." * 100_000 + b'b=1, y="z"}',
    "number of 10^5 digits": b"seed=" + b"1" * 100_000,
    "hexadecimal of 10^5 digits": b"seed=0x" + b"f" * 100_000,
    "10^5 tables": b"[[a]]\n" * 40_000,
    "10^5 keys": b"".join(b"k%d=1\n" % number for number in range(25_000)),
    "50 MB": b"#" * (50 * MEBI),
    "unfinished text": b'name="' + b'\\"' * 100_000,
    "unfinished texts": b"name='''" + b"''" * 100_000,
    "quotes": b'"' * 200_001,
    "no UTF-8": b'name="\xff"',
    "UTF-16": 'name="x"'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbfname="x"',
    "NUL": b'name="a\0"',
    "half a surrogate pair": b'name="\\ud800"',
    "NaN": b"[training]\nlearning_rate=nan",
    "date": b"seed=1979-05-27",
    "name that leads up": b'name="../../x"',
    "long name": b'name="' + b"x" * 1000 + b'"',
    "pickle": b"\x80\x04\x95",
    "unknown key": b'[data]\ncode="import os"',
    "guards that are numbers": b"guards=[1]",
    "method that is a number": b"method=1",
}


@pytest.mark.parametrize("attack", SPECS)
def test_when_a_spec_is_hostile_then_it_is_refused(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_bytes(SPECS[attack])
    with refused(SpecError, len(SPECS[attack])):
        load_spec(path)


def test_when_a_spec_is_no_file_then_it_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for path in (tmp_path, tmp_path / "pipe.toml", tmp_path / "loop.toml", tmp_path / "none.toml", Path("/dev/zero")):
        with refused(SpecError, 0):
            load_spec(path)


def test_when_the_corpus_is_counted_then_it_has_more_than_thirty_attacks() -> None:
    assert len(TENSORS) + len(TASKS) + len(REPLIES) + len(MANIFESTS) + len(MODELS) + len(SPECS) > 150
