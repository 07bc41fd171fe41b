"""Where gradients go: their norms by time lag, by layer and by neuron, the singular values of dstate_t/dstate_0; and what gates and cells do.

state    what a recurrent layer hands from step to step, as one vector: h, or h and c side by side, of all its layers; S its width
lag      steps between the moment an error arises and the state it is traced back to
Everything goes through single steps of `functional`, whose backward hands the state's gradient on. It knows the layers' attributes, not
their equations; pictures are in plots.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import functional
from .layers import GRU, LSTM, RNN
from .module import Array, Module

_Layer = LSTM | GRU | RNN


def _options(layer: _Layer) -> dict[str, Any]:
    if layer.bidirectional:
        raise ValueError("diagnostics: a bidirectional layer has no lag: its reverse direction reads the future")
    return {"num_layers": layer.num_layers, "skip": layer.skip}


def _join(state: Any) -> Array:
    """(L, B, R), or the pair, as (B, S)."""
    parts = state if isinstance(state, tuple) else (state,)
    return np.concatenate([np.moveaxis(part, 1, 0).reshape(part.shape[1], -1) for part in parts], axis=1)


def _split(layer: _Layer, rows: Array) -> Any:
    """The inverse of `_join`."""
    widths = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * layer.paired
    parts, start = [], 0
    for width in widths:
        stop = start + layer.num_layers * width
        parts.append(np.ascontiguousarray(np.moveaxis(rows[:, start:stop].reshape(len(rows), layer.num_layers, width), 1, 0)))
        start = stop
    return tuple(parts) if layer.paired else parts[0]


def state_gradients(layer: _Layer, x: ArrayLike, dy: ArrayLike, state: Any = None) -> Array:
    """dDIV/dstate at every step: how much of an error, backwards through time, is left where.

    layer: LSTM, GRU or RNN of one direction. x (T, B, I), dy (T, B, R) = dDIV/dy, both of the layer's dtype; state as for the layer.
    Returns (T + 1, B, S): [t] is dDIV/dstate_{t-1}, [0] the initial state's, [T] zeros. Parameter gradients are left alone.

    Raises ValueError for a bidirectional layer.

    >>> layer = RNN(1, 4, seed=0)
    >>> dy = np.zeros((30, 1, 4), np.float32)
    >>> dy[-1] = 1
    >>> norms = np.linalg.norm(state_gradients(layer, np.ones((30, 1, 1), np.float32), dy), axis=-1)[:, 0]
    >>> bool(norms[0] < 1e-3 < norms[-2])  # a plain RNN forgets
    True
    """
    x, dy = np.asarray(x), np.asarray(dy)
    options = _options(layer)
    tapes = []
    for step in x:
        _, state, tape = functional.forward(layer.cell, step[None], state, layer.parameters(), **options)
        tapes.append(tape)
    rows = _join(state) if len(x) else np.zeros((x.shape[1], 0), layer.dtype)
    found = np.zeros((len(x) + 1, *rows.shape), layer.dtype)
    dstate = None
    for t in reversed(range(len(x))):
        _, dstate, _ = functional.backward(tapes[t], dy[t : t + 1], dstate, None, need_dx=False)
        found[t] = _join(dstate)
    return found


def log_singular_values(layer: _Layer, x: ArrayLike, state: Any = None) -> Array:
    """log10 of the singular values of dstate_t/dstate_{-1} along one sequence: vanishing below 0, exploding above.

        J_t = dstate_t/dstate_{t-1} J_{t-1},  J_{-1} = 1       rescaled at every step, so that nothing under- or overflows

    x (T, I) for one sequence, state as for the layer with one row, None for its own. Returns (T, S), largest first, -inf for an exact 0. Each
    step costs one backward of S rows and an SVD of S x S.

    Raises ValueError for a bidirectional layer.

    >>> layer = RNN(1, 3, nonlinearity="identity", dtype="float64", seed=0)
    >>> layer.parameters()["weight_hh_l0"][...] = 0.1 * np.eye(3)
    >>> np.round(log_singular_values(layer, np.zeros((4, 1))), 6)[:, 0].tolist()
    [-1.0, -2.0, -3.0, -4.0]
    """
    x = np.asarray(x)
    options = _options(layer)
    found, product, scale = [], None, 0.0
    for step in x:
        if product is None:  # the first step tells the state's width
            start = state if state is not None else _start(layer)
            rows = _join(start)
            product = np.eye(rows.shape[1])
        S = len(product)
        _, after, tape = functional.forward(
            layer.cell, np.repeat(step[None, None], S, axis=1), _split(layer, np.repeat(rows, S, axis=0)), layer.parameters(), **options
        )
        y = np.zeros((1, S, layer.output_size), layer.dtype)
        _, back, _ = functional.backward(tape, y, _split(layer, np.eye(S, dtype=layer.dtype)), None, need_dx=False)
        rows = _join(after)[:1]
        product = _join(back).astype(np.float64) @ product  # row i of the step's Jacobian is d state_i / d the state before
        size = float(np.abs(product).max(initial=0.0)) or 1.0
        product, scale = product / size, scale + np.log10(size)
        with np.errstate(divide="ignore"):
            found.append(np.log10(np.linalg.svd(product, compute_uv=False)) + scale)
    return np.array(found)


def _start(layer: _Layer) -> Any:
    """The layer's own initial state for one row."""
    p = layer.parameters()
    R = layer.proj_size or layer.hidden_size
    h = np.array(p.get("h_0", np.zeros((layer.num_layers, 1, R), layer.dtype)))
    return (h, np.array(p.get("c_0", np.zeros((layer.num_layers, 1, layer.hidden_size), layer.dtype)))) if layer.paired else h


