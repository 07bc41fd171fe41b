"""The kernels against the oracle: every cell, dtype, option, awkward shape and CPU target; outputs and gradients."""

from dataclasses import replace
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
    """Also where e^x leaves the numbers' range on either side."""
    info = np.finfo(dtype)
    edges = [np.log(float(info.max)), -np.log(float(info.tiny)), -np.log(float(info.smallest_subnormal))]
    x = np.concatenate([sign * np.linspace(edge - 3, edge + 3, 20001) for edge in edges for sign in (-1, 1)]).astype(dtype)
    one = {"weight_ih_l0": np.ones((1, 1), dtype), "weight_hh_l0": np.zeros((1, 1), dtype)}
    y = functional.forward(cell, np.sort(x)[None, :, None], None, one)[0].ravel()
    assert y[0] == (-1 if cell == "rnn_tanh" else 0)
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


OVERWRITTEN = {
    "everything": Problem("lstm_peephole", layers=2, directions=2, lengths="ragged", reset=True, state="learned"),
    "a GRU's late gate": Problem("gru_reset_before", layers=2, state="learned"),
    "projected": Problem("gru", projection="biased", lengths="ragged", state="learned"),
    "many chunks": Problem("lstm", "long and wide", lengths="ragged"),
    "in parts": Problem("rnn_tanh", taps=3, reset=True, state="learned"),
    "no token": Problem("lstm", "no time", layers=2, state="learned"),
    "no row": Problem("lstm", "no batch", layers=2, directions=2, state="learned"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OVERWRITTEN)
def test_gradients_overwrite(name: str, dtype: str, target: str) -> None:
    """What was there is never read: NaN leaves no trace."""
    a = arrays(OVERWRITTEN[name], dtype)
    _, _, tape, *_ = functional.forward(OVERWRITTEN[name].cell, a.x, a.state, a.params, **a.options)
    zeros = {name: np.zeros_like(value) for name, value in a.params.items()}
    functional.backward(tape, a.dy, a.dstate, zeros)
    nans = {name: np.full_like(value, np.nan) for name, value in a.params.items()}
    _, _, found = functional.backward(tape, a.dy, a.dstate, nans, accumulate=False)
    assert found is nans
    assert_same(found, zeros)
    assert_same(functional.backward(tape, a.dy, a.dstate)[2], zeros)


@pytest.mark.parametrize("name", ["everything", "in parts"])
def test_a_refused_backward_overwrites_nothing(name: str) -> None:
    a = arrays(OVERWRITTEN[name], "float32")
    _, _, tape, *_ = functional.forward(OVERWRITTEN[name].cell, a.x, a.state, a.params, **a.options)
    ones = {name: np.ones_like(value) for name, value in a.params.items()}
    with pytest.raises(ValueError, match="dy must have shape"):
        functional.backward(tape, a.dy[..., :-1], a.dstate, ones, accumulate=False)
    lacking = {name: value for name, value in ones.items() if not name.startswith("weight_hh")}
    with pytest.raises(KeyError, match="gradients lacks 'weight_hh"):
        functional.backward(tape, a.dy, a.dstate, lacking, accumulate=False)
    assert all((value == 1).all() for value in ones.values())


@pytest.mark.parametrize("bad", ["dtype", "order", "read-only"])
def test_a_refused_gradient_of_the_first_layer_touches_no_other(bad: str) -> None:
    """The layers above it come first in backward."""
    a = arrays(Problem("lstm", layers=3), "float32")
    _, _, tape, *_ = functional.forward("lstm", a.x, a.state, a.params, **a.options)
    ones = {name: np.ones_like(value) for name, value in a.params.items()}
    value = ones["weight_ih_l0"]
    ones["weight_ih_l0"] = value.astype("float64") if bad == "dtype" else np.asfortranarray(value) if bad == "order" else value
    value.flags.writeable = False
    with pytest.raises(ValueError, match="gradient of weight_ih_l0 must be a writeable, C-contiguous array of dtype float32"):
        functional.backward(tape, a.dy, a.dstate, ones)
    assert all((value == 1).all() for value in ones.values())


def test_gradients_that_no_cache_holds_may_lie_anywhere() -> None:
    """They are written by instructions that want aligned registers; NumPy's arrays need not even be aligned to their items."""
    H = 2100
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((H, H), np.float32) / 50 for name in ("weight_ih_l0", "weight_hh_l0")}
    x, dy = rng.standard_normal((2, 1, 2, H), np.float32)
    _, _, tape = functional.forward("rnn_tanh", x, None, params)
    expected = functional.backward(tape, dy, None, {name: np.zeros_like(value) for name, value in params.items()})[2]
    for offset in (0, 1, 4):
        anywhere = {name: np.frombuffer(bytearray(4 * H * H + 8), np.float32, H * H, offset).reshape(H, H) for name in params}
        assert_same(functional.backward(tape, dy, None, anywhere, accumulate=False)[2], expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_overwrite_though_the_last_steps_have_no_row(reverse: bool, target: str) -> None:
    """The first chunk of time that backward comes to has no token."""
    rng = np.random.default_rng(0)
    suffixes = ("", "_reverse")[: 1 + reverse]
    params = {f"{name}_l0{s}": rng.standard_normal((5, n)) for s in suffixes for name, n in (("weight_ih", 3), ("weight_hh", 5))}
    x, lengths = rng.standard_normal((900, 2, 3)), np.array([100, 300])
    y, _, tape = functional.forward("rnn_tanh", x, None, params, bidirectional=reverse, lengths=lengths)
    found = functional.backward(tape, np.ones_like(y))[2]
    shorter, _, tape = functional.forward("rnn_tanh", x[:300], None, params, bidirectional=reverse, lengths=lengths)
    expected = functional.backward(tape, np.ones_like(shorter))[2]
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("B", [1, 7, 40])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_one_step_equals_the_first_of_two(cell: str, B: int, compute_dtype: str, target: str) -> None:
    """One step reads the weights once and in blocks, two read packs of them: wider than a block, and not a multiple of one."""
    dtype, I, H = "float64" if compute_dtype == "float64" else "float32", 1067, 37
    gates = {"lstm": 4, "gru": 3, "gru_": 3, "rnn_": 1}[cell[:4]]
    rng = np.random.default_rng(B)
    params = {
        f"{name}_l0": rng.standard_normal((gates * H, width)[: 1 + (width > 1)]).astype(dtype) / 16
        for name, width in {"weight_ih": I, "weight_hh": H, "bias_ih": 1, "bias_hh": 1}.items()
    }
    x, dy = rng.standard_normal((2, B, I)).astype(dtype), np.zeros((2, B, H), dtype)
    dy[0] = rng.standard_normal((B, H))
    y, _, tape = functional.forward(cell, x, None, params, compute_dtype=compute_dtype)
    dx, _, gradients = functional.backward(tape, dy)
    y_1, _, tape_1 = functional.forward(cell, x[:1], None, params, compute_dtype=compute_dtype)
    dx_1, _, gradients_1 = functional.backward(tape_1, dy[:1])
    assert dx is not None and dx_1 is not None
    assert y_1[0].tobytes() == y[0].tobytes()
    assert np.array_equal(dx_1[0], dx[0])
    for name in params:
        assert np.array_equal(gradients_1[name], gradients[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_dx_on_request_alone(cell: str, target: str) -> None:
    a = arrays(Problem(cell, layers=2, directions=2, lengths="ragged"), "float32")
    _, _, tape, *_ = functional.forward(cell, a.x, a.state, a.params, **a.options)
    _, _, expected = functional.backward(tape, a.dy, a.dstate)
    dx, _, found = functional.backward(tape, a.dy, a.dstate, need_dx=False)
    assert dx is None
    assert_same(found, expected)


@pytest.mark.parametrize("name", [*OVERWRITTEN, "one step"])
@pytest.mark.parametrize("state", ["zero", "given", "learned"])
def test_dstate_on_request_alone(name: str, state: str, target: str) -> None:
    problem = replace(OVERWRITTEN.get(name, Problem("gru", "one step", layers=2, directions=2)), state=state)
    a = arrays(problem, "float32")
    _, _, tape, *_ = functional.forward(problem.cell, a.x, a.state, a.params, **a.options)
    expected = functional.backward(tape, a.dy, a.dstate)
    dx, dstate, found = functional.backward(tape, a.dy, a.dstate, need_dstate=False)
    assert dstate is None
    assert_same({"dx": dx, **found}, {"dx": expected[0], **expected[2]})


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


@pytest.mark.parametrize("T, B", [(6, 2), (1, 1), (0, 2), (3, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("cell", functional.CELLS)
def test_a_plain_call_gives_the_bits_of_the_long_way(cell: str, projected: bool, dtype: type, T: int, B: int) -> None:
    """One layer from no state goes to the kernels straight; naming the threads takes the way through Python's checks."""
    if projected and cell == "gru_reset_before":
        pytest.skip("takes no projection")
    rng = np.random.default_rng(3)
    G, H, I, R = {"lstm": 4, "gru": 3}.get(cell.split("_")[0], 1), 5, 4, 3 if projected else 5
    shapes: dict[str, tuple[int, ...]] = {"weight_ih_l0": (G * H, I), "weight_hh_l0": (G * H, R), "bias_ih_l0": (G * H,), "bias_hh_l0": (G * H,)}
    shapes |= {"weight_peep_l0": (3, H)} if cell == "lstm_peephole" else {}
    shapes |= {"weight_hr_l0": (R, H)} if projected else {}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    x, dy = rng.standard_normal((B, T, I)).astype(dtype).swapaxes(0, 1), rng.standard_normal((T, B, R)).astype(dtype)
    ways = []
    for threads in (None, functional._core.get_num_threads()):
        y, state, tape = functional.forward(cell, x, None, params, threads=threads)
        assert tape.plain == (threads is None and not functional._DEBUG) and not y.flags.writeable
        gradients = {name: np.ones_like(value) for name, value in params.items()}
        dx, dstate, _ = functional.backward(tape, dy, None, gradients, need_dstate=False)
        assert dstate is None
        written = {name: np.ones_like(value) for name, value in params.items()}
        none, _, _ = functional.backward(tape, dy, None, written, accumulate=False, need_dx=False, need_dstate=False)
        assert none is None
        fresh = functional.backward(tape, dy, need_dstate=False)[2]
        dx_2, dstate, fresh_2 = functional.backward(tape, dy)
        assert np.array_equal(dx, dx_2)
        states = [s for pair in (state, dstate) for s in (pair if isinstance(pair, tuple) else (pair,))]
        ways.append([y, dx, *states, *gradients.values(), *written.values(), *fresh.values(), *fresh_2.values()])
        y, _, nothing = functional.forward(cell, x, None, params, tape=False, threads=threads)
        assert nothing is None and y.flags.writeable and np.array_equal(y, ways[-1][0])
        learned = gradients | {"h_0": np.zeros((1, 1, R), dtype)}  # collects what flows into the state that no one gave
        functional.backward(tape, dy, None, learned, need_dstate=False)
        h_gradient = dstate[0] if isinstance(dstate, tuple) else dstate
        assert np.array_equal(learned["h_0"], h_gradient.sum(axis=1, keepdims=True))
        before = {name: value.copy() for name, value in gradients.items()}
        for wrong, error, text in (
            ({"bias_hh_l0": np.zeros(2, dtype)}, ValueError, "gradient of bias_hh_l0 must have shape"),
            ({"bias_hh_l0": np.zeros(G * H, np.float16)}, ValueError, "gradient of bias_hh_l0 must .*dtype float"),
            ({"weight_hh_l0": None}, (KeyError, AttributeError), "weight_hh_l0|None"),
        ):
            with pytest.raises(error, match=text):
                functional.backward(tape, dy, None, gradients | wrong, need_dstate=False)  # type: ignore[operator]
        with pytest.raises(ValueError, match="dy must have shape"):
            functional.backward(tape, np.zeros((T, B + 1, R), dtype), None, gradients, need_dstate=False)
        with pytest.raises(KeyError, match="gradients lacks 'weight_hh_l0'"):
            functional.backward(tape, dy, None, {name: g for name, g in gradients.items() if name != "weight_hh_l0"}, need_dstate=False)
        assert all(np.array_equal(before[name], gradients[name]) for name in before)
        with pytest.raises(ValueError, match="weight_ih_l0 must have shape"):
            functional.forward(cell, x[..., :2], None, params, threads=threads)
    for a, b in zip(*ways, strict=True):
        assert np.array_equal(a, b)
    begun = params | {"h_0": np.ones((1, 1, R), dtype)}  # a state to start from is not plain
    assert not functional.forward(cell, x, None, begun)[2].plain
    assert y.size == 0 or not np.array_equal(functional.forward(cell, x, None, begun)[0], y)
