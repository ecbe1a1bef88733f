"""The Chronos families against their own library."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcast.data.windows import Batch, Windows
from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.published.base import FAMILIES, Published, missing_as_nan
from fedcast.models.published.chronos_2 import Chronos2
from fedcast.models.published.chronos_bolt import ChronosBolt
from fedcast.models.published.chronos_t5 import ChronosT5
from fedcast.models.seeding import seeded

pytestmark = pytest.mark.skipif(ChronosBolt.library.installed is None, reason="chronos-forecasting is not installed")
EVERY = pytest.mark.parametrize("family", [ChronosT5, ChronosBolt, Chronos2])


def context(length: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.sin(torch.arange(length) / torch.tensor([[2.0], [5.0]])) + 0.1 * torch.randn(2, length, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 40] = False
    return values, mask


def batch(steps: int) -> Batch:
    values, mask = context(64 + steps)
    rows, labels = np.arange(2), torch.zeros(2, dtype=torch.int64)
    values = torch.where(mask, values, 0.0)
    return Batch(values[:, :64], mask[:, :64], values[:, 64:], mask[:, 64:], Windows(rows, rows), labels, labels.clone())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@EVERY
@pytest.mark.parametrize("horizon", [5, 70])
def test_when_a_model_is_saved_then_the_library_reads_it_and_forecasts_the_same(
    family: type[Published], horizon: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chronos import BaseChronosPipeline

    model = family.tiny(0).eval()
    model.save_pretrained(tmp_path)
    load_checkpoint(tmp_path)
    values, mask = context()
    with torch.inference_mode():
        ours = model(values, mask, horizon)
    assert capsys.readouterr() == ("", "")
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path)
    given = missing_as_nan(values, mask)
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = pipeline.predict_quantiles(
            given[:, None] if family is Chronos2 else given, prediction_length=horizon, quantile_levels=list(QUANTILES)
        )
    expected = torch.cat(theirs) if family is Chronos2 else theirs
    torch.testing.assert_close(ours.quantiles, expected.sort(dim=-1).values)
    assert torch.equal(ours.point, ours.quantiles[..., 4])


def test_when_bolt_is_trained_then_the_loss_is_its_pinball_loss_over_observed_targets() -> None:
    model, given = ChronosBolt.tiny(0), batch(16)
    given.target_mask[0, 3:9] = False
    loss, _ = model.step(given, generator)
    values = missing_as_nan(given.context, given.mask)
    loc = values.nanmean(dim=1, keepdim=True)
    scale = (values - loc).square().nanmean(dim=1, keepdim=True).sqrt()
    predicted = (model.network(values).quantile_preds[..., :16] - loc[..., None]) / scale[..., None]
    error = ((given.target - loc) / scale)[:, None] - predicted
    levels = torch.tensor(QUANTILES)[None, :, None]
    pinball = 2 * torch.maximum(levels * error, (levels - 1) * error) * given.target_mask[:, None]
    torch.testing.assert_close(loss, pinball.mean(dim=1).sum(dim=1).mean())


def test_when_chronos_2_is_trained_then_a_series_does_not_see_its_neighbours() -> None:
    model, given = Chronos2.tiny(0).eval(), batch(20)
    together = model.step(given, generator)[1].features
    values, mask = given.context[:1], given.mask[:1]
    alone = model.step(Batch(values, mask, given.target[:1], given.target_mask[:1], given.windows, given.dataset, given.domain), generator)
    seen = alone[1].feature_mask
    assert not seen.all()
    torch.testing.assert_close(together[:1][seen], alone[1].features[seen])


def test_when_chronos_t5_is_trained_then_the_loss_is_the_cross_entropy_of_observed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChronosT5, "dropped", 0.0)
    model, given = ChronosT5.tiny(0), batch(62)  # two steps fewer than a pass
    given.target_mask[1, 2] = False
    loss, _ = model.step(given, generator)
    ids, mask, scale = model._tokenizer.context_input_transform(missing_as_nan(given.context, given.mask))
    centres = model._tokenizer.centers
    tokens = (given.target / scale[:, None]).unsqueeze(-1).sub(centres).abs().argmin(
        -1
    ) + 3  # the nearest centre, after the two special tokens
    labels = torch.full((2, 65), -100)
    labels[:, :62] = torch.where(given.target_mask, tokens, -100)
    labels[:, 64] = 1
    logits = model.network(input_ids=ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100))


def test_when_chronos_t5_is_trained_then_each_window_loses_up_to_a_fifth_of_its_points_by_the_generator() -> None:
    model = ChronosT5.tiny(0)
    rows = 400
    many = Batch(torch.ones(rows, 64), torch.ones(rows, 64).bool(), torch.ones(rows, 8), torch.ones(rows, 8).bool(), *[None] * 3)  # type: ignore[arg-type]
    kept = model._kept(many, generator())
    share = 1 - kept.float().mean(dim=1)
    assert kept.shape == (rows, 72)
    assert 0.09 < share.mean() < 0.11
    assert share.max() < 0.35
    assert share.std() > 0.05  # a rate for each window, not one for all
    features = model.step(batch(8), generator)[1].feature_mask
    assert not torch.equal(features, batch(8).mask)
    assert not torch.equal(features, model.step(batch(8), lambda: torch.Generator().manual_seed(2))[1].feature_mask)


def test_when_chronos_t5_forecasts_twice_then_the_paths_are_the_same_and_the_global_stream_stands_still() -> None:
    model = ChronosT5.tiny(0).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = model(*context(), 8)
    torch.rand(5)
    again = model(*context(), 8)
    assert torch.equal(first.quantiles, again.quantiles)
    assert (first.quantiles[..., -1] > first.quantiles[..., 0]).any()
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


def test_when_bolt_learnt_other_levels_then_fedcasts_are_interpolated() -> None:
    model = ChronosBolt.tiny(0)
    config = copy.deepcopy(model.network.config)
    config.chronos_config["quantiles"] = [0.05, 0.25, 0.5, 0.75, 0.95]
    other = ChronosBolt.around(type(model.network)(config)).eval()
    values, mask = context()
    with torch.inference_mode():
        result = other(values, mask, 4)
        raw = other.network(missing_as_nan(values, mask)).quantile_preds[..., :4].transpose(1, 2).numpy()
    expected = np.array([[np.interp(QUANTILES, config.chronos_config["quantiles"], levels) for levels in row] for row in raw])
    np.testing.assert_allclose(result.quantiles.numpy(), np.sort(expected), rtol=1e-4, atol=1e-5)
    config.chronos_config["quantiles"] = [0.2, 0.5, 0.8]
    with pytest.raises(CheckpointError, match=r"0\.2 to 0\.8 only"):
        ChronosBolt.around(type(model.network)(config))


@EVERY
def test_when_weights_are_pickled_only_then_the_checkpoint_is_refused_unread(family: type[Published], tmp_path: Path) -> None:
    family.tiny(0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights in a safetensors file") as caught:
        load_checkpoint(tmp_path)
    assert "model.safetensors" in caught.value.hint


@EVERY
def test_when_parameters_are_missing_then_they_are_not_drawn_at_random(family: type[Published], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    family.tiny(0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.startswith(("input_patch_embedding.", "encoder.")))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lack 1 of .*{lost}"):
        load_checkpoint(tmp_path)


def test_when_the_configuration_is_damaged_then_the_checkpoint_is_refused(tmp_path: Path) -> None:
    ChronosBolt.tiny(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["chronos_config"]["context_length"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint of chronos-bolt: .*context_length"):
        load_checkpoint(tmp_path)


@EVERY
def test_when_lora_is_put_on_a_model_then_only_its_factors_learn(family: type[Published]) -> None:
    peft = pytest.importorskip("peft")
    model = family.tiny(0)
    before = model.embed(*context())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(family.lora_targets)), model.network)
    torch.testing.assert_close(model.embed(*context()), before)  # the second factor begins at zero
    model.step(batch(8), generator)[0].backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt
    assert all(".lora_" in name for name in learnt)
    assert peft.get_peft_model_state_dict(model.network)


def test_when_chronos_is_split_into_parts_then_decoder_and_heads_are_named() -> None:
    bolt, t5 = ChronosBolt.tiny(0), ChronosT5.tiny(0)
    for model in (bolt, t5):
        parts = {name: model.part(name).partition(".")[0] for name, _ in model.named_parameters()}
        assert set(parts.values()) == {"encoder", "decoder", "heads"}
        assert all((part == "decoder") == name.startswith("network.decoder.") for name, part in parts.items())
    assert bolt.head("network.output_patch_embedding.hidden_layer.weight")
    assert t5.network.lm_head.weight is t5.network.shared.weight
    assert t5.head("network.shared.weight")
    assert "chronos" not in FAMILIES
