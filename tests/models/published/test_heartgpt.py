"""HeartGPT: tokens, paths, and the published weights where FEDCAST_WEIGHTS names their folder."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from fedcast.data.windows import Batch, Windows
from fedcast.errors import CheckpointError
from fedcast.models.checkpoints import load_checkpoint, weights_digest
from fedcast.models.published import heartgpt
from fedcast.models.published.heartgpt import GPT, HeartGPT, Shape


def waves(rows: int, length: int) -> torch.Tensor:
    """Return pulses [rows, length] with a little noise, each row with its own period."""
    generator = torch.Generator().manual_seed(0)
    period = torch.arange(9, 9 + rows)[:, None]
    return torch.exp(3 * torch.cos(2 * torch.pi * torch.arange(length) / period)) + 0.1 * torch.randn(rows, length, generator=generator)


def batch_of(values: torch.Tensor, mask: torch.Tensor, length: int) -> Batch:
    rows, labels = np.arange(len(values)), torch.zeros(len(values), dtype=torch.int64)
    values = torch.where(mask, values, 0.0)
    return Batch(values[:, :length], mask[:, :length], values[:, length:], mask[:, length:], Windows(rows, rows), labels, labels.clone())


def written_out(network: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [T, V] of tokens [T], computed head by head as the paper describes it."""
    state, length = network.state_dict(), len(tokens)
    x = state["token_embedding_table.weight"][tokens] + state["position_embedding_table.weight"][:length]
    width = x.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    for block in range(len(network.blocks)):
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in state.items() if name.startswith(f"blocks.{block}.")}
        normal = F.layer_norm(x, (width,), own["ln1.weight"], own["ln1.bias"])
        heads = []
        for head in range(sum(name.endswith("key.weight") for name in own)):
            key, query, value = (normal @ own[f"sa.heads.{head}.{name}.weight"].T for name in ("key", "query", "value"))
            scores = (query @ key.T * width**-0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(dim=-1) @ value)
        x = x + torch.cat(heads, dim=-1) @ own["sa.proj.weight"].T + own["sa.proj.bias"]
        normal = F.layer_norm(x, (width,), own["ln2.weight"], own["ln2.bias"])
        hidden = (normal @ own["ffwd.net.0.weight"].T + own["ffwd.net.0.bias"]).relu()
        x = x + hidden @ own["ffwd.net.2.weight"].T + own["ffwd.net.2.bias"]
    x = F.layer_norm(x, (width,), state["ln_f.weight"], state["ln_f.bias"])
    return x @ state["lm_head.weight"].T + state["lm_head.bias"]


