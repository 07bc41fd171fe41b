"""What can be wrong is said clearly, or is right: shapes, dtypes, lengths, order of calls, views, read-only arrays."""

import pickle
import re
from typing import Any

import numpy as np
import pytest
import rnnfast
from problems import Problem, arrays, map_floats, results
from rnnfast import functional, reference

CELLS = list(reference.CELLS)
RNG = np.random.default_rng(0)


def zeros(*shape: int, dtype: str = "float32") -> Any:
    return np.zeros(shape, dtype)


# ---- Shapes and dtypes -----------------------------------------------------------------------------------------------

LSTM = {  # I = 3, H = 5
    "weight_ih_l0": zeros(20, 3),
    "weight_hh_l0": zeros(20, 5),
    "bias_ih_l0": zeros(20),
    "bias_hh_l0": zeros(20),
}
X = zeros(4, 2, 3)  # T = 4, B = 2


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight_hh_l0", (20, 4), "lstm: weight_hh_l0 must have shape (4*H, H) = (20, 5), got (20, 4)"),
        ("weight_hh_l0", (20, 5, 1), "lstm: weight_hh_l0 must have shape (4*H, H) = (20, 5), got (20, 5, 1)"),
        ("weight_ih_l0", (20, 4), "lstm: weight_ih_l0 must have shape (4*H, I) = (20, 3), got (20, 4)"),
        ("bias_ih_l0", (5,), "lstm: bias_ih_l0 must have shape (4*H,) = (20,), got (5,)"),
        ("bias_hh_l0", (20, 1), "lstm: bias_hh_l0 must have shape (4*H,) = (20,), got (20, 1)"),
    ],
)
def test_parameter_of_a_wrong_shape(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.forward("lstm", X, None, LSTM | {name: zeros(*shape)})


def test_a_bias_of_no_projection() -> None:
    with pytest.raises(ValueError, match="bias_hr_l0 goes with a projection, weight_hr"):
        functional.forward("lstm", X, None, LSTM | {"bias_hr_l0": zeros(5)})


def test_shape_in_the_message_is_the_users() -> None:
    params = {"weight_ih_l0": zeros(1024, 256), "weight_hh_l0": zeros(1024, 128)}
    message = "lstm: weight_hh_l0 must have shape (4*H, H) = (1024, 256), got (1024, 128)"
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.forward("lstm", zeros(1, 1, 256), None, params)


@pytest.mark.parametrize(
    ("cell", "name", "shape"),
    [
        ("lstm_peephole", "weight_peep_l0", (3, 4)),
        ("lstm", "weight_hr_l0", (2, 4)),
        ("lstm", "h_0", (1, 1, 4)),
        ("lstm", "c_0", (2, 1, 5)),
    ],
)
def test_optional_parameter_of_a_wrong_shape(cell: str, name: str, shape: tuple[int, ...]) -> None:
    params = LSTM | {"weight_peep_l0": zeros(3, 5)} if cell == "lstm_peephole" else LSTM
    with pytest.raises(ValueError, match="weight_h[hr]_l0" if name == "weight_hr_l0" else name):  # R is in both
        functional.forward(cell, X, None, params | {name: zeros(*shape)})


@pytest.mark.parametrize("missing", ["weight_ih_l0", "weight_hh_l0"])
def test_missing_parameter(missing: str) -> None:
    params = {name: value for name, value in LSTM.items() if name != missing}
    with pytest.raises((KeyError, ValueError), match=missing):
        functional.forward("lstm", X, None, params)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_parameters_of_another_dtype(dtype: str) -> None:
    with pytest.raises((TypeError, ValueError), match="dtype"):
        functional.forward("lstm", X, None, map_floats(lambda value: value.astype(dtype), LSTM))


@pytest.mark.parametrize("dtype", ["float16", "int64", "complex64"])
def test_input_of_no_supported_dtype(dtype: str) -> None:
    with pytest.raises((TypeError, ValueError), match="dtype"):
        functional.forward("lstm", X.astype(dtype), None, LSTM)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 4), (4, 2, 3, 1), ()])
