"""Laws that no tolerance blurs: results equal bit by bit within a CPU target, and integer arithmetic that is exact.

With the identity as activation and small integers everywhere, the kernels compute in floating point what the oracle
computes in int64; so packing, tails, tiles, threads, lengths, resets, taps and layers are right or they are not.
"""

from collections.abc import Callable
from itertools import pairwise as neighbours
from typing import Any

import numpy as np
import pytest
import rnnfast
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Arrays, Problem, arrays, inaccurate, layer_of, map_floats, named, pairwise, results
from rnnfast import functional, reference
from shapes import Shape

CELLS = list(reference.CELLS)
DTYPES = ["float32", "float64"]

# Enough work for several threads, by rows and by units.
BUSY = {
    "many rows": Shape(12, 67, 20, 40, "a split of the batch leaves rows over"),
    "many units": Shape(6, 3, 33, 260, "a split of the units leaves units over"),
    "one step": Shape(1, 5, 130, 260, "weights are used once, as they stand: enough of them for many threads"),
    "few steps": Shape(3, 9, 30, 70, "packs for rows would cost more than they save"),
}


def options_of(cell: str, shape: str | Shape) -> list[Problem]:
    """A few problems for one cell, in which all options meet."""
    return pairwise(
        cell=[cell],
        shape=[shape],
        layers=(1, 2),
        directions=(1, 2),
        skip=(False, True),
        projection=("none", "biased"),
        taps=(1, 2),
        lengths=("full", "ragged"),
        reset=(False, True),
        state=("given", "learned"),
    )


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert found[name].tobytes() == expected[name].tobytes(), name


def equal(found: Any, expected: Any) -> bool:
    """Bit by bit, but for the sign of zero: a sum of nothing is +0, -0 added to it is gone."""
    return bool(found.dtype == expected.dtype and np.array_equal(found, expected))


# ---- Threads and repetition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BUSY)
@pytest.mark.parametrize("cell", CELLS)
def test_one_thread_equals_many(cell: str, shape: str, dtype: str, target: str, set_num_threads: Callable[[int], None]) -> None:
    for problem in options_of(cell, BUSY[shape]):
        a = arrays(problem, dtype)
        set_num_threads(1)
        alone = results(functional, cell, a)
        for count in (2, 5):
            set_num_threads(count)
            assert rnnfast.get_num_threads() == count
            assert_same(results(functional, cell, a), alone)


@pytest.mark.parametrize("cell", CELLS)
def test_run_equals_run(cell: str, target: str) -> None:
    """Also where the second run finds its memory full of something else."""
    problem = Problem(cell, BUSY["many rows"], layers=2, directions=2, lengths="ragged", reset=True)
    a = arrays(problem, "float32")
    once = results(functional, cell, a)
    nan = a._replace(x=np.full_like(a.x, np.nan), dy=np.full_like(a.dy, np.nan))
    results(functional, cell, nan)
    assert_same(results(functional, cell, a), once)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice_on_a_tape(cell: str, target: str) -> None:
    a = arrays(Problem(cell, layers=2, directions=2, lengths="ragged", reset=True, state="learned"), "float32")
    _, _, tape, *_ = functional.forward(cell, a.x, a.state, a.params, **a.options)
    runs = []
    for _ in range(2):
        dx, dstate, gradients = functional.backward(tape, a.dy, a.dstate)
        runs.append({"dx": dx, **named(dstate), **gradients})
    assert_same(*runs)


class Recomputing:
    """`functional`, with a short tape."""

    @staticmethod
    def forward(*arguments: Any, **options: Any) -> Any:
        return functional.forward(*arguments, **options, recompute=True)

    backward = staticmethod(functional.backward)


@pytest.mark.parametrize("shape", ["long and wide", *BUSY])
@pytest.mark.parametrize("cell", CELLS)
def test_a_short_tape_gives_the_same(cell: str, shape: str, target: str, set_num_threads: Callable[[int], None]) -> None:
    for problem in options_of(cell, BUSY.get(shape, shape)):
        a = arrays(problem, "float32")
        for count in (1, 3):
            set_num_threads(count)
            assert_same(results(Recomputing, cell, a), results(functional, cell, a))


