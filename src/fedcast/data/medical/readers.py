"""Readers of medical recordings: WFDB records (through ``wfdb``), PTB-XL, Vital Signs, and the small files of two toolboxes.

Each gives waveforms in physical units at their own rate; nothing is filtered or resampled here.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fedcast.data.sources.raw import Floats, read_csv, read_mat
from fedcast.errors import MissingExtraError, SourceError

PTBXL_RATE = 500.0
VITAL_SIGNS = {"ecg": ("tfm_ecg2", 2000.0), "icg": ("tfm_icg", 1000.0)}
"""Key in a Vital Signs file and rate in Hz."""

_PTBXL_COLUMNS = ("ecg_id", "site", "strat_fold", "filename_hr")


class Channel(NamedTuple):
    """One channel of a record: samples a second, and its values [T] in physical units, NaN where missing."""

    rate: float
    values: Floats


def wfdb_library() -> Any:
    """Return the library ``wfdb``.

    Raises
    ------
    MissingExtraError
        When it is not installed.
    """
    try:
        import wfdb
    except ImportError as error:
        raise MissingExtraError.of("wfdb", "medical") from error
    return wfdb


def read_record(folder: Path, record: str, channels: Sequence[str] = ()) -> dict[str, Channel]:
    """Read channels of a WFDB record, each at its own rate, of several samples a frame every one.

    Parameters
    ----------
    folder
        Where ``<record>.hea`` lies, with its signal files; a signal file may be compressed (``.dat.gz``).
    record
        Name of the record; it may hold folders.
    channels
        Names wanted, all when empty.

    Raises
    ------
    MissingExtraError
        When ``wfdb`` is not installed.
    SourceError
        When a file is missing or malformed, or the record has no channel of a wanted name.
    """
    wfdb = wfdb_library()
    path = folder / record
    if not path.with_name(f"{path.name}.hea").is_file():
        raise SourceError(f"there is no WFDB record {path}: its .hea is missing", hint="check the path")
    try:
        header = wfdb.rdheader(str(path))
        names = list(dict.fromkeys(channels or header.sig_name))
        missing = [name for name in names if name not in header.sig_name]
        if missing:
            raise SourceError(f"WFDB record {path} has no channel {missing[0]!r}", hint=f"it has {', '.join(header.sig_name)}")
        with _unpacked(path, sorted(set(header.file_name))) as place:
            signals = wfdb.rdrecord(str(place), channel_names=names, smooth_frames=False)
    except (OSError, ValueError, IndexError) as error:
        raise SourceError(f"WFDB record {path} cannot be read: {error}", hint="copy the record again") from error
    return {
        name: Channel(float(signals.fs) * frame, np.asarray(values, dtype=np.float64))
        for name, frame, values in zip(signals.sig_name, signals.samps_per_frame, signals.e_p_signal, strict=True)
    }


@contextmanager
def _unpacked(path: Path, files: Sequence[str]) -> Iterator[Path]:
    """Give the record with its signal files uncompressed: itself, where none is compressed."""
    if all((path.parent / file).is_file() for file in files):
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copy(path.with_name(f"{path.name}.hea"), place)
        for file in files:
            packed = path.parent / f"{file}.gz"
            source = path.parent / file
            (place / file).write_bytes(gzip.decompress(packed.read_bytes()) if packed.is_file() else source.read_bytes())
        yield place / path.name


def read_archived_record(archive: Path, record: str, channels: Sequence[str] = ()) -> dict[str, Channel]:
    """Read a WFDB record of a tar archive; see :func:`read_record`.

    Raises
    ------
    SourceError
        When the archive holds no such record.
    """
    with tempfile.TemporaryDirectory() as name, tarfile.open(archive) as tar:
        for member in tar.getmembers():
            handle = tar.extractfile(member) if Path(member.name).stem == record else None
            if handle is not None:
                # by name alone: a path inside the archive must not lead out of the folder
                (Path(name) / Path(member.name).name).write_bytes(handle.read())
        if not (Path(name) / f"{record}.hea").is_file():
            raise SourceError(f"{archive} holds no WFDB record {record!r}", hint="check the archive")
        return read_record(Path(name), record, channels)


def ptbxl_records(folder: Path) -> pd.DataFrame:
    """Return the list of PTB-XL's records with a known site: ``ecg_id``, ``site``, ``strat_fold``, ``filename_hr``.

    Parameters
    ----------
    folder
        The data set as PhysioNet gives it: ``ptbxl_database.csv`` beside ``records500/``.

    Raises
    ------
    SourceError
        When the list is missing, or a column of it is.

    References
    ----------
    Wagner et al., "PTB-XL, a large publicly available electrocardiography dataset", Scientific Data 7:154 (2020).
    """
    path = folder / "ptbxl_database.csv"
    if not path.is_file():
        raise SourceError(f"{path} is missing", hint="put PTB-XL of PhysioNet there, with records500/ beside it")
    try:
        table = read_csv(path, usecols=list(_PTBXL_COLUMNS))
    except ValueError as error:
        raise SourceError(f"{path} is not PTB-XL's list of records: {error}", hint="copy it from PhysioNet again") from error
    return table.dropna(subset=["site"]).astype({"site": "int64", "strat_fold": "int64"})


def ptbxl_lead(folder: Path, filename: str) -> Floats:
    """Return lead II of one record of PTB-XL, [5000] at 500 Hz in mV.

    Raises
    ------
    SourceError
        When it is missing, or of another rate.
    """
    channel = read_record(folder, filename, ["II"])["II"]
    if channel.rate != PTBXL_RATE:
        raise SourceError(f"{folder / filename} has {channel.rate:g} Hz, not {PTBXL_RATE:g}", hint="give records500, not records100")
    return channel.values


def vital_signs(path: Path, kind: str) -> Channel:
    """Return one waveform of a Vital Signs recording.

    Parameters
    ----------
    path
        A file such as ``GDN0001/GDN0001_1_Resting.mat``.
    kind
        ``"ecg"``: the second lead, in mV; ``"icg"``: the impedance cardiogram.

    Raises
    ------
    SourceError
        When the file has no such waveform.

    References
    ----------
    Schellenberger et al., "A dataset of clinically recorded radar vital signs with synchronised reference sensor signals",
    Scientific Data 7:291 (2020). The rate is that of its reference device, the Task Force Monitor.
    """
    key, rate = VITAL_SIGNS[kind]
    try:
        return Channel(rate, read_mat(path, key).reshape(-1))
    except (OSError, KeyError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{path} has no readable waveform {key!r}", hint="copy the Vital Signs data set again") from error


def read_text_column(path: Path) -> Floats:
    """Return the values [T] of a compressed CSV of BioPsyKit: a stamp and a value a row."""
    values: Floats = read_csv(path).iloc[:, 1].to_numpy(dtype=np.float64)
    return values


def read_biosppy(archive: Path, member: str) -> Floats:
    """Return the first column [T] of one text file of BioSPPy's archive, in units of its converter.

    Raises
    ------
    SourceError
        When the archive holds no such file.
    """
    with tarfile.open(archive) as tar:
        handle = tar.extractfile(member) if member in tar.getnames() else None
        if handle is None:
            raise SourceError(f"{archive} holds no {member!r}", hint="check the archive")
        table = np.loadtxt(io.BytesIO(handle.read()), comments="#", ndmin=2)
    values: Floats = np.asarray(table[:, 0], dtype=np.float64)
    return values
