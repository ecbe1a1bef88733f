"""MOMENT: what is its own beside the contract."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcast.errors import CheckpointError
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.published.moment import Moment

if Moment.library.installed is None:
    pytest.skip("momentfm is not installed", allow_module_level=True)


def series(length: int = 64) -> torch.Tensor:
    return torch.randn(3, length, generator=torch.Generator().manual_seed(0)).cumsum(1)


def pipeline(config: dict[str, Any]) -> Any:
    from momentfm import MOMENTPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MOMENTPipeline(config, model_kwargs={"task_name": "reconstruction"}).eval()


def pretrained(folder: Path) -> Any:
    """Write a checkpoint as published, with a head for reconstruction, and return its network."""
    config = {**Moment.tiny(0).settings, "task_name": "reconstruction"}
    del config["forecast_horizon"]
    network = pipeline(config)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return network


def test_when_the_library_reads_what_was_written_then_it_forecasts_the_same(tmp_path: Path) -> None:
    from momentfm import MOMENTPipeline

    Moment.tiny(0).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"task_name": "forecasting", "forecast_horizon": 16}
        network = MOMENTPipeline.from_pretrained(str(tmp_path), model_kwargs=arguments).eval()
    values = series()
    with torch.inference_mode():
        own = Moment.tiny(0)(values, torch.ones_like(values, dtype=torch.bool), 16).point
        theirs = network(x_enc=values.unsqueeze(1)).forecast.squeeze(1)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)  # theirs adds 1e-5 to the deviation


def test_when_a_context_is_padded_then_the_forecast_is_the_librarys_with_the_padding_masked() -> None:
    model, values = Moment.tiny(0), series(40)
    mask = torch.nn.functional.pad(torch.ones_like(values), (24, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = pipeline({**model.settings, "task_name": "forecasting"})
    network.load_state_dict(model.network.state_dict(), strict=False)
    with torch.inference_mode():
        own = model(values, torch.ones_like(values, dtype=torch.bool), 16).point
        # the library standardises the padding too, so it is padded with what becomes 0
        padded = torch.where(mask > 0, torch.nn.functional.pad(values, (24, 0)), values.mean(dim=1, keepdim=True))
        theirs = network(x_enc=padded.unsqueeze(1), input_mask=mask).forecast.squeeze(1)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


def test_when_a_pre_trained_checkpoint_is_read_then_its_encoder_is_kept_and_its_head_is_new(tmp_path: Path) -> None:
    network = pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert isinstance(model, Moment)
    assert model.config.horizon == Moment.horizon
    assert model.network.head.linear.weight.shape == (96, 8 * 16)
    kept, stored = model.network.state_dict(), network.state_dict()
    encoder = [name for name in kept if not name.startswith("head.")]
    assert any("SelfAttention" in name for name in encoder)
    assert all(torch.equal(kept[name], stored[name]) for name in encoder)
    assert not any("embed_tokens" in name for name in kept)


def test_when_a_head_was_drawn_then_it_is_saved_and_comes_back(tmp_path: Path) -> None:
    pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text(encoding="utf-8")), "forecast_horizon": 24}), encoding="utf-8"
    )
    model = load_checkpoint(tmp_path)
    with torch.no_grad():
        model.network.head.linear.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "own")
    again = load_checkpoint(tmp_path / "own")
    assert again.config.horizon == 24
    assert torch.equal(again.network.head.linear.bias, torch.full((24,), 0.5))


def test_when_a_checkpoint_normalises_with_weights_then_it_is_refused(tmp_path: Path) -> None:
    Moment.tiny(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "revin_affine": True}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="revin_affine"):
        load_checkpoint(tmp_path)


def test_when_values_are_missing_then_gaps_are_interpolated_and_the_end_is_held() -> None:
    model, values = Moment.tiny(0), series()
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[:, 20:29], mask[:, 60:] = False, False
    filled = values.clone()
    filled[:, 20:29] = torch.lerp(values[:, 19:20], values[:, 29:30], torch.arange(1, 10) / 10)
    filled[:, 60:] = values[:, 59:60]
    with torch.inference_mode():
        given, complete = model.one_pass(torch.where(mask, values, 0.0), mask), model.one_pass(filled, torch.ones_like(mask))
    torch.testing.assert_close(given, complete)