def test_when_tokens_are_read_then_the_logits_are_those_of_the_papers_network() -> None:
    network, tokens = HeartGPT.tiny(0).network, torch.randint(0, 101, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, _ = network(tokens[None], torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(network.lm_head(features)[0], written_out(network, tokens))


def test_when_a_context_is_tokenised_then_its_range_becomes_0_to_100_and_gaps_hold_the_last_value() -> None:
    values = torch.tensor([[7.0, 2.0, 3.0, 9.9, 12.0, 30.0], [4.0] * 6])
    mask = torch.tensor([[False, True, True, False, True, True], [True] * 6])
    window = heartgpt._tokenise(values, mask, 5)
    assert window.tokens[0, 1:].tolist() == [0, 10, 10, 100, 100]  # the last is a target beyond the range
    assert window.first.tolist() == [1, 0]
    assert window.tokens[1].tolist() == [50] * 6
    assert window.span.tolist() == [[10.0], [0.0]]


def test_when_paths_are_drawn_then_keeping_keys_gives_what_reading_the_whole_path_again_gives() -> None:
    model = HeartGPT.tiny(0)
    tokens = torch.randint(0, 101, (3, 12), generator=torch.Generator().manual_seed(1))
    first, draws = torch.tensor([0, 4, 11]), heartgpt._draws(8)
    with torch.no_grad():
        paths = model._paths(tokens, first, draws)
        for row in range(3):
            for path in (0, 7):
                whole = tokens[row, first[row] :]
                for step in range(8):
                    logits = written_out(model.network, whole)[-1]
                    whole = torch.cat((whole, heartgpt._choose(logits, draws[path, step])[None]))
                assert torch.equal(paths[row, path], whole[-8:])


def test_when_a_horizon_is_longer_than_a_pass_then_its_beginning_is_that_of_a_pass() -> None:
    model, context = HeartGPT.tiny(0), waves(2, 32)
    mask = torch.ones_like(context, dtype=torch.bool)
    short, long = model(context, mask, 8), model(context, mask, 19)
    assert torch.equal(short.quantiles, long.quantiles[:, :8])


def test_when_a_window_is_forecast_in_other_company_then_its_forecast_is_the_same() -> None:
    model, context = HeartGPT.tiny(0), waves(11, 32)
    mask = torch.ones_like(context, dtype=torch.bool)
    together = model(context, mask, 8).quantiles
    alone = torch.cat([model(context[row : row + 1], mask[:1], 8).quantiles for row in range(11)])
    torch.testing.assert_close(together, alone)


def test_when_the_unit_changes_then_the_forecast_changes_with_it() -> None:
    model, context = HeartGPT.tiny(0), waves(2, 32)
    mask = torch.ones_like(context, dtype=torch.bool)
    torch.testing.assert_close(model(4 * context - 8, mask, 8).point, 4 * model(context, mask, 8).point - 8)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_when_a_context_is_constant_then_its_forecast_is_too_and_it_gives_no_loss(value: float) -> None:
    model, values = HeartGPT.tiny(0), torch.full((1, 36), value)
    values[:, 32:] = 5.0
    mask = torch.ones_like(values, dtype=torch.bool)
    assert (model(values[:, :32], mask[:, :32], 4).quantiles == value).all()
    assert model.step(batch_of(values, mask, 32), torch.Generator)[0] == 0


def test_when_a_batch_is_trained_on_then_the_loss_is_the_cross_entropy_of_every_next_observed_token() -> None:
    model, values = HeartGPT.tiny(0), waves(1, 38)
    mask = torch.ones_like(values, dtype=torch.bool)
    tokens = heartgpt._tokenise(values, mask, 32).tokens[0]
    batch = batch_of(values, mask, 32)
    with torch.no_grad():
        each = F.cross_entropy(written_out(model.network, tokens[:-1]), tokens[1:], reduction="none")
        torch.testing.assert_close(model.step(batch, torch.Generator)[0], each.mean())
        later = replace(batch, target_mask=torch.tensor([[True] * 3 + [False] * 3]))
        torch.testing.assert_close(model.step(later, torch.Generator)[0], each[:-3].mean())


def test_when_an_adapter_stands_in_the_place_of_a_map_then_it_is_read() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, context = HeartGPT.tiny(0), waves(2, 16)
    before = model.embed(context, torch.ones_like(context, dtype=torch.bool))
    head = model.network.blocks[0].sa.heads[1]
    twin = Doubled(16, 8, bias=False)
    twin.load_state_dict(head.value.state_dict())
    head.value = twin
    assert not torch.allclose(before, model.embed(context, torch.ones_like(context, dtype=torch.bool)))


def test_when_a_file_as_published_is_given_then_it_is_read(tmp_path: Path) -> None:
    state = GPT(Shape(102)).state_dict()
    state["blocks.0.sa.heads.0.tril"] = torch.ones(500, 500).tril()
    file = tmp_path / "PPGPT.safetensors"
    safetensors.torch.save_file(state, file)
    model = load_checkpoint(file)
    assert isinstance(model, HeartGPT)
    assert model.settings == Shape(102)
    assert len(weights_digest(file)) == 64
    with pytest.raises(CheckpointError, match="ecg"):
        HeartGPT.from_published(file, "ecg")


def test_when_a_file_holds_something_else_then_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(file)
    with pytest.raises(CheckpointError, match="HeartGPT"):
        HeartGPT.from_published(file)
    names = ("token_embedding_table.weight", "position_embedding_table.weight")
    safetensors.torch.save_file({name: torch.ones(101, 64) for name in names}, file)
    with pytest.raises(CheckpointError, match=r"other\.safetensors lacks"):
        load_checkpoint(file)


@pytest.mark.parametrize(("kind", "name", "size"), [("ecg", "ECGPT_560k_iters", 443_493), ("ppg", "PPGPT_500k_iters", 443_622)])
def test_when_the_published_weights_are_read_then_they_predict_a_heart(
    real_weights: Path, tmp_path: Path, kind: Literal["ecg", "ppg"], name: str, size: int
) -> None:
    model = HeartGPT.from_published(real_weights / "heartgpt" / f"{name}.safetensors", kind)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    model.save_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(load_checkpoint(tmp_path).state_dict().values(), model.state_dict().values(), strict=True))
    with (real_weights / "heartgpt" / f"example_context_{kind.upper()}.csv").open() as file:
        values = torch.tensor([[float(row[0]) for row in csv.reader(file)]])
    assert values.shape == (1, 500)
    context, target = values[:, :436], values[:, 436:476]
    mask = torch.ones_like(values, dtype=torch.bool)
    with torch.inference_mode():
        loss = model.step(batch_of(values, mask, 436), torch.Generator)[0]
        point = model(context, mask[:, :436], 40).point
    assert loss < 2.0  # nats a token, where guessing needs 4.6
    error = (point - target).abs().mean()
    assert error < 0.5 * (target - context.median()).abs().mean()
