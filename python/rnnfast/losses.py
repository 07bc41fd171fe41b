"""Divergences: a function of the whole output sequence Y and its derivative with respect to every Y(t).

divergence  Y (T, B, O) -> (value, dY (T, B, O)), dY(t) = dDIV/dY(t). It need not be a sum over time.

Any such function trains a model: `value, dy = divergence(y)`, then `model.backward(dy)`. `fit` calls
`loss(y, target)`, so a divergence of your own is

    def end_to_end(y, target):                 # how far the walk ends from the target
        miss = y.sum(axis=0) - target          # (B, O): couples every step of the sequence
        return 0.5 * float((miss ** 2).sum()), np.broadcast_to(miss, y.shape)

`check_gradient` compares its dY with central differences. The losses below are means over what their weights
count; a weight of 0 (padding, a delay, every step but the last) leaves a step unread. They know no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _core
from .module import Array


def _float(name: str, what: str, array: ArrayLike) -> Array:
    out: Array = np.asarray(array)
    if out.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: {what} must have dtype float32 or float64, got {out.dtype}")
    return out


def _weights(name: str, weights: ArrayLike | None, shape: tuple[int, ...]) -> tuple[Array | None, float]:
    """The weights as float64 (N,) and their sum; None stands for ones."""
    if weights is None:
        return None, float(np.prod(shape))
    out: Array = np.asarray(weights)
    if out.dtype.kind not in "fiub" or out.shape != shape:
        raise ValueError(f"{name}: weights must be numbers of shape {shape}, got {out.dtype} of {out.shape}")
    out = out.reshape(-1).astype(np.float64)
    if not (np.isfinite(out).all() and (out >= 0).all()):
        raise ValueError(f"{name}: weights must be finite and not negative")
    return out, float(out.sum())


def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    gradient: bool = True,
    out: Array | None = None,
) -> tuple[float, Array | None]:
    """Mean negative log likelihood, in nats, of integer targets under softmax(logits), and its gradient.

        loss = Σ_n w_n (log Σ_v exp a_nv - a_n,target) / Σ_n w_n
        da_nv = w_n (softmax(a_n)_v - [v = target_n]) / Σ_n w_n

    logits (..., V) float32 or float64, targets (...) integers in [0, V), weights (...) numbers, True and False
    included: a mask. Where a weight is 0 neither logits nor target are read and the gradient is 0; if all are 0, so
    is the loss. `out` takes the gradient and may be the logits themselves; gradient=False returns (loss, None).
    The loss is summed in float64; exp never overflows, as every row is shifted by its maximum.

    Raises ValueError for wrong shapes, TypeError for wrong dtypes, IndexError for a target out of range.

    >>> loss, da = softmax_cross_entropy(np.zeros((1, 2, 4), np.float32), np.array([[3, 0]]))
    >>> round(loss, 6), da[0, 0].tolist()
    (1.386294, [0.125, 0.125, 0.125, -0.375])
    """
    name = "softmax_cross_entropy"
    a = _float(name, "logits", logits)
    t: Array = np.asarray(targets)
    if a.ndim < 1 or t.shape != a.shape[:-1]:
        raise ValueError(f"{name}: targets must have shape {a.shape[:-1]} for logits of {a.shape}, got {t.shape}")
    if t.dtype.kind not in "iu":
        raise TypeError(f"{name}: targets must be integers, got dtype {t.dtype}")
    if out is not None and (out.shape != a.shape or out.dtype != a.dtype or not out.flags.c_contiguous):
        raise ValueError(f"{name}: out must be a contiguous {a.dtype} array of shape {a.shape}")
    if out is not None and not out.flags.writeable:
        raise ValueError(f"{name}: out is read-only")
    w, total = _weights(name, weights, t.shape)
    V = a.shape[-1]
    t1 = t.reshape(-1).astype(np.int64)
    if w is not None:
        t1[w == 0] = 0
    if t1.size and (V == 0 or t1.min() < 0 or t1.max() >= V):
        raise IndexError(f"{name}: targets must lie in [0, {V}), got {t1.min()} to {t1.max()}")
    da = (np.empty(a.shape, a.dtype) if out is None else out) if gradient else None
    scale = 1 / total if total else 0.0
    sums, picked = _core.softmax(np.ascontiguousarray(a), t1, None if w is None else w * scale, scale, da)
    nll = np.log(sums) - picked
    return float(nll.sum() if w is None else nll @ w) * scale, da


def mean_squared_error(y: ArrayLike, target: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, Array]:
    """Mean squared error (L2) over the weighted steps and the components of y, and its gradient.

        loss = Σ_n w_n Σ_o (y_no - t_no)² / (O Σ_n w_n)        dy_no = 2 w_n (y_no - t_no) / (O Σ w)

    y (..., O) float32 or float64, target the same shape, weights (...) numbers or a mask. Where a weight is 0
    neither y nor target are read and dy is 0. For the slides' ½ Σ (y - t)² multiply both by half the count.

    Raises ValueError for wrong shapes, TypeError for wrong dtypes.

    >>> loss, dy = mean_squared_error(np.array([[[1.0], [3.0]]]), np.array([[[0.0], [1.0]]]))
    >>> loss, dy.ravel().tolist()
    (2.5, [1.0, 2.0])
    """
    name = "mean_squared_error"
    y, target = _float(name, "y", y), np.asarray(target)
    if y.ndim < 1 or target.shape != y.shape:
        raise ValueError(f"{name}: target must have the shape of y {y.shape}, got {target.shape}")
    w, total = _weights(name, weights, y.shape[:-1])
    count = total * y.shape[-1]
    scale = 1 / count if count else 0.0
    miss = np.subtract(y, target, dtype=y.dtype)
    if w is None:
        loss = float(np.vdot(miss, miss)) if y.dtype == np.float64 else float(np.square(miss).sum(dtype=np.float64))
        return loss * scale, miss * y.dtype.type(2 * scale)
    w = w.reshape(y.shape[:-1])[..., None]
    miss = np.where(w == 0, 0, miss)
    loss = float((np.square(miss, dtype=np.float64) * w).sum())
    return loss * scale, (miss * (2 * scale * w)).astype(y.dtype)


def check_gradient(divergence: Callable[[Array], tuple[float, Any]], y: ArrayLike, step: float = 1e-5) -> float:
    """The largest difference between a divergence's dY and central differences, relative to the largest of dY.

        dDIV/dy ≈ (DIV(y + step) - DIV(y - step)) / (2 step), one component of Y at a time, in float64

    Below about 1e-6 for a smooth divergence with a right gradient. Two calls a number: for small Y.

    Raises ValueError if dY has not the shape of Y.

    >>> def end(y):  # ½ |Σ_t y_t|²
    ...     return 0.5 * float((y.sum(axis=0) ** 2).sum()), np.broadcast_to(y.sum(axis=0), y.shape)
    >>> check_gradient(end, np.ones((3, 1, 2))) < 1e-6
    True
    """
    at = np.array(y, np.float64)
    dy: Array = np.asarray(divergence(at.copy())[1])
    if dy.shape != at.shape:
        raise ValueError(f"check_gradient: dY must have shape {at.shape}, got {dy.shape}")
    slopes = np.empty_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (divergence(up)[0] - divergence(down)[0]) / (2 * step)
    return float(np.max(np.abs(dy - slopes), initial=0.0) / max(np.max(np.abs(slopes), initial=0.0), 1e-300))
