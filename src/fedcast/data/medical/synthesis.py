"""Synthesised subjects: an electrocardiogram, and the impedance cardiogram of the same beats. The same number gives the same bytes.

The ECG is ECGSYN (McSharry et al. 2003) of ``neurokit2``; heart rate, its variation, the size of the waves, and the noise are drawn
for each subject. The impedance cardiogram, dZ/dt, is a sum of Gaussian waves at each beat, as ECGSYN builds an ECG: A at the
onset of depolarisation, C (the peak), X (closure of the aortic valve), O (mitral opening), around B (opening of the aortic valve),
named as in Sherwood et al. 1990. B and X follow the regressions of Weissler et al. 1968 on the heart rate of the beat (beats a minute):
pre-ejection period ``131 - 0.4 HR`` ms and ejection time ``413 - 1.7 HR`` ms. Heights are relative to C; those and the widths are this
module's own, chosen by eye to look like recorded curves. It is a stand-in for tests and scale, not a model of a heart.

References
----------
McSharry, Clifford, Tarassenko, Smith, "A dynamical model for generating synthetic electrocardiogram signals", IEEE Transactions on
Biomedical Engineering 50:289 (2003).
Sherwood et al., "Methodological guidelines for impedance cardiography", Psychophysiology 27:1 (1990).
Weissler, Harris, Schoenfeld, "Systolic time intervals in heart failure in man", Circulation 37:149 (1968).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

from fedcast.data.sources.raw import Floats
from fedcast.errors import DataError, MissingExtraError

ECG_RATE, ICG_RATE = 2000, 1000
"""Hz, those of the Vital Signs data set."""

_SUBJECTS, _SITES = 0x5375626A, 0x53697465
_HEIGHTS = np.array([1.2, -5.0, 30.0, -7.5, 0.75])  # of P, Q, R, S, T, as ECGSYN has them
_ONSET = 0.04  # seconds from the onset of depolarisation to the R peak
# height over that of C; centre after B and width, both over the ejection time (A: centre before B, over the pre-ejection period)
_WAVES = {"C": (1.0, 0.25, 0.13), "X": (-0.45, 1.0, 0.12), "O": (0.2, 1.4, 0.14)}
_A_HEIGHT, _A_WIDTH = -0.2, 0.03
_TALLEST, _ATTEMPTS = 1.3, 50
_LEAD_IN = 2  # seconds until the start no longer shows


@dataclass(frozen=True)
class Subject:
    """What is drawn once for a person.

    Attributes
    ----------
    seed
        Of everything that varies from beat to beat.
    heart_rate, heart_rate_std
        Beats a minute.
    noise
        Of the recording, relative to the signal.
    heights
        Of the waves P, Q, R, S, T; their widths and places are ECGSYN's, since its solver steps over narrower ones.
    """

    seed: int
    heart_rate: float
    heart_rate_std: float
    noise: float
    heights: tuple[float, ...]


def _drawn(rng: np.random.Generator, heart_rate: float, noise: tuple[float, float]) -> Subject:
    return Subject(
        seed=int(rng.integers(2**31)),
        heart_rate=float(np.clip(heart_rate, 48, 110)),
        heart_rate_std=float(rng.uniform(1, 5)),
        noise=float(rng.uniform(*noise)),
        heights=tuple((_HEIGHTS * np.exp(rng.normal(0, 0.2, 5))).tolist()),
    )


def subject(number: int) -> Subject:
    """Return the subject of a number: a healthy adult at rest, recorded well."""
    rng = np.random.default_rng([_SUBJECTS, number])
    return _drawn(rng, rng.normal(68, 8), (0.005, 0.03))


def patient(site: int, number: int) -> Subject:
    """Return a patient of a site: each site has its own mean heart rate and noise."""
    own = np.random.default_rng([_SITES, site])
    rate, noise = own.normal(75, 6), own.uniform(0.005, 0.08)
    rng = np.random.default_rng([_SITES, site, number + 1])
    return _drawn(rng, rng.normal(rate, 12), (0.5 * noise, 1.5 * noise))


def ecg(person: Subject, seconds: float, rate: int = ECG_RATE) -> Floats:
    """Return a synthesised ECG, [seconds * rate] in mV.

    Raises
    ------
    MissingExtraError
        When ``neurokit2`` is not installed.
    """
    noisy = _neurokit().signal_distort(
        clean_ecg(person, seconds, rate),
        sampling_rate=rate,
        noise_amplitude=person.noise,
        noise_frequency=[5, 10, 100],
        noise_shape="laplace",
        random_state=person.seed,
        silent=True,
    )
    result: Floats = np.asarray(noisy, dtype=np.float64)
    return result


def icg(person: Subject, seconds: float, rate: int = ICG_RATE) -> Floats:
    """Return the impedance cardiogram dZ/dt of the beats of :func:`ecg`, [seconds * rate] in ohm a second.

    Raises
    ------
    MissingExtraError
        When ``neurokit2`` is not installed.
    """
    beats = r_peaks(clean_ecg(person, seconds, ECG_RATE), ECG_RATE, person.heart_rate)
    rng = np.random.default_rng([person.seed, 1])
    time = np.arange(round(seconds * rate)) / rate
    curve = np.zeros(len(time))
    peak = rng.uniform(1.0, 2.5)
    for start, length in zip(beats, np.diff(beats, append=2 * beats[-1] - beats[-2]), strict=True):
        heart_rate = 60.0 / length
        pre, ejection = (131 - 0.4 * heart_rate) / 1000, (413 - 1.7 * heart_rate) / 1000
        opening = start - _ONSET + pre
        height = peak * (1 + 0.1 * np.sin(2 * np.pi * 0.25 * start) + rng.normal(0, 0.03))  # 0.25 Hz: ECGSYN's respiration
        waves = [(h, opening + centre * ejection, width * ejection) for h, centre, width in _WAVES.values()]
        for h, centre, width in (*waves, (_A_HEIGHT, opening - pre, _A_WIDTH)):
            near = slice(*np.searchsorted(time, [centre - 5 * width, centre + 5 * width]).tolist())
            curve[near] += height * h * np.exp(-0.5 * ((time[near] - centre) / width) ** 2)
    sway: Floats = 0.1 * peak * np.sin(2 * np.pi * 0.25 * time + rng.uniform(0, 2 * np.pi))
    return curve + sway + rng.normal(0, person.noise * peak, len(time))


def clean_ecg(person: Subject, seconds: float, rate: int) -> Floats:
    """Return the ECG before noise, [seconds * rate]; ECGSYN scales it to -0.4 to 1.2 mV.

    Raises
    ------
    DataError
        When no attempt gave a sound one.
    """
    for seed in range(person.seed, person.seed + _ATTEMPTS):
        values = _neurokit().ecg_simulate(
            duration=seconds + _LEAD_IN,
            sampling_rate=rate,
            noise=0.0,
            heart_rate=person.heart_rate,
            heart_rate_std=person.heart_rate_std,
            method="ecgsyn",
            random_state=seed,
            ai=person.heights,
        )
        result: Floats = np.asarray(values, dtype=np.float64)[_LEAD_IN * rate :]
        # The library's solver now and then steps over an S wave, and the curve stays high: one such beat would set the scale of all.
        usual = np.median(result[_peaks(result, rate, person.heart_rate)]) - np.median(result)
        if result.max() - np.median(result) < _TALLEST * usual:
            return result
    raise DataError(f"no sound ECG came of seed {person.seed} in {_ATTEMPTS} attempts", hint="ask for fewer seconds, or another subject")


def r_peaks(clean: Floats, rate: int, heart_rate: float) -> Floats:
    """Return the times of the R peaks of :func:`clean_ecg`, in seconds."""
    times: Floats = _peaks(clean, rate, heart_rate) / rate
    return times


def _peaks(clean: Floats, rate: int, heart_rate: float) -> NDArray[np.int64]:
    # A T wave may be half as high as R: of two peaks within half a beat the higher one counts.
    at, _ = find_peaks(clean, distance=round(0.55 * rate * 60 / heart_rate))
    tall: NDArray[np.int64] = at[clean[at] - np.median(clean) > 0.6 * (np.median(clean[at]) - np.median(clean))]
    return tall


def _neurokit() -> Any:
    try:
        import neurokit2
    except ImportError as error:
        raise MissingExtraError.of("neurokit2", "medical") from error
    return neurokit2
