"""Which client holds what: the three partitions of Ali et al. 2025, 20 clients each.

``subjects``
    ECG by person: clients 1 to 10 hold two persons each, 11 to 20 one each.
``modality``
    The same, but client 20 holds the impedance cardiogram of its person, not the ECG.
``sites``
    Ten-second records by site, a site a client, of very different sizes: 8,910 records at the largest and 10 at the smallest in the
    paper. Sizes between them are not published; here they fall geometrically, and all are divided by 100 and at least 1,
    since a record takes 50 ms to synthesise.
``real``
    Not of the paper: every real person a client, by kind of recording, nothing synthesised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

from fedcast.data.medical import MEDICAL_SOURCES, RATES, SYNTHETIC, readers, synthesis
from fedcast.data.medical.parts import CONTEXT, HORIZON, TRAIN_SHARE, cut, whole
from fedcast.data.medical.recordings import ECG, ICG, LONGEST, MODALITY_SUBJECT, Recording
from fedcast.data.sources.dataset import Dataset
from fedcast.data.sources.raw import Floats, Series
from fedcast.errors import SourceError, UnknownNameError

CLIENTS = 20
PAIRS = 10
"""Clients that hold two persons each, the first."""

SECONDS = 120.0
"""Length of a synthesised recording."""

SITE_LARGEST, SITE_SMALLEST, SITE_FACTOR = 8910, 10, 100
"""Train records of the largest and the smallest site in the paper, and by how much sizes are divided here."""

SITE_SECONDS, SITE_TESTED = 10.0, 0.2
"""Length of a record, and share of a site's records that are tested on."""

_PTBXL, _VITAL_SIGNS = "medical/ptbxl", "medical/vital_signs"
_TRAIN_FOLDS = 8  # of ten; the authors of PTB-XL made the last two for validation and test
_SYNTHETIC_LICENCE = "CC0-1.0"
_VITAL_LICENCE, _VITAL_WHO = "CC-BY-4.0", "Schellenberger et al., Scientific Data 7:291 (2020), figshare 12186516, CC BY 4.0"
Clients = dict[str, list[Recording]]


def medical_domains(source: str) -> dict[str, tuple[Dataset, ...]]:
    """Return the clients of a medical source, in order, each with its datasets; no raw file is read.

    Parameters
    ----------
    source
        One of :data:`fedcast.data.medical.MEDICAL_SOURCES`.

    Returns
    -------
    dict
        Client to datasets, one a kind and rate (``ecg_360hz``); client and dataset end in ``synthetic`` where nothing was recorded.

    Raises
    ------
    UnknownNameError
        When there is no such source.
    """
    if source not in MEDICAL_SOURCES:
        raise UnknownNameError.of("data source", source, MEDICAL_SOURCES)
    if source == "ptbxl-sites":
        return {f"client_{i:02d}": (_ptbxl_site(f"client_{i:02d}", i - 1),) for i in range(1, CLIENTS + 1)}
    suffix = next((each for each in RATES if each and source.endswith(each)), "")
    name, to = source.removesuffix(suffix), RATES[suffix]
    if name == "medical-sites":
        sizes = site_sizes()
        return {f"client_{i:02d}-synthetic": (_synthetic_site(i, sizes[i - 1], to),) for i in range(1, CLIENTS + 1)}
    return {client: _datasets(client, recordings, to) for client, recordings in _clients(name, to).items()}


def _clients(name: str, to: float | None) -> Clients:
    if name == "medical-real":
        return _real(to)
    if name.startswith("vital-signs"):
        clients = {client: [_gdn(number, "ecg") for number in numbers] for client, numbers in _numbers().items()}
        odd = _gdn(_numbers()[f"client_{CLIENTS}"][0], "icg")
    elif name in SYNTHETIC:
        clients = {client: [_synthesised(number, "ecg") for number in numbers] for client, numbers in _numbers().items()}
        odd = _synthesised(_numbers()[f"client_{CLIENTS}"][0], "icg")
        return _named(clients | ({f"client_{CLIENTS}": [odd]} if "modality" in name else {}))
    else:
        return _named(_filled(to, modality=name == "medical-modality"))
    return clients | ({f"client_{CLIENTS}": [odd]} if "modality" in name else {})


