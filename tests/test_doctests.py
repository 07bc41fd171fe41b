"""The examples in the docstrings, run on the package as it is installed."""

import doctest
import importlib
import pkgutil

import pytest
import rnnfast

NAMES = ["rnnfast", *(f"rnnfast.{module.name}" for module in pkgutil.iter_modules(rnnfast.__path__))]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_hold(name: str) -> None:
    framework = {"rnnfast.torch": "torch", "rnnfast.onnx": "onnx", "rnnfast.jax": "jax"}.get(name)
    if framework:
        pytest.importorskip(framework)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
