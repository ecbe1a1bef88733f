"""The real ECG and ICG recordings of the raw folder, with their rate, length and licence: one lead a recording.

Left out: the pulse, pressure, respiration and other channels of these files (they are neither ECG nor ICG), and ``p10143`` (fetal ECG:
most of it is the noise of an electrode that lies open).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fedcast.data.medical.readers import read_archived_record, read_biosppy, read_record, read_text_column
from fedcast.data.sources.raw import Floats, read_mat

LONGEST = 600.0
"""Seconds taken of a longer recording, its first: about the length of a resting recording in the paper."""

PHYSIONET = "PhysioNet (Goldberger et al. 2000), ODC Attribution License 1.0"


@dataclass(frozen=True)
class Recording:
    """One lead of one recording of one person.

    Attributes
    ----------
    subject, name
        The person, and this recording of theirs.
    kind
        What was recorded: the field's short names.
    files
        Raw files, relative to the raw folder; none where it is synthesised.
    rate
        Samples a second.
    seconds
        Length taken.
    licence, attribution
        As in the catalogue; see :class:`fedcast.data.sources.Dataset`.
    read
        Raw folder to all values, float64 [T].
    synthetic
        Whether it was never recorded.
    """

    subject: str
    name: str
    kind: Literal["ecg", "icg"]
    files: tuple[str, ...]
    rate: float
    seconds: float
    licence: str
    attribution: str
    read: Callable[[Path], Floats]
    synthetic: bool = False


def _lead(root: Path, record: str, lead: str) -> Floats:
    return read_record(root / "medical", record, [lead])[lead].values


def _toolbox(root: Path, file: str, column: int) -> Floats:
    return read_mat(root / file, "ecg_icg")[:, column]


def _biopsykit(root: Path, file: str) -> Floats:
    return read_text_column(root / file)


def _biosppy(root: Path, file: str) -> Floats:
    return read_biosppy(root / file, "ecg.txt")


def _archived(root: Path, file: str, record: str) -> Floats:
    return read_archived_record(root / file, record, ["II"])["II"].values


def _wfdb(subject: str, record: str, lead: str, rate: float, seconds: float, who: str, signal: str = "dat") -> Recording:
    files = (f"medical/{record}.hea", f"medical/{record}.{signal}")
    read = partial(_lead, record=record, lead=lead)
    return Recording(subject, subject, "ecg", files, rate, min(seconds, LONGEST), "ODC-By-1.0", f"{who}; {PHYSIONET}", read)


def _icg_toolbox(kind: Literal["ecg", "icg"], number: int, state: str, seconds: float) -> Recording:
    file = f"medical/icg_ecg_sample_{number}_{state}.mat"
    who = "ICG_OSToolbox, Copyright (c) 2019, Clifford Lab, BSD-3-Clause"
    read = partial(_toolbox, file=file, column=("ecg", "icg").index(kind))
    subject = f"icgtoolbox_{number}"
    return Recording(subject, f"{subject}_{state}_{kind}", kind, (file,), 1000.0, seconds, "BSD-3-Clause", who, read)


def _biopsykit_recording(kind: Literal["ecg", "icg"]) -> Recording:
    file = f"medical/biopsykit_pep_{kind}.csv.gz"
    who = "BioPsyKit, Copyright (c) 2020, Machine Learning and Data Analytics Lab, MIT"
    return Recording("biopsykit", f"biopsykit_{kind}", kind, (file,), 1000.0, 10.0, "MIT", who, partial(_biopsykit, file=file))


def _ptbxl(record: str) -> Recording:
    file = "medical/ptbxl_four_records.tar.xz"
    who = "Wagner et al., PTB-XL (PhysioNet), CC BY 4.0"
    return Recording(
        f"ptbxl_{record}",
        f"ptbxl_{record}",
        "ecg",
        (file,),
        500.0,
        10.0,
        "CC-BY-4.0",
        who,
        partial(_archived, file=file, record=f"{record}_hr"),
    )


_MITBIH = "Moody and Mark, MIT-BIH Arrhythmia Database"
_CHALLENGE = "PhysioNet/CinC Challenge 2015"
_TOOLBOX = (("N", 338.436), ("S", 487.188))

ECG: tuple[Recording, ...] = (
    _wfdb("mitbih_100", "100", "MLII", 360.0, 1805.5, _MITBIH),
    _wfdb("mitbih_105", "105", "MLII", 360.0, 1805.5, _MITBIH),
    _wfdb("mitbih_200", "200m", "MLII", 360.0, 1805.5, _MITBIH, "mat"),
    _wfdb("incart_I06", "I06", "II", 257.0, 1800.0, "St Petersburg INCART 12-lead Arrhythmia Database", "dat.gz"),
    _icg_toolbox("ecg", 1, "N", 426.29),
    _icg_toolbox("ecg", 1, "S", 410.317),
    _wfdb("mimic_037", "03700181", "MCL1", 500.0, 600.0, "MIMIC Database"),
    _wfdb("challenge_a103l", "a103l", "II", 250.0, 330.0, _CHALLENGE, "mat"),
    _wfdb("challenge_v102s", "v102s", "II", 250.0, 300.0, _CHALLENGE),
    _wfdb("ptb_s0010", "s0010_re", "ii", 1000.0, 38.4, "Bousseljot et al., PTB Diagnostic ECG Database"),
    Recording(
        "biosppy",
        "biosppy",
        "ecg",
        ("medical/biosppy_biosignals.tar.xz",),
        1000.0,
        15.0,
        "BSD-3-Clause",
        "BioSPPy, Copyright (c) 2015-2023, Instituto de Telecomunicacoes, BSD-3-Clause",
        partial(_biosppy, file="medical/biosppy_biosignals.tar.xz"),
    ),
    _ptbxl("00001"),
    _ptbxl("00002"),
    _biopsykit_recording("ecg"),
    *(_icg_toolbox("ecg", 2, state, seconds) for state, seconds in _TOOLBOX),
)
"""Every ECG, the longer ones first; the last subject is the one whose ICG there is, too."""

ICG: tuple[Recording, ...] = (
    _icg_toolbox("icg", 1, "N", 426.29),
    _icg_toolbox("icg", 1, "S", 410.317),
    *(_icg_toolbox("icg", 2, state, seconds) for state, seconds in _TOOLBOX),
    _biopsykit_recording("icg"),
)
"""Every impedance cardiogram; the same persons as some of :data:`ECG`."""

MODALITY_SUBJECT = "icgtoolbox_2"
"""The person of client 20: by ECG in the partition by subjects, by ICG in that by modality."""
