from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tests.batches import batch_of
from tests.federations import small_spec, train_small
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import ModelError, QuorumError, SpecError
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.contract import Model, OwnLossModel
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import FAMILIES
from fedcast.models.reheaded import Reheaded
from fedcast.spec import TuningSpec, parse_spec
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import FlatAdamW, FlatParameters, Layout
from fedcast.training.gates import add_gates, draw_masks, gated, get_mask, importances, leave_one_out, merged, set_mask
from fedcast.tuning.base import build_tuning
from fedcast.tuning.trace import Trace

CONFIG = ModelConfig(d_model=16, n_heads=2, encoder_layers=2, decoder_layers=1, context=64, horizon=16, patch=8)
Loss = Callable[[Batch], Tensor]


def batch(seed: int = 0, rows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(80)
    values = torch.sin(2 * torch.pi * steps / torch.arange(5, 5 + rows)[:, None] + seed)
    return batch_of(values + 0.1 * torch.randn(values.shape, generator=generator), 64)


def loss_of(model: Model) -> Loss:
    return lambda data: ForecastTask().step(model, data, lambda: torch.Generator().manual_seed(0))[0]


def train(model: Model, steps: int = 30, rate: float = 1e-2) -> Model:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(model)(batch(step)).backward()
        optimiser.step()
    return model


def tuned(steps: int = 30, **options: object) -> tuple[Trace, Model]:
    tuning = build_tuning(TuningSpec(name="trace", options=options))
    assert isinstance(tuning, Trace)
    return tuning, train(tuning.prepare(PatchTransformer(CONFIG, seed=1), seed=7), steps)


@pytest.fixture(scope="module")
def trained() -> tuple[Trace, Model]:
    return tuned()


@pytest.fixture
def model(trained: tuple[Trace, Model]) -> Model:
    return copy.deepcopy(trained[1])


def forecast(model: Model) -> Tensor:
    with torch.inference_mode():
        return model(batch(99).context, batch(99).mask, 16).point


def answers(tuning: Trace, model: Model, round_: int, rounds: int = 8, batches: int = 2) -> dict[str, Tensor]:
    found = tuning.answer(model, loss_of(model), lambda: [batch(200 + i) for i in range(batches)], round=round_, rounds=rounds, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == tuning.answer_shapes(model)
    return found


def test_when_a_model_is_prepared_then_it_forecasts_as_before_and_only_additions_and_head_train() -> None:
    plain = PatchTransformer(CONFIG, seed=1)
    before = forecast(plain)
    tuned = Trace().prepare(plain, seed=7)
    assert torch.equal(forecast(tuned), before)
    trains = {name for name, p in tuned.named_parameters() if p.requires_grad}
    added = {f"{name}.{leaf}" for name in gated(tuned) for leaf in ("lora_A", "lora_B", "gate")}
    assert trains == added | {name for name, _ in tuned.named_parameters() if name.startswith("heads.")}


def test_when_a_model_is_prepared_twice_then_the_seed_alone_decides() -> None:
    before = torch.get_rng_state()
    one, same, other = (Trace().prepare(PatchTransformer(CONFIG, seed=1), seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def test_when_maps_are_not_named_then_those_of_attention_and_feed_forward_are_adapted() -> None:
    names = list(gated(Trace().prepare(PatchTransformer(CONFIG), seed=0)))
    encoder = ["qkv", "feed_forward.hidden", "feed_forward.out"]
    decoder = ["query", "kv", "feed_forward.hidden", "feed_forward.out"]
    assert names == [
        *(f"encoder.blocks.{block}.{leaf}" for block in range(2) for leaf in encoder),
        *(f"decoder.blocks.0.{leaf}" for leaf in decoder),
    ]


def test_when_an_adapted_map_is_called_then_it_is_the_formula(model: Model) -> None:
    module = gated(model)["encoder.blocks.1.qkv"]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.gate.fill_(0.7)
        addition = 0.7 * 2 * (x @ module.lora_A.T @ module.lora_B.T)
        assert addition.abs().max() > 1e-3
        assert torch.allclose(module(x), module.linear(x) + addition, atol=1e-6)
        assert torch.allclose(nn.functional.linear(x, module.weight, module.bias), module(x), atol=1e-6)
        module.mask.zero_()
        assert torch.equal(module(x), module.linear(x))


def test_when_a_new_head_leaves_the_decoder_unused_then_no_addition_is_put_there() -> None:
    tuned = Trace(head="depthwise", width=8, horizon=12).prepare(PatchTransformer(CONFIG), seed=0)
    assert isinstance(tuned, Reheaded)
    assert tuned.config.horizon == 12
    assert all(name.startswith("base.encoder.blocks.") for name in gated(tuned))
    assert {name for name, p in tuned.named_parameters() if p.requires_grad and not name.startswith("base.encoder.")} == {
        name for name, _ in tuned.named_parameters() if name.startswith("network.")
    }


def test_when_nothing_has_the_name_then_the_error_says_so() -> None:
    with pytest.raises(ModelError, match=r"no linear map before the head of .* is named elsewhere"):
        Trace(targets=("elsewhere",)).prepare(PatchTransformer(CONFIG), seed=0)
    # a decoder's map, which is not used under a new head
    with pytest.raises(ModelError, match=r"no linear map before the head of .* is named kv"):
        Trace(targets=("kv",), head="flatten").prepare(PatchTransformer(CONFIG), seed=0)
    # the head itself trains whole
    with pytest.raises(ModelError, match=r"no linear map before the head of .* is named point"):
        Trace(targets=("point",)).prepare(PatchTransformer(CONFIG), seed=0)


def test_when_additions_are_trained_then_the_loss_falls_and_frozen_weights_stay(model: Model) -> None:
    start = PatchTransformer(CONFIG, seed=1)
    assert loss_of(model)(batch(99)) < 0.95 * loss_of(start)(batch(99))
    now = dict(merged_names(model))
    for name, parameter in start.named_parameters():
        if not name.startswith("heads."):
            assert torch.equal(now[name], parameter), name


def merged_names(model: Model) -> dict[str, Tensor]:
    """Weights by the names that they had before maps were adapted."""
    return {name.replace(".linear.", "."): p for name, p in model.named_parameters()}


@pytest.mark.parametrize("kept", ["all", "half"])
def test_when_a_model_is_merged_then_it_forecasts_the_same_and_has_its_old_form(model: Model, kept: str, tmp_path: Path) -> None:
    if kept == "half":
        set_mask(model, torch.arange(len(gated(model))) % 2)
    with torch.no_grad():
        for module in gated(model).values():
            module.gate.mul_(1.3)
    before, state = forecast(model), copy.deepcopy(model.state_dict())
    plain = Trace().plain(model)
    assert torch.allclose(forecast(plain), before, atol=1e-5)
    assert plain.state_dict().keys() == PatchTransformer(CONFIG).state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    Trace().save(model, tmp_path / "model")
    read = load_checkpoint(tmp_path / "model")
    assert isinstance(read, PatchTransformer)
    assert torch.allclose(forecast(read), before, atol=1e-5)


def test_when_additions_are_masked_then_they_get_no_gradient_and_no_update_and_may_come_back(model: Model) -> None:
    names = list(gated(model))
    everything = forecast(model)
    mask = torch.arange(len(names)) % 2
    set_mask(model, mask)
    assert not torch.equal(forecast(model), everything)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = FlatParameters(named, Layout.of(named, lambda name: True), torch.float32)
    optimiser = FlatAdamW(flat, beta1=0.9, beta2=0.99, weight_decay=0.0, clip_norm=1.0)
    before = {name: p.detach().clone() for name, p in named.items()}
    for step in range(3):
        flat.gradient.zero_()
        loss_of(model)(batch(step)).backward()
        optimiser.step(1e-2)
    for name, on in zip(names, mask.tolist(), strict=True):
        for leaf in ("lora_A", "lora_B", "gate"):
            parameter = named[f"{name}.{leaf}"]
            assert torch.equal(parameter, before[f"{name}.{leaf}"]) == (not on), name
            assert bool(parameter.grad.any()) == bool(on)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])
    Trace().apply(model, {})
    assert torch.equal(forecast(model), everything)


def test_when_the_state_is_applied_then_it_is_the_mask(model: Model) -> None:
    tuning = Trace()
    (shape,) = tuning.state_shapes(model).values()
    mask = draw_masks(shape[0], 2, 1, (0,))[0]
    tuning.apply(model, {"mask": mask})
    assert torch.equal(get_mask(model), mask)
    assert torch.equal(get_mask(copy.deepcopy(model)), mask)


@given(
    modules=st.integers(1, 200),
    keep=st.floats(0.01, 1.0),
    selections=st.integers(1, 12),
    rounds=st.integers(3, 20),
)
def test_when_additions_are_chosen_then_fewer_stay_each_time_down_to_the_share(
    modules: int, keep: float, selections: int, rounds: int
) -> None:
    tuning = Trace(keep=keep, selections=selections)
    turns = [turn for r in range(1, rounds + 1) if (turn := tuning.turn(r, rounds)) is not None]
    assert tuning.turn(1, rounds) is None
    assert len(turns) == min(selections, rounds - 2)
    assert [tuning.turn(r, rounds) for r in range(2, len(turns) + 2)] == turns
    kept = [tuning.kept(modules, *turn) for turn in turns]
    assert kept[-1] == max(1, round(keep * modules))
    assert all(1 <= later <= earlier <= modules for earlier, later in zip([modules, *kept], kept, strict=False))
    # as linear as whole numbers allow
    for turn, count in enumerate(kept, 1):
        assert abs(count - (modules - (modules - kept[-1]) * turn / len(turns))) <= 0.5 + 1e-9


@given(modules=st.integers(1, 60), data=st.data(), draws=st.integers(1, 9), seed=st.integers(0, 5))
def test_when_masks_are_drawn_then_each_keeps_as_many_and_the_key_decides(modules: int, data: st.DataObject, draws: int, seed: int) -> None:
    kept = data.draw(st.integers(1, modules))
    masks = draw_masks(modules, kept, draws, (seed, 2))
    assert masks.shape == (draws, modules)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.sum(1) == kept).all()
    assert torch.equal(masks, draw_masks(modules, kept, draws, (seed, 2)))


def test_when_masks_are_drawn_often_then_every_module_is_as_likely() -> None:
    masks = draw_masks(8, 3, 4000, (1, 2))
    assert torch.allclose(masks.mean(0), torch.full((8,), 3 / 8), atol=0.03)
    assert not torch.equal(masks[:8], draw_masks(8, 3, 8, (1, 3)))


def test_when_importances_are_measured_then_they_are_the_formula(model: Model) -> None:
    modules, batches = list(gated(model).values()), [batch(300), batch(301, rows=4)]
    masks = draw_masks(len(modules), 4, 3, (0, 1))
    set_mask(model, torch.ones(len(modules)).index_fill(0, torch.tensor([1]), 0.0))
    before, state = get_mask(model), copy.deepcopy(model.state_dict())
    model.zero_grad()
    found = importances(model, loss_of(model), batches, masks)
    assert torch.equal(get_mask(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    total, step = torch.zeros(len(modules)), 1e-2
    for mask in masks:
        set_mask(model, mask)
        for index, module in enumerate(modules):
            values = []
            for gate in (1 + step, 1 - step):
                with torch.no_grad():
                    old = module.gate.clone()
                    module.gate.mul_(gate)
                    values.append((8 * loss_of(model)(batches[0]) + 4 * loss_of(model)(batches[1])).item() / 12)
                    module.gate.copy_(old)
            # dL / d log g = g dL/dg
            total[index] += mask[index] * abs(values[0] - values[1]) / (2 * step)
    expected = total / masks.sum(0).clamp_min(1)
    assert torch.allclose(found, expected, rtol=0.05, atol=2e-4)
    assert found.max() > 5e-3


def test_when_nothing_is_trained_then_all_importances_are_zero_and_the_first_round_chooses_nothing() -> None:
    tuning, fresh = tuned(steps=0)
    assert not importances(fresh, loss_of(fresh), [batch(1)], torch.ones(1, len(gated(fresh)))).any()
    answer = tuning.answer(fresh, loss_of(fresh), lambda: pytest.fail("no validation window is read"), round=1, rounds=5, seed=0)
    state = tuning.decide({}, [answer], [1.0], round=1, rounds=5, seed=0)
    assert torch.equal(state["mask"], torch.ones(len(gated(fresh))))


def test_when_rounds_go_by_then_choices_tighten_may_be_reversed_and_then_stand() -> None:
    tuning = Trace(selections=3)
    state: dict[str, Tensor] = {}
    seen = []
    scores = [
        [9.0, 1, 8, 2, 7, 3],
        [9.0, 1, 8, 2, 7, 3],
        [1.0, 9, 2, 8, 3, 7],
        [1.0, 9, 2, 8, 3, 7],
        [9.0, 1, 8, 2, 7, 3],
        [9.0, 1, 8, 2, 7, 3],
    ]
    for round_, score in enumerate(scores, 1):
        answer = {"importance": torch.tensor(score), "measured": torch.ones(1)}
        state = tuning.decide(state, [answer], [1.0], round=round_, rounds=6, seed=0)
        seen.append(state["mask"].tolist())
    assert seen == [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 1],
        [0, 1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1],
    ]


def test_when_sites_answer_then_the_server_weights_them_by_training_points_and_leaves_out_who_measured_nothing() -> None:
    tuning = Trace(selections=1)

    def answer(first: float, second: float, measured: float = 1.0) -> dict[str, Tensor]:
        return {"importance": torch.tensor([first, second]), "measured": torch.tensor([measured])}

    def chosen(*given: dict[str, Tensor], weights: list[float]) -> list[float]:
        return tuning.decide({"mask": torch.ones(2)}, given, weights, round=2, rounds=4, seed=0)["mask"].tolist()

    one, other = answer(1.0, 0.0), answer(0.0, 2.0)
    assert chosen(one, other, weights=[1.0, 1.0]) == [0, 1]
    assert chosen(one, other, weights=[3.0, 1.0]) == [1, 0]
    assert chosen(one, answer(0.0, 9.0, measured=0.0), weights=[1.0, 5.0]) == [1, 0]
    with pytest.raises(QuorumError, match="no site that answered round 2 has validation windows"):
        chosen(answer(0.0, 0.0, measured=0.0), weights=[1.0])


@pytest.mark.parametrize("selection", ["dsic", "naive", "random"])
def test_when_a_site_answers_then_importances_are_measured_as_asked(trained: tuple[Trace, Model], model: Model, selection: str) -> None:
    tuning = Trace(selection=selection, draws=3)  # type: ignore[arg-type]
    found = answers(tuning, model, 2)
    assert found["importance"].isfinite().all()
    assert found["measured"].item() == 1
    assert torch.equal(found["importance"], answers(tuning, model, 2)["importance"])
    modules, batches = len(gated(model)), [batch(200), batch(201)]
    if selection == "naive":
        expected = importances(model, loss_of(model), batches, torch.ones(1, modules))
    elif selection == "dsic":
        expected = importances(model, loss_of(model), batches, draw_masks(modules, tuning.kept(modules, 1, 4), 3, (3, 2)))
    else:
        expected = answers(tuning, train(model, 2), 2)["importance"]  # nothing of the site's is in it
        assert not torch.equal(expected, answers(tuning, model, 3)["importance"])
    assert torch.equal(found["importance"], expected)


def test_when_a_site_has_no_validation_windows_then_it_says_so(model: Model) -> None:
    found = answers(Trace(), model, 2, batches=0)
    assert not found["importance"].any()
    assert found["measured"].item() == 0


def test_when_a_site_has_many_validation_batches_then_some_are_taken_from_all_over(model: Model) -> None:
    seen = []

    def loss(data: Batch) -> Tensor:
        seen.append(int(data.windows.series[0]))
        return loss_of(model)(data)

    def numbered(index: int) -> Batch:
        data = batch(index, rows=2)
        data.windows.series[:] = index
        return data

    Trace(selection="naive", batches=4).answer(model, loss, lambda: [numbered(i) for i in range(10)], round=2, rounds=4, seed=0)
    assert seen == [0, 2, 5, 7]


def test_when_the_run_has_too_few_rounds_then_there_is_no_room_for_a_choice_and_steps_after_it(model: Model) -> None:
    with pytest.raises(SpecError, match="the run has 2"):
        Trace().check(2)
    Trace().check(3)


def test_when_a_site_lies_about_its_importances_then_it_counts_no_more_than_its_points(model: Model) -> None:
    honest = {"importance": torch.tensor([1.0, 0.0]), "measured": torch.ones(1)}
    liar = {"importance": torch.tensor([-1e9, 0.5]), "measured": torch.full((1,), 1e6)}
    state = Trace(keep=0.5, selections=1).decide({}, [honest, liar], [300.0, 1.0], round=2, rounds=3, seed=0)
    assert state["mask"].tolist() == [1.0, 0.0]


def test_when_modules_are_left_out_one_by_one_then_the_loss_change_is_that_of_the_pruned_model(model: Model) -> None:
    names, batches = list(gated(model)), [batch(400), batch(401)]
    mask = draw_masks(len(names), 5, 1, (4,))[0]
    set_mask(model, mask)
    with torch.no_grad():
        whole = np.mean([loss_of(model)(data).item() for data in batches])
    changes = leave_one_out(model, loss_of(model), batches)
    assert torch.equal(get_mask(model), mask)
    assert list(changes) == [name for name, on in zip(names, mask, strict=True) if on]
    index = names.index(next(iter(changes)))
    set_mask(model, mask.index_fill(0, torch.tensor([index]), 0.0))
    with torch.no_grad():
        without = np.mean([loss_of(model)(data).item() for data in batches])
    assert changes[names[index]] == pytest.approx(without - whole, abs=1e-6)


def test_when_importances_are_compared_with_the_change_after_pruning_then_both_estimates_have_a_rank_correlation(
    trained: tuple[Trace, Model], model: Model
) -> None:
    names, batches = list(gated(model)), [batch(500 + i) for i in range(2)]
    loss, kept = loss_of(model), len(gated(model)) // 2
    naive = importances(model, loss, batches, torch.ones(1, len(names)))
    dsic = importances(model, loss, batches, draw_masks(len(names), kept, 8, (0, 2)))
    mask = torch.zeros(len(names)).index_fill(0, dsic.argsort(descending=True)[:kept], 1.0)
    set_mask(model, mask)
    change = leave_one_out(model, loss, batches)
    true = [change[name] for name in names if name in change]
    correlations = [spearmanr(scores[mask.bool()], true).statistic for scores in (naive, dsic)]
    assert len(true) == kept
    assert np.isfinite(true).all()
    assert np.isfinite(correlations).all()
    assert not torch.allclose(naive, dsic, rtol=0.01)


@pytest.mark.parametrize("head", ["own", "depthwise"])
def test_when_moment_is_tuned_then_the_maps_of_its_blocks_are_adapted_and_merged(head: str, tmp_path: Path) -> None:
    family = FAMILIES["moment"]
    if family.library.installed is None:
        pytest.skip("momentfm is not installed")
    tuning = Trace(head=head, width=8)  # type: ignore[arg-type]
    model = tuning.prepare(family.tiny(0), seed=1)
    assert isinstance(model, OwnLossModel)
    leaves = [name.rpartition(".")[2] for name in gated(model)]
    assert leaves == ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    train(model, 10)
    found = answers(tuning, model, 2)
    assert (found["importance"] > 0).sum() >= 4
    tuning.apply(model, tuning.decide({}, [found], [1.0], round=2, rounds=3, seed=0))
    assert 3 <= get_mask(model).sum() < 7
    before = forecast(model)
    tuning.save(model, tmp_path / "model")
    read = load_checkpoint(tmp_path / "model")
    assert torch.allclose(forecast(read.eval()), before, atol=1e-5)


def test_when_a_block_reads_weights_directly_then_it_reads_what_is_adapted(model: Model, compiled: None) -> None:
    ours, native = model.to(torch.bfloat16), copy.deepcopy(model)
    native.use_native(True)
    data = batch(7)
    results = []
    for one in (ours, native):
        one.zero_grad()
        loss = loss_of(one)(data)
        loss.backward()
        results.append((loss.item(), torch.cat([module.gate.grad for module in gated(one).values()]).float()))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.95
    plain = merged(ours)
    set_mask(ours, torch.zeros(len(gated(ours))))
    assert (forecast(ours) - forecast(plain)).abs().max() > 0.01


def test_when_maps_stand_under_several_names_then_each_is_adapted_once() -> None:
    model = PatchTransformer(CONFIG)
    model.encoder.blocks[1] = model.encoder.blocks[0]
    names = add_gates(model, ("qkv",), 2, 0, lambda: model(batch().context, batch().mask, 1).point.sum())
    assert names == ["encoder.blocks.0.qkv"]
    assert len(gated(model)) == 1


def test_when_steps_compute_in_bfloat16_then_gradients_of_gates_are_close(model: Model) -> None:
    results = []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss_of(model)(batch(7)).backward()
        results.append(torch.cat([module.gate.grad for module in gated(model).values()]))
    assert results[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.95


def test_when_a_federation_is_tuned_then_half_of_the_maps_have_changed_in_the_end(tmp_path: Path) -> None:
    document = small_spec("fedavg", rounds=3, local_steps=2).to_dict()
    document["tuning"] = {"name": "trace", "selections": 1, "draws": 2}
    train_small(parse_spec(document), tmp_path)
    final = load_checkpoint(tmp_path / "run").state_dict()
    start = PatchTransformer.from_spec(parse_spec(document).model, seed=1)
    changed = {name.removesuffix(".weight") for name, value in start.state_dict().items() if not torch.equal(value, final[name])}
    maps = set(gated(Trace().prepare(start, seed=1)))
    assert len(changed & maps) == len(maps) // 2
    assert all(name.startswith("heads.") for name in changed - maps)