@pytest.mark.parametrize("cell", CELLS)
def test_a_short_tape_is_a_fifth(cell: str) -> None:
    a = arrays(Problem(cell, "panel"), "float32")

    def size(recompute: bool) -> int:
        tape = functional.forward(cell, a.x, None, a.params, recompute=recompute)[2]
        return sum(kept.size for run in tape.runs for kept in run.tapes)

    assert size(True) == (size(False) // 5 if cell in ("lstm", "lstm_peephole") else 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_target_reads_every_tape(cell: str, dtype: str, target: str) -> None:
    """A forward on this target, its backward on each of the others."""
    a = arrays(Problem(cell, "16 lanes + 1"), dtype)

    def gradients(other: str) -> dict[str, Any]:
        rnnfast.use_target(target)
        y, _, tape = functional.forward(cell, a.x, None, a.params)
        rnnfast.use_target(other)
        dx, _, found = functional.backward(tape, np.ones_like(y), None, None)
        return {"dx": dx} | dict(found)

    expected, tolerance = gradients(target), 1e-5 if dtype == "float32" else 1e-13
    for other in rnnfast.targets():
        for name, value in gradients(other).items():
            np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance * np.abs(expected[name]).max(), err_msg=f"{other} {name}")
    rnnfast.use_target(target)


# ---- A sequence in pieces --------------------------------------------------------------------------------------------

CHUNKED = [
    Problem(cell, shape, layers=layers, projection=projection, taps=taps, state="given")
    for cell in CELLS
    for shape in ("8 lanes - 1", "long and wide")
    for layers, projection, taps in ((1, "none", 1), (2, "none", 1), (2, "biased", 1), (1, "biased", 3))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [p for p in CHUNKED if p.makes_sense], ids=str)
