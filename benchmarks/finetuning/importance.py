"""How well gate gradients rank TRACE's modules: naive and DSIC scores beside the true effect of leaving a module out.

``python -m benchmarks.finetuning.importance`` trains all gated additions on each set alone, scores them on one half of the validation
windows, and measures on the other half by how much the loss rises when one module is switched off: among those that a score keeps
(``after pruning``), and over random choices of as many (``over choices``), which is the same truth for every score.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.evidence.tables import write
from benchmarks.finetuning import bases
from benchmarks.finetuning.studies import STUDIES, TRACE, Row
from benchmarks.tables import markdown
from fedcast.data.windows import Batch
from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.models.contract import OwnLossModel
from fedcast.run.prepare import prepare
from fedcast.training.backend import Backend
from fedcast.training.gates import draw_masks, gated, importances, leave_one_out, set_mask

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "finetuning-evidence.md"
SETS = ("etth1", "etth2", "ettm2", "weather", "exchange")
DRAWS = (1, 4, 8, 16)
CHOICES = 16
"""Random choices that the truth of ``over choices`` is averaged over."""


def trained(base: Path, name: str, seed: int, rounds: int, steps: int) -> tuple[OwnLossModel, list[Batch], list[Batch]]:
    """Return a model with all additions trained on one set, and its validation windows in two halves."""
    row = Row({"name": "fedavg"}, {**TRACE["TRACE"].tuning, "keep": 1.0})
    spec = STUDIES["trace"].spec(base, row, seed)
    document = spec.to_dict()
    document["data"]["domains"] = [name]
    document["federation"] |= {"rounds": rounds, "local_steps": steps}
    document["training"] |= {"precision": "float32"}
    spec = type(spec).model_validate(document)
    plan = Plan(spec, build_method(spec.method))
    plan = plan.computing_with(Backend.resolve(plan.training).written_into(spec.training))
    prepared = prepare(spec, plan.method)
    weights, workspaces = plan.initial, Workspaces()
    with TemporaryDirectory() as folder:
        site = Site(prepared.roles[name], prepared.stores[name], plan, Path(folder))
        for number in range(1, rounds + 1):
            weights = site.run(Task("train", number, {"shared": weights}), workspaces).tensors["shared"]
        batches = list(site.validation_batches(torch.device("cpu"), 16))
    model = plan.load(weights, {})
    if not isinstance(model, OwnLossModel):
        raise TypeError("the model has a new head, and so a loss of its own")
    return model, batches[::2], batches[1::2]


def correlations(base: Path, name: str, seed: int, rounds: int, steps: int) -> list[dict[str, object]]:
    """Return Spearman's rank correlation of each score with the true effects."""
    model, scored, judged = trained(base, name, seed, rounds, steps)

    def loss(batch: Batch) -> torch.Tensor:
        return model.step(batch, torch.Generator)[0]

    names = list(gated(model))
    count, kept = len(names), len(names) // 2
    truth, seen = np.zeros(count), np.zeros(count)
    for mask in draw_masks(count, kept, CHOICES, (seed, 1000)):
        set_mask(model, mask)
        for module, rise in leave_one_out(model, loss, judged).items():
            truth[names.index(module)] += rise
            seen[names.index(module)] += 1
    truth /= np.maximum(seen, 1)
    set_mask(model, torch.ones(count))
    scores = {"naive": importances(model, loss, scored, torch.ones(1, count))}
    scores |= {f"DSIC, M = {m}": importances(model, loss, scored, draw_masks(count, kept, m, (seed, 2))) for m in DRAWS}
    rows = []
    for label, score in scores.items():
        best = torch.argsort(score, descending=True, stable=True)[:kept]
        set_mask(model, torch.zeros(count).index_fill_(0, best, 1.0))
        pruned = leave_one_out(model, loss, judged)
        with torch.no_grad():
            left = float(np.mean([loss(batch).item() for batch in judged]))
        after = [(float(score[names.index(module)]), rise) for module, rise in pruned.items()]
        found = {
            "over choices": spearmanr(score.numpy()[seen > 0], truth[seen > 0]).statistic,
            "after pruning": spearmanr(*zip(*after, strict=True)).statistic,
            "loss after pruning": left,
        }
        rows.append({"set": name, "seed": seed, "score": label, "modules": count, **found})
        set_mask(model, torch.ones(count))
    return rows


def table(rows: pd.DataFrame) -> str:
    """Return mean correlations over sets and seeds, and how often each score ranks better than the naive one."""
    naive = rows[rows.score == "naive"].set_index(["set", "seed"])
    body = []
    for label, part in rows.groupby("score", sort=False):
        own = part.set_index(["set", "seed"])
        cells = []
        for column in ("over choices", "after pruning"):
            gain = (own[column] - naive[column]).dropna()
            wins = f"{int((gain > 0).sum())} of {len(gain)}" if label != "naive" else "-"
            cells += [f"{own[column].mean():.3f} ± {own[column].std(ddof=1):.3f}", wins]
        body.append([str(label), *cells, f"{(own['loss after pruning'] / naive['loss after pruning']).mean():.4f}"])
    header = ["score", "Spearman, over choices", "above naive", "Spearman, after pruning", "above naive", "loss after pruning, of naive's"]
    return markdown(header, body)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = bases.native(arguments.output)
    found: list[dict[str, object]] = []
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            found += correlations(base, name, seed, arguments.rounds, arguments.steps)
            print(name, seed, flush=True)
    rows = pd.DataFrame(found)
    RESULTS.mkdir(exist_ok=True)
    rows.to_parquet(RESULTS / "importance.parquet")
    write({"importance": table(rows)}, arguments.page)


if __name__ == "__main__":
    main()