def test_input_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape .*, got "):
        functional.forward("lstm", zeros(*shape), None, LSTM)


@pytest.mark.parametrize(
    "state",
    [
        zeros(1, 2, 5),
        (zeros(1, 2, 5),),
        (zeros(1, 2, 5), zeros(1, 3, 5)),
        (zeros(2, 5), zeros(2, 5)),
        (zeros(2, 2, 5), zeros(2, 2, 5)),
    ],
    ids=["no pair", "half a pair", "another batch", "no layers", "two layers"],
)
def test_state_of_a_wrong_shape(state: Any) -> None:
    with pytest.raises(ValueError, match=r"must have shape|pair"):
        functional.forward("lstm", X, state, LSTM)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3), (3, 2, 5)])
def test_output_gradient_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    _, _, tape = functional.forward("lstm", X, None, LSTM)
    with pytest.raises(ValueError, match=r"dy must have shape .* got "):
        functional.backward(tape, zeros(*shape))


def test_resets_with_output_taps_check_what_they_are_given() -> None:
    """All of it, though such a call is run in parts."""
    params = {"weight_ih_l0": zeros(5, 3), "weight_hh_l0": zeros(5, 10)}
    reset = np.array([[False, False], [False, False], [True, False], [False, False]])
    with pytest.raises(ValueError, match=r"state h must have shape .* = \(1, 2, 10\), got \(1, 1, 10\)"):
        functional.forward("rnn_tanh", X, zeros(1, 1, 10), params, reset=reset, output_taps=2)
    _, _, tape = functional.forward("rnn_tanh", X, None, params, reset=reset, output_taps=2)
    with pytest.raises(ValueError, match=r"dy must have shape .* = \(4, 2, 5\), got \(5, 2, 5\)"):
        functional.backward(tape, zeros(5, 2, 5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [(zeros(4, 2, 1), r"shape .* = \(4, 2, 5\), got \(4, 2, 1\)"), (zeros(4, 2, 5, dtype="float64"), "dtype float32, got float64")],
    ids=["shape", "dtype"],
)
def test_dropout_mask_of_a_wrong_kind(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"lstm: dropout_masks\[0\] must have " + message):
        functional.forward("lstm", X, None, rnnfast.LSTM(3, 5, 2).parameters(), num_layers=2, dropout_masks=[mask])


def test_gradients_of_a_wrong_shape() -> None:
    _, _, tape = functional.forward("lstm", X, None, LSTM)
    gradients = {name: np.zeros_like(value) for name, value in LSTM.items()}
    with pytest.raises(ValueError, match="weight_hh_l0"):
        functional.backward(tape, zeros(4, 2, 5), None, gradients | {"weight_hh_l0": zeros(20, 4)})


@pytest.mark.parametrize(
    ("reset", "error"),
    [
        (np.zeros((4, 3), np.bool_), ValueError),
        (np.zeros(4, np.bool_), ValueError),
        (zeros(4, 2), (TypeError, ValueError)),
    ],
    ids=["another batch", "no batch", "floats"],
)
def test_reset_of_a_wrong_kind(reset: Any, error: Any) -> None:
    with pytest.raises(error, match="reset"):
        functional.forward("lstm", X, None, LSTM, reset=reset)


# ---- Lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [np.array([4.0, 2.0]), [4.0, 2.0]], ids=["array", "list"])
def test_float_lengths(lengths: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="lengths"):
        functional.forward("lstm", X, None, LSTM, lengths=lengths)


@pytest.mark.parametrize(
    "lengths",
    [np.array([4, 5]), np.array([-1, 4]), np.array([4]), np.array([[4, 4]])],
    ids=["late", "early", "few", "2-D"],
)
def test_lengths_out_of_range(lengths: Any) -> None:
    with pytest.raises(ValueError, match="lengths"):
        functional.forward("lstm", X, None, LSTM, lengths=lengths)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_lengths_of_any_integer_dtype(dtype: str) -> None:
    a = arrays(Problem("gru", lengths="ragged"), "float32")
    lengths = a.options["lengths"].astype(dtype)
    expected = results(functional, "gru", a)
    found = results(functional, "gru", a._replace(options=a.options | {"lengths": lengths}))
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of rnn_tanh.*got '?mlp"):
        functional.forward("mlp", X, None, LSTM)


def test_reset_before_gru_takes_no_projection() -> None:
    params = {"weight_ih_l0": zeros(15, 3), "weight_hh_l0": zeros(15, 2), "weight_hr_l0": zeros(2, 5)}
    with pytest.raises(ValueError, match="gru_reset_before"):
        functional.forward("gru_reset_before", X, None, params)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_output_taps_take_one_layer_in_one_direction(options: dict[str, Any]) -> None:
    params = arrays(Problem("rnn_tanh", layers=2, directions=2), "float32").params
    with pytest.raises(ValueError, match="output_taps"):
        functional.forward("rnn_tanh", zeros(2, 2, 6), None, params, output_taps=2, **options)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.startswith("lstm")])
