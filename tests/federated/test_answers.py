"""What may stand in a site's answer to a task of kind "evaluate"."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federated.test_rounds import Meddling
from tests.federations import small_spec

import fedcast.run.pretrain as pretraining
from fedcast.errors import ScreenError, SiteError
from fedcast.evaluate.metrics import COUNTS, METRICS
from fedcast.federated.answers import screen_answer
from fedcast.federated.fleet import Fleet
from fedcast.federated.messages import Reply, Task
from fedcast.models.base import QUANTILES
from fedcast.run.pretrain import pretrain

SPEC = small_spec("fedavg")
SPEC = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"samples": 1, "horizons": (2, 4)})})
TEST = {"part": "test", "baselines": True}


def good() -> dict[str, Any]:
    """Return a good answer."""
    scores = {**dict.fromkeys((*METRICS, *COUNTS), 1.0), "batch_mse": None}
    own = dict.fromkeys(SPEC.evaluation.baselines, scores)
    sample = {"domain": "a", "series": "x", "context": [None] * SPEC.model.context, "truth": [1.0, 2], "point": [1, 2.5]}
    sample |= {"seasonal_naive": [1.0, None], "quantiles": {str(level): [0.5, 1.5] for level in QUANTILES}}
    results = [{"horizon": horizon, "windows": 3, "scores": scores, "baselines": own} for horizon in (2, 4)]
    return copy.deepcopy({"results": results, "samples": [sample], "seconds": 1.0, "worker": "1-2"})


def test_when_an_answer_is_as_declared_then_it_passes() -> None:
    screen_answer(Reply(meta=good()), TEST, "a", SPEC)
    for loss in (1, 0.5, None, float("nan")):
        screen_answer(Reply(meta={"loss": loss}), {"part": "validation"}, "a", SPEC)


PLACES: list[tuple[str, object]] = [
    ("results", None),
    ("results", []),
    ("results", {"0": {}}),
    ("results.0", [1]),
    ("results.0.horizon", 4),
    ("results.0.horizon", 2.0),
    ("results.0.horizon", True),
    ("results.0.windows", -1),
    ("results.0.windows", 10**30),
    ("results.0.scores", {}),
    ("results.0.scores", [1.0]),
    ("results.0.scores.mse", "1"),
    ("results.0.scores.mse", True),
    ("results.0.scores.mse", 10**400),
    ("results.0.scores.mse", {"a": 1}),
    ("results.0.scores.weights_sha256", 1.0),
    ("results.0.scores.batch_" + "x" * 100, 1.0),
    ("results.0.scores.batch_\x1b[2J", 1.0),
    ("results.0.more", 1.0),
    ("results.0.baselines", {}),
    ("results.0.baselines.other", {}),
    ("results.0.baselines.seasonal_naive", {"mse": 1.0}),
    ("samples", None),
    ("samples", [{}]),
    ("samples", [1, 2]),
    ("samples.0.domain", "b"),
    ("samples.0.series", 1),
    ("samples.0.series", "x" * 10_000),
    ("samples.0.point", [1.0]),
    ("samples.0.point", [1.0, "2"]),
    ("samples.0.context", [1.0] * 10_000),
    ("samples.0.quantiles", {}),
]


@pytest.mark.parametrize(("place", "value"), PLACES)
def test_when_something_of_an_answer_is_not_as_declared_then_it_is_refused(place: str, value: object) -> None:
    meta = good()
    *way, last = place.split(".")
    inner: Any = meta
    for step in way:
        inner = inner[int(step) if step.isdigit() else step]
    inner[int(last) if last.isdigit() else last] = value
    with pytest.raises(ScreenError, match="not as declared"):
        screen_answer(Reply(meta=meta), TEST, "a", SPEC)


@pytest.mark.parametrize(
    "reply", [Reply(), Reply(meta={"loss": "1"}), Reply(meta={"loss": 10**400}), Reply({"x": torch.zeros(1)}, {"loss": 1.0})]
)
def test_when_a_validation_loss_is_none_then_it_is_refused(reply: Reply) -> None:
    with pytest.raises(ScreenError, match="not as declared"):
        screen_answer(reply, {"part": "validation"}, "a", SPEC)


class Spoiling(Meddling):
    """A real fleet one of whose sites answers something else when it is to score."""

    def __init__(self, fleet: Fleet, part: str) -> None:
        super().__init__(fleet)
        self._part = part

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and spoil an answer."""
        for site, reply in super().run(tasks, deadline_s):
            spoilt = site == "energy" and tasks[site].meta.get("part") == self._part
            yield site, replace(reply, meta={"seconds": 1.0}) if spoilt else reply


@pytest.mark.parametrize("part", ["validation", "test"])
def test_when_a_site_answers_no_scores_then_it_is_named_as_one_that_did_not_score(
    part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = pretraining.start_fleet
    monkeypatch.setattr(pretraining, "start_fleet", lambda *a: Spoiling(start(*a), part))
    spec = small_spec("fedavg", rounds=1, local_steps=1)
    if part == "validation":
        (row,) = pretrain(spec, output=tmp_path).rows("validation")
        assert row["missing"] == {"energy": "its answer is not as declared: loss is no number"}
        assert json.dumps(sorted(row["sites"])) == '["health", "medical"]'
    else:
        with pytest.raises(SiteError, match=r"1 of 3 sites did not score the model \(energy: its answer is not as declared: results"):
            pretrain(spec, output=tmp_path)