def test_whole_sequence_equals_its_chunks(problem: Problem, dtype: str, target: str) -> None:
    """The state carries everything from chunk to chunk, and its gradient everything back."""
    a = arrays(problem, dtype)
    whole = results(functional, problem.cell, a)

    T = problem.dims.T
    ends = [0, 1, T // 3, T - 1, T]
    chunks = [np.s_[start:end] for start, end in neighbours(ends)]
    state, ys, tapes = a.state, [], []
    for chunk in chunks:
        y, state, tape, *_ = functional.forward(problem.cell, a.x[chunk], state, a.params, **a.options)
        ys.append(y)
        tapes.append(tape)
    assert np.concatenate(ys).tobytes() == whole["y"].tobytes()
    for name, part in named(state).items():
        assert part.tobytes() == whole[name].tobytes()

    dstate, dxs = a.dstate, []
    gradients = {name: np.zeros_like(value) for name, value in a.params.items()}
    for chunk, tape in zip(reversed(chunks), reversed(tapes), strict=True):
        dx, dstate, _ = functional.backward(tape, a.dy[chunk], dstate, gradients)
        dxs.insert(0, dx)
    assert np.concatenate(dxs).tobytes() == whole["dx"].tobytes()
    for name, dpart in named(dstate, "d").items():
        assert dpart.tobytes() == whole[name].tobytes()
    # sums over time are split elsewhere, so the parameters' gradients obey the law of accuracy alone
    assert inaccurate({"d" + name: gradient for name, gradient in gradients.items()}, problem, dtype) == {}


STREAMED = [
    Problem(cell, shape, layers=layers, projection=projection, skip=skip, state="learned")
    for cell in CELLS
    for shape in ("one row", "8 lanes - 1", "16 lanes + 1", "two panels + 2")
    for layers, projection, skip in ((1, "none", False), (2, "plain", False), (3, "none", True))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [p for p in STREAMED if p.makes_sense], ids=str)
def test_stream_equals_batch(problem: Problem, dtype: str, target: str) -> None:
    a = arrays(problem, dtype)
    layer = layer_of(problem, dtype, a.params).eval()
    y, state, *_ = functional.forward(problem.cell, a.x, None, a.params, **a.options)
    stream = layer.stream(batch=problem.dims.B)
    streamed = np.stack([np.array(stream(x_t)) for x_t in a.x])
    assert streamed.tobytes() == y.tobytes()
    for found, expected in zip(named(stream.state).values(), named(state).values(), strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [p for p in STREAMED if p.makes_sense], ids=str)
def test_a_layers_call_in_eval_mode_equals_the_function(problem: Problem, dtype: str, target: str) -> None:
    """Also where a call takes microseconds and goes a shorter way: other lengths and batches in turn, states given or not."""
    a = arrays(problem, dtype)
    layer = layer_of(problem, dtype, a.params).eval()
    state = named(a.dstate).values()  # some numbers
    for x, rows in ((a.x, slice(None)), (a.x[:1], slice(None)), (np.ascontiguousarray(a.x[:, :2]), slice(2)), (a.x, slice(None))):
        some = [np.ascontiguousarray(part[:, rows]) for part in state]
        for start in (None, tuple(some) if problem.paired else some[0]):
            y, end, *_ = functional.forward(problem.cell, x, start, a.params, **a.options)
            found, found_end = layer(x, start)
            assert_same({"y": found, **named(found_end)}, {"y": y, **named(end)})


def test_a_short_call_says_what_a_long_one_says() -> None:
    layer = rnnfast.LSTM(3, 4).eval()
    x = np.zeros((2, 5, 3), np.float32)
    for call, message in (
        (lambda: layer(x[..., :2]), "LSTM: x must have input_size = 3"),
        (lambda: layer(x.astype(np.float64)), "lstm: x must have dtype float32"),
        (lambda: layer(x, np.zeros((1, 5, 4), np.float32)), r"lstm: state must be a pair \(h, c\)"),
        (lambda: layer(x, (np.zeros((1, 4, 4), np.float32),) * 2), "lstm: state h must have shape"),
        (lambda: layer(x, (np.zeros((1, 5, 4)),) * 2), "lstm: state h must have dtype float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert layer(x[:0])[0].shape == (0, 5, 4)
    assert layer(x[:, :0])[0].shape == (2, 0, 4)
    np.testing.assert_array_equal(layer(x[::-1])[0], layer(x)[0])  # whatever the strides


STREAM = {cell: Problem(cell, "8 lanes - 1", layers=2, state="learned") for cell in CELLS}


@pytest.mark.parametrize("problem", STREAM.values(), ids=STREAM)
def test_stream_writes_where_it_is_told(problem: Problem, target: str) -> None:
    a = arrays(problem, "float32")
    layer = layer_of(problem, "float32", a.params).eval()
    y, _ = layer(a.x)
    stream = layer.stream(batch=problem.dims.B)
    out = np.empty_like(y[0])
    assert stream(a.x[0], out) is out
    assert out.tobytes() == y[0].tobytes()
    kept = stream(a.x[1])
    stream(a.x[2])
    assert kept.tobytes() == y[1].tobytes()  # not overwritten by the next step


@pytest.mark.parametrize("problem", STREAM.values(), ids=STREAM)
def test_copy_of_a_stream_goes_its_own_way(problem: Problem, target: str) -> None:
    a = arrays(problem, "float32")
    layer = layer_of(problem, "float32", a.params).eval()
    y, _ = layer(a.x)
    stream = layer.stream(batch=problem.dims.B)
    stream(a.x[0])
    twin = stream.copy()
    twin(a.x[2])
    assert stream(a.x[1]).tobytes() == y[1].tobytes()


def test_copy_of_a_stream_keeps_its_target(target: str) -> None:
    """Whose order its weights are in, whatever the target has become."""
    layer = rnnfast.GRU(7, 19, seed=0).eval()
    stream, x = layer.stream(), np.ones((1, 7), np.float32)
    expected = layer.stream()(x)
    for other in rnnfast.targets():
        rnnfast.use_target(other)
        twin = stream.copy()
        assert twin(x).tobytes() == expected.tobytes()
    rnnfast.use_target(target)


@pytest.mark.parametrize("problem", STREAM.values(), ids=STREAM)
def test_stream_put_back_equals_reset(problem: Problem, target: str) -> None:
    """Some rows or all of them start afresh from h_0."""
    a = arrays(problem, "float32")
    layer = layer_of(problem, "float32", a.params).eval()
    y, _ = layer(a.x)
    stream = layer.stream(batch=problem.dims.B)
    stream(a.x[0])
    reset = np.zeros(a.x.shape[:2], np.bool_)
    reset[1, ::2] = True
    stream.reset(reset[1])
    assert stream(a.x[1]).tobytes() == layer(a.x, reset=reset)[0][1].tobytes()
    stream.reset()
    assert stream(a.x[0]).tobytes() == y[0].tobytes()


@pytest.mark.parametrize("problem", STREAM.values(), ids=STREAM)
def test_stream_goes_on_from_a_state(problem: Problem, target: str) -> None:
    a = arrays(problem, "float32")
    layer = layer_of(problem, "float32", a.params).eval()
    y, _ = layer(a.x)
    _, state = layer(a.x[:2])
    stream = layer.stream(batch=problem.dims.B)
    stream.state = state
    assert stream(a.x[2]).tobytes() == y[2].tobytes()
    assert layer.stream(batch=problem.dims.B, state=state)(a.x[2]).tobytes() == y[2].tobytes()


@pytest.mark.parametrize("problem", STREAM.values(), ids=STREAM)
def test_stream_holds_a_snapshot(problem: Problem, target: str) -> None:
    """Of weights and initial states alike, from its making until refresh(); and so do its copies."""
    a = arrays(problem, "float32")
    layer = layer_of(problem, "float32", a.params)
    old = layer.eval()(a.x)[0].tobytes()
    used, unused = (layer.stream(batch=problem.dims.B) for _ in range(2))
    used(a.x[0])
    layer.train().flat[...] *= 2
    new = layer.eval()(a.x)[0].tobytes()

    def streamed(stream: Any) -> bytes:
        stream.reset()
        return np.stack([stream(x_t) for x_t in a.x]).tobytes()

    twin = used.copy()
    assert [streamed(stream) for stream in (used, unused, twin)] == [old] * 3
    for stream in (used, unused, twin):
        stream.refresh()
    assert [streamed(stream) for stream in (used, unused, twin)] == [new] * 3


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("cell", CELLS)
def test_stream_on_many_threads_equals_one(cell: str, rows: int, target: str, set_num_threads: Callable[[int], None]) -> None:
    """Shared by units or by rows; and with the weights at its making, whatever the number of threads has become since."""
    shape = Shape(3, rows, 80, 130, "enough for many threads")
    for projection in ("none", "plain"):
        problem = Problem(cell, shape, layers=2, projection=projection, state="learned")
        if not problem.makes_sense:
            continue
        a = arrays(problem, "float32")
        layer = layer_of(problem, "float32", a.params).eval()
        set_num_threads(1)
        y, _ = layer(a.x)
        for made, used in ((1, 1), (2, 2), (3, 3), (1, 2), (2, 3), (3, 2)):
            layer.load_state_dict(a.params)
            set_num_threads(made)
            stream = layer.stream(batch=rows)
            layer.train().flat[...] *= 2
            set_num_threads(used)
            streamed = np.stack([stream(a.x[0]), *(stream.copy()(a.x[1]) for _ in range(2)), *map(stream, a.x[1:])])
            assert streamed.tobytes() == y[[0, 1, 1, 1, 2]].tobytes(), (projection, made, used)


# ---- A batch in rows -------------------------------------------------------------------------------------------------


def row_of(a: Arrays, b: int) -> Arrays:
    """The problem of row b alone."""
    options = dict(a.options)
    for name, part in (("lengths", np.s_[b : b + 1]), ("reset", np.s_[:, b : b + 1])):
        if name in options:
            options[name] = options[name][part]
    row = np.s_[:, b : b + 1]
    return a._replace(
        x=a.x[row],
        dy=a.dy[row],
        state=map_floats(lambda part: part[row], a.state),
        dstate=map_floats(lambda part: part[row], a.dstate),
        options=options,
    )


PER_ROW = ("y", "h", "c", "every c", "dx", "dh", "dc")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_row_alone_equals_row_in_a_batch(cell: str, dtype: str, target: str) -> None:
    for problem in options_of(cell, "long and wide"):
        a = arrays(problem, dtype)
        batch = results(functional, cell, a)
        for b in (0, 4, problem.dims.B - 1):
            alone = results(functional, cell, row_of(a, b))
            for name in alone.keys() & PER_ROW:
                assert alone[name].tobytes() == batch[name][:, b : b + 1].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_padded_equals_ragged(cell: str, dtype: str, target: str) -> None:
    """A row cut at its end equals the same row padded, and past its end y and dx are zeros."""
    problem = Problem(cell, "long and wide", layers=2, directions=2, lengths="ragged", state="given")
    a = arrays(problem, dtype)
    padded = results(functional, cell, a)
    for b, length in enumerate(a.options["lengths"]):
        row = row_of(a, b)
        options = {name: value for name, value in row.options.items() if name != "lengths"}
        ragged = results(functional, cell, row._replace(x=row.x[:length], dy=row.dy[:length], options=options))
        for name in ("h", "c", "dh", "dc"):
            if name in ragged:
                assert ragged[name].tobytes() == padded[name][:, b : b + 1].tobytes(), name
        for name in ("y", "dx"):
            assert ragged[name].tobytes() == padded[name][:length, b : b + 1].tobytes(), name
            assert (padded[name][length:, b] == 0).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("width", "dtype"), [(64, "float32"), (68, "float32"), (33, "float32"), (34, "float64")])
def test_places_past_the_ends_of_large_arrays_are_zero(width: int, dtype: str, directions: int, threads: int) -> None:
    """Large arrays' zeros go around the caches where their rows are whole; either way into memory that has held something else."""
    T, B = 300, 70
    rng = np.random.default_rng(0)
    params = {
        f"weight_{part}_l0{suffix}": rng.standard_normal((width, width)).astype(dtype) / 8
        for part in ("ih", "hh")
        for suffix in ("", "_reverse")[:directions]
    }
    x, lengths = rng.standard_normal((T, B, width)).astype(dtype), rng.integers(1, T, B)
    past = np.arange(T)[:, None] >= lengths
    reused = 0
    for _ in range(10):
        used = [np.full((T, B, directions * width), np.nan, dtype) for _ in range(4)]
        places = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in used]
        del used
        kept = np.isnan(np.empty((T, B, directions * width), dtype)).any()  # the allocator hands it out as it was
        y, _, tape = functional.forward("rnn_tanh", x, None, params, bidirectional=directions == 2, lengths=lengths, threads=threads)
        dx, _, _ = functional.backward(tape, np.ones_like(y), threads=threads)
        reused += kept and any(begin < y.ctypes.data + y.nbytes and y.ctypes.data < end for begin, end in places)
        for array in (y, dx):
            assert array.nbytes > 2 << 20
            assert not array[past].any()
            assert np.isfinite(array).all()
            assert array[~past].all()
    if not reused:
        pytest.skip("this allocator clears what it hands out")


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str, target: str) -> None:
    problem = Problem(cell, "long and wide", layers=2, directions=2, skip=True, lengths="ragged", reset=True, state="given")
    a = arrays(problem, "float32")
    past = np.arange(problem.dims.T)[:, None] >= a.options["lengths"]
    x, dy = a.x.copy(), a.dy.copy()
    x[past], dy[past] = np.nan, np.nan
    assert_same(results(functional, cell, a._replace(x=x, dy=dy)), results(functional, cell, a))


