"""Convolutions and what stands around them: CausalConv1d (a TDNN's layer), Conv2d, MaxPool2d, Flatten, Activation. Plain NumPy.

Dims    T time, B batch, I input and O output channels, K taps; C, h, w a picture's channels, height, width; N everything before them.
taps    a convolution is one product: the K (or kh·kw) shifted inputs side by side, times the weights
y = layer(x) and dx = layer.backward(dy), as in dense.py; parameter names and layouts are torch's. They do not know lengths: a causal
convolution never reads ahead, so that padding behind a row's end (zeros, not NaN) changes nothing before it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .dense import _count, _Map
from .module import Array


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
        pictures = np.ascontiguousarray(x).reshape(-1, *x.shape[-3:])
        if p:
            pictures = np.pad(pictures, ((0, 0), (0, 0), (p, p), (p, p)))
        windows = np.lib.stride_tricks.sliding_window_view(pictures, (kh, kw), axis=(2, 3))  # (N, I, h', w', kh, kw)
        N, I, high, wide = windows.shape[:4]
        taps = windows.transpose(0, 2, 3, 1, 4, 5).reshape(N * high * wide, I * kh * kw)
        y = taps @ self._parameters["weight"].reshape(self.out_channels, -1).T
        if "bias" in self._parameters:
            y += self._parameters["bias"]
        y = np.ascontiguousarray(y.reshape(N, high * wide, -1).swapaxes(1, 2))
        return y.reshape(*x.shape[:-3], self.out_channels, high, wide), (taps if self.training else None, x.shape, (N, high, wide))

    def _backward(self, tape: Any, dy: Array) -> Array:
        taps, shape, (N, high, wide) = tape
        O, I, (kh, kw), p = self.out_channels, self.in_channels, self.kernel_size, self.padding
        self._check("dy", dy, (*shape[:-3], O, high, wide))
        _ = self.flat_gradient
        rows = dy.reshape(N, O, high * wide).swapaxes(1, 2).reshape(-1, O)
        self._gradients["weight"] += (rows.T @ taps).reshape(O, I, kh, kw)
        if "bias" in self._gradients:
            self._gradients["bias"] += rows.sum(axis=0)
        dtaps = (rows @ self._parameters["weight"].reshape(O, -1)).reshape(N, high, wide, I, kh, kw)
        padded: Array = np.zeros((N, I, shape[-2] + 2 * p, shape[-1] + 2 * p), dy.dtype)
        for i in range(kh):
            for j in range(kw):
                padded[:, :, i : i + high, j : j + wide] += dtaps[..., i, j].transpose(0, 3, 1, 2)
        dx: Array = padded[:, :, p : p + shape[-2], p : p + shape[-1]].reshape(shape)
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
        blocks = x[..., : high * kh, : wide * kw].reshape(-1, high, kh, wide, kw).swapaxes(2, 3).reshape(-1, kh * kw)
        best = blocks.argmax(axis=1)
        return blocks[np.arange(len(best)), best].reshape(*x.shape[:-2], high, wide), (best if self.training else None, x.shape)

    def _backward(self, tape: Any, dy: Array) -> Array:
        best, shape = tape
        kh, kw = self.kernel_size
        high, wide = shape[-2] // kh, shape[-1] // kw
        if dy.shape != (*shape[:-2], high, wide):
            raise ValueError(f"{self._name}: dy must have shape {(*shape[:-2], high, wide)}, got {dy.shape}")
        blocks = np.zeros((len(best), kh * kw), dy.dtype)
        blocks[np.arange(len(best)), best] = dy.reshape(-1)
        dx = np.zeros(shape, dy.dtype)
        dx[..., : high * kh, : wide * kw] = blocks.reshape(-1, high, wide, kh, kw).swapaxes(2, 3).reshape(*shape[:-2], high * kh, wide * kw)
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


_ACTIVATIONS = ("relu", "elu", "sigmoid", "tanh")


class Activation(_Map):
    """One of the usual nonlinearities, element by element, for any shape.

        relu   y = max(x, 0)                dx = dy [x > 0]
        elu    y = x, or e^x - 1 below 0    dx = dy, or dy (y + 1)
        sigmoid  y = 1 / (1 + e^-x)         dx = dy y (1 - y)
        tanh   y = tanh x                   dx = dy (1 - y²)

    Raises ValueError for another name.

    >>> Activation("relu")(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in _ACTIVATIONS:
            raise ValueError(f"Activation: kind must be one of {', '.join(_ACTIVATIONS)}, got {kind!r}")
        self.kind = kind

    def _forward(self, x: Array) -> tuple[Array, Any]:
        y: Array
        if self.kind == "relu":
            y = np.maximum(x, 0)
        elif self.kind == "elu":
            y = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        elif self.kind == "tanh":
            y = np.tanh(x)
        else:
            e = np.exp(-np.abs(x))  # never overflows
            y = np.where(x >= 0, 1, e) / (1 + e)
        return y, y

    def _backward(self, tape: Any, dy: Array) -> Array:
        y: Array = tape
        if dy.shape != y.shape:
            raise ValueError(f"Activation: dy must have shape {y.shape}, got {dy.shape}")
        if self.kind == "relu":
            return np.where(y > 0, dy, 0)
        slope: Array = np.where(y > 0, 1, y + 1) if self.kind == "elu" else y * (1 - y) if self.kind == "sigmoid" else 1 - y * y
        return np.multiply(dy, slope)
