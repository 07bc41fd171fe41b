"""The lecture's examples about series and memory, in their quick versions: each ends in a number on the right side of a bar."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

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
    ],
)
def test_example(name, low, high, monkeypatch, tmp_path):
    assert low <= run(name, monkeypatch, "--figure", str(tmp_path / "picture.png")) <= high
    assert (tmp_path / "picture.png").stat().st_size > 1000
