"""Recurrent nets as pure functions of arrays: layers, directions, lengths and resets around the fused kernels.

Dims    T time, B batch, I input, H hidden, R output width (H, or proj_size), K output taps, G gates, L layers, D directions.
tape    what one forward keeps for its backward; any number of backwards may use it.
=, +=   parameter gradients accumulate, every other gradient is overwritten.

The equations are in `rnnfast.reference`, which takes the same arguments. This file knows no parameter's origin and no layer class;
shapes and dtypes are checked here and at the kernels' border, before anything is touched.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from sys import intern
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core

Array: TypeAlias = NDArray[Any]
State: TypeAlias = "Array | tuple[Array, Array]"

__all__ = ["CELLS", "Tape", "backward", "forward"]

CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "rnn_identity", "lstm", "lstm_peephole", "gru", "gru_reset_before")
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_peep", "weight_hr", "bias_hr")
_Weights: TypeAlias = "list[Array | None]"
_DEBUG = os.environ.get("RNNFAST_DEBUG", "0") not in ("", "0")  # check that x is the same in backward as it was in forward


@dataclass(repr=False)
class Tape:
    """What `forward` keeps for `backward`; opaque to callers."""

    cell: str
    params: Mapping[str, Array]
    runs: list[_core.Run]  # one a layer
    x: Array  # (T, B, I)
    sizes: tuple[int, int, int, int, int, int]  # L, D, B, H, R, S
    dropout_masks: Sequence[Array] | None
    skip: bool
    paired: bool  # is the state (h, c)?
    started: bool  # was the state given?
    checksum: int | None = None  # of x, in debug mode
    parts: Sequence[tuple[int, int, Tape, NDArray[np.bool_]]] = ()  # see _forward_in_parts
    plain: bool = False  # by _core.forward_plain: of no parameters but those whose gradients the kernels write


# ---- arguments ---------------------------------------------------------------------------------------------------------------------------


def _array(value: Any, name: str, who: str) -> Array:
    if not isinstance(value, np.ndarray):
        dlpack = hasattr(value, "__dlpack__") and not hasattr(value, "__array_interface__")
        value = np.from_dlpack(value) if dlpack else np.asarray(value)
    array: Array = value
    if array.dtype.kind != "f":
        raise ValueError(f"{who}: {name} must hold floats, got dtype {array.dtype}")
    return array


def _expect(array: Array, name: str, symbols: str, shape: tuple[int, ...], dtype: np.dtype[Any], who: str) -> Array:
    if array.shape != shape:
        raise ValueError(f"{who}: {name} must have shape {symbols} = {shape}, got {array.shape}")
    if array.dtype != dtype:
        raise ValueError(f"{who}: {name} must have dtype {dtype}, got {array.dtype}")
    return array


def _whole(numbers: Any, name: str, who: str) -> NDArray[np.int64]:
    array = np.asarray(numbers)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{who}: {name} must be whole numbers (int64), got dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def _weights(params: Mapping[str, Array], suffix: str, who: str) -> _Weights:
    for name in ("weight_ih", "weight_hh"):
        if name + suffix not in params:
            raise KeyError(f"{who}: params lacks {name + suffix!r}")
    return [params.get(name + suffix) for name in _NAMES]


@lru_cache(64)
def _names(L: int, D: int) -> tuple[list[tuple[tuple[str, ...], ...]], frozenset[str]]:
    """The names of each layer's weights in each direction, and all of them: those whose gradients the kernels write."""
    ends = [[f"_l{layer}" + ("_reverse" if d else "") for d in range(D)] for layer in range(L)]
    names = [tuple(tuple(intern(name + end) for name in _NAMES) for end in directions) for directions in ends]  # a lookup is then one comparison
    return names, frozenset(name for layer in names for direction in layer for name in direction)


def _left(array: Array | None, n: int) -> Array | None:
    """The first n columns."""
    return None if array is None else np.ascontiguousarray(array[..., :n])


# ---- forward -----------------------------------------------------------------------------------------------------------------------------


