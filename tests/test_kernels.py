"""The kernels against the oracle: every cell, dtype, option, awkward shape and CPU target; outputs and gradients."""

from typing import Any

import numpy as np
import pytest
from problems import WIDER, Arrays, Problem, arrays, inaccurate, map_floats, oracle, pairwise, results
from rnnfast import functional, reference
from shapes import SHAPES

DTYPES = list(WIDER)
CELLS = list(reference.CELLS)
PROBLEMS = pairwise(
    shape=list(SHAPES),
    cell=CELLS,
    layers=(1, 2, 3),
    directions=(1, 2),
    skip=(False, True),
    bias=(True, False),
    projection=("none", "plain", "biased"),
    taps=(1, 3),
    lengths=("full", "ragged"),
    reset=(False, True),
    dropout=(False, True),
    state=("zero", "given", "learned", "given and learned"),
)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes(), name


def test_cells_are_the_oracles() -> None:
    assert functional.CELLS == reference.CELLS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernels_are_as_accurate_as_numpy(problem: Problem, dtype: str, target: str) -> None:
    found = results(functional, problem.cell, arrays(problem, dtype))
    assert found.keys() == oracle(problem, dtype).exact.keys()
    assert inaccurate(found, problem, dtype) == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in ("rnn_relu", "rnn_identity")])