def activities(layer: _Layer, x: ArrayLike, state: Any = None) -> dict[str, Array]:
    """What every unit of a layer does at every step: its gates, its cell and its output, each (T, B, H), by the letters of the equations.

        LSTM  i f g o c h        GRU  r z n h        RNN  h

    layer: one layer of one direction without projection; x (T, B, I) and state as for it. All are the kernels' own numbers, which they keep for
    backward. For pictures see `plots.activity_plot` and `plots.text_activity`.

    Raises ValueError for several layers, a bidirectional or a projected one.

    >>> layer = LSTM(2, 3, seed=0)
    >>> a = activities(layer, np.ones((4, 1, 2), np.float32))
    >>> bool(np.allclose(a["c"][1:], a["f"][1:] * a["c"][:-1] + a["i"][1:] * a["g"][1:], atol=1e-6)), list(a)
    (True, ['i', 'f', 'g', 'o', 'c', 'h'])
    """
    if layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        raise ValueError("activities: the layer must be one layer of one direction without projection")
    y, _, tape = functional.forward(layer.cell, np.asarray(x), state, layer.parameters())
    gates = {"lstm": "ifgo", "gru": "rzn", "rnn": ""}[layer.cell.split("_")[0]]
    if not gates:
        return {"h": y}
    # The kernels' tape (csrc/sequence.hpp): of every token [padded / 16][slots][16] (and q); behind them an LSTM's c of every token.
    (T, B), H, slots = y.shape[:2], layer.hidden_size, 3 if layer.cell == "gru_reset_before" else 4
    padded = -(-H // 16) * 16
    tokens, c = np.split(tape.runs[0].tapes[0], [T * B * 4 * padded])
    kept = tokens.reshape(T, B, 4 * padded)[..., : slots * padded].reshape(T, B, -1, slots, 16).swapaxes(2, 3).reshape(T, B, slots, padded)
    found = {gate: kept[:, :, k, :H].copy() for k, gate in enumerate(gates)}
    return found | ({"c": c.reshape(T, B, padded)[..., :H].copy()} if c.size else {}) | {"h": y}


def neuron_gradients(model: Module) -> dict[str, Array]:
    """The norm of the gradient of each neuron's incoming weights, |∇_{W_neuron} DIV|, for every weight matrix of a model.

    Read after a backward. Returns {parameter: (rows,)} for the parameters called weight..., rows being neurons (for gated cells the gates' units, in
    the order of the gates).

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(2, 1, bias=False, seed=0)
    >>> layer.flat_gradient[:] = 3, 4
    >>> neuron_gradients(layer)["weight"].tolist()
    [5.0]
    """
    gradients = {name: g for name, g in model.gradients().items() if name.rpartition(".")[2].startswith("weight") and g.ndim > 1}
    return {name: np.sqrt(np.square(g.reshape(len(g), -1), dtype=np.float64).sum(axis=1)) for name, g in gradients.items()}


def lag_norms(gradients: Array) -> Array:
    """The mean over the batch of |dDIV/dstate| by lag: (T + 1, B, S) of `state_gradients` -> (T,), lag 0 (the last step) first.

    >>> lag_norms(np.ones((4, 2, 9))).tolist()
    [3.0, 3.0, 3.0]
    """
    norms: Array = np.linalg.norm(gradients, axis=-1).mean(axis=1)
    return norms[:-1][::-1]