def _numbers() -> dict[str, list[int]]:
    """Return the persons of each client, numbered 1 to 30 as in the paper."""
    return {f"client_{i:02d}": [2 * i - 1, 2 * i] if i <= PAIRS else [PAIRS + i] for i in range(1, CLIENTS + 1)}


def _filled(to: float | None, *, modality: bool) -> Clients:
    """Return real persons in pairs from client 1 on and the last client real, synthesised ones everywhere else."""
    clients = {client: [_synthesised(number, "ecg") for number in numbers] for client, numbers in _numbers().items()}
    people = _by_subject(each for each in ECG if _tested(each, to) and each.subject != MODALITY_SUBJECT)
    # two real persons a client, never a real and a synthesised one: the one left over is in medical-real alone
    for i, (first, second) in enumerate(zip(people[::2], people[1::2], strict=False), start=1):
        clients[f"client_{i:02d}"] = [*first, *second]
    clients[f"client_{CLIENTS}"] = [each for each in (ICG if modality else ECG) if each.subject == MODALITY_SUBJECT]
    return clients


def _named(clients: Clients) -> Clients:
    """Mark the names of clients whose recordings are all synthesised."""
    return {f"{name}-synthetic" if all(each.synthetic for each in held) else name: held for name, held in clients.items()}


def _real(to: float | None) -> Clients:
    people = _by_subject(each for each in (*ECG, *ICG) if _tested(each, to))
    return {f"{held[0].kind}_{held[0].subject}": held for held in people}


def _by_subject(recordings: Iterable[Recording]) -> list[list[Recording]]:
    found: dict[tuple[str, str], list[Recording]] = {}
    for each in recordings:
        found.setdefault((each.subject, each.kind), []).append(each)
    return list(found.values())


def _tested(recording: Recording, to: float | None) -> bool:
    """Say whether the test part has room for a window."""
    steps = recording.seconds * (to or recording.rate)
    return steps - int(steps * TRAIN_SHARE) >= CONTEXT + HORIZON


def _synthesised(number: int, kind: Literal["ecg", "icg"]) -> Recording:
    rate = {"ecg": synthesis.ECG_RATE, "icg": synthesis.ICG_RATE}[kind]
    name = f"synthetic_{number:04d}"
    who = f"synthesised by fedcast: subject {number:04d}"
    read = partial(_synthesise, number=number, kind=kind)
    return Recording(name, f"{name}_{kind}", kind, (), float(rate), SECONDS, _SYNTHETIC_LICENCE, who, read, synthetic=True)


def _synthesise(_: Path, number: int, kind: str) -> Floats:
    make = {"ecg": synthesis.ecg, "icg": synthesis.icg}[kind]
    return make(synthesis.subject(number), SECONDS)


def _gdn(number: int, kind: Literal["ecg", "icg"]) -> Recording:
    name = f"GDN{number:04d}"
    file = f"{_VITAL_SIGNS}/{name}/{name}_1_Resting.mat"
    rate = readers.VITAL_SIGNS[kind][1]
    return Recording(
        name, f"{name}_{kind}", kind, (file,), rate, LONGEST, _VITAL_LICENCE, _VITAL_WHO, partial(_read_gdn, file=file, kind=kind)
    )


def _read_gdn(root: Path, file: str, kind: str) -> Floats:
    return readers.vital_signs(root / file, kind).values


def _datasets(client: str, recordings: list[Recording], to: float | None) -> tuple[Dataset, ...]:
    """Return one dataset for each kind, rate and way of coming about."""
    groups: dict[str, list[Recording]] = {}
    for each in recordings:
        groups.setdefault(_label(each.kind, to or each.rate, synthetic=each.synthetic), []).append(each)
    return tuple(_dataset(client, label, held, to) for label, held in groups.items())


def _label(kind: str, rate: float, *, synthetic: bool) -> str:
    return f"{kind}_{rate:g}hz" + ("_synthetic" if synthetic else "")


