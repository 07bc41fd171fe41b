"""Convolutions and what stands around them: CausalConv1d (a TDNN's layer), Conv2d, MaxPool2d, Flatten, Activation. Plain NumPy.

Dims    T time, B batch, I input and O output channels, K taps; C, h, w a picture's channels, height, width; N everything before them.
taps    a convolution is one product: the K (or kh·kw) shifted inputs side by side, times the weights
y = layer(x) and dx = layer.backward(dy), as in dense.py; parameter names and layouts are torch's. They do not know lengths: a causal
convolution never reads ahead, so that padding behind a row's end (zeros, not NaN) changes nothing before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .dense import _count, _Map
from .module import Array

_TAPS = 1 << 17  # numbers of a convolution's taps at a time: they stay in the cache


class CausalConv1d(_Map):
    """A finite response over time, shared by all steps: the time-delay neural network's layer (Waibel et al. 1989).

        y_t = b + Σ_k W_k x_{t - (K-1-k) d}      x before the first step is 0, d the dilation

    x (T, B, I) -> y (T, B, O). Parameters: weight (O, I, K), newest tap last, bias (O,): torch.nn.Conv1d's of an input with (K-1) d
    zeros put before it; drawn from U(-1/√(I K), 1/√(I K)). Backwards:

        dx_t = Σ_k W_kᵀ dy_{t + (K-1-k) d}      dW_k += Σ_t dy_t x_{t - (K-1-k) d}ᵀ      db += Σ_t dy_t

    Raises ValueError for a wrong shape, TypeError for a wrong dtype, RuntimeError for a backward without a forward.

    >>> layer = CausalConv1d(1, 1, 2, seed=0)
    >>> layer.parameters()["weight"][...] = [[[10, 1]]]
    >>> layer.parameters()["bias"][...] = 0
    >>> layer(np.array([1, 2, 3], np.float32).reshape(3, 1, 1)).ravel().tolist()
    [1.0, 12.0, 23.0]
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1, bias: bool = True, *, dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "dilation": dilation}
        self.in_channels, self.out_channels, self.kernel_size, self.dilation = (_count(self._name, *item) for item in sizes.items())
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_channels, in_channels, kernel_size)}
        self._allocate(shapes | ({"bias": (out_channels,)} if bias else {}), dtype)
        bound = 1 / math.sqrt(in_channels * kernel_size)
        self.flat[:] = np.random.default_rng(seed).uniform(-bound, bound, self.flat.size)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        if x.ndim != 3:
            raise ValueError(f"{self._name}: x must have shape (T, B, I), got {x.shape}")
        self._check("x", x, (*x.shape[:2], self.in_channels))
        T, B, I = x.shape
        K, d = self.kernel_size, self.dilation
        taps = np.zeros((T, B, K, I), x.dtype)  # oldest first
        for k in range(K):
            lag = (K - 1 - k) * d
            taps[lag:, :, k] = x[: max(T - lag, 0)]
        rows = taps.reshape(T * B, K * I)
        y: Array = rows @ self._rows()
        if "bias" in self._parameters:
            y += self._parameters["bias"]
        return y.reshape(T, B, self.out_channels), (rows if self.training else None, x.shape)

    def _rows(self) -> Array:
        """The weights as (K I, O)."""
        rows: Array = self._parameters["weight"].transpose(2, 1, 0).reshape(-1, self.out_channels)
        return rows

    def _backward(self, tape: Any, dy: Array) -> Array:
        rows, (T, B, I) = tape
        O, K, d = self.out_channels, self.kernel_size, self.dilation
        self._check("dy", dy, (T, B, O))
        _ = self.flat_gradient
        flat = np.ascontiguousarray(dy).reshape(T * B, O)
        self._gradients["weight"] += (flat.T @ rows).reshape(O, K, I).transpose(0, 2, 1)
        if "bias" in self._gradients:
            self._gradients["bias"] += flat.sum(axis=0)
        dtaps = (flat @ self._rows().T).reshape(T, B, K, I)
        dx = np.zeros((T, B, I), dy.dtype)
        for k in range(K):
            lag = (K - 1 - k) * d
            dx[: max(T - lag, 0)] += dtaps[lag:, :, k]
        return dx


