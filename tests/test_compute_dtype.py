"""compute_dtype: the oracle with both factors of every product rounded, the bitwise laws, and how far the rounding takes a result.

The oracle is `rnnfast.reference` itself, unchanged: it computes on an array type that rounds what it multiplies.
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import rnnfast
from problems import Problem, arrays, cast, error, layer_of, map_floats, named, results
from rnnfast import functional, reference
from shapes import Shape
from test_kernels import PROBLEMS

SOME = [problem for problem in PROBLEMS if problem.dims.T * problem.dims.B > 0][::3]
CELLS = list(reference.CELLS)


def to_bfloat16(array: Any) -> Any:
    """The upper half of a float32, to nearest and ties to even."""
    array = np.asarray(array)
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(array.dtype)


def to_int8(array: Any, axis: int) -> Any:
    """Whole numbers from -127 to 127 times a scale for each row (axis -1) or column (-2)."""
    array = np.asarray(array)
    scale = np.abs(array).max(axis=axis, keepdims=True, initial=0) / 127
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, np.rint(array / scale), 0) * scale


class Rounds(np.ndarray[Any, Any]):
    """An array whose products round both factors to bfloat16."""

    @staticmethod
    def factors(a: Any, b: Any) -> tuple[Any, Any]:
        return to_bfloat16(a), to_bfloat16(b)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: tuple[Any, ...] = (), **options: Any) -> Any:
        given = [np.asarray(value) for value in inputs]
        if ufunc is np.matmul:
            given = list(self.factors(*given))
        if out:
            options["out"] = tuple(np.asarray(value) for value in out)
        result = getattr(ufunc, method)(*given, **options)
        return out[0] if out else np.asarray(result).view(type(self))

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        result = super().__array_function__(function, types, arguments, options)
        return map_floats(lambda array: array.view(type(self)), result)


class RoundsToBytes(Rounds):
    """The same to int8: a row of the left factor and a column of the right one have a scale each."""

    @staticmethod
    def factors(a: Any, b: Any) -> tuple[Any, Any]:
        return to_int8(a, -1), to_int8(b, -2)


def oracle(cell: str, a: Any) -> dict[str, Any]:
    tensordot = np.tensordot

    def rounding(a: Any, b: Any, axes: Any) -> Any:  # of arrays that are no longer Rounds
        return tensordot(*Rounds.factors(a, b), axes=axes)

    with mock.patch.object(np, "tensordot", rounding):
        found = results(reference, cell, map_floats(lambda array: array.copy().view(Rounds), a))
    return {name: np.asarray(array) for name, array in found.items()}


class Bfloat16:
    """`functional`, in bfloat16."""

    @staticmethod
    def forward(*arguments: Any, **options: Any) -> Any:
        return functional.forward(*arguments, **options, compute_dtype="bfloat16")

    backward = staticmethod(functional.backward)


@cache
def exact_and_allowed(problem: Problem) -> tuple[dict[str, Any], dict[str, float]]:
    """Results in float64, and how far those in float32 may be from them: twice as far as NumPy's are.

    A factor on the border between two bfloat16 falls to either side with the last bit of a float32, so NumPy tries again with every number
    moved by one rounding, and 1e-4 of the largest number is always allowed; without rounding the results are ten times as far off.
    """
    a = arrays(problem, "float32")
    rng = np.random.default_rng(0)
    exact = oracle(problem.cell, cast(a, np.float64))
    allowed = {name: 0.5e-4 * float(np.abs(array).max(initial=0)) for name, array in exact.items()}
    for _ in range(4):
        moved = map_floats(lambda array: (array * (1 + rng.choice([-(2.0**-23), 2.0**-23], array.shape))).astype(np.float32), a)
        for name, array in oracle(problem.cell, moved).items():
            allowed[name] = max(allowed[name], error(array, exact[name]))
    return exact, {name: 2 * value for name, value in allowed.items()}


@pytest.mark.parametrize("problem", SOME, ids=str)
def test_kernels_are_the_oracle_that_rounds(problem: Problem, target: str) -> None:
    exact, allowed = exact_and_allowed(problem)
    for name, found in results(Bfloat16, problem.cell, arrays(problem, "float32")).items():
        assert found.dtype == np.float32
        assert error(found, exact[name]) <= allowed[name], name


@pytest.mark.parametrize("cell", CELLS)
def test_rounding_costs_what_the_documentation_says(cell: str) -> None:
    """Up to 1 % of an output's and 5 % of a gradient's largest number (a ReLU's gradient jumps: 20 %), and it does round."""
    a = arrays(Problem(cell, Shape(40, 16, 64, 128, "as people train"), layers=2), "float32")
    exact = results(reference, cell, cast(a, np.float64))
    for name, found in results(Bfloat16, cell, a).items():
        share = error(found, exact[name]) / np.abs(exact[name]).max()
        assert 1e-5 < share <= (0.01 if name[0] != "d" else 0.2 if cell == "rnn_relu" else 0.05), name


@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_laws_hold(cell: str, target: str, set_num_threads: Callable[[int], None]) -> None:
    """One thread equals many, by rows and by units; a stream equals the batch; a row alone equals a row in a batch."""
    for dims in (Shape(6, 40, 33, 70, "rows"), Shape(6, 3, 40, 330, "units")):
        problem = Problem(cell, dims, layers=2)
        a = arrays(problem, "float32")
        set_num_threads(1)
        alone = results(Bfloat16, cell, a)
        set_num_threads(3)
        for name, array in results(Bfloat16, cell, a).items():
            assert array.tobytes() == alone[name].tobytes(), name
        layer = layer_of(problem, "float32", a.params, compute_dtype="bfloat16").eval()
        y = layer(a.x)[0]
        assert y.tobytes() == alone["y"].tobytes()
        stream = layer.stream(batch=a.x.shape[1])
        assert np.stack([stream(step) for step in a.x]).tobytes() == y.tobytes()
        assert layer(np.ascontiguousarray(a.x[:, 1:2]))[0].tobytes() == y[:, 1:2].tobytes()


def test_extremes(target: str) -> None:
    """NaN and infinity go through, the largest float32 rounds to infinity, and what is too small for a float32's product is 0."""
    one = {"weight_ih_l0": np.ones((1, 1), np.float32), "weight_hh_l0": np.zeros((1, 1), np.float32)}
    x = np.array([np.nan, np.inf, -np.inf, np.finfo(np.float32).max, 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 3 * 2.0**-8], np.float32)
    y = functional.forward("rnn_identity", x[None, :, None], None, one, compute_dtype="bfloat16")[0].ravel()
    expected = np.array([np.nan, np.inf, -np.inf, np.inf, 1, 1 + 2.0**-7, 1 + 2.0**-6], np.float32)  # a tie goes to the even neighbour
    np.testing.assert_array_equal(y, expected)


def test_a_layer_learns(target: str) -> None:
    layer = rnnfast.GRU(3, 24, seed=0, compute_dtype="bfloat16")
    assert "compute_dtype=bfloat16" in repr(layer)
    x = np.random.default_rng(0).standard_normal((20, 8, 3)).astype(np.float32)
    goal = np.tanh(np.cumsum(x, axis=0)[..., :1]).repeat(24, axis=2)
    first = last = 0.0
    for _ in range(60):
        layer.zero_gradients()
        y, _ = layer(x)
        last = float(((y - goal) ** 2).mean())
        first = first or last
        layer.backward((y - goal) * np.float32(2 / y.size))
        for name, parameter in layer.parameters().items():
            parameter -= 5 * layer.gradients()[name]
    assert last < first / 2


def outputs(implementation: Any, cell: str, a: Any, **options: Any) -> dict[str, Any]:
    y, state, _, *c = implementation.forward(cell, a.x, a.state, a.params, **a.options, tape=False, **options)
    return {"y": np.asarray(y), **{name: np.asarray(part) for name, part in named(state).items()}, **({"every c": np.asarray(c[0])} if c else {})}


@pytest.mark.parametrize("problem", SOME, ids=str)
def test_int8_is_the_oracle_that_rounds(problem: Problem, target: str) -> None:
    """Within a hundredth of a scale's step, but where a number on the border between two bytes falls to the other side, as NumPy's do too."""
    a = arrays(problem, "float32")
    exact = outputs(reference, problem.cell, map_floats(lambda array: array.view(RoundsToBytes), cast(a, np.float64)))
    plain = outputs(reference, problem.cell, map_floats(lambda array: array.view(RoundsToBytes), a))
    for name, found in outputs(functional, problem.cell, a, compute_dtype="int8").items():
        allowed = max(2 * error(plain[name], exact[name]), 1e-4 * float(np.abs(exact[name]).max(initial=0)))
        assert error(found, exact[name]) <= allowed, name


@pytest.mark.parametrize("cell", CELLS)
def test_int8_costs_what_the_documentation_says(cell: str) -> None:
    a = arrays(Problem(cell, Shape(40, 16, 64, 128, "as people run it"), layers=2), "float32")
    exact = outputs(reference, cell, cast(a, np.float64))
    for name, found in outputs(functional, cell, a, compute_dtype="int8").items():
        assert 1e-4 < error(found, exact[name]) / np.abs(exact[name]).max() <= 0.03, name


@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_laws_hold_in_int8(cell: str, target: str, set_num_threads: Callable[[int], None]) -> None:
    for dims in (Shape(6, 40, 33, 70, "rows"), Shape(6, 3, 40, 330, "units")):
        problem = Problem(cell, dims, layers=2)
        a = arrays(problem, "float32")
        layer = layer_of(problem, "float32", a.params, compute_dtype="int8").eval()
        set_num_threads(1)
        y = layer(a.x)[0]
        set_num_threads(3)
        assert layer(a.x)[0].tobytes() == y.tobytes()
        assert functional.forward(cell, a.x, None, a.params, num_layers=2, tape=False, compute_dtype="int8")[0].tobytes() == y.tobytes()
        stream = layer.stream(batch=a.x.shape[1])
        assert np.stack([stream(step) for step in a.x]).tobytes() == y.tobytes()
        assert layer(np.ascontiguousarray(a.x[:, 1:2]))[0].tobytes() == y[:, 1:2].tobytes()


def test_int8_extremes(target: str) -> None:
    """What is not finite makes its row NaN and no other; zeros are zeros."""
    one = {"weight_ih_l0": np.ones((1, 2), np.float32), "weight_hh_l0": np.zeros((1, 1), np.float32)}
    x = np.array([[np.nan, 1], [np.inf, 1], [0, 0], [-127, 1], [1e-42, 0], [3e38, 0]], np.float32)
    y = functional.forward("rnn_identity", x[None], None, one, compute_dtype="int8", tape=False)[0].ravel()
    np.testing.assert_allclose(y, np.array([np.nan, np.nan, 0, -126, 0, 3e38]), rtol=1e-6)


def test_errors() -> None:
    layer = rnnfast.GRU(2, 3, compute_dtype="int8")
    with pytest.raises(ValueError, match=r"gru: compute_dtype int8 is for inference: it keeps no tape"):
        layer(np.zeros((4, 1, 2), np.float32))
    with pytest.raises(ValueError, match="GRU: compute_dtype must be bfloat16 or int8, with dtype float32, or None, got 'float16' with float32"):
        rnnfast.GRU(2, 3, compute_dtype="float16")
    with pytest.raises(ValueError, match="LSTM: compute_dtype must be bfloat16 or int8, with dtype float32, or None, got 'bfloat16' with float64"):
        rnnfast.LSTM(2, 3, dtype="float64", compute_dtype="bfloat16")
    a = arrays(Problem("gru"), "float64")
    with pytest.raises(ValueError, match="gru: compute_dtype must be the parameters' own dtype, or bfloat16 or int8"):
        functional.forward("gru", a.x, None, a.params, compute_dtype="bfloat16")
