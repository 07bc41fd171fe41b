"""The equations of every cell in plain NumPy: the oracle of the tests and the documentation of the maths.

Dims    T time, B batch, I input, H hidden, R output and recurrent state (= H unless projected), K output taps,
        G gates, L layers, D directions, N = the rows of one step (those that have not reached their end).
Names   a_* pre-activations; W, U, b_w, b_u, V, b_v, P the weights; s what a cell carries unit by unit (c of an LSTM);
        d<name> the gradient of the loss with respect to <name>, same shape.
=, +=   gradients of parameters accumulate, gradients of x and of states are overwritten.

Written apart from the C++ kernels, and computed in the dtype of its inputs. It knows one way to run each equation,
a loop over time, and nothing of speed, threads, packing or layers as objects.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
State: TypeAlias = Array | tuple[Array, Array]

__all__ = ["CELLS", "Tape", "backward", "forward"]


# ---- Activations -----------------------------------------------------------------------------------------------------


def _sigmoid(a: Array) -> Array:
    e = np.exp(-np.abs(a))  # at most 1: never overflows
    y: Array = np.where(a >= 0, 1, e) / (1 + e)  #             y = σ(a) = 1 / (1 + e⁻ᵃ)
    return y


def _relu(a: Array) -> Array:
    y: Array = np.maximum(a, 0)
    return y


def _identity(a: Array) -> Array:
    return a


# The derivatives, in terms of the activation's value y.


def _dsigmoid(y: Array) -> Array:
    dy: Array = y * (1 - y)  #                                 dy/da = y (1 - y)
    return dy


def _dtanh(y: Array) -> Array:
    return 1 - y * y  #                                        dy/da = 1 - y²


def _drelu(y: Array) -> Array:
    return (~(y <= 0)).astype(y.dtype)  #                      dy/da = 0 if y <= 0 else 1: NaN lets the gradient pass


def _didentity(y: Array) -> Array:
    return np.ones_like(y)


# ---- Cells: one step forward, the same step backward -----------------------------------------------------------------


@dataclass
class Weights:
    """The parameters of one layer in one direction; an absent one is zero, except that V = None means y = hidden.

    The same class holds their gradients.
    """

    W: Array  #  (G*H, in)    weight_ih   reads x_t
    b_w: Array  # (G*H,)      bias_ih
    U: Array  #  (G*H, K*R)   weight_hh   reads h_{t-1}
    b_u: Array  # (G*H,)      bias_hh
    P: Array  #  (3, H)       weight_peep rows i f o
    V: Array | None  # (R, H) weight_hr   reads hidden_t
    b_v: Array  # (R,)        bias_hr


class Cell(NamedTuple):
    """One step of a cell, without the product with x (before it) and the projection (after it).

    `forward(a, h, s, w) -> hidden, s, kept`:
        a (N, G*H) = W x_t + b_w; h (N, K*R) the operand of the recurrent product; s (N, H), or (N, 0) for an RNN.
    `backward(dhidden, ds, kept, w, d) -> da, dh, ds`:
        takes the gradients of forward's results, returns those of its arguments, and adds to d's U, b_u and P.
    """

    gates: int
    units: bool  # does it carry s?
    forward: Callable[[Array, Array, Array, Weights], tuple[Array, Array, Any]]
    backward: Callable[[Array, Array, Any, Weights, Weights], tuple[Array, Array, Array]]


def _rnn(activation: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Cell:
    """h = φ(W x + U h' + b), with φ the activation (Elman, "Finding structure in time", 1990)."""

    def forward(a: Array, h: Array, s: Array, w: Weights) -> tuple[Array, Array, Any]:
        hidden = activation(a + h @ w.U.T + w.b_u)  #          h = φ(a)
        return hidden, s, (h, hidden)

    def backward(dhidden: Array, ds: Array, kept: Any, w: Weights, d: Weights) -> tuple[Array, Array, Array]:
        h, hidden = kept
        da = dhidden * derivative(hidden)  #                   da = dh dφ/da
        d.U += da.T @ h
        d.b_u += da.sum(axis=0)
        return da, da @ w.U, ds

    return Cell(1, False, forward, backward)


def _lstm_forward(a: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array, Any]:
    """LSTM (Hochreiter & Schmidhuber 1997) with a forget gate (Gers et al. 2000); P = 0 without peepholes.

    The peepholes are diagonal: i and f see c_{t-1}, o sees c_t (Gers & Schmidhuber 2000; Graves 2013, eq. 7 to 11).
    """
    a_i, a_f, a_g, a_o = np.split(a + h @ w.U.T + w.b_u, 4, axis=1)
    p_i, p_f, p_o = w.P
    i = _sigmoid(a_i + p_i * c)  #                             i = σ(a_i + p_i c')
    f = _sigmoid(a_f + p_f * c)  #                             f = σ(a_f + p_f c')
    g = np.tanh(a_g)  #                                        g = tanh(a_g)
    c_t = f * c + i * g  #                                     c = f c' + i g
    o = _sigmoid(a_o + p_o * c_t)  #                           o = σ(a_o + p_o c)
    return o * np.tanh(c_t), c_t, (h, c, i, f, g, o, c_t)  #   h = o tanh(c)


def _lstm_backward(dhidden: Array, dc: Array, kept: Any, w: Weights, d: Weights) -> tuple[Array, Array, Array]:
    h, c, i, f, g, o, c_t = kept
    p_i, p_f, p_o = w.P
    tanh_c = np.tanh(c_t)
    da_o = dhidden * tanh_c * _dsigmoid(o)  #                  h = o tanh(c)
    dc = dc + dhidden * o * _dtanh(tanh_c) + da_o * p_o  #     ... and o = σ(a_o + p_o c)
    da_i = dc * g * _dsigmoid(i)  #                            c = f c' + i g
    da_f = dc * c * _dsigmoid(f)
    da_g = dc * i * _dtanh(g)
    da = np.concatenate((da_i, da_f, da_g, da_o), axis=1)
    d.U += da.T @ h
    d.b_u += da.sum(axis=0)
    d.P += np.stack(((da_i * c).sum(axis=0), (da_f * c).sum(axis=0), (da_o * c_t).sum(axis=0)))
    return da, da @ w.U, dc * f + da_i * p_i + da_f * p_f


def _gru_forward(a: Array, h: Array, s: Array, w: Weights) -> tuple[Array, Array, Any]:
    """GRU with the reset gate after the product: torch, cuDNN, ONNX's linear_before_reset = 1 (Cho et al. 2014, v3)."""
    a_r, a_z, a_n = np.split(a, 3, axis=1)
    u_r, u_z, u_n = np.split(h @ w.U.T + w.b_u, 3, axis=1)
    r = _sigmoid(a_r + u_r)  #                                 r = σ(a_r + u_r)
    z = _sigmoid(a_z + u_z)  #                                 z = σ(a_z + u_z)
    n = np.tanh(a_n + r * u_n)  #                              n = tanh(a_n + r u_n)
    s_t = (1 - z) * n + z * s  #                               s = (1 - z) n + z s'
    return s_t, s_t, (h, s, r, z, n, u_n)


def _gru_backward(dhidden: Array, ds: Array, kept: Any, w: Weights, d: Weights) -> tuple[Array, Array, Array]:
    h, s, r, z, n, u_n = kept
    ds = ds + dhidden
    da_z = ds * (s - n) * _dsigmoid(z)  #                      s = (1 - z) n + z s'
    da_n = ds * (1 - z) * _dtanh(n)
    da_r = da_n * u_n * _dsigmoid(r)  #                        n = tanh(a_n + r u_n)
    du = np.concatenate((da_r, da_z, da_n * r), axis=1)
    d.U += du.T @ h
    d.b_u += du.sum(axis=0)
    return np.concatenate((da_r, da_z, da_n), axis=1), du @ w.U, ds * z


def _gru_reset_before_forward(a: Array, h: Array, s: Array, w: Weights) -> tuple[Array, Array, Any]:
    """GRU with the reset gate before the product: Cho et al. 2014 (v1), ONNX's default; z is torch's, as in `gru`."""
    H = s.shape[1]
    a_rz, a_n = a[:, : 2 * H], a[:, 2 * H :]
    U_rz, U_n = w.U[: 2 * H], w.U[2 * H :]
    b_rz, b_n = w.b_u[: 2 * H], w.b_u[2 * H :]
    r, z = np.split(_sigmoid(a_rz + h @ U_rz.T + b_rz), 2, axis=1)  # r, z = σ(a_rz + U_rz h')
    n = np.tanh(a_n + (r * h) @ U_n.T + b_n)  #                n = tanh(a_n + U_n (r h'))
    s_t = (1 - z) * n + z * s  #                               s = (1 - z) n + z s'
    return s_t, s_t, (h, s, r, z, n)


def _gru_reset_before_backward(dhidden: Array, ds: Array, kept: Any, w: Weights, d: Weights) -> tuple[Array, Array, Array]:
    h, s, r, z, n = kept
    H = s.shape[1]
    U_rz, U_n = w.U[: 2 * H], w.U[2 * H :]
    ds = ds + dhidden
    da_z = ds * (s - n) * _dsigmoid(z)  #                      s = (1 - z) n + z s'
    da_n = ds * (1 - z) * _dtanh(n)
    drh = da_n @ U_n  #                                        n = tanh(a_n + U_n (r h'))
    da_r = drh * h * _dsigmoid(r)
    da_rz = np.concatenate((da_r, da_z), axis=1)
    da = np.concatenate((da_rz, da_n), axis=1)
    d.U += np.concatenate((da_rz.T @ h, da_n.T @ (r * h)))
    d.b_u += da.sum(axis=0)
    return da, drh * r + da_rz @ U_rz, ds * z


_LSTM = Cell(4, True, _lstm_forward, _lstm_backward)
_CELLS = {
    "rnn_tanh": _rnn(np.tanh, _dtanh),
    "rnn_relu": _rnn(_relu, _drelu),
    "rnn_sigmoid": _rnn(_sigmoid, _dsigmoid),
    "rnn_identity": _rnn(_identity, _didentity),
    "lstm": _LSTM,
    "lstm_peephole": _LSTM,
    "gru": Cell(3, True, _gru_forward, _gru_backward),
    "gru_reset_before": Cell(3, True, _gru_reset_before_forward, _gru_reset_before_backward),
}
CELLS = tuple(_CELLS)


# ---- Time: one layer in one direction --------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step keeps for backward."""

    t: int
    rows: Array  #   (B,) bool: t is before the row's end
    fresh: Array  #  (B,) bool: the row starts afresh before this step
    hidden: Array  # (N, H)
    kept: Any


@dataclass
class Run:
    """One layer in one direction: what it read, its weights, and its steps in the order they were taken."""

    x: Array  #         (T, B, in)
    weights: Weights
    steps: list[Step]


def _order(active: Array, reset: Array, reverse: bool) -> Iterator[tuple[int, Array, Array]]:
    """Yield (t, rows, fresh) for every step in the order of one direction; active and reset are (T, B) bool.

    A reset at t cuts a sequence between t-1 and t. Forward in time the row starts afresh at t, in reverse at t-1.
    """
    T = len(active)
    if not reverse:
        for t in range(T):
            yield t, active[t], reset[t]
    else:
        for t in reversed(range(T)):
            yield t, active[t], reset[t + 1] if t + 1 < T else np.zeros_like(reset[t])


def _run_forward(cell: Cell, run: Run, order: Iterator[tuple[int, Array, Array]], h: Array, s: Array, h_0: Array, s_0: Array) -> tuple[Array, Array]:
    """Run one direction from the state h (B, K*R), s (B, H) and leave the last state in it.

    h_0 and s_0 are the fresh state. Returns y (T, B, R) and s of every step (T, B, H), both 0 where no row was active.
    """
    w = run.weights
    a = run.x @ w.W.T + w.b_w  #                               a = W x + b_w for all times at once
    T, B, GH = a.shape
    R = GH // cell.gates if w.V is None else len(w.V)
    y = np.zeros((T, B, R), a.dtype)
    s_all = np.zeros((T, B, s.shape[1]), a.dtype)
    for t, rows, fresh in order:
        h[fresh], s[fresh] = h_0, s_0
        hidden, s[rows], kept = cell.forward(a[t, rows], h[rows], s[rows], w)
        y[t, rows] = hidden if w.V is None else hidden @ w.V.T + w.b_v  #  y = V hidden + b_v
        h[rows] = np.concatenate((y[t, rows], h[rows, :-R]), axis=1)  #   h = [y_t, ..., y_{t-K+1}]
        s_all[t] = np.where(rows[:, None], s, 0)
        run.steps.append(Step(t, rows, fresh, hidden, kept))
    return y, s_all


def _run_backward(cell: Cell, run: Run, dy: Array, dh: Array, ds: Array, d: Weights, dh_0: Array, ds_0: Array) -> Array:
    """Go back through one direction; dh and ds hold the last state's gradient and leave as the initial state's.

    dy (T, B, R). Adds to the parameters' gradients d, dh_0 and ds_0. Returns dx (T, B, in).
    """
    w = run.weights
    T, B, R = dy.shape
    da = np.zeros((T, B, len(w.W)), dy.dtype)
    for t, rows, fresh, hidden, kept in reversed(run.steps):
        dy_t = dy[t, rows] + dh[rows, :R]  #                   h = [y_t, ..., y_{t-K+1}]
        dhidden = dy_t
        if w.V is not None and d.V is not None:
            dhidden = dy_t @ w.V  #                            y = V hidden + b_v
            d.V += dy_t.T @ hidden
            d.b_v += dy_t.sum(axis=0)
        dh_older = np.concatenate((dh[rows, R:], np.zeros_like(dy_t)), axis=1)
        da[t, rows], dh_t, ds[rows] = cell.backward(dhidden, ds[rows], kept, w, d)
        dh[rows] = dh_t + dh_older
        dh_0 += dh[fresh].sum(axis=0)
        ds_0 += ds[fresh].sum(axis=0)
        dh[fresh], ds[fresh] = 0, 0
    d.W += np.tensordot(da, run.x, axes=((0, 1), (0, 1)))  #   a = W x + b_w
    d.b_w += da.sum(axis=(0, 1))
    return da @ w.W


# ---- The whole: layers, directions, options --------------------------------------------------------------------------


@dataclass
class Tape:
    """What `forward` keeps for `backward`."""

    cell: Cell
    params: Mapping[str, Array]
    runs: list[list[Run]]  # of every layer, of every direction
    active: Array  # (T, B) bool: t is before the row's end
    dropout_masks: Sequence[Array] | None
    skip: bool
    output_taps: int
    units: int  # width of s: H, or 0 for an RNN
    tied: bool  # is s the newest tap of h? A GRU that is not projected
    paired: bool  # is the state a pair (h, c)? An LSTM, a projected GRU
    started: bool  # was the initial state given?


def _weights(of: Mapping[str, Array], suffix: str, gates: int) -> Weights:
    """Views of one layer's and direction's arrays in a dict of parameters, or of their gradients."""
    U = of["weight_hh" + suffix]
    V = of.get("weight_hr" + suffix)
    H = len(U) // gates
    R = H if V is None else len(V)

    def get(name: str, *shape: int) -> Array:
        found = of.get(name + suffix)
        return np.zeros(shape, U.dtype) if found is None else found

    return Weights(
        W=of["weight_ih" + suffix],
        b_w=get("bias_ih", gates * H),
        U=U,
        b_u=get("bias_hh", gates * H),
        P=get("weight_peep", 3, H),
        V=V,
        b_v=get("bias_hr", R),
    )


def _suffix(layer: int, direction: int) -> str:
    return f"_l{layer}" + "_reverse" * direction


def _fresh(of: Mapping[str, Array], runs: int, units: int, taps: int, R: int, dtype: Any) -> tuple[Array, Array]:
    """h_0 (L*D, 1, K*R) and c_0 (L*D, 1, H) of a dict of parameters, or of their gradients; zeros where absent."""
    h_0, c_0 = of.get("h_0"), of.get("c_0")
    return (
        np.zeros((runs, 1, taps * R), dtype) if h_0 is None else h_0,
        np.zeros((runs, 1, units), dtype) if c_0 is None else c_0,
    )


def forward(
    cell: str,
    x: Array,
    state: State | None,
    params: Mapping[str, Array],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    skip: bool = False,
    lengths: Array | None = None,
    reset: Array | None = None,
    dropout_masks: Sequence[Array] | None = None,
    output_taps: int = 1,
    cells: bool = False,
    tape: bool = True,
) -> tuple[Any, ...]:
    """Run a stack of recurrent layers over a batch of sequences.

    One step of each cell, with h' and c' the state before it, W, U, b = b_ih + b_hh its weights, and σ the sigmoid::

        rnn_tanh, rnn_relu, rnn_sigmoid, rnn_identity
                            h = φ(W x + b_ih + U h' + b_hh)
        lstm                i = σ(a_i), f = σ(a_f), g = tanh(a_g), o = σ(a_o)      with a = W x + b_ih + U h' + b_hh
                            c = f c' + i g
                            h = o tanh(c)
        lstm_peephole       ... with p_i c' added to a_i, p_f c' to a_f and p_o c to a_o
        gru                 r, z = σ(W x + b_ih + U h' + b_hh)
                            n = tanh(W_n x + b_in + r (U_n h' + b_hn))
                            h = (1 - z) n + z h'
        gru_reset_before    n = tanh(W_n x + b_in + U_n (r h') + b_hn), the rest as gru
        projection          y = V hidden + b_hr is the output and what U reads; a GRU keeps its own h' as c
        output taps         U reads [y_{t-1}, ..., y_{t-K}]: a NARX network is rnn_sigmoid with V, b_hr and K taps

    Args:
        cell: one of `CELLS`.
        x: (T, B, I), float32 or float64.
        state: None, or h (L*D, B, K*R), or for an LSTM and a projected GRU the pair (h, c) with c (L*D, B, H).
            None starts from the parameters h_0 and c_0 if there, else from zeros.
        params: name -> array, with the suffix _l{layer} and, for the second direction, _reverse. Gates are in torch's
            order, i f g o and r z n. weight_ih (G*H, in); weight_hh (G*H, K*R); optional bias_ih and bias_hh (G*H,);
            weight_hr (R, H), optional, projects; bias_hr (R,), optional; weight_peep (3, H), rows i f o, of a
            lstm_peephole. Without a suffix, optional: h_0 (L*D, 1, K*R) and c_0 (L*D, 1, H).
        skip: layers above the first read [x, y_{l-1}], and y is every layer's output side by side.
        lengths: int64 (B,), 0 <= lengths <= T. Past a row's end y is 0, x is not read and the state stays as it is;
            the reverse direction starts at the row's own end.
        reset: bool (T, B). A row's reset at t makes the call equal to two: one on [0, t), one on [t, T), each direction
            entering its second part with the fresh state (h_0 and c_0, or zeros). Ignored at and past a row's end.
        dropout_masks: L-1 arrays (T, B, D*R), multiplied onto y_{l-1} where layer l reads it.
        output_taps: K, above 1 for one layer in one direction.
        cells: append every step's cell state to the result, LSTM only.
        tape: whether to keep what `backward` needs.

    Returns:
        y (T, B, D*R), with skip (T, B, L*D*R); the state at each row's own end (of the reverse direction: after its
        step at t = 0), like `state`; the tape or None; and with `cells` c (T, B, D*H), with skip (T, B, L*D*H).

    Raises:
        ValueError: an unknown cell, or options that do not go together.

    Sources: Elman, "Finding structure in time" (1990); Hochreiter & Schmidhuber, "Long short-term memory" (1997); Gers
    & Schmidhuber, "Recurrent nets that time and count" (2000); Lin et al., "Learning long-term dependencies in NARX
    recurrent neural networks" (1996); Sak et al., "Long short-term memory recurrent neural network architectures"
    (2014), for the projection; Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014).

    A sum that starts afresh at the reset:

    >>> one = {"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.ones((1, 1))}
    >>> x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    >>> reset = np.array([False, False, True, False]).reshape(4, 1)
    >>> y, state, tape = forward("rnn_identity", x, None, one, reset=reset)
    >>> y.ravel().tolist()
    [1.0, 3.0, 3.0, 7.0]

    Its loss is the last output, which hears of the last two inputs only:

    >>> dy = np.array([0.0, 0.0, 0.0, 1.0]).reshape(4, 1, 1)
    >>> dx, dstate, gradients = backward(tape, dy)
    >>> dx.ravel().tolist()
    [0.0, 0.0, 1.0, 1.0]
    >>> gradients["weight_ih_l0"].tolist()
    [[7.0]]
    """
    if cell not in _CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    kind = _CELLS[cell]
    lstm = kind is _LSTM
    projected = "weight_hr_l0" in params
    if cell == "gru_reset_before" and (projected or output_taps > 1):
        raise ValueError("gru_reset_before: r multiplies the state unit by unit, so it takes no projection and no taps")
    if output_taps > 1 and (num_layers > 1 or bidirectional):
        raise ValueError("output_taps above 1 need num_layers=1 and bidirectional=False")
    if cells and not lstm:
        raise ValueError(f"{cell} has no cell state")

    T, B, _ = x.shape
    L, D = num_layers, 1 + bidirectional
    H = len(params["weight_hh_l0"]) // kind.gates
    R = len(params["weight_hr_l0"]) if projected else H
    units = H if kind.units else 0
    tied = kind.units and not lstm and not projected
    paired = kind.units and not tied

    ends = np.full(B, T) if lengths is None else lengths
    active = np.arange(T)[:, None] < ends  # (T, B)
    cut = np.zeros((T, B), np.bool_) if reset is None else reset & active
    x = np.where(active[..., None], x, 0)

    h_0, s_0 = _fresh(params, L * D, units, output_taps, R, x.dtype)
    s_0 = h_0[..., :H] if tied else s_0
    if state is None:
        h, s = (np.repeat(fresh, B, axis=1) for fresh in (h_0, s_0))
    elif isinstance(state, tuple):
        h, s = (np.array(part) for part in state)
    else:
        h = np.array(state)
        s = h[..., :units].copy()

    runs: list[list[Run]] = []
    ys: list[Array] = []  # of every layer: (T, B, D*R)
    cs: list[Array] = []  # of every layer: (T, B, D*H)
    for layer in range(L):
        below = x
        if layer > 0:
            below = ys[-1] if dropout_masks is None else ys[-1] * dropout_masks[layer - 1]
            below = np.concatenate((x, below), axis=2) if skip else below
        runs.append([])
        outputs = []
        for d in range(D):
            run = Run(below, _weights(params, _suffix(layer, d), kind.gates), [])
            k = layer * D + d
            outputs.append(_run_forward(kind, run, _order(active, cut, d == 1), h[k], s[k], h_0[k], s_0[k]))
            runs[-1].append(run)
        ys.append(np.concatenate([y for y, _ in outputs], axis=2))
        cs.append(np.concatenate([c for _, c in outputs], axis=2))

    kept = Tape(kind, params, runs, active, dropout_masks, skip, output_taps, units, tied, paired, state is not None)
    result = (
        np.concatenate(ys, axis=2) if skip else ys[-1],
        (h, s) if paired else h,
        kept if tape else None,
    )
    return (*result, np.concatenate(cs, axis=2) if skip else cs[-1]) if cells else result


def backward(
    tape: Tape,
    dy: Array,
    dstate: State | None = None,
    gradients: dict[str, Array] | None = None,
    *,
    need_dx: bool = True,
) -> tuple[Array | None, State, dict[str, Array]]:
    """Go back through a forward call: from the gradients of its results to those of its arguments.

    Args:
        tape: of `forward`; it may be used any number of times.
        dy: like y. Not read past a row's end.
        dstate: like the returned state, or None for zeros.
        gradients: name -> array like the parameter, which is added to; None starts from zeros.
        need_dx: False returns None for dx.

    Returns:
        dx (T, B, I), 0 past a row's end; dstate, of the initial state; gradients. Where forward had no state, h_0 and
        c_0 collect the initial state's gradient over the batch; they collect it at every reset too.

    Source: Werbos, "Backpropagation through time: what it does and how to do it" (1990).

    Twice the gradient, from two passes over one tape:

    >>> params = {"weight_ih_l0": np.full((1, 1), 2.0), "weight_hh_l0": np.full((1, 1), 3.0)}
    >>> y, state, tape = forward("rnn_identity", np.ones((2, 1, 1)), None, params)
    >>> dx, dstate, gradients = backward(tape, np.ones((2, 1, 1)))
    >>> dx, dstate, gradients = backward(tape, np.ones((2, 1, 1)), gradients=gradients)
    >>> dx.ravel().tolist(), dstate.ravel().tolist(), gradients["weight_hh_l0"].tolist()
    ([8.0, 2.0], [12.0], [[4.0]])
    """
    kind, runs = tape.cell, tape.runs
    L, D = len(runs), len(runs[0])
    first = runs[0][0]
    GH, KR = first.weights.U.shape
    H, R = GH // kind.gates, KR // tape.output_taps
    _, B, in_0 = first.x.shape  #                              in_0 = I
    if gradients is None:
        gradients = {name: np.zeros_like(value) for name, value in tape.params.items()}

    dy = np.where(tape.active[..., None], dy, 0)
    if dstate is None:
        dh, ds = np.zeros((L * D, B, KR), dy.dtype), np.zeros((L * D, B, tape.units), dy.dtype)
    elif isinstance(dstate, tuple):
        dh, ds = (np.array(part) for part in dstate)
    else:
        dh, ds = np.array(dstate), np.zeros((L * D, B, tape.units), dy.dtype)
    dh_0, ds_0 = _fresh(gradients, L * D, tape.units, tape.output_taps, R, dy.dtype)

    dx = np.zeros_like(first.x)
    dy_l = dy[..., -D * R :]  # (T, B, D*R), of the last layer
    for layer in reversed(range(L)):
        dbelow = np.zeros_like(runs[layer][0].x)
        for d, run in enumerate(runs[layer]):
            k = layer * D + d
            dw = _weights(gradients, _suffix(layer, d), kind.gates)
            dy_d = dy_l[..., d * R : (d + 1) * R]
            dbelow += _run_backward(kind, run, dy_d, dh[k], ds[k], dw, dh_0[k], ds_0[k])
            if tape.tied:
                dh[k, :, :H] += ds[k]  #                       s' = the newest tap of h'
                dh_0[k, :, :H] += ds_0[k]  #                   ds_0 is scratch here: a tied cell has no c_0
        if layer == 0:
            dx += dbelow
            break
        if tape.skip:
            dx += dbelow[..., :in_0]
            dbelow = dbelow[..., in_0:]
        dy_l = dbelow if tape.dropout_masks is None else dbelow * tape.dropout_masks[layer - 1]
        if tape.skip:
            dy_l = dy_l + dy[..., (layer - 1) * D * R : layer * D * R]

    if not tape.started:
        dh_0 += dh.sum(axis=1, keepdims=True)
        if tape.paired:
            ds_0 += ds.sum(axis=1, keepdims=True)
    return dx if need_dx else None, (dh, ds) if tape.paired else dh, gradients