def forward(
    cell: str,
    x: Any,
    state: Any,
    params: Mapping[str, Array],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    skip: bool = False,
    lengths: Any = None,
    batch_sizes: Any = None,
    reset: Any = None,
    dropout_masks: Sequence[Array] | None = None,
    output_taps: int = 1,
    cells: bool = False,
    tape: bool = True,
    snapshot: dict[str, _core.Packs] | None = None,
    compute_dtype: str | None = None,
    recompute: bool = False,
    threads: int | None = None,
) -> Any:
    """Run layers of a recurrent cell over sequences: the equations of `rnnfast.reference.forward`, fused.

    Args:
        cell: one of `CELLS`.
        x: (T, B, I), float32 or float64 like the parameters; T and B may be strided.
        state: None (from the parameters h_0 and c_0 if there, else zeros), or h (L*D, B, K*R), or for an LSTM and a projected GRU
            (h, c) with c (L*D, B, H).
        params: name -> C-contiguous array under torch's names and gate order: weight_ih_l{k}[_reverse] (G*H, in), weight_hh (G*H, K*R), optional
            bias_ih, bias_hh (G*H,), weight_peep (3, H), weight_hr (R, H), bias_hr (R,); and h_0 (L*D, 1, K*R), c_0 (L*D, 1, H).
        skip: layers above the first read [x, y_{l-1}], and y is every layer's output side by side.
        lengths: whole numbers (B,), 0 <= lengths <= T, in any order. Past a row's end y is 0 and x is never read.
        batch_sizes: whole numbers (T,), positive and never growing: x is packed, (tokens, I) with step t's rows side by side, as in torch's
            PackedSequence, and so are y, the masks and c. Without lengths and reset.
        reset: bool (T, B). True starts the row afresh (from h_0 and c_0, or zeros) before step t, in either direction as if the call were two.
        dropout_masks: L-1 arrays (T, B, D*R), multiplied onto y_{l-1} where layer l reads it.
        output_taps: K, how many earlier outputs the recurrence reads; above 1 for one layer in one direction. 0 makes an RNN a dense layer.
        cells: also return every step's cell state, for LSTMs.
        tape: whether to keep what `backward` needs.
        snapshot: a dict, empty at first, that holds the weights in the kernels' order from call to call; who passes it again promises that the
            parameters have not changed.
        compute_dtype: "bfloat16" rounds both factors of every product to bfloat16, forward and backward, twice as fast where the CPU has
            instructions for it; sums, states, the tape and everything returned stay float32. Two layers with H = 128, started as usual, are off
            by up to 1 % of the largest output and 5 % of the largest gradient (20 % through a ReLU). "int8", without a tape, rounds them to
            127 steps either side of 0, with a scale for each row of the weights, of x and of h, up to 3 % off on the same layers: weights that
            stream from memory take a quarter of the time. None: x's dtype.
        recompute: keep a tape of a fifth the size (an LSTM's; none for an RNN and a GRU, whose y has it all), from which backward gets the same
            bits a third slower, by computing the gates again.
        threads: at most so many take part, now; None: as many as `rnnfast.set_num_threads` says. They change no bit.

    Returns:
        y (T, B, D*R), with skip (T, B, L*D*R); the state at each row's own end; the tape or None; with `cells` also c (T, B, D*H).
        y is read-only while a tape may need it.

    Raises:
        ValueError: naming the argument, its symbolic shape and what it got. KeyError: a missing parameter.

    Sources: as in `rnnfast.reference.forward`.

    >>> import numpy as np
    >>> one = {"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.ones((1, 1))}
    >>> y, state, tape = forward("rnn_identity", np.ones((4, 1, 1)), None, one)
    >>> y.ravel().tolist(), state.tolist()
    ([1.0, 2.0, 3.0, 4.0], [[[4.0]]])
    >>> dx, dstate, gradients = backward(tape, np.ones((4, 1, 1)))
    >>> dx.ravel().tolist(), gradients["weight_hh_l0"].tolist()
    ([4.0, 3.0, 2.0, 1.0], [[10.0]])
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}")
    who = cell.split("_")[0]
    lstm, L, D = who == "lstm", num_layers, 1 + bool(bidirectional)
    if L < 1 or output_taps < (who != "rnn"):
        raise ValueError(f"{who}: num_layers and output_taps must be at least 1, got {L} and {output_taps}")
    if output_taps != 1 and (L > 1 or bidirectional):
        raise ValueError(f"{who}: output_taps other than 1 need num_layers=1 and bidirectional=False")
    if cells and not lstm:
        raise ValueError(f"{who}: has no cell states")
    if cell == "gru_reset_before" and ("weight_hr_l0" in params or output_taps > 1):
        raise ValueError(f"{cell}: takes no projection and no output taps, since r multiplies the H-wide state unit by unit")
    params = params if isinstance(params, dict) else dict(params)
    if (
        L == D == output_taps == 1 and state is None and lengths is None and batch_sizes is None and reset is None and dropout_masks is None
        and snapshot is None and compute_dtype is None and threads is None and not (skip or cells or recompute or _DEBUG)
        and isinstance(x, np.ndarray)
    ):  # fmt: skip
        done = _core.forward_plain(cell, params, _names(1, 1)[0][0], x, tape)
        if done is not None:
            y, final, run, sizes = done
            return y, final, None if run is None else Tape(cell, params, [run], x, sizes, None, False, isinstance(final, tuple), False, plain=True)
    x = _array(x, "x", who)
    if x.ndim != (3 if batch_sizes is None else 2):
        raise ValueError(f"{who}: x must have shape {'(T, B, I)' if batch_sizes is None else '(tokens, I)'}, got {x.shape}")
    I = x.shape[-1]
    names, _ = _names(L, D)
    first = names[0][0]
    w_ih, w_hh, w_hr = params.get(first[0]), params.get(first[1]), params.get(first[5])
    if w_ih is None or w_hh is None:
        raise KeyError(f"{who}: params lacks {first[w_ih is not None]!r}")
    gates = 4 if lstm else 3 if who == "gru" else 1
    if w_ih.ndim != 2 or w_ih.shape[0] % gates or w_ih.shape[1] != I:
        H = w_hh.shape[0] // gates if w_hh.ndim else 0
        raise ValueError(f"{who}: weight_ih_l0 must have shape ({gates}*H, I) = ({gates * H}, {I}), got {w_ih.shape}, where x has shape {x.shape}")
    _expect(x, "x", "(T, B, I)", x.shape, w_ih.dtype, who)
    ends = None if lengths is None else _whole(lengths, "lengths", who)
    layout = _layout(x, ends, batch_sizes, who)
    lead = x.shape[:-1]
    T, B = lead if batch_sizes is None else (layout.T, layout.B)
    if batch_sizes is not None and (lengths is not None or reset is not None or output_taps > 1):
        raise ValueError(f"{who}: batch_sizes go without lengths, reset and output_taps")
    cut = _reset(reset, T, B, ends, who)
    if dropout_masks is not None and len(dropout_masks) != L - 1:
        raise ValueError(f"{who}: dropout_masks must be num_layers - 1 = {L - 1} arrays, got {len(dropout_masks)}")

    H = w_ih.shape[0] // gates
    R = H if w_hr is None else w_hr.shape[0]
    S = R * output_taps
    if dropout_masks is not None:
        for layer, mask in enumerate(dropout_masks):
            name = f"dropout_masks[{layer}]"
            _expect(_array(mask, name, who), name, "(T, B, D*R)", (*lead, D * R), x.dtype, who)
    carries = lstm or who == "gru"
    paired = lstm or (who == "gru" and w_hr is not None)
    h_shape, c_shape = (L * D, B, S), (L * D, B, H)
    fresh_h = _initial(params, "h_0", (L * D, 1, S), x.dtype, who)
    fresh_c = _initial(params, "c_0", (L * D, 1, H), x.dtype, who)
    h_0, c_0 = _state(state, paired, h_shape, c_shape, fresh_h, fresh_c, x.dtype, who)
    if cut is not None and output_taps > 1:
        return _forward_in_parts(cell, x, state, params, cut, ends, output_taps, tape, paired, cells, compute_dtype, recompute, threads)
    events: list[NDArray[np.int64]] = []
    if cut is not None:
        events = [_events(cut, d == 1) for d in range(D)]
        fresh_h = np.zeros((L * D, 1, S), x.dtype) if fresh_h is None else fresh_h
        fresh_c = np.zeros((L * D, 1, H), x.dtype) if fresh_c is None else fresh_c
    if carries and not paired:  # a GRU carries its own h
        c_0, fresh_c = _left(h_0, H), _left(fresh_h, H)

    h_T, c_T = np.empty(h_shape, x.dtype), np.empty(c_shape, x.dtype) if paired else None
    new = np.zeros if ends is not None else np.empty
    every_y = new((*lead, L * D * R), x.dtype) if skip else None
    every_c = new((*lead, (L if skip else 1) * D * H), x.dtype) if cells else None
    runs: list[_core.Run] = []
    y = below = x
    for layer in range(L):
        if layer > 0:
            below = y if dropout_masks is None else y * dropout_masks[layer - 1]
            below = np.concatenate((x, below), axis=-1) if skip else below
        y_out = None if every_y is None else every_y[..., layer * D * R : (layer + 1) * D * R]
        c_out = None if every_c is None else every_c[..., layer * D * H : (layer + 1) * D * H] if skip else every_c if layer == L - 1 else None
        packs = [] if snapshot is None else [snapshot.setdefault(name, _core.Packs()) for name, *_ in names[layer]]
        y, run = _core.forward(
            cell, layout, params, names[layer], layer, compute_dtype, output_taps, below, y_out, h_0, c_0, h_T, c_T, events, fresh_h,
            fresh_c if carries else None, c_out, tape, recompute, packs, threads,
        )  # fmt: skip
        if run is not None:
            runs.append(run)
    result = y if every_y is None else every_y
    final = h_T if c_T is None else (h_T, c_T)
    kept = None
    if tape:
        kept = Tape(cell, params, runs, x, (L, D, B, H, R, S), dropout_masks, skip, paired, state is not None)
        if _DEBUG:
            kept.checksum = zlib.crc32(x.tobytes())
        result.setflags(write=False)
    return (result, final, kept, every_c) if cells else (result, final, kept)


@lru_cache(8)
def _plain(T: int, B: int) -> _core.Layout:
    """Every row runs at every step."""
    return _core.Layout(T, B)


def _layout(x: Array, ends: NDArray[np.int64] | None, batch_sizes: Any, who: str) -> _core.Layout:
    sizes = None if batch_sizes is None else _whole(batch_sizes, "batch_sizes", who)
    try:
        if sizes is None:
            T, B = x.shape[:2]
            return _plain(T, B) if ends is None and T + B <= 4096 else _core.Layout(T, B, ends)
        layout = _core.Layout.from_batch_sizes(sizes)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    if layout.tokens != len(x):
        raise ValueError(f"{who}: x must have shape (tokens, I) with as many tokens as batch_sizes add up to = {layout.tokens}, got {x.shape}")
    return layout


def _reset(reset: Any, T: int, B: int, ends: NDArray[np.int64] | None, who: str) -> NDArray[np.bool_] | None:
    """Where a row starts afresh inside its length, or None where none does."""
    if reset is None:
        return None
    cut = np.asarray(reset)
    if cut.dtype != np.bool_ or cut.shape != (T, B):
        raise ValueError(f"{who}: reset must be bool of shape (T, B) = ({T}, {B}), got {cut.dtype} of {cut.shape}")
    if ends is not None:
        cut = cut & (np.arange(T)[:, None] < ends)
    return cut if cut.any() else None


def _events(cut: NDArray[np.bool_], reverse: bool) -> NDArray[np.int64]:
    """Resets numbered in order of t, elsewhere -1; the reverse direction starts afresh at t - 1, and at T - 1 anyway."""
    if reverse:
        cut = np.concatenate((cut[1:], np.zeros_like(cut[:1])))
    numbers = np.full(cut.shape, -1, np.int64)
    numbers[cut] = np.arange(cut.sum())
    return numbers


def _initial(params: Mapping[str, Array], name: str, shape: tuple[int, ...], dtype: np.dtype[Any], who: str) -> Array | None:
    value = params.get(name)
    if value is None:
        return None
    return np.ascontiguousarray(_expect(value, name, "(L*D, 1, R)" if name == "h_0" else "(L*D, 1, H)", shape, dtype, who))


def _rows(fresh: Array | None, B: int) -> Array | None:
    """A fresh state (L*D, 1, n) for every row of the batch."""
    return None if fresh is None else np.repeat(fresh, B, axis=1)


def _state(
    state: Any, paired: bool, h_shape: tuple[int, ...], c_shape: tuple[int, ...], fresh_h: Array | None, fresh_c: Array | None,
    dtype: np.dtype[Any], who: str,
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """Copies of h and c, so that a tape never sees what the caller does to its own; None for zeros."""
    if state is None:
        return _rows(fresh_h, h_shape[1]), _rows(fresh_c, c_shape[1]) if paired else None
    if paired != isinstance(state, (tuple, list)) or (paired and len(state) != 2):
        raise ValueError(f"{who}: state must be {'a pair (h, c)' if paired else 'one array h'}, got {type(state).__name__}")
    parts = [_array(part, name, who) for part, name in zip(state if paired else (state,), "hc")]
    for part, name, shape, symbols in zip(parts, ("state h", "state c"), (h_shape, c_shape), ("(L*D, B, R)", "(L*D, B, H)")):
        _expect(part, name, symbols, shape, dtype, who)
    copies = [np.array(part, order="C") for part in parts]
    return copies[0], copies[1] if paired else None


# ---- backward ----------------------------------------------------------------------------------------------------------------------------


def backward(
    tape: Tape, dy: Any, dstate: Any = None, gradients: dict[str, Array] | None = None, *, accumulate: bool = True, need_dx: bool = True,
    need_dstate: bool = True, threads: int | None = None,
) -> tuple[Array | None, State | None, dict[str, Array]]:  # fmt: skip
    """Backpropagation through time: from the gradients of a forward's results to those of its arguments.

    Args:
        tape: of `forward`; it may be used any number of times, as long as x and the parameters have not changed.
        dy: like y; never read past a row's end.
        dstate: like the returned state, or None for zeros.
        gradients: name -> C-contiguous array of the parameter's shape, added to; None makes new ones.
        accumulate: False overwrites `gradients` instead, which saves their zeroing and, for a step or two over big weights, half their traffic.
        need_dx: False returns None for dx and saves its product.
        need_dstate: False returns None for dstate and saves the first step's product with weight_hh, which for a call of few steps counts.
        threads: as of `forward`.

    Returns:
        dx (T, B, I), 0 past a row's end, or None; dstate, the initial state's gradient, or None; gradients. Where forward was given no state, h_0 and
        c_0 collect the initial state's gradient over the batch, and they collect it at every reset.

    Source: Werbos, "Backpropagation through time: what it does and how to do it" (1990).
    """
    who = tape.cell.split("_")[0]
    gradients = gradients if gradients is None or isinstance(gradients, dict) else dict(gradients)
    if gradients is None:
        gradients, accumulate = {name: np.empty_like(value, order="C") for name, value in tape.params.items()}, False
    if tape.plain and dstate is None and not need_dstate and isinstance(dy, np.ndarray) and "h_0" not in gradients and "c_0" not in gradients:
        return _core.backward(tape.runs[0], dy, None, None, need_dx, None, None, gradients, accumulate, threads)[0], None, gradients
    L, D, B, H, R, S = tape.sizes
    x, dtype, lead, carries = tape.x, tape.x.dtype, tape.x.shape[:-1], who != "rnn"
    wide, symbols = ((L if tape.skip else 1) * D * R, "(T, B, L*D*R)" if tape.skip else "(T, B, D*R)")
    dy = _expect(_array(dy, "dy", who), "dy", symbols, (*lead, wide), dtype, who)
    dh_T = dc_T = None
    if dstate is not None:
        dh_T, dc_T = _state(dstate, tape.paired, (L * D, B, S), (L * D, B, H), None, None, dtype, who)
    if tape.checksum is not None and tape.checksum != zlib.crc32(x.tobytes()):
        raise RuntimeError(f"{who}: x has changed between forward and backward")
    for name, value in tape.params.items():
        gradient = gradients.get(name)
        if gradient is None:
            raise KeyError(f"{who}: gradients lacks {name!r}")
        if gradient.shape != value.shape:
            raise ValueError(f"{who}: gradient of {name} must have shape {value.shape}, got {gradient.shape}")
    if L > 1 or "h_0" in tape.params or "c_0" in tape.params:  # one layer's weights the kernels' border checks before it writes
        for name in (_names(L, D)[1] | {"h_0", "c_0"}) & tape.params.keys():
            gradient = gradients[name]
            if gradient.dtype != dtype or not gradient.flags.c_contiguous or not gradient.flags.writeable:
                raise ValueError(f"{who}: gradient of {name} must be a writeable, C-contiguous array of dtype {dtype}")
        for run in tape.runs:
            run.check_kept()
    if tape.parts:
        in_parts = _backward_in_parts(tape, dy, dstate, gradients, accumulate, need_dx, threads)
        return in_parts if need_dstate else (in_parts[0], None, in_parts[2])

    if not accumulate:
        written = _names(L, D)[1]
        for name in tape.params:
            if name not in written:
                gradients[name].fill(0)
    learned = not tape.started and ("h_0" in gradients or "c_0" in gradients)
    dh_0 = np.empty((L * D, B, S), dtype) if need_dstate or learned else None
    dc_0 = np.empty((L * D, B, H), dtype) if carries and dh_0 is not None else None
    dx: Array | None = None
    dx_skip: Array | None = None  # what the layers above the first send to x under skip
    dy_l = dy[..., (L - 1) * D * R :] if tape.skip else dy
    for layer in reversed(range(L)):
        total, resets = _core.backward(tape.runs[layer], dy_l, dh_T, dc_T, layer > 0 or need_dx, dh_0, dc_0, gradients, accumulate, threads)
        for k, (dreset_h, dreset_c) in enumerate(resets, layer * D):
            if carries and not tape.paired:
                dreset_h[:, :H] += dreset_c
            if "h_0" in gradients:
                gradients["h_0"][k, 0] += dreset_h.sum(axis=0)
            if tape.paired and "c_0" in gradients:
                gradients["c_0"][k, 0] += dreset_c.sum(axis=0)
        if layer == 0:
            dx = total if dx_skip is None or total is None else total + dx_skip
            break
        assert total is not None
        if tape.skip:
            if need_dx:
                dx_skip = total[..., : x.shape[-1]] if dx_skip is None else dx_skip + total[..., : x.shape[-1]]
            total = total[..., x.shape[-1] :]
        dy_l = total if tape.dropout_masks is None else total * tape.dropout_masks[layer - 1]
        if tape.skip:
            dy_l = dy_l + dy[..., (layer - 1) * D * R : layer * D * R]
    if dh_0 is None:
        return dx, None, gradients
    if dc_0 is not None and not tape.paired:  # a GRU carries its own h
        dh_0[..., :H] += dc_0
    if learned:
        if "h_0" in gradients:
            gradients["h_0"] += dh_0.sum(axis=1, keepdims=True)
        if tape.paired and dc_0 is not None and "c_0" in gradients:
            gradients["c_0"] += dc_0.sum(axis=1, keepdims=True)
    dstate = (dh_0, dc_0) if tape.paired and dc_0 is not None else dh_0
    return dx, dstate if need_dstate else None, gradients


# ---- resets with output taps: one call a stretch between resets, since the history of outputs must start afresh ----------------------------


def _forward_in_parts(
    cell: str, x: Array, state: Any, params: Mapping[str, Array], cut: NDArray[np.bool_], ends: NDArray[np.int64] | None, taps: int, tape: bool,
    paired: bool, cells: bool, compute: str | None, recompute: bool, threads: int | None,
) -> Any:  # fmt: skip
    T = len(x)
    bounds = sorted({0, T, *np.flatnonzero(cut.any(axis=1)).tolist()})
    started = state is not None
    whole: Tape | None = None
    ys, cs, parts = [], [], []
    for t0, t1 in pairwise(bounds):
        rows = cut[t0]
        if rows.any() or t0 == 0:
            _, fresh, _ = forward(cell, x[:0], None, params, output_taps=taps, tape=False)
            state = fresh if state is None else state
            old, new = (state, fresh) if paired else ((state,), (fresh,))
            mixed = tuple(np.where(rows[:, None], b, a) for a, b in zip(old, new))
            mixed_state = mixed if paired else mixed[0]
        lengths = None if ends is None else np.clip(ends - t0, 0, t1 - t0)
        y, state, whole, *c = forward(
            cell, x[t0:t1], mixed_state, params, lengths=lengths, output_taps=taps, tape=tape, cells=cells, compute_dtype=compute,
            recompute=recompute, threads=threads,
        )  # fmt: skip
        ys.append(y)
        cs.extend(c)
        if whole is not None:
            parts.append((t0, t1, whole, rows))
    result = np.concatenate(ys)
    if whole is not None:
        whole = Tape(cell, params, [], x, whole.sizes, None, False, paired, started, parts=parts)
    return (result, state, whole, np.concatenate(cs)) if cells else (result, state, whole)


def _backward_in_parts(
    tape: Tape, dy: Array, dstate: Any, gradients: dict[str, Array], accumulate: bool, need_dx: bool, threads: int | None
) -> tuple[Array | None, State, dict[str, Array]]:
    dxs: list[Array] = []
    for t0, t1, part, rows in reversed(tape.parts):
        dx, dstate, _ = backward(part, dy[t0:t1], dstate, gradients, accumulate=accumulate, need_dx=need_dx, threads=threads)
        accumulate = True  # the parts before add to what the last has written
        if dx is not None:
            dxs.insert(0, dx)
        for name, d in zip(("h_0", "c_0"), dstate if tape.paired else (dstate,)):
            if name in gradients:
                gradients[name][0, 0] += d[0, rows].sum(axis=0)
            d[0, rows] = 0
    if not tape.started:
        for name, d in zip(("h_0", "c_0"), dstate if tape.paired else (dstate,)):
            if name in gradients:
                gradients[name] += d.sum(axis=1, keepdims=True)
    return np.concatenate(dxs) if need_dx else None, dstate, gradients
