"""What a training step does beside the recurrent layers, on every target: softmax, an embedding's gradient, Adam."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rnnfast
from rnnfast import _core

FLOATS = ("float32", "float64")
ROWS = {"one": (1, 1), "less than a register": (3, 5), "registers": (7, 32), "a lane more": (6, 33), "many": (2500, 129), "long": (9, 5003)}


@pytest.fixture(params=(1, 2, 3))
def threads(request: Any) -> Any:
    before = rnnfast.get_num_threads()
    rnnfast.set_num_threads(request.param)
    yield request.param
    rnnfast.set_num_threads(before)


def softmax(a: Any, target: Any, weight: Any) -> tuple[Any, Any]:
    """Each row's loss and gradient, in float64."""
    a = a.astype(np.float64)
    shifted = a - a.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    loss = np.log(e.sum(axis=1)) - shifted[np.arange(len(a)), target]
    gradient = e / e.sum(axis=1, keepdims=True)
    gradient[np.arange(len(a)), target] -= 1
    return loss, gradient * weight[:, None]


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_softmax_is_the_oracles_for_any_number_of_threads(shape: tuple[int, int], dtype: str, threads: int) -> None:
    draw = np.random.default_rng(3)
    n, V = shape
    a, targets, weights = (5 * draw.standard_normal(shape)).astype(dtype), draw.integers(0, V, n), draw.random(n)
    gradient = np.empty_like(a)
    sums, picked = _core.softmax(a, targets, weights, 1.0, gradient)
    loss, expected = softmax(a, targets, weights)
    near = {"float32": 2e-6, "float64": 4e-15}[dtype]
    np.testing.assert_allclose(np.log(sums) - picked, loss, rtol=near, atol=near)
    np.testing.assert_allclose(gradient, expected, rtol=near, atol=near)
    rnnfast.set_num_threads(1)
    alone = a.copy()
    again = _core.softmax(alone, targets, weights, 1.0, alone)  # and in place
    for one, other in ((sums, again[0]), (picked, again[1]), (gradient, alone)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_of_what_is_not_finite(dtype: str) -> None:
    """-inf is a class that cannot be: its probability is 0, exactly; NaN stays in its row."""
    a = np.zeros((3, 20), dtype)
    a[0, 7:] = -np.inf
    a[1, 3] = np.nan
    gradient = np.empty_like(a)
    sums, picked = _core.softmax(a, np.array([2, 0, 19]), None, 1.0, gradient)
    np.testing.assert_array_equal(gradient[0, 7:], 0)
    assert sums[0] == 7 and picked[0] == 0
    assert np.isnan(gradient[1]).all() and np.isnan(sums[1])
    assert np.isfinite(gradient[2]).all() and sums[2] == 20
    sums, picked = _core.softmax(a, np.array([9, 0, 19]), None, 1.0, None)
    assert picked[0] == -np.inf  # an infinite loss


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", (1, 15, 64, 129, 1000))
def test_scatter_adds_to_the_rows_named(width: int, dtype: str, threads: int) -> None:
    draw = np.random.default_rng(4)
    rows = draw.integers(0, 7, 300)
    values = draw.integers(-9, 9, (300, width)).astype(dtype)  # whole numbers: any order gives the same sums
    table = draw.integers(-9, 9, (7, width)).astype(dtype)
    expected = table.copy()
    np.add.at(expected, rows, values)
    _core.scatter(table, rows, values)
    np.testing.assert_array_equal(table, expected)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", (1, 37, 100_003))
def test_adam_is_its_equations_bit_for_bit(size: int, dtype: str, threads: int) -> None:
    draw = np.random.default_rng(5)
    p, g, m = (draw.standard_normal(size).astype(dtype) for _ in range(3))
    v = draw.random(size).astype(dtype)
    number = np.dtype(dtype).type
    rate, beta_1, beta_2, eps, decay, kept = 0.003, 0.9, 0.999, 1e-8, 0.01, 0.99
    full = g + p * number(decay)
    mean = m + (full - m) * number(1 - beta_1)
    square = v + (full * full - v) * number(1 - beta_2)
    expected = p * number(kept) - mean / (np.sqrt(square) + number(eps)) * number(rate)
    _core.adam(p, g, m, v, rate, beta_1, beta_2, eps, decay, kept)
    for one, other in ((p, expected), (m, mean), (v, square)):
        np.testing.assert_array_equal(one, other)


ONE, TWO = np.ones((2, 3), np.float32), np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: _core.softmax(ONE, np.array([0, 3]), None, 1.0, None), r"targets must lie in \[0, 3\)"),
        (lambda: _core.softmax(ONE, np.array([0, 1]), np.ones(3), 1.0, None), "a target and a weight for every row"),
        (lambda: _core.softmax(ONE, np.array([0, 1]), None, 1.0, TWO), "contiguous arrays of one dtype"),
        (lambda: _core.scatter(ONE, np.array([2]), ONE[:1]), "rows must lie in the table"),
        (lambda: _core.scatter(ONE, np.array([0]), ONE), "a contiguous row of values for each"),
        (lambda: _core.adam(ONE, ONE, ONE[:1], ONE, 1, 0, 0, 0, 0, 1), "with 6 numbers each"),
    ),
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
