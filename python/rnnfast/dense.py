"""The layers that know no time: Embedding, Linear, Dropout.

Each maps the last axis and takes any axes before it, so that (T, B, I) and (N, I) are the same to it.
y = layer(x) and dx = layer.backward(dy); in training mode k forwards are undone by k backwards, latest first.
They do not know lengths or states: what a loss ignores brings a gradient of 0 here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core, functional
from .module import Array, Module


def _count(name: str, what: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: {what} must be an integer of at least 1, got {value!r}")
    return int(value)


class _Map(Module):
    """y = _forward(x), dx = _backward(tape, dy): the calls around the two, once for every layer of this file."""

    def __call__(self, x: ArrayLike) -> Array:
        if not self.training:
            return self._forward(np.asarray(x))[0]
        with self._alone():
            y, tape = self._forward(np.asarray(x))
            self._push(tape)
            return y

    def backward(self, dy: ArrayLike) -> Array | None:
        with self._alone():
            tape = self._pop()
            try:
                return self._backward(tape, np.asarray(dy))
            except (TypeError, ValueError):
                self._push(tape)  # a wrong dy costs nothing
                raise

    def _forward(self, x: Array) -> tuple[Array, Any]:
        raise NotImplementedError

    def _backward(self, tape: Any, dy: Array) -> Array | None:
        raise NotImplementedError

    def _check(self, what: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise ValueError(f"{self._name}: {what} must have shape {shape}, got {array.shape}")
        if array.dtype != self.dtype:
            raise TypeError(f"{self._name}: {what} must have dtype {self.dtype}, got {array.dtype}")


class Embedding(_Map):
    """A row of a table for each integer, as torch.nn.Embedding: y[t, b] = weight[tokens[t, b]].

    tokens (...) of any integer dtype in [0, num_embeddings) -> y (..., E). Parameter: weight
    (num_embeddings, E), drawn from N(0, 1). The gradient of the table is
    dweight[v] += Σ over tokens equal to v of dy; tokens have none, so `backward` returns None.

    The gradient is sparse: only rows whose token was met differ from 0. With sparse=True zero_gradients,
    clipping and the optimizers touch these rows alone: exactly the same as dense for plain SGD, "lazy" for the
    others (a row that was not met keeps its moments and stands still, as torch.optim.SparseAdam). This
    pays for vocabularies of many thousands.

    Raises TypeError for tokens that are no integers, IndexError for tokens out of range.

    >>> table = Embedding(5, 2, seed=0)
    >>> table(np.array([[1, 4], [1, 0]])).shape
    (2, 2, 2)
    >>> table.backward(np.ones((2, 2, 2), np.float32))
    >>> table.gradients()["weight"][:, 0].tolist()
    [1.0, 2.0, 0.0, 0.0, 1.0]
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        sparse: bool = False,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = _count(self._name, "num_embeddings", num_embeddings)
        self.embedding_dim = _count(self._name, "embedding_dim", embedding_dim)
        self.sparse = bool(sparse)
        self._allocate({"weight": (self.num_embeddings, self.embedding_dim)}, dtype)
        self.flat[:] = np.random.default_rng(seed).standard_normal(self.flat.size, dtype=self.flat.dtype.type)
        self._met: list[NDArray[np.int64]] = []  # rows that a backward has added to since zero_gradients

    def _forward(self, tokens: Array) -> tuple[Array, Any]:
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"{self._name}: tokens must be integers, got dtype {tokens.dtype}")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_embeddings:
            raise IndexError(f"{self._name}: tokens must lie in [0, {self.num_embeddings}), got {tokens.min()} to {tokens.max()}")
        y = np.take(self._parameters["weight"], tokens, axis=0)
        return y, (tokens.astype(np.int64) if self.training else None)

    def _backward(self, tape: Any, dy: Array) -> None:
        tokens: NDArray[np.int64] = tape
        self._check("dy", dy, (*tokens.shape, self.embedding_dim))
        if tokens.size == 0:
            return
        _ = self.flat_gradient
        _core.scatter(self._gradients["weight"], tokens.reshape(-1), np.ascontiguousarray(dy))
        if self.sparse:
            self._met.append(np.unique(tokens))

    def rows(self) -> tuple[int, NDArray[np.int64]] | None:
        """(E, the rows met since zero_gradients) if sparse, else None."""
        if not self.sparse:
            return None
        if not self._met:
            return self.embedding_dim, np.zeros(0, np.int64)
        self._met = [np.unique(np.concatenate(self._met))]
        return self.embedding_dim, self._met[0]

    def zero_gradients(self) -> None:
        """Sets every gradient to 0 and drops the tapes that no backward took."""
        if not self.sparse:
            return super().zero_gradients()
        self._tapes.clear()
        for rows in self._met:
            self._gradients["weight"][rows] = 0
        self._met = []


