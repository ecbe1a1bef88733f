"""What is fuzzed: each target takes bytes, hands them to a reader, and lets nothing but fedcast's own errors pass silently.

``python tests/fuzz/targets.py TARGET FOLDER [libFuzzer's options]`` mutates bytes until something else is raised; the crash is then
written to ``FOLDER/crash-...``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas  # noqa: F401 - imported before atheris looks on: only fedcast is instrumented
import torch

ROOT = Path(__file__).parents[2]
Target = Callable[[bytes], None]


def wire(folder: Path) -> Target:
    """Task and reply: by the first byte as they are, with a header's length put right, or the JSON of a message alone."""
    from tests.federated.hostile import READERS, in_message

    from fedcast.errors import WireError
    from fedcast.federated.messages import Reply, Task

    task, reply = (READERS[name].good(folder) for name in ("Task.decode", "Reply.decode"))

    def target(data: bytes) -> None:
        try:
            inner = data[1:].decode(errors="ignore").encode()
            if data[:1] == b"T":
                Task.decode(in_message(task, lambda _: inner))
            elif data[:1] == b"R":
                Reply.decode(in_message(reply, lambda _: inner))
            else:
                (Task if data[-1:] < b"@" else Reply).decode(_put_right(data))
        except WireError:
            return

    return target


def _put_right(data: bytes) -> bytes:
    """Return safetensors: as they are behind a small letter, else a header's text and, behind a line feed, tensors' bytes."""
    if data[:1].islower():
        return data[1:]
    header, _, body = data[1:].partition(b"\n")
    return len(header).to_bytes(8, "little") + header + body


def checkpoint(folder: Path) -> Target:
    """Manifest and tensors of a checkpoint, a site's state, and the configuration of a model, by the first byte."""
    from tests.federated.hostile import good_checkpoint, good_model, reseal, server

    from fedcast.errors import CheckpointError
    from fedcast.federated.checkpoint import Checkpoints
    from fedcast.federated.state import SiteStates
    from fedcast.models.files import model_format
    from fedcast.models.patch import model_class

    run, site, model = folder / "run", folder / "site", folder / "model"
    good_checkpoint(run)
    good_model(model)
    site.mkdir(exist_ok=True)
    kept = server()

    def tensors(data: bytes) -> None:
        reseal(run, _put_right(data))
        Checkpoints(run).load(kept)

    def manifest(data: bytes) -> None:
        (run / "round-000001" / "manifest.json").write_bytes(data)
        try:
            Checkpoints(run).load(kept)
        finally:
            good_checkpoint(run)

    def state(data: bytes) -> None:
        (site / "state-000001.safetensors").write_bytes(_put_right(data))
        SiteStates(site).newest()

    def config(data: bytes) -> None:
        (model / "config.json").write_bytes(data)
        if model_format(model):
            model_class(model).from_pretrained(model)

    ways = (state, state, state, state, tensors, manifest, config, config)

    def target(data: bytes) -> None:
        if data:
            try:
                ways[data[0] % len(ways)](data[1:])
            except CheckpointError:
                return

    return target


def spec(folder: Path) -> Target:
    """A spec in TOML."""
    from fedcast.errors import SpecError
    from fedcast.spec import load_spec

    path = folder / "spec.toml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            load_spec(path).fingerprint()
        except SpecError:
            return

    return target


def frame(folder: Path) -> Target:
    """A table in CSV."""
    from fedcast.data.frames import read_frame
    from fedcast.errors import DataError

    path = folder / "frame.csv"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_frame(path)
        except DataError:
            return

    return target


TARGETS: dict[str, Callable[[Path], Target]] = {"wire": wire, "checkpoint": checkpoint, "spec": spec, "frame": frame}


def seeds(name: str, folder: Path) -> list[bytes]:
    """Return good inputs of a target, and a few bad ones."""
    from tests.federated.hostile import READERS, REPLIES, TASKS, TENSORS

    def attacked(good: bytes) -> list[bytes]:
        made = [good, *(bad for attack in TENSORS.values() if len(bad := attack(good)) < 4_000)]
        split = [(bad[8 : 8 + int.from_bytes(bad[:8], "little")], bad[8 + int.from_bytes(bad[:8], "little") :]) for bad in made]
        return [b"a" + bad for bad in made] + [b"A" + head + b"\n" + body for head, body in split]

    if name == "wire":
        found = []
        for reader in ("Task.decode", "Reply.decode"):
            good = READERS[reader].good(folder)
            attacks, letter = (TASKS, b"T") if reader == "Task.decode" else (REPLIES, b"R")
            found += [letter + change(_inner(good)) for change in attacks.values()] + attacked(good)
        return [seed for seed in found if len(seed) < 4_000]
    if name == "checkpoint":
        scratch = folder / "seeds"
        scratch.mkdir()
        state = READERS["SiteStates"].good(scratch)
        tensors = READERS["Checkpoints.load"].good(scratch)
        READERS["Forecaster.from_pretrained"].good(scratch)
        manifest = (scratch / "round-000001" / "manifest.json").read_bytes()
        config = (scratch / "config.json").read_bytes()
        return [*(b"\0" + bad for bad in attacked(state)), b"\4a" + tensors, b"\5" + manifest, b"\6" + config]
    if name == "spec":
        return [path.read_bytes() for path in sorted((ROOT / "examples").glob("*.toml"))]
    rows = [f"2024-01-{day:02d},T{series},{day}.5" for series in (1, 2) for day in range(1, 9)]
    return [
        "\n".join(["ds,unique_id,y", *rows]).encode(),
        "\n".join(["ds;unique_id;y", *(row.replace(",", ";") for row in rows)]).encode(),
        b"time,a,b\n1,2,3\n2,3,\n4,?,5\n",
        b'ds,y\n2024-01-01 00:00,"1,5"\n2024-01-01 01:00,2\n',
        b"ds,y\r\n2024-01,1\r\n2024-02,2\r\n",
        b"ds,y\r2024-01,1\r2024-02,2\r",
    ]


def _inner(message: bytes) -> dict[str, Any]:
    length = int.from_bytes(message[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(message[8 : 8 + length])["__metadata__"]["fedcast"])
    return header


WORDS = r"""
dtype shape data_offsets F32 BF16 I64 BOOL __metadata__ fedcast kind train round meta id error task null true NaN 1e999 -1 0.5
9223372036854775807 [ ] { } , : [[ ]] = \" \\ud800 \"\" ds unique_id T1 ; \x09 \x0d \x0a \x00 \xff ? 2024-01-01 2024-02-30
0001-01-01 1,5 1e308 inf +02:00 name guards seed rounds
"""
"""What mutations put in beside single bytes, as libFuzzer writes them."""


def main(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz a target under atheris."""
    import atheris

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    numpy.seterr(all="ignore")
    with atheris.instrument_imports(include=["fedcast"]):
        target = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(name, folder)):
        (corpus / f"{number:03d}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS.split()))
    options = [f"-dict={words}", *options]
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", "-max_len=4096", "-timeout=20", "-print_final_stats=1", *options], target
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