def test_cell_states_of_a_cell_without(cell: str) -> None:
    a = arrays(Problem(cell), "float32")
    with pytest.raises(ValueError, match="cell"):
        functional.forward(cell, a.x, None, a.params, cells=True)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be one of"):
        rnnfast.use_target("z80")


@pytest.mark.parametrize("n", [0, -1])
def test_no_threads(n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        rnnfast.set_num_threads(n)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4, -1)], ids=["no input", "no unit", "less input", "less units"])
def test_layer_of_no_size(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="_size"):
        rnnfast.LSTM(*sizes)


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 0}, {"dropout": -0.1}, {"dropout": 1.5}, {"proj_size": 5}, {"proj_size": -1}, {"dtype": "float16"}],
    ids=str,
)
def test_layer_of_a_nonsense_option(options: dict[str, Any]) -> None:
    """proj_size must be smaller than hidden_size, as in torch."""
    with pytest.raises(ValueError, match=next(iter(options))):
        rnnfast.LSTM(4, 5, **options)


# ---- The order of calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [rnnfast.LSTM(3, 5), rnnfast.GRU(3, 5), rnnfast.RNN(3, 5)], ids=["LSTM", "GRU", "RNN"])
def test_backward_without_a_forward(layer: Any) -> None:
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(zeros(4, 2, 5))


def test_one_backward_for_each_forward() -> None:
    """The latest first; a third one has none left."""
    layer = rnnfast.RNN(3, 5, seed=0)
    x = RNG.normal(size=(2, 4, 2, 3)).astype("float32")
    dy = RNG.normal(size=(4, 2, 5)).astype("float32")
    expected = []
    for part in x:
        layer(part)
        expected.append(layer.backward(dy)[0])
    for part in x:
        layer(part)
    assert layer.backward(dy)[0].tobytes() == expected[1].tobytes()
    assert layer.backward(dy)[0].tobytes() == expected[0].tobytes()
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(dy)


def test_backward_after_zero_gradients() -> None:
    """Which drops the tapes that nobody asked for."""
    layer = rnnfast.GRU(3, 5)
    layer(X)
    layer.zero_gradients()
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(zeros(4, 2, 5))


def test_evaluation_keeps_no_tape() -> None:
    layer = rnnfast.LSTM(3, 5)
    layer.eval()
    layer(X)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(zeros(4, 2, 5))