@pytest.mark.parametrize("cell", CELLS)
def test_reset_past_the_end_is_ignored(cell: str, target: str) -> None:
    problem = Problem(cell, "prime batch", layers=2, directions=2, lengths="ragged", reset=True, state="learned")
    a = arrays(problem, "float32")
    past = np.arange(problem.dims.T)[:, None] >= a.options["lengths"]
    always = a._replace(options=a.options | {"reset": a.options["reset"] | past})
    never = a._replace(options=a.options | {"reset": a.options["reset"] & ~past})
    assert_same(results(functional, cell, always), results(functional, cell, never))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_reversed_input_equals_reverse_direction(cell: str, dtype: str, target: str) -> None:
    problem = Problem(cell, "long and wide", directions=2, lengths="ragged", state="given")
    a = arrays(problem, dtype)
    T, H = problem.dims.T, problem.R
    a.dy[..., :H] = 0  # of the forward direction the loss knows nothing
    for dpart in named(a.dstate).values():
        dpart[0] = 0
    both = results(functional, cell, a)

    order = a.options["lengths"] - 1 - np.arange(T)[:, None]  # (T, B): each row back from its own end
    order = np.where(order >= 0, order, np.arange(T)[:, None])  # padding stays where it is
    params = {name.removesuffix("_reverse"): value for name, value in a.params.items() if name.endswith("_reverse")}
    turned = a._replace(
        x=np.take_along_axis(a.x, order[..., None], 0),
        dy=np.take_along_axis(a.dy, order[..., None], 0)[..., H:],
        state=map_floats(lambda part: part[1:], a.state),
        dstate=map_floats(lambda part: part[1:], a.dstate),
        params=params,
        options=a.options | {"bidirectional": False},
    )
    single = results(functional, cell, turned)
    assert equal(np.take_along_axis(single["y"], order[..., None], 0), both["y"][..., H:])
    assert equal(np.take_along_axis(single["dx"], order[..., None], 0), both["dx"])
    for name in single.keys() & {"h", "c", "dh", "dc"}:
        assert equal(single[name], both[name][1:])


