"""One function a raw dataset: what is taken of it and how, as regular series.

Every function takes the raw folder (the one that ``FEDCAST_DATA`` names) and returns series. Choices that lose something (resampling,
a subset, a cut) stand in the ``taken`` text of the dataset in :mod:`fedcast.data.sources.recipes`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd

from fedcast.data.sources.raw import EPOCH, Series, columns_of, on_grid, read_csv, read_mat, read_nab, read_wfdb, resampled


def france_demand(root: Path) -> list[Series]:
    """Hourly demand of 12 French regions, stamps in UTC; the hour lost each October is written as 0 and read as missing."""
    table = read_csv(root / "energy/france_regional_demand_hourly.csv.gz").drop(columns="time")
    return columns_of(table.replace(0, np.nan), pd.Timestamp("2014-01-01"))


def household_power(root: Path) -> list[Series]:
    """Seven meters of one house, minutes averaged to 15 minutes; a quarter hour without any minute is missing."""
    table = read_csv(root / "energy/household_power_minute.csv.xz", na_values=["?"])
    stamps = pd.to_datetime(table["Date"] + " " + table["Time"], format="%d/%m/%Y %H:%M:%S")
    quarter = table.drop(columns=["Date", "Time"]).set_index(stamps).resample("15min").mean()
    return columns_of(quarter, quarter.index[0])


def hourly_power(root: Path) -> list[Series]:
    """Hourly means of the Monash electricity, wind and solar sets."""
    tables = {name: read_csv(root / f"energy/hourly_{name}.csv.gz") for name in ("electricity", "windpower", "solarpower")}
    return [Series(name, pd.Timestamp(table["ts"].iloc[0]), table["y"].to_numpy(dtype=np.float64)) for name, table in tables.items()]


def etth(root: Path) -> list[Series]:
    """Both hourly electricity transformer sets."""
    return _ett(root, ("ETTh1", "ETTh2"))


def ettm(root: Path) -> list[Series]:
    """Both 15-minute electricity transformer sets."""
    return _ett(root, ("ETTm1", "ETTm2"))


def _ett(root: Path, names: tuple[str, ...]) -> list[Series]:
    result = []
    for name in names:
        table = read_csv(root / f"energy/{name}.csv.gz").drop(columns="date")
        result += [Series(f"{name}-{s.id}", s.start, s.values) for s in columns_of(table, pd.Timestamp("2016-07-01"))]
    return result


def turbine_power(root: Path) -> list[Series]:
    """Active power of four turbines in kW."""
    return _turbines(root, "P_avg")


def turbine_wind(root: Path) -> list[Series]:
    """Wind speed at four nacelles in m/s."""
    return _turbines(root, "Ws_avg")


def _turbines(root: Path, column: str) -> list[Series]:
    path = root / "wind/la_haute_borne_scada_2014_2015.csv.gz"
    table = read_csv(path, usecols=["Wind_turbine_name", "Date_time", column])
    stamps = pd.to_datetime(table["Date_time"], utc=True).dt.tz_localize(None)
    return [
        on_grid(str(name), stamps[rows], table[column].to_numpy()[rows], "10min")
        for name, rows in table.groupby("Wind_turbine_name").indices.items()
    ]


def pems_occupancy(root: Path) -> list[Series]:
    """Hourly road occupancy of 20 sensors in the San Francisco bay area."""
    values = np.loadtxt(root / "traffic/pems_sf_20_sensors_hourly.txt.gz")
    return [Series(f"sensor-{i:02d}", pd.Timestamp("2015-01-01"), values[:, i]) for i in range(values.shape[1])]


def metr_la(root: Path) -> list[Series]:
    """Speed at 207 loop detectors of Los Angeles, 5 minutes, one week."""
    return columns_of(read_csv(root / "traffic/metr_la_subset_los_speed_5min.csv.gz"), pd.Timestamp("2012-03-01"))


def flights(root: Path) -> list[Series]:
    """Hourly departures of three New York airports and their carriers."""
    table = read_csv(root / "transport/nyc_flights_hourly_counts.csv.gz")
    names = [name for name in table.columns if name != "ts" and not name.startswith("delay")]
    return columns_of(table, pd.Timestamp(table["ts"].iloc[0]), names)


def buses(root: Path) -> list[Series]:
    """Hourly passengers of 675 bus stops; the clock was not kept."""
    with gzip.open(root / "transport/montevideo_bus_hourly.json.gz", "rt", encoding="utf-8") as file:
        nodes = json.load(file)["nodes"]
    return [Series(f"stop-{node['bus_stop']}", EPOCH, np.array(node["X"]["y"], dtype=np.float64)) for node in nodes]


def taxi(root: Path) -> list[Series]:
    """Half-hourly taxi passengers of New York."""
    return read_nab(root / "cloud/nab_realKnownCause.tar.xz", "30min", ["nyc_taxi"])


def retail_daily(root: Path) -> list[Series]:
    """Daily units of the 200 items that sold most."""
    table = read_csv(root / "retail/online_retail_ii_daily_qty_top200.csv.gz")
    return columns_of(table.drop(columns="date"), pd.Timestamp(table["date"].iloc[0]))


def retail_hourly(root: Path) -> list[Series]:
    """Hourly units, revenue and invoices of the shop."""
    table = read_csv(root / "retail/online_retail_ii_hourly_totals.csv.gz")
    return columns_of(table.drop(columns="ts"), pd.Timestamp(table["ts"].iloc[0]))


def ili_states(root: Path) -> list[Series]:
    """Weekly visits with influenza-like illness by region; reports are consecutive weeks, so stamps are counted, not read."""
    table = read_csv(root / "health/ili_by_state_weekly.csv.gz")
    groups = table.groupby("region", sort=True)["ILITOTAL"]
    first = pd.Timestamp("2010-10-04")
    return [Series(str(name), first, values.to_numpy(dtype=np.float64)) for name, values in groups if len(values) == 688]


def ili_national(root: Path) -> list[Series]:
    """Weekly influenza-like illness in the United States, stamps moved from Tuesdays to Mondays."""
    table = read_csv(root / "health/national_illness_weekly.csv.gz").drop(columns="date")
    return columns_of(table, pd.Timestamp("2001-12-31"))


def mitbih(root: Path) -> list[Series]:
    """Two leads of three records of the MIT-BIH arrhythmia database."""
    result = []
    for record in ("100", "105", "200m"):
        rate, signals = read_wfdb(root / "medical", record)
        result += [Series(f"{record}-{name}", EPOCH, resampled(values, rate, seconds=900)) for name, values in signals.items()]
    return result


def incart(root: Path) -> list[Series]:
    """Twelve leads of one record of the St Petersburg INCART database."""
    rate, signals = read_wfdb(root / "medical", "I06")
    return [Series(f"I06-{name}", EPOCH, resampled(values, rate, seconds=300)) for name, values in signals.items()]


def icg_ecg(root: Path) -> list[Series]:
    """ECG and impedance cardiogram of two subjects, neutral (N) and under stress (S)."""
    result = []
    for record in ("1_N", "1_S", "2_N", "2_S"):
        values = read_mat(root / f"medical/icg_ecg_sample_{record}.mat", "ecg_icg")  # [T, 2] at 1000 Hz
        result += [Series(f"{record}-{name}", EPOCH, resampled(values[:, i], 1000.0)) for i, name in enumerate(("ecg", "icg"))]
    return result


def vital_signs(root: Path) -> list[Series]:
    """Arterial pressure, respiration and pulse waveforms of three intensive care records."""
    result = []
    for record in ("03700181", "a103l", "v102s"):
        rate, signals = read_wfdb(root / "medical", record)
        wanted = [name for name in ("ABP", "RESP", "PLETH") if name in signals]
        result += [Series(f"{record}-{name}", EPOCH, resampled(signals[name], rate)) for name in wanted]
    return result


def wikipedia(root: Path) -> list[Series]:
    """Daily views of nine Wikipedia pages."""
    table = read_csv(root / "web/wikipedia_traffic_daily.csv.gz")
    pages = table[~table["Page"].str.startswith("Порнография")].groupby("Page", sort=True)["value"]
    return [Series(str(name), pd.Timestamp("2015-07-01"), values.to_numpy(dtype=np.float64)) for name, values in pages]


def tweets(root: Path) -> list[Series]:
    """Mentions of ten companies on Twitter, 5 minutes."""
    return read_nab(root / "web/nab_realTweets.tar.xz", "5min")


def ad_exchange(root: Path) -> list[Series]:
    """Clicks and prices of online advertisements, hourly."""
    return read_nab(root / "web/nab_realAdExchange.tar.xz", "1h")


def cloudwatch(root: Path) -> list[Series]:
    """CPU, disk, network and request metrics of cloud servers, 5 minutes."""
    return read_nab(root / "cloud/nab_realAWSCloudwatch.tar.xz", "5min")


def server_faults(root: Path) -> list[Series]:
    """Server metrics with a known cause of failure, 5 minutes."""
    names = ["cpu_utilization_asg_misconfiguration", "ec2_request_latency_system_failure", "rogue_agent_key_hold", "rogue_agent_key_updown"]
    return read_nab(root / "cloud/nab_realKnownCause.tar.xz", "5min", names)


def google2019(root: Path) -> list[Series]:
    """Usage of a Google cluster; the clock was not kept."""
    return columns_of(read_csv(root / "cloud/google2019_usage_5min.csv.gz"), EPOCH)


def azure(root: Path) -> list[Series]:
    """Usage of an Azure region; the clock was not kept."""
    return columns_of(read_csv(root / "cloud/azure_v2_usage_5min.csv.gz"), EPOCH)


def alibaba(root: Path) -> list[Series]:
    """Usage of an Alibaba cluster, 10 seconds; the clock was not kept."""
    return columns_of(read_csv(root / "cloud/alibaba2018_usage_10s.csv.gz"), EPOCH)


def co2(root: Path) -> list[Series]:
    """Daily carbon dioxide at Mauna Loa; days without a baseline reading are missing."""
    table = read_csv(root / "nature/mauna_loa_co2_daily.csv.gz", comment="%", header=None, skipinitialspace=True, encoding="latin1")
    stamps = pd.to_datetime({"year": table[0], "month": table[1], "day": table[2]})
    return [on_grid("mauna-loa-co2", stamps, pd.to_numeric(table[3], errors="coerce"), "1D")]


def jena(root: Path) -> list[Series]:
    """Twenty-one weather channels, 10 minutes."""
    table = read_csv(root / "weather/weather_jena2020.csv.gz", encoding="latin1")
    stamps = pd.to_datetime(table["date"])
    return [on_grid(str(name), stamps, table[name].replace(-9999.0, np.nan), "10min") for name in table.columns if name != "date"]


def meteo_france(root: Path) -> list[Series]:
    """Daily minimum and maximum temperature and rain of stations in Ille-et-Vilaine."""
    columns = ["NUM_POSTE", "NOM_USUEL", "AAAAMMJJ", "TN", "TX", "RR"]
    table = read_csv(root / "weather/meteofrance_dept35_daily_1950_2024.csv.gz", sep=";", usecols=columns)
    stamps = pd.to_datetime(table["AAAAMMJJ"].astype(str), format="%Y%m%d")
    result = []
    stations = table["NUM_POSTE"].astype(str) + "-" + table["NOM_USUEL"].str.split().str.join("-")
    for station, rows in stations.groupby(stations).indices.items():
        channels = {column: table[column].to_numpy(dtype=np.float64)[rows] for column in ("TN", "TX", "RR")}
        if min(np.isfinite(values).sum() for values in channels.values()) >= 7000:
            result += [on_grid(f"{station}-{column}", stamps.iloc[rows], values, "1D") for column, values in channels.items()]
    return result


def melbourne(root: Path) -> list[Series]:
    """Daily minimum and maximum temperature of Melbourne."""
    table = read_csv(root / "weather/melbourne_min_max_daily.csv.gz")
    return [on_grid(name, pd.to_datetime(table["Date"]), table[name], "1D") for name in ("Min_Temp", "Max_Temp")]


def china_temperature(root: Path) -> list[Series]:
    """Daily temperature of every fortieth of 428 Chinese stations; the clock was not kept."""
    with np.load(root / "weather/china_temperature_daily.npz", allow_pickle=False) as data:
        values = data["x"][:, ::40].astype(np.float64)
    values[values <= -32767] = np.nan
    return [Series(f"station-{40 * i:03d}", EPOCH, values[:, i] / 10) for i in range(values.shape[1])]


def watch(root: Path) -> list[Series]:
    """Six axes of a wrist watch in 140 recordings of shoulder exercises by 10 people."""
    with np.load(root / "activity/watch_shoulder_exercises.npz", allow_pickle=False) as data:
        axes, subject, exercise, names = data["X_labels"], data["subject"], data["y"], data["y_labels"]
        result = []
        for i in range(len(subject)):
            values = data[f"x{i:03d}"].astype(np.float64)  # [T, 6]
            label = f"{i:03d}-subject{int(subject[i]):02d}-{names[exercise[i]]}"
            result += [Series(f"{label}-{axis}", EPOCH, values[:, j]) for j, axis in enumerate(axes)]
    return result


def smap(root: Path) -> list[Series]:
    """Telemetry of the SMAP satellite; integer steps."""
    return _telemetry(root / "anomaly/nasa_smap.npz")


def msl(root: Path) -> list[Series]:
    """Telemetry of the Curiosity rover; integer steps."""
    return _telemetry(root / "anomaly/nasa_msl.npz")


def _telemetry(path: Path) -> list[Series]:
    with np.load(path, allow_pickle=False) as data:
        series = [Series(name.removesuffix("__telemetry"), 0, data[name].astype(np.float64)) for name in data if name.endswith("telemetry")]
    return [s for s in series if len(np.unique(s.values)) > 10]


def exchange(root: Path) -> list[Series]:
    """Daily exchange rates of eight currencies; the clock was not kept."""
    values = np.loadtxt(root / "finance/exchange_rate_daily.txt.gz", delimiter=",")
    return [Series(f"currency-{i}", EPOCH, values[:, i]) for i in range(values.shape[1])]


def stocks(root: Path) -> list[Series]:
    """Close and volume of five stocks, one step a trading day."""
    groups = read_csv(root / "finance/stocks_ohlcv_daily.csv.gz").sort_values(["Ticker", "Date"]).groupby("Ticker", sort=True)
    first = pd.Timestamp("2000-03-01")
    return [Series(f"{name}-{column}", first, t[column].to_numpy(dtype=np.float64)) for name, t in groups for column in ("Close", "Volume")]


def bitcoin(root: Path) -> list[Series]:
    """Daily number of bitcoin transactions."""
    table = read_csv(root / "finance/bitcoin_transactions_daily.csv.gz")
    return [Series("transactions", pd.Timestamp(table["ts"].iloc[0]), table["y"].to_numpy(dtype=np.float64))]