def test_output_is_read_only_while_a_tape_holds_it() -> None:
    layer = rnnfast.LSTM(3, 5)
    y, _ = layer(X)
    with pytest.raises(ValueError, match="read-only"):
        y[0] = 1


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_parameters_are_read_only_in_evaluation(name: str) -> None:
    layer = rnnfast.LSTM(3, 5)
    layer.eval()
    with pytest.raises(ValueError, match="read-only"):
        layer.parameters()[name][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        layer.flat[0] = 1
    layer.train()
    layer.parameters()[name][0] = 1
    assert (layer.state_dict()[name][0] == 1).all()


def test_bidirectional_stream() -> None:
    """The reverse direction starts at an end that a stream does not have."""
    with pytest.raises(ValueError, match="bidirectional"):
        rnnfast.LSTM(3, 5, bidirectional=True).stream()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 4), (1, 1, 3)])
def test_stream_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        rnnfast.LSTM(3, 5).stream()(zeros(*shape))


def test_stream_of_rows_that_no_stride_reaches() -> None:
    records = np.zeros(2, [("x", "f4", 3), ("flag", "u1")])
    with pytest.raises(ValueError, match="strides that are multiples of its item size"):
        rnnfast.LSTM(3, 5).stream(batch=2)(records["x"])


@pytest.mark.parametrize("mask", [[0, 1], np.array([True]), [1.0, 0.0], True, [[True, False]]])
def test_stream_reset_by_what_is_no_mask(mask: Any) -> None:
    stream = rnnfast.LSTM(3, 5).stream(batch=2)
    stream(zeros(2, 3) + 1)
    before = stream.state[0]
    with pytest.raises(ValueError, match=re.escape("mask must be bool of shape (B,) = (2,)")):
        stream.reset(mask)
    np.testing.assert_array_equal(stream.state[0], before)
    stream.reset([True, False])
    assert not stream.state[0][0, 0].any() and stream.state[0][0, 1].any()


# ---- Views, read-only arrays, other libraries' arrays ----------------------------------------------------------------


def read_only(array: Any) -> Any:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def test_read_only_arrays_are_read() -> None:
    a = arrays(Problem("lstm", layers=2, directions=2, lengths="ragged", reset=True, state="given and learned"), "float32")
    expected = results(functional, "lstm", a)
    found = results(functional, "lstm", map_floats(read_only, a))
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_read_only_gradients_are_not_written() -> None:
    _, _, tape = functional.forward("lstm", X, None, LSTM)
    gradients = {name: read_only(value) for name, value in LSTM.items()}
    with pytest.raises(ValueError, match=r"writ|read-only"):
        functional.backward(tape, np.ones((4, 2, 5), "float32"), None, gradients)
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_learned_states_gradients_stand_where_another_is_refused() -> None:
    params = LSTM | {"h_0": zeros(1, 1, 5), "c_0": zeros(1, 1, 5)}
    _, _, tape = functional.forward("lstm", X, None, params)
    gradients = {name: np.ones_like(value) for name, value in params.items()}
    with pytest.raises(ValueError, match="gradient of weight_hh_l0"):
        functional.backward(tape, zeros(4, 2, 5), None, gradients | {"weight_hh_l0": read_only(LSTM["weight_hh_l0"])}, accumulate=False)
    assert all((gradient == 1).all() for gradient in gradients.values())


def reversed_in_memory(array: Any) -> Any:
    """Equal, with the last axis running backwards in memory."""
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


@pytest.mark.parametrize("strange", [reversed_in_memory, np.asfortranarray], ids=["backwards", "Fortran"])
@pytest.mark.parametrize("what", ["x", "params", "dy"])
def test_scattered_last_axis(what: str, strange: Any) -> None:
    """Is refused, for no big array is copied in silence."""
    a = arrays(Problem("lstm", state="given"), "float32")
    with pytest.raises(ValueError, match="contiguous"):
        results(functional, "lstm", a._replace(**{what: map_floats(strange, getattr(a, what))}))


