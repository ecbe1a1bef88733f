from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.federated.hostile import reseal
from tests.federations import small_spec, train_small

from fedcast.errors import CheckpointError
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.plan import Plan
from fedcast.methods.base import Server, build_method
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.patch import PatchTransformer
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run
from fedcast.training.flat import Layout
from fedcast.training.memory import peak_bytes, reset_peak

BLOCK = 4096
LAYOUT = Layout.of({"a": torch.zeros(100_000), "b": torch.zeros(30_000)}, lambda name: name == "a")


def server(round_: int, layout: Layout = LAYOUT) -> Server:
    generator = torch.Generator().manual_seed(round_)
    shared, private = torch.randn(layout.shared_size, generator=generator), torch.randn(layout.private_size, generator=generator)
    return Server(layout, shared, private, {"x": torch.full((3,), float(round_), dtype=torch.float64)}, round=round_, rounds=9)


def two_rounds(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for number in (1, 2):
        checkpoints.save(server(number), Progress(best_round=number, rows=[{"round": number}]))
    return checkpoints


def loaded(checkpoints: Checkpoints) -> tuple[Server, Progress]:
    found = server(9)
    progress = checkpoints.load(found)
    assert progress is not None
    return found, progress


def holds(checkpoints: Checkpoints, round_: int) -> bool:
    """Whether the newest undamaged checkpoint is that of a round, to the last bit."""
    found, progress = loaded(checkpoints)
    wanted = server(round_)
    same = torch.equal(found.shared, wanted.shared) and torch.equal(found.private, wanted.private)
    return same and found.round == progress.best_round == round_ and torch.equal(found.tensors["x"], wanted.tensors["x"])


def files(folder: Path) -> list[Path]:
    return [folder / "round-000002" / name for name in ("server.safetensors", "manifest.json")]


def flips(path: Path) -> list[int]:
    """Return a bit of every 4 KiB block of a file."""
    size = path.stat().st_size
    rng = np.random.default_rng(0)
    return [8 * int(rng.integers(start, min(start + BLOCK, size))) + int(rng.integers(8)) for start in range(0, size, BLOCK)]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_when_a_bit_of_any_block_is_flipped_then_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)
    assert holds(checkpoints, 2)
    assert sum(len(flips(path)) for path in files(tmp_path)) == 128 + 1
    for path in files(tmp_path):
        for bit in flips(path):
            flip(path, bit)
            assert holds(checkpoints, 1), f"bit {bit} of {path.name}"
            flip(path, bit)
    assert holds(checkpoints, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec("fedtrl", rounds=2), tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
def test_when_a_bit_of_any_block_of_a_runs_checkpoint_is_flipped_then_it_is_found(trained: Run) -> None:
    folder = trained.folder / "checkpoints"
    checkpoints, layout = Checkpoints(folder), _layout(trained)
    count = 0
    for path in files(folder):
        for bit in flips(path):
            flip(path, bit)
            found = server(9, layout)
            assert checkpoints.load(found) is not None
            assert found.round == 1, f"bit {bit} of {path.name}"
            flip(path, bit)
            count += 1
    assert count > 900
    found = server(9, layout)
    checkpoints.load(found)
    assert found.round == 2


def _layout(run: Run) -> Layout:
    spec = RunFolder(run.folder).spec()
    return Plan(spec, build_method(spec.method)).layout


def test_when_a_bit_of_any_block_of_a_model_is_flipped_then_it_is_found(tmp_path: Path) -> None:
    config = ModelConfig(d_model=64, n_heads=2, encoder_layers=1, decoder_layers=1, context=16, horizon=8, patch=8)
    PatchTransformer(config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    assert len(flips(weights)) > 50
    for bit in flips(weights):
        flip(weights, bit)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path)
        flip(weights, bit)
    assert load_checkpoint(tmp_path)


def test_when_a_file_is_cut_anywhere_then_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)
    for path in files(tmp_path):
        whole = path.read_bytes()
        for cut in {0, 1, 7, 8, 9, *range(0, len(whole), max(1, len(whole) // 20)), len(whole) - 1} - {len(whole)}:
            path.write_bytes(whole[:cut])
            assert holds(checkpoints, 1), f"{path.name} cut after {cut} bytes"
            path.write_bytes(whole[:cut] + bytes(len(whole) - cut))
            assert holds(checkpoints, 1), f"{path.name} zero after {cut} bytes"
        path.write_bytes(whole)
    assert holds(checkpoints, 2)


TORN: dict[str, Callable[[Path], object]] = {
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "tensors missing": lambda folder: (folder / "server.safetensors").unlink(),
    "folder empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "tensors of another round": lambda folder: (folder / "server.safetensors").write_bytes(
        (folder.parent / "round-000001" / "server.safetensors").read_bytes()
    ),
    "manifest of another round": lambda folder: (folder / "manifest.json").write_bytes(
        (folder.parent / "round-000001" / "manifest.json").read_bytes()
    ),
    "longer": lambda folder: (folder / "server.safetensors").write_bytes((folder / "server.safetensors").read_bytes() + b"\0"),
}


@pytest.mark.parametrize("how", TORN)
def test_when_a_checkpoint_is_torn_then_the_one_before_is_used_and_the_next_is_written(how: str, tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)
    TORN[how](tmp_path / "round-000002")
    assert holds(checkpoints, 1)
    checkpoints.save(server(2), Progress(best_round=2))
    assert holds(checkpoints, 2)


def test_when_the_rename_is_interrupted_then_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(server(3), Progress(best_round=3), before_rename=die)
    assert (tmp_path / "aside" / "manifest.json").exists()
    assert holds(checkpoints, 2)
    checkpoints.save(server(3), Progress(best_round=3))
    assert holds(checkpoints, 3)
    assert sorted(os.listdir(tmp_path)) == ["round-000002", "round-000003"]


def test_when_both_checkpoints_are_damaged_then_the_error_says_so(tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)
    for number in (1, 2):
        flip(tmp_path / f"round-{number:06d}" / "server.safetensors", 8 * 200_000)
    kept = server(9)
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints.load(kept)
    assert torch.equal(kept.shared, server(9).shared)
    assert kept.round == 9


def test_when_a_checkpoint_is_of_another_model_then_the_error_says_so(tmp_path: Path) -> None:
    checkpoints = two_rounds(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoints.load(server(9, Layout.of({"a": torch.zeros(5)}, lambda name: True)))


def test_when_a_checkpoint_has_no_size_as_older_ones_then_it_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(server(1), Progress(best_round=1))
    reseal(tmp_path, size=None)
    assert holds(checkpoints, 1)


def test_when_a_checkpoint_is_written_then_the_library_reads_it_and_nothing_is_copied(tmp_path: Path) -> None:
    layout = Layout.of({"a": torch.zeros(1 << 24)}, lambda name: True)
    large = server(1, layout)
    checkpoints = Checkpoints(tmp_path)
    reset_peak()
    before = peak_bytes()
    checkpoints.save(large, Progress())
    assert peak_bytes() - before < large.shared.nbytes / 4
    found = safetensors.torch.load_file(tmp_path / "round-000001" / "server.safetensors")
    assert torch.equal(found["shared"], large.shared)
    assert torch.equal(found["method.x"], large.tensors["x"])
    assert (tmp_path / "round-000001" / "server.safetensors").read_bytes() == safetensors.torch.save(
        {"shared": large.shared, "private": large.private, "method.x": large.tensors["x"]}
    )
