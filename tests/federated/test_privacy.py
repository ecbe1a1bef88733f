from __future__ import annotations

import json
import math
import time
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedcast.errors import ResumeError
from fedcast.federated.privacy import LEDGER, Accountant, Ledger, Release, Spending, epsilon

DELTA = 1e-5


def _release(round_: int = 1, *, sites: tuple[str, ...] = ("a", "b"), seeded: bool = False, noise: float = 1.0) -> Release:
    return Release(round_, "central", noise, dict.fromkeys(sites, (1.0, 1)), seeded)


def test_when_steps_are_not_sampled_then_epsilon_is_that_of_one_gaussian_mechanism() -> None:
    assert epsilon((Spending(2.0, 1.0, 16),), DELTA) == dp_accounting.get_epsilon_gaussian(0.5, DELTA)
    # Balle and Wang: sigma = 1, sensitivity 1, delta = 1e-5.
    assert epsilon((Spending(1.0, 1.0, 1),), DELTA) == pytest.approx(4.3772, abs=1e-3)


def test_when_steps_are_sampled_then_epsilon_is_that_of_the_librarys_accountants_and_of_the_literature() -> None:
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.1))
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountants = {"pld": PLDAccountant(relation), "rdp": RdpAccountant(neighboring_relation=relation)}
    found = {}
    for name, accountant in accountants.items():
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, 10_000))
        kind: Accountant = "pld" if name == "pld" else "rdp"
        found[name] = epsilon((Spending(1.1, 0.01, 10_000),), DELTA, kind)
        assert found[name] == accountant.get_epsilon(DELTA)
    # The moments accountant of TensorFlow Privacy gives 5.7 to 6.3 for these settings, depending on its version.
    assert 5.5 < found["rdp"] < 6.4
    assert found["pld"] < found["rdp"]


def test_when_noise_is_small_then_the_coarser_grid_changes_the_fifth_digit_at_most() -> None:
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    fine = PLDAccountant(relation)
    fine.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(0.005, dp_accounting.GaussianDpEvent(0.45)), 200))
    assert epsilon((Spending(0.45, 0.005, 200),), DELTA) == pytest.approx(fine.get_epsilon(DELTA), rel=1e-4)


@pytest.mark.parametrize("rate", [1.0, 0.02])
def test_when_more_steps_are_taken_then_epsilon_grows(rate: float) -> None:
    values = [epsilon((Spending(1.0, rate, steps),), DELTA) for steps in (0, 1, 20)]
    assert values[0] == 0
    assert values == sorted(set(values))


def test_when_a_site_claims_any_number_of_steps_then_epsilon_is_an_upper_bound_within_seconds() -> None:
    begin = time.process_time()
    vast = epsilon((Spending(1.0, 0.9, 10**8),), DELTA)
    assert time.process_time() - begin < 10
    assert vast == epsilon((Spending(1.0, 0.9, 10**8),), DELTA, "rdp") > epsilon((Spending(1.0, 0.9, 100),), DELTA)


def test_when_there_is_no_noise_then_epsilon_is_infinite() -> None:
    assert epsilon((Spending(0.0, 1.0, 1),), DELTA) == math.inf


def test_when_sites_took_part_in_different_rounds_then_the_one_that_took_part_most_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for round_, sites in enumerate((("a", "b"), ("a", "c"), ("b", "c"), ("a", "b")), start=1):
        ledger.add(_release(round_, sites=sites))
    assert ledger.epsilon(DELTA, "pld") == epsilon((Spending(1.0, 1.0, 3),), DELTA)


def test_when_a_ledger_is_read_again_then_it_says_the_same_and_a_release_more_makes_it_say_more(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(_release(1))
    assert len(Ledger(tmp_path)) == 1
    before = Ledger(tmp_path).epsilon(DELTA, "pld")
    assert before == ledger.epsilon(DELTA, "pld") > 0
    assert Ledger(tmp_path).epsilon(DELTA, "pld", also=_release(2)) > before


def test_when_a_round_is_run_again_then_it_costs_twice_unless_its_noise_is_seeded(tmp_path: Path) -> None:
    spent = {}
    for seeded in (False, True):
        folder = tmp_path / str(seeded)
        for _ in range(2):
            Ledger(folder).add(_release(1, seeded=seeded))
        spent[seeded] = Ledger(folder).epsilon(DELTA, "pld")
    assert spent[True] == epsilon((Spending(1.0, 1.0, 1),), DELTA)
    assert spent[False] == epsilon((Spending(1.0, 1.0, 2),), DELTA)


def test_when_a_kill_cuts_a_line_short_then_it_is_no_release_and_the_next_one_has_a_line_of_its_own(tmp_path: Path) -> None:
    Ledger(tmp_path).add(_release(1))
    with (tmp_path / LEDGER).open("a") as file:
        file.write(_release(2).to_json()[:40])
    ledger = Ledger(tmp_path)
    assert len(ledger) == 1
    ledger.add(_release(3))
    lines = (tmp_path / LEDGER).read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 3]


@pytest.mark.parametrize("line", ["", "no json", "[]", "{}", '{"round": 1}'])
def test_when_a_line_is_no_release_then_the_run_does_not_go_on_as_if_nothing_had_been_spent(tmp_path: Path, line: str) -> None:
    (tmp_path / LEDGER).write_text(f"{_release(1).to_json()}\n{line}\n")
    with pytest.raises(ResumeError, match="line 2 of"):
        Ledger(tmp_path)
