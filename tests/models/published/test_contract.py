"""What every adapter of a published model must do, checked on its tiny model; a family whose library is not installed is skipped."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedcast.models.published  # noqa: F401 - registers the adapters
from fedcast.data.windows import Batch, Windows
from fedcast.errors import CheckpointError, MissingExtraError, ModelError
from fedcast.models.base import QUANTILES, Forecast
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.forecaster import Forecaster
from fedcast.models.published.base import FAMILIES, Published, read_json
from fedcast.models.reheaded import Reheaded

ROWS = 3


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> type[Published]:
    chosen = FAMILIES[request.param]
    if chosen.library.installed is None:
        pytest.skip(f"{chosen.library.package}, which computes {chosen.family}, is not installed")
    return chosen


@pytest.fixture
def model(family: type[Published]) -> Published:
    return copy.deepcopy(tiny(family))


@cache
def tiny(family: type[Published]) -> Published:
    return family.tiny(0).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def saved(model: Published, folders: Path) -> Path:
    folder = folders / model.family
    if not folder.exists():
        model.save_pretrained(folder)
    return folder


def series(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return sines with noise [3, length], a tenth of the points missing at random, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.tensor([[7.0], [12.0], [24.0]])
    values = 10 + 3 * torch.sin(2 * torch.pi * torch.arange(length) / period) + 0.1 * torch.randn(ROWS, length, generator=generator)
    return values, torch.rand(ROWS, length, generator=generator) > 0.1


def batch_for(model: Published, steps: int | None = None) -> Batch:
    """Return the batch that a store would give: zeros where missing."""
    length, steps = model.config.context, steps or model.config.horizon
    values, mask = series(length + steps)
    values = torch.where(mask, values, 0.0)
    rows = np.arange(ROWS)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    return Batch(
        values[:, :length], mask[:, :length], values[:, length:], mask[:, length:], Windows(rows, rows + length), labels, labels.clone()
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def gradients(model: Published, batch: Batch) -> dict[str, Tensor | None]:
    model.zero_grad()
    model.step(batch, generator)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def forecast(model: Published, horizon: int | None = None) -> Forecast:
    with torch.inference_mode():
        return model(*series(model.config.context), horizon or model.config.horizon)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_when_a_tiny_model_is_built_then_the_seed_alone_decides_its_weights(family: type[Published]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, other = family.tiny(0), family.tiny(1)
    assert same_bits(again.state_dict(), tiny(family).state_dict())
    assert not same_bits(other.state_dict(), tiny(family).state_dict())
    assert torch.equal(before, torch.get_rng_state())


def test_when_a_fresh_model_is_drawn_then_only_its_values_differ(model: Published) -> None:
    fresh, state = model.fresh(3), model.state_dict()
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {name: value.shape for name, value in state.items()}
    assert fresh.config == model.config
    assert not same_bits(fresh.state_dict(), state)
    assert same_bits(fresh.state_dict(), model.fresh(3).state_dict())


def test_when_a_tiny_model_is_saved_then_it_is_small_and_only_its_family_recognises_it(model: Published, folders: Path) -> None:
    folder = saved(model, folders)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 150_000
    config = read_json(folder / "config.json")
    assert [name for name, family in sorted(FAMILIES.items()) if family.recognises(config)] == [model.family]


def test_when_a_saved_model_is_read_then_it_forecasts_the_same_bits(model: Published, folders: Path) -> None:
    read = load_checkpoint(saved(model, folders))
    assert type(read) is type(model)
    assert read.config == model.config
    assert same_bits(read.state_dict(), model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(forecast(read.eval()), forecast(model), strict=True))


@pytest.mark.parametrize("damage", ["none", "cut"])
def test_when_the_weights_are_missing_or_cut_then_the_checkpoint_is_refused(
    model: Published, folders: Path, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(saved(model, folders), tmp_path / "copy"))
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert caught.value.hint


def test_when_a_tensor_has_another_shape_then_it_is_named_and_nothing_is_printed(
    model: Published, folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(saved(model, folders), tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name] = torch.cat((weights[name], weights[name]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_checkpoint(folder)
    assert capfd.readouterr() == ("", "")


def test_when_the_library_is_missing_then_a_tiny_model_names_the_command(family: type[Published], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "library", replace(family.library, needs=("no_such_module",)))
    with pytest.raises(MissingExtraError) as caught:
        family.tiny(0)
    assert caught.value.hint == family.library.install


def test_when_a_model_is_under_a_new_head_then_bfloat16_is_refused_as_without(model: Published) -> None:
    for one in (model, Reheaded.on(model, "flatten")):
        with pytest.raises(ModelError, match="float32"):
            Forecaster(one).predict_arrays(np.zeros((1, 8)), 2, precision="bfloat16")


@pytest.mark.parametrize("steps", ["one", "a pass", "more than a pass"])
def test_when_a_horizon_is_asked_for_then_the_forecast_is_finite_and_sorted(model: Published, steps: str) -> None:
    own = model.config.horizon
    horizon = {"one": 1, "a pass": own, "more than a pass": own + own // 2 + 1}[steps]
    point, quantiles = forecast(model, horizon)
    assert point.shape == (ROWS, horizon)
    assert quantiles.shape == (ROWS, horizon, len(QUANTILES))
    assert point.dtype == quantiles.dtype == torch.float32
    assert point.isfinite().all()
    assert quantiles.isfinite().all()
    assert (quantiles.diff(dim=-1) >= 0).all()
    if model.quantiles == "none":
        assert torch.equal(quantiles, point[..., None].expand_as(quantiles))


def test_when_values_are_missing_then_what_stands_there_does_not_matter(model: Published) -> None:
    context, mask = series(model.config.context)
    mask[1] = False
    with torch.inference_mode():
        results = [model(torch.where(mask, context, other), mask, 2) for other in (0.0, torch.nan, -7.0)]
        unmarked = model(torch.where(mask, context, torch.nan), torch.ones_like(mask), 2)
    assert all(part.isfinite().all() for part in results[0])
    for other in (*results[1:], unmarked):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("length", [0, 1, 9])
def test_when_the_context_is_short_then_there_is_a_forecast(model: Published, length: int) -> None:
    context, mask = series(length)
    with torch.inference_mode():
        result = model(context, mask, 3)
    assert result.quantiles.shape == (ROWS, 3, len(QUANTILES))
    assert all(part.isfinite().all() for part in result)


def test_when_the_context_is_longer_than_the_models_then_only_its_end_counts(model: Published) -> None:
    context, mask = series(model.config.context + 5)
    with torch.inference_mode():
        whole, end = model(context, mask, 2), model(context[:, 5:], mask[:, 5:], 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, end, strict=True))


def test_when_a_few_steps_are_taken_on_one_batch_then_the_loss_falls(model: Published) -> None:
    model.train()
    batch, losses = batch_for(model), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(6):
        optimiser.zero_grad()
        loss, _ = model.step(batch, generator)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_when_a_batch_comes_twice_then_it_gives_the_same_gradient_in_either_mode(model: Published) -> None:
    batch = batch_for(model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    results = [gradients(mode, batch) for mode in (model.train(), model.eval(), model.train())]
    reached = {name for name, gradient in results[0].items() if gradient is not None and gradient.any()}
    assert {model.head(name) for name in reached} == {True, False}
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert gradient is None or torch.equal(gradient, other[name])
    assert torch.equal(before, torch.get_rng_state())


def test_when_targets_are_missing_then_what_stands_there_does_not_matter(model: Published) -> None:
    batch = batch_for(model)
    assert not batch.target_mask.all()
    losses = [model.step(batch, generator)[0]]
    batch.target[~batch.target_mask] = 50.0
    losses.append(model.step(batch, generator)[0])
    assert losses[0].isfinite()
    assert torch.equal(*losses)


def test_when_targets_are_shorter_than_a_pass_then_they_are_trained_on(model: Published) -> None:
    loss, _ = model.step(batch_for(model, max(1, model.config.horizon // 2)), generator)
    assert loss.shape == ()
    assert loss.isfinite()


def test_when_targets_are_longer_than_a_pass_then_they_are_refused(model: Published) -> None:
    with pytest.raises(ModelError, match=r"cannot be trained") as caught:
        model.step(batch_for(model, model.config.horizon + 1), generator)
    assert str(model.config.horizon) in caught.value.hint


def test_when_a_batch_is_encoded_then_there_is_one_feature_vector_a_token(model: Published) -> None:
    batch = batch_for(model)
    loss, encoding = model.step(batch, generator)
    tokens = encoding.features.shape[1]
    assert encoding.features.shape == (ROWS, tokens, model.config.d_model)
    assert encoding.feature_mask.shape == (ROWS, tokens)
    assert encoding.feature_mask.dtype == torch.bool
    assert encoding.features.dtype == torch.float32
    assert encoding.features[encoding.feature_mask].isfinite().all()
    assert encoding.features.requires_grad
    assert loss.requires_grad
    embedded = model.embed(batch.context, batch.mask)
    assert embedded.shape[::2] == (ROWS, model.config.d_model)
    assert embedded.dtype == torch.float32


def test_when_parameters_are_asked_for_their_part_then_heads_and_encoder_are_told_apart(model: Published) -> None:
    assert {model.head(name) for name, _ in model.named_parameters()} == {True, False}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_when_a_family_names_what_lora_adapts_then_these_are_linear_maps_of_its_model(model: Published) -> None:
    assert model.lora_targets
    for target in model.lora_targets:
        found = [module for name, module in model.network.named_modules() if name == target or name.endswith(f".{target}")]
        assert found, target
        assert all(isinstance(module, torch.nn.Linear) for module in found), target


def test_when_a_model_is_copied_then_the_copy_stands_alone_and_forecasts_the_same(model: Published) -> None:
    twin, before = copy.deepcopy(model), forecast(model)
    assert all(torch.equal(a, b) for a, b in zip(forecast(twin), before, strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(forecast(model), before, strict=True))


def test_when_a_family_is_listed_then_it_says_what_it_is(family: type[Published]) -> None:
    assert family.summary
    assert family.licence
    assert all(name.count("/") == 1 for name in family.hub)
    assert family.quantiles in {"learnt", "sampled", "none"}