class Conv2d(_Map):
    """A convolution over pictures of stride 1, as torch.nn.Conv2d (a correlation: the kernel is not flipped).

        y[o, r, s] = b_o + Σ_c Σ_i Σ_j W[o, c, i, j] x[c, r + i - p, s + j - p]      x outside is 0, p the padding

    x (..., I, h, w) -> y (..., O, h + 2p - kh + 1, w + 2p - kw + 1); the axes before may be (B,) or (T, B). Parameters: weight
    (O, I, kh, kw), bias (O,), drawn from U(-1/√(I kh kw), 1/√(I kh kw)).

    Raises ValueError for a wrong shape or a picture smaller than the kernel, TypeError for a wrong dtype.

    >>> layer = Conv2d(3, 8, 5, padding=2, seed=0)
    >>> layer(np.ones((4, 3, 28, 14), np.float32)).shape
    (4, 8, 28, 14)
    >>> layer.backward(np.ones((4, 8, 28, 14), np.float32)).shape
    (4, 3, 28, 14)
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], padding: int = 0, bias: bool = True, *,
        dtype: DTypeLike = "float32", seed: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = _count(self._name, "in_channels", in_channels), _count(self._name, "out_channels", out_channels)
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.kernel_size = _count(self._name, "kernel_size", kh), _count(self._name, "kernel_size", kw)
        if not 0 <= padding < max(kh, kw):
            raise ValueError(f"{self._name}: padding must lie in [0, {max(kh, kw)}), got {padding}")
        self.padding = padding
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_channels, in_channels, kh, kw)}
        self._allocate(shapes | ({"bias": (out_channels,)} if bias else {}), dtype)
        bound = 1 / math.sqrt(in_channels * kh * kw)
        self.flat[:] = np.random.default_rng(seed).uniform(-bound, bound, self.flat.size)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        (kh, kw), p = self.kernel_size, self.padding
        if x.ndim < 3 or x.shape[-2] + 2 * p < kh or x.shape[-1] + 2 * p < kw:
            raise ValueError(f"{self._name}: x must have shape (..., I, h, w) of at least {(kh - 2 * p, kw - 2 * p)}, got {x.shape}")
        self._check("x", x, (*x.shape[:-3], self.in_channels, *x.shape[-2:]))
        flat, high, wide = self._flat(x), x.shape[-2] + 2 * p - kh + 1, x.shape[-1] + 2 * p
        N, O = flat.shape[1], self.out_channels
        y: Array = np.empty((N, O, high, wide - kw + 1), x.dtype)
        for part, taps in self._taps(flat, high * wide, wide):
            rows = self._parameters["weight"].reshape(O, -1) @ taps
            if "bias" in self._parameters:
                rows += self._parameters["bias"][:, None]
            y[part] = rows.reshape(O, -1, high, wide)[..., : wide - kw + 1].swapaxes(0, 1)
        return y.reshape(*x.shape[:-3], *y.shape[1:]), (flat if self.training else None, x.shape)

    def _flat(self, x: Array) -> Array:
        """Pictures with their border, row after row: (I, N, (h + 2p) (w + 2p) + kw - 1)."""
        *_, I, h, w = x.shape
        p, N = self.padding, math.prod(x.shape[:-3])
        whole = (h + 2 * p) * (w + 2 * p)
        flat = np.zeros((I, N, whole + self.kernel_size[1] - 1), x.dtype)
        flat[..., :whole].reshape(I, N, h + 2 * p, -1)[:, :, p : p + h, p : p + w] = x.reshape(N, I, h, w).swapaxes(0, 1)
        return flat

    def _lags(self, wide: int) -> list[int]:
        """Where in a picture of rows of `wide` numbers, one behind the other, each tap's picture begins."""
        return [i * wide + j for i in range(self.kernel_size[0]) for j in range(self.kernel_size[1])]

    def _taps(self, flat: Array, size: int, wide: int) -> Iterator[tuple[slice, Array]]:
        """Some pictures after the other, so that they stay in the cache: (which, (I kh kw, n size)), `size` numbers each from every lag on."""
        I, N, _ = flat.shape
        lags = self._lags(wide)
        most = max(1, _TAPS // max(I * len(lags) * size, 1))
        space = np.empty((I, len(lags), min(most, N), size), flat.dtype)
        for start in range(0, N, most):
            part = slice(start, min(start + most, N))
            taps = space if part.stop - start == space.shape[2] else np.empty((I, len(lags), part.stop - start, size), flat.dtype)
            for k, lag in enumerate(lags):
                taps[:, k] = flat[:, part, lag : lag + size]
            yield part, taps.reshape(I * len(lags), -1)

    def _backward(self, tape: Any, dy: Array) -> Array:
        flat, shape = tape
        O, I, (kh, kw), p = self.out_channels, self.in_channels, self.kernel_size, self.padding
        h, w = shape[-2:]
        high, wide = h + 2 * p - kh + 1, w + 2 * p
        self._check("dy", dy, (*shape[:-3], O, high, wide - kw + 1))
        _ = self.flat_gradient
        weight, dweight = (of["weight"].reshape(O, -1) for of in (self._parameters, self._gradients))
        d, dflat = dy.reshape(-1, O, high, wide - kw + 1).swapaxes(0, 1), np.zeros_like(flat)
        for part, taps in self._taps(flat, high * wide, wide):
            rows = np.zeros((O, part.stop - part.start, high, wide), dy.dtype)  # 0 where a row's end reads the next row's beginning
            rows[..., : wide - kw + 1] = d[:, part]
            rows = rows.reshape(O, -1)
            dweight += rows @ taps.T
            if "bias" in self._gradients:
                self._gradients["bias"] += rows.sum(axis=1)
            dtaps = np.matmul(weight.T, rows, out=taps).reshape(I, kh * kw, -1, high * wide)
            for k, lag in enumerate(self._lags(wide)):
                dflat[:, part, lag : lag + high * wide] += dtaps[:, k]
        whole = dflat[..., : (h + 2 * p) * wide].reshape(I, -1, h + 2 * p, wide)
        dx: Array = np.ascontiguousarray(whole[:, :, p : p + h, p : p + w].swapaxes(0, 1)).reshape(shape)
        return dx


class MaxPool2d(_Map):
    """The largest of every kh x kw block, blocks side by side, as torch.nn.MaxPool2d; rows and columns that fill no block are left out.

    x (..., h, w) -> y (..., h // kh, w // kw). The gradient goes to the (first) largest. Raises ValueError for a picture smaller than a block.

    >>> pool = MaxPool2d(2)
    >>> pool(np.array([[[1.0, 2, 9], [4, 3, 9]]])).tolist()
    [[[4.0]]]
    >>> pool.backward(np.ones((1, 1, 1))).tolist()
    [[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]
    """

    def __init__(self, kernel_size: int | tuple[int, int]) -> None:
        super().__init__()
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.kernel_size = _count(self._name, "kernel_size", kh), _count(self._name, "kernel_size", kw)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        kh, kw = self.kernel_size
        if x.ndim < 2 or x.shape[-2] < kh or x.shape[-1] < kw:
            raise ValueError(f"{self._name}: x must have shape (..., h, w) of at least {self.kernel_size}, got {x.shape}")
        high, wide = x.shape[-2] // kh, x.shape[-1] // kw
        first, *others = self._parts(x, high, wide)
        y: Array = first.copy()
        for part in others:
            np.maximum(y, part, out=y)
        return y, ((x, y) if self.training else None)

    def _parts(self, x: Array, high: int, wide: int) -> list[Array]:
        """The numbers at each place of the blocks: kh·kw views (..., high, wide)."""
        kh, kw = self.kernel_size
        return [x[..., i : high * kh : kh, j : wide * kw : kw] for i in range(kh) for j in range(kw)]

    def _backward(self, tape: Any, dy: Array) -> Array:
        x, y = tape
        if dy.shape != y.shape:
            raise ValueError(f"{self._name}: dy must have shape {y.shape}, got {dy.shape}")
        high, wide = y.shape[-2:]
        dx: Array = np.zeros(x.shape, dy.dtype)
        free = np.ones(y.shape, bool)  # blocks whose largest has not been met
        for part, dpart in zip(self._parts(x, high, wide), self._parts(dx, high, wide), strict=True):
            here = part == y
            here &= free
            np.multiply(dy, here, out=dpart)
            free ^= here
        return dx


class Flatten(_Map):
    """The last `axes` axes as one: x (..., C, h, w) -> y (..., C h w).

    >>> layer = Flatten(3)
    >>> layer(np.zeros((5, 2, 8, 7, 7), np.float32)).shape
    (5, 2, 392)
    """

    def __init__(self, axes: int = 3) -> None:
        super().__init__()
        self.axes = _count(self._name, "axes", axes)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        if x.ndim < self.axes:
            raise ValueError(f"{self._name}: x must have at least {self.axes} axes, got shape {x.shape}")
        return np.ascontiguousarray(x).reshape(*x.shape[: -self.axes], -1), x.shape

    def _backward(self, tape: Any, dy: Array) -> Array:
        dx: Array = dy.reshape(tape)
        return dx


_ACTIVATIONS = ("relu", "elu", "sigmoid", "tanh", "glu")


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    y: Array = np.where(x >= 0, 1, e) / (1 + e)
    return y


class Activation(_Map):
    """One of the usual nonlinearities, element by element, for any shape; "glu" gates one half of the last axis with the other.

        relu   y = max(x, 0)                dx = dy [x > 0]
        elu    y = x, or e^x - 1 below 0    dx = dy, or dy (y + 1)
        sigmoid  y = 1 / (1 + e^-x)         dx = dy y (1 - y)
        tanh   y = tanh x                   dx = dy (1 - y²)
        glu    y = a σ(b), x = [a, b]       da = dy σ(b), db = dy a σ(b) (1 - σ(b))      x (..., 2H) -> y (..., H)

    Raises ValueError for another name, and for "glu" of an odd width. Source of "glu": Dauphin, Fan, Auli & Grangier 2017.

    >>> Activation("relu")(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    >>> Activation("glu")(np.array([3.0, 0.0])).tolist()
    [1.5]
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in _ACTIVATIONS:
            raise ValueError(f"Activation: kind must be one of {', '.join(_ACTIVATIONS)}, got {kind!r}")
        self.kind = kind

    def _forward(self, x: Array) -> tuple[Array, Any]:
        y: Array
        if self.kind == "glu":
            if x.shape[-1:] == () or x.shape[-1] % 2:
                raise ValueError(f"Activation: glu needs x of shape (..., 2H), got {x.shape}")
            half, gate = x[..., : x.shape[-1] // 2], _sigmoid(x[..., x.shape[-1] // 2 :])
            y = half * gate
            return y, (y, half, gate)
        if self.kind == "relu":
            y = np.maximum(x, 0)
        elif self.kind == "elu":
            y = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        elif self.kind == "tanh":
            y = np.tanh(x)
        else:
            y = _sigmoid(x)
        return y, (y,)

    def _backward(self, tape: Any, dy: Array) -> Array:
        y: Array = tape[0]
        if dy.shape != y.shape:
            raise ValueError(f"Activation: dy must have shape {y.shape}, got {dy.shape}")
        if self.kind == "glu":
            return np.concatenate((dy * tape[2], dy * y * (1 - tape[2])), axis=-1)
        if self.kind == "relu":
            return np.where(y > 0, dy, 0)
        slope: Array = np.where(y > 0, 1, y + 1) if self.kind == "elu" else y * (1 - y) if self.kind == "sigmoid" else 1 - y * y
        return np.multiply(dy, slope)