def test_saturated_gates_are_as_accurate_as_numpy(cell: str, scale: float, dtype: str, target: str) -> None:
    """The outputs. Of the gradients it is known that there are any: 1 - y² is all rounding error where y is nearly 1."""
    problem = Problem(cell, "8 lanes - 1", directions=2, state="given", scale=scale)
    found = results(functional, cell, arrays(problem, dtype))
    outputs = {name: array for name, array in found.items() if not name.startswith("d")}
    assert inaccurate(outputs, problem, dtype) == {}
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_sigmoid"])
def test_activations_are_as_accurate_as_numpy_everywhere(cell: str, dtype: str, target: str) -> None:
    """In units in the last place, from where the sigmoid is the smallest normal number to where all is saturated."""
    lowest = np.log(np.finfo(dtype).tiny) + 1
    x = np.concatenate((np.linspace(lowest, -lowest, 20001), np.geomspace(1e-30, 30, 10001), -np.geomspace(1e-30, 30, 10001)))
    one = {"weight_ih_l0": np.ones((1, 1), dtype), "weight_hh_l0": np.zeros((1, 1), dtype)}
    column = x.astype(dtype)[None, :, None]
    exact = reference.forward(cell, column.astype(WIDER[dtype]), None, {n: w.astype(WIDER[dtype]) for n, w in one.items()})[0]

    def ulps(implementation: Any) -> Any:
        y = implementation.forward(cell, column, None, one)[0]
        return (np.abs(y - exact) / np.spacing(np.abs(exact).astype(dtype))).max()

    assert ulps(functional) <= 2 * ulps(reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_sigmoid"])
def test_activations_rise_to_their_bounds(cell: str, dtype: str, target: str) -> None:
    """Also where e^x is on its way from the largest number to infinity."""
    info = np.finfo(dtype)
    edges = [np.log(float(info.max)), -np.log(float(info.tiny)), -np.log(float(info.smallest_subnormal))]
    x = np.concatenate([sign * np.linspace(edge - 3, edge + 3, 20001) for edge in edges for sign in (-1, 1)]).astype(dtype)
    one = {"weight_ih_l0": np.ones((1, 1), dtype), "weight_hh_l0": np.zeros((1, 1), dtype)}
    y = functional.forward(cell, np.sort(x)[None, :, None], None, one)[0].ravel()
    assert y[0] == (-1 if cell == "rnn_tanh" else 0) or y[0] < info.tiny
    assert y[-1] == 1
    assert (np.diff(y) >= -4 * np.spacing(np.abs(y[1:]))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_accumulate(cell: str, dtype: str, target: str) -> None:
    """Onto zeros they are the fresh ones, not a number remains none, and the arrays stay the same objects."""
    a = arrays(Problem(cell, layers=2, directions=2, state="learned"), dtype)
    _, _, tape, *_ = functional.forward(cell, a.x, a.state, a.params, **a.options)
    _, _, fresh = functional.backward(tape, a.dy, a.dstate)

    zeros = {name: np.zeros_like(value) for name, value in a.params.items()}
    _, _, found = functional.backward(tape, a.dy, a.dstate, zeros)
    assert found is zeros
    assert_same(zeros, fresh)

    nans = {name: np.full_like(value, np.nan) for name, value in a.params.items()}
    kept = dict(nans)
    functional.backward(tape, a.dy, a.dstate, nans)
    for name, array in nans.items():
        assert array is kept[name]
        assert np.isnan(array).all(), name


@pytest.mark.parametrize("cell", CELLS)
def test_dx_on_request_alone(cell: str, target: str) -> None:
    a = arrays(Problem(cell, layers=2, directions=2, lengths="ragged"), "float32")
    _, _, tape, *_ = functional.forward(cell, a.x, a.state, a.params, **a.options)
    _, _, expected = functional.backward(tape, a.dy, a.dstate)
    dx, _, found = functional.backward(tape, a.dy, a.dstate, need_dx=False)
    assert dx is None
    assert_same(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_inference_equals_training(cell: str, target: str) -> None:
    a = arrays(Problem(cell, layers=2, directions=2, lengths="ragged", reset=True, skip=True), "float32")
    y, state, tape, *c = functional.forward(cell, a.x, a.state, a.params, **a.options)
    found_y, found_state, no_tape, *found_c = functional.forward(cell, a.x, a.state, a.params, **a.options, tape=False)
    assert tape is not None
    assert no_tape is None
    for found, expected in zip((found_y, *found_state, *found_c), (y, *state, *c), strict=True):
        assert found.tobytes() == expected.tobytes()


def batch_first(array: Any) -> Any:
    """Equal, but a transposed view of a (B, T, ...) array."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


def every_other(array: Any) -> Any:
    """Equal, but a view of every second step of an array that is NaN elsewhere."""
    wide = np.full((2 * len(array), *array.shape[1:]), np.nan, array.dtype)
    wide[::2] = array
    return wide[::2]


@pytest.mark.parametrize("strided", [batch_first, every_other])
@pytest.mark.parametrize("cell", CELLS)
def test_strided_time_and_batch(cell: str, strided: Any, target: str) -> None:
    problem = Problem(cell, layers=2, directions=2, skip=True, lengths="ragged", dropout=True)
    a = arrays(problem, "float32")
    masks = [strided(mask) for mask in a.options["dropout_masks"]]
    view = a._replace(x=strided(a.x), dy=strided(a.dy), options=a.options | {"dropout_masks": masks})
    assert not view.x.flags.c_contiguous
    assert_same(results(functional, cell, view), results(functional, cell, a))


@pytest.mark.parametrize("cell", CELLS)
def test_arguments_are_not_written(cell: str, target: str) -> None:
    a = arrays(Problem(cell, layers=2, directions=2, lengths="ragged", reset=True, state="given and learned"), "float32")
    copy = map_floats(np.copy, a)
    results(functional, cell, a)
    seen: list[Any] = []
    map_floats(seen.append, a)
    map_floats(lambda array: np.testing.assert_array_equal(array, seen.pop(0)), copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row_and_after_its_step(cell: str, dtype: str, target: str) -> None:
    a = arrays(Problem(cell, "prime batch"), dtype)
    x = a.x.copy()
    x[2, 5, 1] = np.nan
    expected, *_ = functional.forward(cell, a.x, None, a.params)
    found, *_ = functional.forward(cell, x, None, a.params)
    assert np.isnan(found[2:, 5]).all()
    elsewhere = np.ones_like(found, np.bool_)
    elsewhere[2:, 5] = False
    assert found[elsewhere].tobytes() == expected[elsewhere].tobytes()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cell", CELLS)
def test_infinity_saturates(cell: str, sign: int, target: str) -> None:
    """As IEEE says: what the oracle makes of an infinite x, whether a bound, an infinity or not a number."""
    a = arrays(Problem(cell, "16 lanes + 1"), "float32")
    a.x[1, 2] = sign * np.inf
    params = {name: np.abs(value) for name, value in a.params.items()}
    with np.errstate(invalid="ignore"):
        expected, *_ = reference.forward(cell, a.x, None, params)
    found, *_ = functional.forward(cell, a.x, None, params)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))


def no_rows(cell: str, shape: str) -> Arrays:
    return arrays(Problem(cell, shape, layers=2, directions=2, skip=True, state="learned"), "float32")


@pytest.mark.parametrize("shape", ["no time", "no batch", "no time, no batch"])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do_leaves_no_gradient(cell: str, shape: str, target: str) -> None:
    found = results(functional, cell, no_rows(cell, shape))
    assert all((found["d" + name] == 0).all() for name in no_rows(cell, shape).params if name.endswith(("l0", "reverse")))