# ---- Exact arithmetic ------------------------------------------------------------------------------------------------


@st.composite
def integer_problems(draw: st.DrawFn) -> Problem:
    taps = draw(st.sampled_from([1, 1, 2, 5]))
    layers = 1 if taps > 1 else draw(st.integers(1, 3))
    sizes = (draw(st.integers(0, 9)), draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 140)))
    return Problem(
        "rnn_identity",
        Shape(*sizes, "drawn"),
        layers=layers,
        directions=1 if taps > 1 else draw(st.integers(1, 2)),
        skip=layers > 1 and draw(st.booleans()),
        bias=draw(st.booleans()),
        projection=draw(st.sampled_from(["none", "plain", "biased"])),
        taps=taps,
        lengths=draw(st.sampled_from(["full", "ragged"])),
        reset=draw(st.booleans()),
        dropout=layers > 1 and draw(st.booleans()),
        state=draw(st.sampled_from(["zero", "given", "learned", "given and learned"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def integers(problem: Problem) -> Arrays:
    """The problem with -2, -1, 1 or 2 here and there: about one number in each row of a weight, a third elsewhere."""
    rng = np.random.default_rng(problem.seed)

    def sparse(array: Any) -> Any:
        chance = 1 / array.shape[1] if array.ndim == 2 and array.size else 1 / 3
        return rng.choice([-2.0, -1.0, 1.0, 2.0], array.shape) * (rng.random(array.shape) < chance)

    return map_floats(sparse, arrays(problem, "float64"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype: str, target: str) -> None:
    """Every sum that a kernel may form is at most the same sum of absolute values; where that has an exact float, the
    result is the one of int64, whatever the order of the sum.
    """

    @given(integer_problems())
    def law(problem: Problem) -> None:
        a = integers(problem)
        bound = results(reference, problem.cell, map_floats(np.abs, a))
        assume(max(array.max(initial=0) for array in bound.values()) < 2 ** (np.finfo(dtype).nmant + 1))
        exact = results(reference, problem.cell, map_floats(lambda array: array.astype(np.int64), a))
        found = results(functional, problem.cell, map_floats(lambda array: array.astype(dtype), a))
        for name, array in exact.items():
            np.testing.assert_array_equal(found[name], array, name)

    law()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_any_sizes_are_as_accurate_as_numpy(cell: str, dtype: str, target: str) -> None:
    """From 3 units: one unit has a named shape, and is too few for errors to average out in whatever is drawn."""
    sizes = st.builds(Shape, st.integers(0, 6), st.integers(0, 20), st.integers(1, 20), st.integers(3, 70), st.just("drawn"))

    @settings(max_examples=30)
    @given(sizes, st.integers(1, 2), st.integers(1, 2), st.sampled_from(["full", "ragged"]), st.booleans())
    def law(shape: Shape, layers: int, directions: int, lengths: str, reset: bool) -> None:
        problem = Problem(cell, shape, layers=layers, directions=directions, lengths=lengths, reset=reset)
        assert inaccurate(results(functional, cell, arrays(problem, dtype)), problem, dtype) == {}

    law()
