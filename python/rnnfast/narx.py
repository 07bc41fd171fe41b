"""A NARX in its modes (fed with true values, its own outputs or its past errors), closed-loop forecasts, and training without gradients.

x, d     exogenous input (T, B, I) and true output (T, B, O); the modes read both side by side, (T, B, I + O)
origin   the step from which on the truth is unknown: from there on a net is fed with its own outputs (or with errors of 0)
Dims as in layers.py: N input taps, K output taps, newest first. The equations are NARX's; this file only decides what stands in its feedback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from . import functional
from .layers import NARX
from .module import Array, Module

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("true", "own", "error")
_CELL = "rnn_sigmoid"


def _lags(past: Array, series: Array, count: int, skip: int) -> Array:
    """(T, B, count * F): at step t series[t - skip], series[t - skip - 1], ...; past (P, B, F) stands before it, newest first."""
    whole = np.concatenate((past[::-1], series))
    T, B, F = series.shape
    start = len(past) - skip
    parts = [whole[start - j : start - j + T] for j in range(count)]
    return np.stack(parts, axis=2).reshape(T, B, count * F)


class Feedback(Module):
    """A NARX whose feedback is what `mode` says, trained by `fit` as any other model.

        true    y_t = f(x_t .. x_{t-N+1}, d_{t-1} .. d_{t-K})                          the truth, "series-parallel": all steps at once
        own     y_t = f(x_t .. x_{t-N+1}, y_{t-1} .. y_{t-K})                          its own outputs, "parallel": BPTT
        error   y_t = f(x_t .. x_{t-N+1}, e_{t-1} .. e_{t-K}),  e_t = d_t - y_t        its past errors: BPTT through them

    From step `origin` on the truth is not read: "true" goes on with its own outputs, "error" with errors of 0: so a window of K known steps and 24
    unknown ones trains a forecast of 24 steps. None: the truth is known throughout. mode and origin may be set at any time.

    y, state = model(xd, state=None): xd (T, B, I + O) with d in its last O columns, state (x_past (N-1, B, I), feedback (1, B, K*O)),
    newest first, None for zeros. y (T, B, O). backward(dy) adds to the layer's gradients and returns (None, None): data have no gradient here.

    Raises ValueError for an unknown mode, wrong shapes, lengths or resets (cut the series instead).

    Sources: Lin, Horne, Tiňo and Giles 1996; Narendra and Parthasarathy 1990 (series-parallel and parallel).

    >>> model = Feedback(NARX(1, 1, 8, input_taps=2, output_taps=3, seed=0), "true", origin=5)
    >>> y, state = model(np.ones((9, 4, 2), np.float32))
    >>> y.shape, state[1].shape
    ((9, 4, 1), (1, 4, 3))
    """

    recurrent = True

    def __init__(self, layer: NARX, mode: str = "true", origin: int | None = None) -> None:
        super().__init__()
        self.layer, self.mode, self.origin = layer, mode, origin
        self._plan(0)

    def _plan(self, T: int) -> int:
        """The number of steps that see the truth."""
        if self.mode not in MODES:
            raise ValueError(f"Feedback: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.origin is not None and self.origin < 0:
            raise ValueError(f"Feedback: origin must be at least 0, got {self.origin}")
        return 0 if self.mode == "own" else T if self.origin is None else min(self.origin, T)

    # ---- the layer is the module

    def leaves(self) -> list[Module]:
        """The layer alone."""
        return self.layer.leaves()

    def parameters(self) -> dict[str, Array]:
        """The layer's."""
        return self.layer.parameters()

    def gradients(self) -> dict[str, Array]:
        """The layer's."""
        return self.layer.gradients()

    def zero_gradients(self) -> None:
        """Sets every gradient to 0 and drops the tapes that no backward took."""
        self._tapes.clear()
        self.layer.zero_gradients()

    def train(self, mode: bool = True) -> Self:
        """Training or inference mode. Returns the model."""
        self.training = bool(mode)
        self.layer.train(mode)
        return self

    # ---- forwards and backwards

    def __call__(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> tuple[Array, tuple[Array, Array]]:
        if lengths is not None or reset is not None:
            raise ValueError("Feedback: takes neither lengths nor reset")
        y, new, tape = self._forward(np.asarray(x), state)
        if self.training:
            self._push(tape)
        return y, new

    def _forward(self, xd: Array, state: Any) -> tuple[Array, tuple[Array, Array], Any]:
        n = self.layer
        I, O, N, K = n.input_size, n.output_size, n.input_taps, n.output_taps
        if xd.ndim != 3 or xd.shape[2] != I + O or xd.dtype != n.dtype:
            raise ValueError(f"Feedback: x must be {n.dtype} of shape (T, B, I + O) = (T, B, {I + O}), got {xd.dtype} of {xd.shape}")
        T, B, _ = xd.shape
        x_past, feedback = (np.zeros((N - 1, B, I), n.dtype), np.zeros((1, B, K * O), n.dtype)) if state is None else state
        if x_past.shape != (N - 1, B, I) or feedback.shape != (1, B, K * O):
            raise ValueError(f"Feedback: state must be {(N - 1, B, I)} and {(1, B, K * O)}, got {x_past.shape} and {feedback.shape}")
        known = self._plan(T)
        x, d = xd[..., :I], xd[..., I:]
        taps = _lags(x_past, x, N, 0)
        past = feedback.reshape(B, K, O).swapaxes(0, 1)  # (K, B, O), newest first
        parts, kept = [], []
        if known:
            fed = d[:known]
            if self.mode == "error":
                p = n.parameters()
                twin = p | {"weight_ih_l0": np.concatenate((p["weight_ih_l0"], p["weight_hh_l0"]), axis=1), "weight_hh_l0": -p["weight_hh_l0"]}
                both = np.concatenate((taps[:known], _lags(past, fed, K, 1)), axis=2)  # U e = U d - U y
                y, _, tape = functional.forward(_CELL, both, None, twin, output_taps=K, tape=self.training)
                fed = fed - y
            else:
                y, tape = self._at_once(taps[:known], _lags(past, fed, K, 1))
            parts, kept = [y], [tape]
            past = np.concatenate((past[::-1], fed))[-K:][::-1]
        if known < T:
            if self.mode == "error":
                nothing = np.zeros_like(d[known:])
                y, tape = self._at_once(taps[known:], _lags(past, nothing, K, 1))
                past = np.concatenate((past[::-1], nothing))[-K:][::-1]
            else:
                start = np.ascontiguousarray(past.swapaxes(0, 1)).reshape(1, B, K * O)
                y, end, tape = functional.forward(_CELL, np.ascontiguousarray(taps[known:]), start, n.parameters(), output_taps=K, tape=self.training)
                assert isinstance(end, np.ndarray)
                past = end.reshape(B, K, O).swapaxes(0, 1)
            parts, kept = [*parts, y], [*kept, tape]
        out = np.concatenate(parts) if parts else np.zeros((0, B, O), n.dtype)
        x_end = np.concatenate((x_past[::-1], x))[len(x) :][::-1]
        return out, (x_end, np.ascontiguousarray(past.swapaxes(0, 1)).reshape(1, B, K * O)), (self.mode, known, T, B, kept)

    def _at_once(self, taps: Array, lags: Array) -> tuple[Array, Any]:
        """All steps side by side, each a row of its own with its feedback as its state."""
        T, B, _ = taps.shape
        rows = np.ascontiguousarray(taps).reshape(1, T * B, -1)
        n = self.layer
        y, _, tape = functional.forward(_CELL, rows, lags.reshape(1, T * B, -1), n.parameters(), output_taps=n.output_taps, tape=self.training)
        return y.reshape(T, B, -1), tape

    def backward(self, dy: ArrayLike, dstate: Any = None) -> tuple[None, None]:
        """Undoes the latest forward: parameter gradients add to the layer's. dstate is not taken."""
        mode, known, T, B, kept = self._pop()
        n = self.layer
        K, O = n.output_taps, n.output_size
        dy = np.array(dy)
        if dy.shape != (T, B, O) or dy.dtype != n.dtype:
            self._push((mode, known, T, B, kept))
            raise ValueError(f"Feedback: dy must be {n.dtype} of shape (T, B, O) = {(T, B, O)}, got {dy.dtype} of {dy.shape}")
        _ = n.flat_gradient
        gradients = n.gradients()
        if known < T:
            tape = kept.pop()
            if mode == "error":
                rows = dy[known:].reshape(1, -1, O)
                _, d, _ = functional.backward(tape, rows, None, gradients, need_dx=False)
                assert isinstance(d, np.ndarray)
                lags = d.reshape(T - known, B, K, O)
                for t in range(min(K, T - known)):  # step `known + t` saw e_{known - 1 - i} as its lag t + 1 + i
                    for lag in range(t, min(K, t + known)):
                        dy[known - 1 - (lag - t)] -= lags[t, :, lag]
            else:
                functional.backward(tape, np.ascontiguousarray(dy[known:]), None, gradients, need_dx=False)
        if known and mode == "error":
            _, _, g = functional.backward(kept.pop(), np.ascontiguousarray(dy[:known]), None, None, need_dx=False)
            wide = gradients["weight_ih_l0"].shape[1]
            gradients["weight_ih_l0"] += g["weight_ih_l0"][:, :wide]
            gradients["weight_hh_l0"] += g["weight_ih_l0"][:, wide:] - g["weight_hh_l0"]
            for name in ("bias_ih_l0", "bias_hh_l0", "weight_hr_l0", "bias_hr_l0"):
                gradients[name] += g[name]
        elif known:
            functional.backward(kept.pop(), dy[:known].reshape(1, -1, O), None, gradients, need_dx=False)
        return None, None


def forecast(model: Feedback, x: ArrayLike, d: ArrayLike, x_future: ArrayLike) -> Array:
    """Closed-loop forecast: reads the past in the model's mode, then runs on by itself.

    x (T, B, I) and d (T, B, O) are the past, x_future (F, B, I) what is known beforehand of the inputs to come (the hour, the season, a plan).
    Returns (F, B, O). A model in mode "own" has run on its own outputs from the first step, a "true" or "error" one reads d up to the origin.

    >>> model = Feedback(NARX(1, 1, 4, input_taps=1, output_taps=2, seed=0)).eval()
    >>> forecast(model, np.zeros((5, 1, 1), np.float32), np.ones((5, 1, 1), np.float32), np.zeros((3, 1, 1), np.float32)).shape
    (3, 1, 1)
    """
    x, d, ahead = np.asarray(x), np.asarray(d), np.asarray(x_future)
    unknown = np.zeros((*ahead.shape[:2], d.shape[2]), d.dtype)
    whole = np.concatenate((np.concatenate((x, d), axis=2), np.concatenate((ahead, unknown), axis=2)))
    was, training = model.origin, model.training
    model.origin = len(x)
    model.eval()
    try:
        return model(whole)[0][len(x) :]
    finally:
        model.origin = was
        model.train(training)


def evolve(
    model: Module, score: Callable[[], float], *, method: str = "genetic", bound: float = 2.0, generations: int = 100, seed: int | None = None
) -> float:
    """Trains without gradients, as the slides' NARX was: a genetic algorithm or simulated annealing over all parameters.

    score() -> number to make small, read after each change of the weights. "genetic" is scipy's differential_evolution (Storn and Price 1997: a
    population of 15, crossover and mutation), "annealing" its dual_annealing (Xiang et al. 1997) without local search; both keep every
    parameter within ±bound. Meant for nets of some hundred parameters. Leaves the best weights in the model and returns their score; the start
    values are one of the first candidates.

    Raises ImportError without scipy (the extra "examples"), ValueError for another method.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, seed=0)
    >>> best = evolve(layer, lambda: float((layer.flat**2).sum()), generations=30, seed=0)
    >>> best < 0.01
    True
    """
    if method not in ("genetic", "annealing"):
        raise ValueError(f"evolve: method must be genetic or annealing, got {method!r}")
    try:
        from scipy.optimize import differential_evolution, dual_annealing
    except ImportError as error:
        raise ImportError("evolve needs scipy: pip install 'rnnfast[examples]'") from error
    leaves = [leaf for leaf in model.leaves() if leaf.flat.size]
    start = np.clip(np.concatenate([leaf.flat for leaf in leaves]).astype(np.float64), -bound, bound)

    def put(weights: Array) -> None:
        at = 0
        for leaf in leaves:
            leaf.flat[...] = weights[at : at + leaf.flat.size]
            at += leaf.flat.size

    def objective(weights: Array) -> float:
        put(weights)
        return score()

    limits = [(-bound, bound)] * len(start)
    if method == "genetic":
        rng = np.random.default_rng(seed)
        first = np.concatenate((start[None], np.clip(start + 0.5 * rng.standard_normal((14, len(start))), -bound, bound)))
        found = differential_evolution(objective, limits, maxiter=generations, init=first, polish=False, tol=0, mutation=(0.3, 0.9), rng=rng)
    else:
        found = dual_annealing(objective, limits, maxiter=generations, no_local_search=True, x0=start, rng=np.random.default_rng(seed))
    put(found.x)
    return float(found.fun)