def _dataset(client: str, label: str, held: list[Recording], to: float | None) -> Dataset:
    files = tuple(dict.fromkeys(file for each in held for file in each.files))
    who = "; ".join(dict.fromkeys(each.attribution for each in held))
    licence = ", ".join(dict.fromkeys(each.licence for each in held))
    taken = f"{', '.join(each.name for each in held)}: first 60 % trained on, last 40 % tested on, each part scaled to [0, 1]"
    return Dataset(client, label, files, 1, licence, who, who, taken, partial(_read, held=held, to=to))


def _read(root: Path, held: list[Recording], to: float | None) -> list[Series]:
    parts = []
    for each in held:
        # Vital Signs recordings are taken whole, as in the paper; LONGEST only bounds longer ones of other origin
        values = each.read(root) if each.subject.startswith("GDN") else each.read(root)[: round(each.seconds * each.rate)]
        parts += cut(each.name, values, each.rate, to)
    return parts


def site_sizes() -> list[int]:
    """Return the train records of each synthesised site, largest first: a geometric fall from 8,910 to 10, divided by 100, at least 1."""
    fall = (SITE_SMALLEST / SITE_LARGEST) ** (1 / (CLIENTS - 1))
    return [max(1, round(SITE_LARGEST * fall**i / SITE_FACTOR)) for i in range(CLIENTS)]


def _tested_records(train: int) -> int:
    return max(1, round(train * SITE_TESTED / (1 - SITE_TESTED)))


def _synthetic_site(site: int, size: int, to: float | None) -> Dataset:
    client = f"client_{site:02d}-synthetic"
    who = f"synthesised by fedcast: site {site:02d}"
    taken = f"{size} records of 10 s trained on, {_tested_records(size)} tested on, each scaled to [0, 1]"
    label = _label("ecg", to or readers.PTBXL_RATE, synthetic=True)
    read: Callable[[Path], list[Series]] = partial(_synthesise_site, site=site, size=size, to=to)
    return Dataset(client, label, (), 1, _SYNTHETIC_LICENCE, who, who, taken, read)


def _synthesise_site(_: Path, site: int, size: int, to: float | None) -> list[Series]:
    rate = int(readers.PTBXL_RATE)
    return [
        whole(f"site{site:02d}_{k:04d}", synthesis.ecg(synthesis.patient(site, k), SITE_SECONDS, rate), rate, to, test=k >= size)
        for k in range(size + _tested_records(size))
    ]


def _ptbxl_site(client: str, rank: int) -> Dataset:
    who = "Wagner et al., PTB-XL, Scientific Data 7:154 (2020), PhysioNet, CC BY 4.0"
    taken = f"lead II of site number {rank + 1} by size; folds 1 to 8 trained on, 9 and 10 tested on, each record scaled to [0, 1]"
    # the list stands for the records: they are 21,799 files, and none of them changes while the list does not
    files = (f"{_PTBXL}/ptbxl_database.csv",)
    return Dataset(client, "ecg_500hz", files, 1, "CC-BY-4.0", who, who, taken, partial(_read_ptbxl_site, rank=rank))


def _read_ptbxl_site(root: Path, rank: int) -> list[Series]:
    folder = root / _PTBXL
    records = readers.ptbxl_records(folder)
    train = records[records["strat_fold"] <= _TRAIN_FOLDS]
    sizes = train.groupby("site").size().sort_index().sort_values(ascending=False, kind="stable")
    tested = set(records.loc[records["strat_fold"] > _TRAIN_FOLDS, "site"])
    sites = [int(site) for site, size in sizes.items() if size >= SITE_SMALLEST and site in tested]  # type: ignore[call-overload]
    if rank >= len(sites):
        hint = "give the whole of PTB-XL"
        raise SourceError(
            f"{folder} has {len(sites)} sites with {SITE_SMALLEST} train records, so there is no client {rank + 1}", hint=hint
        )
    own = records[records["site"] == sites[rank]]
    return [
        whole(
            f"{int(row.ecg_id):05d}",
            readers.ptbxl_lead(folder, str(row.filename_hr)),
            readers.PTBXL_RATE,
            test=row.strat_fold > _TRAIN_FOLDS,
        )
        for row in own.itertuples()
    ]