class Linear(_Map):
    """y = x Wᵀ + b, as torch.nn.Linear.

    x (..., I) -> y (..., O), both of the layer's dtype. Parameters: weight (O, I), bias (O,) unless bias=False,
    both drawn from U(-1/sqrt(I), 1/sqrt(I)). Backwards, with N the product of the axes before the last:

        dx = dy W      dweight += dyᵀ x  (O, I) summed over N      dbias += Σ dy  (O,)

    Raises ValueError for a wrong shape, TypeError for a wrong dtype, RuntimeError for a backward without a forward.
    x must not change between forward and backward.

    >>> layer = Linear(3, 2, seed=0)
    >>> layer(np.ones((4, 5, 3), np.float32)).shape
    (4, 5, 2)
    >>> layer.backward(np.ones((4, 5, 2), np.float32)).shape
    (4, 5, 3)
    >>> layer.gradients()["bias"].tolist()
    [20.0, 20.0]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _count(self._name, "in_features", in_features)
        self.out_features = _count(self._name, "out_features", out_features)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if bias:
            shapes["bias"] = (self.out_features,)
        self._allocate(shapes, dtype)
        bound = 1 / math.sqrt(self.in_features)
        self.flat[:] = np.random.default_rng(seed).uniform(-bound, bound, self.flat.size)

    def _as_cell(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The names under which the kernels know a dense layer: a linear cell that reads no earlier output."""
        named = {"weight_ih_l0": arrays["weight"], "weight_hh_l0": np.empty((self.out_features, 0), self.dtype)}
        return named | ({"bias_ih_l0": arrays["bias"]} if "bias" in arrays else {})

    def _steps(self, rows: Array) -> Array:
        """(T, B, width) as the kernels take it: in steps of many rows, so that a few steps' sums stay in cache."""
        B = rows.shape[-2] if rows.ndim > 2 and rows.shape[-2] >= 16 else rows.size // rows.shape[-1]
        return np.ascontiguousarray(rows).reshape(-1 if B else 1, B, rows.shape[-1])

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check("x", x, (*x.shape[:-1], self.in_features))
        rows = self._steps(x)
        y, _, tape = functional.forward("rnn_identity", rows, None, self._as_cell(self._parameters), output_taps=0, tape=self.training)
        y.flags.writeable = True  # a linear cell's backward does not read y
        return y.reshape(*x.shape[:-1], self.out_features), (tape, x.shape)

    def _backward(self, tape: Any, dy: Array) -> Array:
        kept, shape = tape
        self._check("dy", dy, (*shape[:-1], self.out_features))
        _ = self.flat_gradient
        rows = self._steps(dy)
        dx, _, _ = functional.backward(kept, rows, None, self._as_cell(self._gradients), need_dstate=False)
        assert dx is not None
        result: Array = dx.reshape(shape)
        return result


class Dropout(_Map):
    """In training mode each value survives with probability q = 1 - p and is scaled by 1/q; in eval mode y = x.

        y = m ∘ x / q      dx = m ∘ dy / q      m ~ Bernoulli(q), drawn anew at each forward

    x (...) of float32 or float64 -> y (...) of the same. The draws come from the layer's own `generator`, so nothing
    else moves them; p is taken in steps of 2^-16.

    Raises ValueError unless 0 <= p < 1 (torch allows 1; nothing would be left), TypeError for x of another dtype.

    >>> drop = Dropout(0.5, seed=0)
    >>> sorted(set(drop(np.ones(100, np.float32)).tolist()))
    [0.0, 2.0]
    >>> drop.eval()(np.ones(3, np.float32)).tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"{self._name}: p must lie in [0, 1), got {p}")
        self.p = float(p)
        self.generator: np.random.Generator = np.random.default_rng(seed)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        if x.dtype not in (np.float32, np.float64):
            raise TypeError(f"{self._name}: x must have dtype float32 or float64, got {x.dtype}")
        if not self.training:
            return x, None
        dropped = min(round(self.p * 65536), 65535)
        if dropped == 0:
            return x, (x.shape, x.dtype, None)
        keep = self.generator.integers(0, 65536, x.shape, np.uint16) >= dropped
        scale = keep * x.dtype.type(65536 / (65536 - dropped))
        return x * scale, (x.shape, x.dtype, scale)

    def _backward(self, tape: Any, dy: Array) -> Array:
        shape, dtype, scale = tape
        if dy.shape != shape or dy.dtype != dtype:
            raise ValueError(f"{self._name}: dy must be {dtype} of shape {shape}, got {dy.dtype} of {dy.shape}")
        return dy if scale is None else dy * scale
