from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.methods.base import Server, Update
from fedcast.methods.fedpm import FedPM, align, forecast_loss, memory_losses, utility_diversity
from fedcast.models.architectures import build_model
from fedcast.models.architectures.prototype import Prediction, PrototypeTransformer
from fedcast.models.base import ModelConfig
from fedcast.spec import ModelSpec
from fedcast.training.flat import Layout

ROWS, WIDTH = 8, 16


def uploads(clients: int, seed: int, width: int = 3, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Memories [N, M, D] in which some prototypes of different sites are alike, and counts [N, M]."""
    generator = torch.Generator().manual_seed(seed)
    memories = torch.randn(clients, rows, width, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 6, (clients, rows), generator=generator).double()
    return memories.float().double(), counts


def updates(memories: torch.Tensor, counts: torch.Tensor, names: list[str] | None = None) -> list[Update]:
    names = names or [f"s{n}" for n in range(len(memories))]
    return [
        Update(name, {"shared": memory.float().flatten(), "counts": count.float()}, 10 * (n + 1))
        for n, (name, memory, count) in enumerate(zip(names, memories, counts, strict=True))
    ]


def server(rows: int = ROWS, width: int = WIDTH) -> Server:
    start = torch.randn(rows * width, generator=torch.Generator().manual_seed(99))
    return Server(Layout(("memory.prototypes", "encoder.a"), ((rows, width), (2,)), 1), start, torch.zeros(0), {}, 1, 10)


def aggregated(method: FedPM, memories: torch.Tensor, counts: torch.Tensor, names: list[str] | None = None) -> Server:
    made = server(*memories.shape[1:])
    method.aggregate(made, updates(memories, counts, names))
    return made


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def smooth(error: float) -> float:
    return 0.5 * error**2 / 0.1 if abs(error) < 0.1 else abs(error) - 0.05


# The loss at a site (B.3)


@pytest.mark.parametrize("statistics", [True, False])
def test_when_the_forecast_loss_is_taken_then_it_is_the_sum_of_its_terms(statistics: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, target = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator) * 2
    mask = torch.rand(4, 6, generator=generator) > 0.3
    mask[3] = False
    shift, widening, mean, deviation = torch.rand(4, 4, 1, generator=generator).unbind()
    given_ = (shift, widening) if statistics else (None, None)
    ours = forecast_loss(Prediction(shape, *given_, mean, deviation, None), target, mask)  # type: ignore[arg-type]
    points: list[list[float]] = [[], [], [], []]
    for b in range(3):
        y = [float(target[b, h]) for h in range(6) if mask[b, h]]
        mu = sum(y) / len(y)
        sigma = math.sqrt(sum((v - mu) ** 2 for v in y) / len(y) + 1e-5)
        more, wider = (float(shift[b]), float(widening[b])) if statistics else (0.0, 0.0)
        for h in range(6):
            if mask[b, h]:
                s, v = float(shape[b, h]), float(target[b, h])
                points[0].append(smooth(s - (v - mu) / sigma))
                points[1].append(smooth(s * (wider + float(deviation[b])) + more + float(mean[b]) - v))
        points[2].append(smooth(more - (mu - float(mean[b]))))
        points[3].append(smooth(wider - (sigma - float(deviation[b]))))
    used = points if statistics else points[:2]
    assert ours.item() == pytest.approx(sum(sum(values) / len(values) for values in used), rel=1e-4)


def test_when_mean_and_deviation_are_predicted_then_the_last_term_does_not_train_them() -> None:
    shape, target = torch.zeros(1, 2, requires_grad=True), torch.tensor([[5.0, 5.0]])
    shift, widening = (torch.tensor([[v]], requires_grad=True) for v in (5.0, math.sqrt(1e-5) - 1.0))
    prediction = Prediction(shape, shift, widening, torch.zeros(1, 1), torch.ones(1, 1), None)  # type: ignore[arg-type]
    # Both changes are exactly right, so only the last term could pull at them.
    (forecast_loss(prediction, target, torch.ones(1, 2, dtype=torch.bool)) + 0 * shape.sum()).backward()
    assert shift.grad.abs().max() < 1e-4
    assert widening.grad.abs().max() < 1e-4


def prototype_model(seed: int = 0) -> PrototypeTransformer:
    config = ModelConfig(WIDTH, 2, 1, 1, 32, 12, 4, architecture="prototype", settings=(("prototypes", ROWS), ("statistics", 8)))
    built = build_model(config, seed)
    assert isinstance(built, PrototypeTransformer)
    return built


def test_when_the_memory_losses_are_taken_then_one_moves_the_encoder_and_the_other_the_memory() -> None:
    net = prototype_model()
    context = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 32, dtype=torch.bool)
    mask[0, :8] = False
    reading = net.read(context, mask)
    commitment, quantisation = memory_losses(reading)
    z, p = reading.features.detach(), reading.nearest.detach()
    seen = [(b, n) for b in range(3) for n in range(8) if mask[b, 4 * n : 4 * n + 4].any()]
    expected = sum(float((z[b, n] - p[b, n]).square().sum()) for b, n in seen) / (len(seen) * WIDTH)
    assert commitment.item() == pytest.approx(expected, rel=1e-5)
    assert quantisation.item() == pytest.approx(expected, rel=1e-5)
    commitment.backward(retain_graph=True)
    assert net.memory.prototypes.grad is None
    assert net.encoder.embedding.weight.grad.abs().sum() > 0
    net.zero_grad()
    quantisation.backward()
    assert net.encoder.embedding.weight.grad is None
    used = torch.zeros(ROWS, dtype=torch.bool)
    used[[int(reading.rows[b, n]) for b, n in seen]] = True
    assert torch.equal(net.memory.prototypes.grad.abs().sum(1) > 0, used)


@pytest.mark.parametrize(("statistics", "total"), [(512, 747_042), (0, 432_672)])
def test_when_the_method_builds_the_papers_model_then_it_trains_as_many_parameters(statistics: int, total: int) -> None:
    shape = FedPM(statistics=statistics).model_config(ModelSpec(context=96, horizon=96, patch=16))
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in build_model(shape).named_parameters()}
    # The paper's model has no quantiles, and judges no window.
    ours = {name: sizes.pop(name) for name in list(sizes) if name.startswith(("heads.summary.", "heads.quantiles.", "heads.typical_error"))}
    assert sum(sizes.values()) == total
    assert sum(ours.values()) == (24 * 64 + 1) * 64 + (64 + 1) * 96 * 9 + 1


# The server: alignment, shared prototypes, the choice of the others (B.4)


def components(memories: torch.Tensor, delta: float) -> list[set[tuple[int, int]]]:
    """Breadth-first search over all pairs of prototypes of different sites; components of two or more."""
    nodes = [(n, i) for n in range(len(memories)) for i in range(memories.shape[1])]
    left, found = set(nodes), []
    while left:
        front = [left.pop()]
        component = set(front)
        while front:
            a = front.pop()
            near = {b for b in left if a[0] != b[0] and cosine(memories[a], memories[b]) > delta}
            left -= near
            component |= near
            front += near
        found.append(component)
    return [component for component in found if len(component) > 1]


@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([0.5, 0.7, 0.9, 0.99]))
@settings(max_examples=40)
def test_when_aligning_then_clusters_are_the_components_of_the_graph_by_a_direct_search(clients: int, seed: int, delta: float) -> None:
    memories, counts = uploads(clients, seed)
    ours, theirs = align(memories, counts, delta), components(memories, delta)
    found: dict[int, set[tuple[int, int]]] = {}
    for n in range(clients):
        for i in range(ROWS):
            if ours.rank[n, i] >= 0:
                found.setdefault(int(ours.rank[n, i]), set()).add((n, i))
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, theirs))
    assert sorted(found) == list(range(len(theirs)))
    keys = []
    for rank, members in sorted(found.items()):
        torch.testing.assert_close(ours.centres[rank], sum(memories[m] for m in members) / len(members))
        assert int(ours.sizes[rank]) == len(members)
        keys.append((-len(members), -sum(float(counts[m]) for m in members)))
    assert keys == sorted(keys)
    assert ours.index_aligned == sum(len({i for _, i in members}) == 1 for members in theirs)


@pytest.mark.parametrize("delta", [0.7, 0.25])
def test_when_a_cosine_is_delta_within_float32_then_float64_decides(delta: float) -> None:
    axis = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    axis[:, 0] = 1
    other = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for i in range(ROWS):
        # Orthogonal but for the first axis, along which the cosine is a little more or less than delta.
        cosine = delta + (1e-10 if i % 2 else -1e-10)
        other[i, 0], other[i, i + 1] = cosine, math.sqrt(1 - cosine**2)
    rank = align(torch.stack((axis, other)), torch.ones(2, ROWS, dtype=torch.float64), delta).rank
    assert (rank[1] >= 0).tolist() == [bool(i % 2) for i in range(ROWS)]


def test_when_sites_keep_what_they_started_from_then_the_clusters_are_aligned_by_index() -> None:
    memories, counts = uploads(1, 0, width=WIDTH)
    clusters = align(memories.expand(3, -1, -1).contiguous(), counts.expand(3, -1).contiguous(), 0.99)
    assert clusters.index_aligned == len(clusters.sizes) == ROWS
    assert clusters.sizes.tolist() == [3] * ROWS


def test_when_a_ring_of_prototypes_cancels_out_then_it_is_no_cluster() -> None:
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    ring = torch.stack((angles.cos(), angles.sin()), dim=1)
    memories = torch.stack((ring[::2], ring[1::2]))
    assert len(components(memories, 0.7)) == 1
    clusters = align(memories, torch.ones(2, 4, dtype=torch.float64), 0.7)
    assert len(clusters.sizes) == 0
    assert (clusters.rank == -1).all()


@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from(["mean", "max"]), st.sampled_from([0.0, 1.0, 0.3]))
@settings(max_examples=40)
def test_when_scoring_then_it_is_utility_minus_similarity_by_a_direct_loop(clients: int, seed: int, kind: str, diversity: float) -> None:
    memories, counts = uploads(clients, seed)
    isolated = align(memories, counts, 0.9).rank < 0
    candidates = isolated.clone()
    candidates[:, 0] = True
    ours = utility_diversity(memories, counts, candidates, isolated, kind, diversity)  # type: ignore[arg-type]
    for n in range(clients):
        most = max([float(counts[n, i]) for i in range(ROWS) if candidates[n, i]], default=0.0)
        others = [m for m in range(clients) if m != n]
        for i in range(ROWS):
            cosines = {(m, j): cosine(memories[n, i], memories[m, j]) for m in others for j in range(ROWS)}
            if kind == "mean":
                alike = sum(sum(cosines[m, j] for j in range(ROWS)) / ROWS for m in others) / max(1, len(others))
            else:
                alike = max((value for place, value in cosines.items() if isolated[place]), default=0.0)
            utility = float(counts[n, i]) / most if most else 0.0
            if candidates[n, i]:
                assert float(ours[n, i]) == pytest.approx(utility - diversity * alike, abs=1e-6)


def rows_of(vector: torch.Tensor, width: int = 3) -> torch.Tensor:
    return vector.view(-1, width)


@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([0.0, 0.25, 0.5, 0.95, 1.0]))
@settings(max_examples=40)
def test_when_memories_are_made_then_shared_rows_come_first_and_the_best_candidates_after(clients: int, seed: int, gamma: float) -> None:
    memories, counts = uploads(clients, seed)
    made = aggregated(FedPM(prototypes=ROWS, gamma=gamma), memories, counts)
    clusters = align(memories, counts, 0.7)
    shared = min(len(clusters.sizes), math.floor(gamma * ROWS))
    assert made.log["shared_prototypes"] == shared
    candidates = (clusters.rank < 0) | (clusters.rank >= shared)
    scores = utility_diversity(memories, counts, candidates, clusters.rank < 0, "mean", 1.0)
    for n in range(clients):
        rows = rows_of(made.own[f"s{n}"])
        torch.testing.assert_close(rows[:shared], clusters.centres[:shared].float())
        elected = sorted((i for i in range(ROWS) if candidates[n, i]), key=lambda i: -float(scores[n, i]))
        rest = sorted((i for i in range(ROWS) if i not in elected[: ROWS - shared]), key=lambda i: (-float(counts[n, i]), i))
        expected = (elected[: ROWS - shared] + rest)[: ROWS - shared]
        assert torch.equal(rows[shared:], memories[n, expected].float())


@given(st.integers(2, 5), st.integers(0, 10_000), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_when_sites_stand_in_another_order_then_each_gets_the_same_memory(clients: int, seed: int, random: object) -> None:
    memories, counts = uploads(clients, seed)
    order = list(range(clients))
    random.shuffle(order)  # type: ignore[attr-defined]
    first = aggregated(FedPM(prototypes=ROWS), memories, counts)
    second = aggregated(FedPM(prototypes=ROWS), memories[order], counts[order], [f"s{n}" for n in order])
    assert first.log == pytest.approx(second.log)
    for name, memory in first.own.items():
        torch.testing.assert_close(memory, second.own[name])


@given(
    st.integers(1, 4),
    st.integers(0, 10_000),
    st.floats(-0.5, 0.99),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from(["personalised", "random_isolated", "none"]),
    st.sampled_from(["cosine", "fedavg", "none"]),
)
@settings(max_examples=80)
def test_when_memories_are_made_then_no_row_is_ever_zero(
    clients: int, seed: int, delta: float, gamma: float, fill: str, aggregation: str
) -> None:
    memories, counts = uploads(clients, seed)
    method = FedPM(prototypes=ROWS, delta=delta, gamma=gamma, fill=fill, aggregation=aggregation)  # type: ignore[arg-type]
    made = aggregated(method, memories, counts)
    for site in [*(f"s{n}" for n in range(clients)), "newcomer"]:
        rows = rows_of(method.message(made, site)["shared"])
        assert rows.shape == (ROWS, 3)
        assert rows.isfinite().all()
        assert (rows.norm(dim=1) > 1e-7).all()


def two_alike() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sites of four prototypes: two pairs across the sites (the second one used more), and two more at each site."""
    axes = torch.eye(6, dtype=torch.float64)
    memories = torch.stack((axes[[0, 1, 2, 3]], 2 * axes[[4, 1, 0, 5]]))
    return memories, torch.tensor([[1.0, 7, 5, 0], [9, 8, 0, 0]], dtype=torch.float64)


def test_when_a_cluster_gets_no_slot_then_its_prototypes_stay_candidates() -> None:
    memories, counts = two_alike()
    made = aggregated(FedPM(prototypes=4, gamma=0.25), memories, counts)
    assert made.log == {"dead_share": 3 / 8, "clusters": 2, "index_aligned": 1, "shared_prototypes": 1}
    shared = 1.5 * memories[0, 1]
    # The first site's candidates: 2 scores 5 / 5, 3 scores 0, and 0, of the cluster left over, 1 / 5 - 1 / 4; none is lost.
    assert torch.equal(rows_of(made.own["s0"], 6).double(), torch.stack((shared, memories[0, 2], memories[0, 3], memories[0, 0])))
    assert {tuple(row.tolist()) for row in rows_of(made.own["s1"], 6)[1:]} == {tuple(memories[1, i].tolist()) for i in (0, 2, 3)}


def test_when_it_runs_as_released_then_rows_are_zero_prototypes_are_lost_and_the_first_memory_is_sent_to_all() -> None:
    memories, counts = two_alike()
    method = FedPM(prototypes=4, gamma=0.25, as_released=True)
    made = aggregated(method, memories, counts)
    rows = rows_of(made.own["s1"], 6)
    assert torch.equal(rows[1:3].double(), memories[1, [0, 3]])
    assert (rows[3] == 0).all()
    assert torch.equal(method.message(made, "s1")["shared"], made.own["s0"])
    # Scores are taken with the site's own.
    assert torch.equal(made.shared_of("s1"), made.own["s1"])
    assert torch.equal(FedPM().message(made, "s1")["shared"], made.own["s1"])


def test_when_fill_is_switched_then_the_free_slots_differ() -> None:
    memories, counts = uploads(3, 5)
    made = {
        fill: aggregated(FedPM(prototypes=ROWS, delta=0.9, gamma=0.25, fill=fill), memories, counts)  # type: ignore[arg-type]
        for fill in ("personalised", "random_isolated", "none")
    }
    shared = made["none"].log["shared_prototypes"]
    assert shared == 2
    rows = rows_of(made["none"].own["s0"])
    assert torch.equal(rows, rows[:shared].repeat(4, 1))
    mine = {tuple(row.tolist()) for row in memories[0].float()}
    drawn = [tuple(row.tolist()) for row in rows_of(made["random_isolated"].own["s0"])[shared:]]
    assert len(set(drawn)) == ROWS - shared
    assert set(drawn) <= mine
    assert not torch.equal(made["random_isolated"].own["s0"], made["personalised"].own["s0"])


def test_when_aggregation_is_an_ablation_then_memories_are_averaged_by_row_or_kept() -> None:
    memories, counts = uploads(2, 0)
    averaged = aggregated(FedPM(prototypes=ROWS, aggregation="fedavg"), memories, counts)
    assert averaged.own == {}
    torch.testing.assert_close(rows_of(averaged.shared).double(), (10 * memories[0] + 20 * memories[1]) / 30)
    kept = aggregated(FedPM(prototypes=ROWS, aggregation="none", as_released=True), memories, counts)
    method = FedPM(prototypes=ROWS, aggregation="none", as_released=True)
    assert torch.equal(rows_of(method.message(kept, "s1")["shared"]).double(), memories[1])


def test_when_a_site_takes_no_part_then_it_keeps_its_memory_and_a_newcomer_gets_the_shared_rows() -> None:
    method, made = FedPM(prototypes=ROWS), server(ROWS, 3)
    start = made.shared.clone()
    memories, counts = uploads(3, 1)
    method.aggregate(made, updates(memories, counts))
    kept = made.own["s2"].clone()
    method.aggregate(made, updates(memories[:2] + 0.1, counts[:2]))
    assert torch.equal(made.own["s2"], kept)
    shared = made.log["shared_prototypes"]
    rows = rows_of(method.message(made, "new")["shared"])
    assert 0 < shared < ROWS
    assert torch.equal(rows[:shared], rows_of(made.own["s0"])[:shared])
    assert rows.shape == rows_of(start).shape
