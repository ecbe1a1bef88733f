"""Synthesised subjects: the same bytes every time, beats of the rate drawn, an impedance cardiogram tied to them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fedcast.data.medical import synthesis
from fedcast.errors import MissingExtraError

pytest.importorskip("neurokit2")

PERSON = synthesis.subject(5)


def test_when_a_subject_is_drawn_twice_then_it_is_the_same_and_others_differ() -> None:
    assert synthesis.subject(5) == PERSON
    assert synthesis.subject(6) != PERSON
    assert synthesis.patient(1, 0) == synthesis.patient(1, 0)
    assert len({synthesis.patient(site, k).seed for site in range(4) for k in range(4)}) == 16


def test_when_an_ecg_is_made_twice_then_its_bytes_are_the_same_whatever_was_drawn_before() -> None:
    first = synthesis.ecg(PERSON, 8, 500)
    np.random.default_rng().normal(size=3)
    assert synthesis.ecg(PERSON, 8, 500).tobytes() == first.tobytes()
    assert first.shape == (4000,)


@pytest.mark.parametrize("number", [5, 10, 20])
def test_when_an_ecg_is_made_then_it_beats_at_the_subjects_heart_rate(number: int) -> None:
    person = synthesis.subject(number)
    beats = synthesis.r_peaks(synthesis.clean_ecg(person, 30, 500), 500, person.heart_rate)
    assert 60 / np.diff(beats).mean() == pytest.approx(person.heart_rate, rel=0.08)
    assert np.diff(beats).min() > 0.5 * 60 / person.heart_rate


def test_when_an_icg_is_made_then_each_peak_follows_its_beat_by_weisslers_times() -> None:
    clean = synthesis.clean_ecg(PERSON, 20, synthesis.ECG_RATE)
    beats = synthesis.r_peaks(clean, synthesis.ECG_RATE, PERSON.heart_rate)
    curve = synthesis.icg(PERSON, 20)
    assert curve.shape == (20 * synthesis.ICG_RATE,)
    delays = []
    for beat in beats[1:-1]:
        start = round(beat * synthesis.ICG_RATE)
        delays.append(int(np.argmax(curve[start : start + 400])) / synthesis.ICG_RATE)
    heart_rate = 60 / np.diff(beats).mean()
    # B at the pre-ejection period after the onset (40 ms before R), C a quarter of the ejection time later
    expected = (131 - 0.4 * heart_rate) / 1000 - 0.04 + 0.25 * (413 - 1.7 * heart_rate) / 1000
    assert np.mean(delays) == pytest.approx(expected, abs=0.015)
    assert curve.min() < -0.25 * curve.max()  # the X wave


def test_when_the_library_is_missing_then_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neurokit2", None)
    with pytest.raises(MissingExtraError) as error:
        synthesis.ecg(PERSON, 1, 100)
    assert "fedcast[medical]" in error.value.hint