def test_arrays_of_other_libraries() -> None:
    torch = pytest.importorskip("torch")
    layer = rnnfast.GRU(3, 5, seed=0).eval()
    x = RNG.normal(size=(4, 2, 3)).astype("float32")
    expected, _ = layer(x)
    for other in (torch.from_numpy(x), memoryview(x)):
        assert layer(other)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("layer", [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN])
def test_layer_and_arrays_that_were_pickled(layer: Any) -> None:
    net, x = layer(3, 5, seed=0), zeros(4, 2, 3)
    again, x_again = pickle.loads(pickle.dumps((net, x)))
    y, state = again(x_again)
    assert y.tobytes() == net(x)[0].tobytes()
    again.backward(y, state)
    assert again.eval().stream(batch=2)(x_again[0]).tobytes() == y[0].tobytes()


def test_debug_mode_sees_that_x_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_DEBUG", True)
    layer, x = rnnfast.LSTM(3, 5), zeros(4, 2, 3)
    y, _ = layer(x)
    layer.backward(y)
    y, _ = layer(x)
    x[0] = 1
    with pytest.raises(RuntimeError, match="x has changed between forward and backward"):
        layer.backward(y)


@pytest.mark.parametrize("name", ["x", *LSTM])
def test_array_that_was_resized_is_not_read(name: str) -> None:
    """Where numpy gives an array other memory after all, the tape would read what is no longer its own."""
    held = {"x": X.copy()} | {key: value.copy() for key, value in LSTM.items()}
    params = {key: held[key] for key in LSTM}
    _, _, tape = functional.forward("lstm", held["x"], None, params)
    with pytest.raises(ValueError, match="resize"):
        held[name].resize(0)
    held[name].resize((1000, *held[name].shape[1:]), refcheck=False)
    with pytest.raises(ValueError, match="resized between forward and backward"):
        functional.backward(tape, zeros(1000, 2, 5) if name == "x" else zeros(4, 2, 5))


def test_batch_sizes_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"^lstm: batch_sizes must be whole numbers \(int64\), got dtype float64$"):
        functional.forward("lstm", zeros(8, 3), None, LSTM, batch_sizes=[4.9, 4.0])


def test_tape_keeps_the_arrays_that_it_reads() -> None:
    """Other arrays under their names are nothing to it."""
    a = arrays(Problem("lstm", layers=2, directions=2, lengths="ragged", reset=True, state="given"), "float32")
    expected = results(functional, "lstm", a)
    params = {name: value.copy() for name, value in a.params.items()}
    tape = functional.forward("lstm", a.x, a.state, params, **a.options)[2]
    for name, value in params.items():
        params[name] = np.full_like(value, np.nan)
    dx, _, gradients = functional.backward(tape, a.dy, a.dstate)
    assert dx.tobytes() == expected["dx"].tobytes()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


# ---- Nothing to do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "B"), [(0, 2), (4, 0), (0, 0)])
@pytest.mark.parametrize("layer", [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN])
def test_no_time_and_no_batch(layer: Any, T: int, B: int) -> None:
    net = layer(3, 5, num_layers=2, bidirectional=True)
    y, state = net(zeros(T, B, 3))
    assert y.shape == (T, B, 10)
    dx, dstate = net.backward(y, state)
    assert dx.shape == (T, B, 3)
    assert type(dstate) is type(state)
    assert all((gradient == 0).all() for gradient in net.gradients().values())


def test_no_row_has_any_step() -> None:
    """All lengths 0: the state comes back as it went in, and so does its gradient."""
    a = arrays(Problem("lstm", layers=2, directions=2, state="given"), "float32")
    found = results(functional, "lstm", a._replace(options=a.options | {"lengths": np.zeros(a.x.shape[1], np.int64)}))
    assert (found["y"] == 0).all()
    assert (found["dx"] == 0).all()
    for name, given, dgiven in zip("hc", a.state, a.dstate, strict=True):
        assert found[name].tobytes() == given.tobytes()
        assert found["d" + name].tobytes() == dgiven.tobytes()
