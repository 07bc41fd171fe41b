"""Optimizers on the flat arrays of a model, global-norm clipping, and schedules of the learning rate.

p  parameters (N,)     g  their gradient (N,)     k  the number of updates done so far
An update runs block by block in place, so that its passes stay in the cache. A schedule is a plain function of k, so
it needs no state of its own. The equations are torch.optim's. It does not know layers, only `leaves()`, `flat`,
`flat_gradient` and `rows()` (the rows of a sparse gradient).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from . import _core
from .module import Array, Module

Schedule = Callable[[int], float]
_BLOCK = 1 << 15  # numbers that a norm sums in their own dtype


def _real(name: str, what: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    if not low <= value < high:
        raise ValueError(f"{name}: {what} must lie in [{low:g}, {high:g}), got {value}")
    return float(value)


def _whole(name: str, what: str, value: int) -> int:
    if value < 1 or value != int(value):
        raise ValueError(f"{name}: {what} must be a whole number of at least 1, got {value}")
    return int(value)


class Optimizer:
    """What the optimizers share: walking over a model's flat arrays, the count of updates, the saved state.

    `learning_rate` is a number or a schedule, and may be set at any time. `step()` does one update from the
    gradients; `zero_gradients()` is the model's. Sparse gradients (Embedding with sparse=True) update their rows
    alone.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, seed=0)
    >>> layer.gradients()["weight"][...] = 1
    >>> optimizer = SGD(layer, learning_rate=linear(0.1, steps=4))
    >>> optimizer.step()
    >>> optimizer.steps, round(optimizer.rate, 3)
    (1, 0.075)
    """

    moments: tuple[str, ...] = ()  # the names of the arrays like p that the update keeps
    _block = 1 << 15  # numbers a block: p, g, two moments and a scratch array of float32 are 640 KiB

    def __init__(self, model: Module, learning_rate: float | Schedule) -> None:
        self.model = model
        self.learning_rate = learning_rate
        self.steps = 0
        self._leaves = [leaf for leaf in model.leaves() if leaf.flat.size]
        self._kept = [[np.zeros_like(leaf.flat) for _ in self.moments] for leaf in self._leaves]
        _ = self.rate  # a wrong rate is told here

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return _real(
            self._name,
            "learning rate",
            self.learning_rate(self.steps) if callable(self.learning_rate) else self.learning_rate,
        )

    def zero_gradients(self) -> None:
        """Sets the model's gradients to 0 and drops its waiting tapes."""
        self.model.zero_gradients()

    def step(self) -> None:
        """One update of every parameter. Raises RuntimeError for a model in eval mode."""
        if not all(leaf.training for leaf in self._leaves):
            raise RuntimeError(f"{self._name}: the model is in eval mode; call train() before step()")
        self._begin(self.rate)
        for leaf, kept in zip(self._leaves, self._kept, strict=True):
            for blocks, store in _blocks(leaf, [leaf.flat, leaf.flat_gradient, *kept], self._block):
                p, g, *own = blocks
                self._update(p, g, own)
                store()
        self.steps += 1

    def _begin(self, rate: float) -> None:
        raise NotImplementedError

    def _update(self, p: Array, g: Array, own: list[Array]) -> None:
        """One block, in place: g must not be written."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Array]:
        """name -> copy: "steps", and "<moment>.<leaf>" for every array kept."""
        state: dict[str, Array] = {"steps": np.array(self.steps, np.int64)}
        for i, kept in enumerate(self._kept):
            state.update({f"{name}.{i}": array.copy() for name, array in zip(self.moments, kept, strict=True)})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state_dict. Raises KeyError or ValueError naming what does not fit, before it writes."""
        own = {f"{name}.{i}": a for i, kept in enumerate(self._kept) for name, a in zip(self.moments, kept, strict=True)}
        wrong = sorted({*own, "steps"} ^ set(state))
        if wrong:
            raise KeyError(f"{self._name}: state_dict lacks or has unexpected {', '.join(map(repr, wrong))}")
        for name, array in own.items():
            if np.shape(state[name]) != array.shape:
                raise ValueError(f"{self._name}: {name} must have shape {array.shape}, got {np.shape(state[name])}")
        steps = np.asarray(state["steps"])
        if steps.size != 1 or steps.dtype.kind not in "iu":
            raise ValueError(f"{self._name}: steps must be one whole number, got {steps.dtype} of shape {steps.shape}")
        for name, array in own.items():
            array[...] = state[name]
        self.steps = int(steps.item())


def _blocks(leaf: Module, arrays: list[Array], size: int) -> Iterator[tuple[list[Array], Callable[[], None]]]:
    """Blocks of the arrays to update in place, each with what to call afterwards."""
    sparse = leaf.rows()
    if sparse is None:
        for start in range(0, leaf.flat.size, size):
            yield [array[start : start + size] for array in arrays], lambda: None
        return
    width, rows = sparse
    step = max(1, size // width)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        tables = [array.reshape(-1, width) for array in arrays]
        blocks = [table[part].reshape(-1) for table in tables]  # copies

        def store(tables: list[Array] = tables, blocks: list[Array] = blocks, part: Array = part) -> None:
            for i, (table, block) in enumerate(zip(tables, blocks, strict=True)):
                if i != 1:  # all but the gradient
                    table[part] = block.reshape(-1, width)

        yield blocks, store


class SGD(Optimizer):
    """Gradient descent with momentum, as torch.optim.SGD.

        v = μ v + g  (v = g at the first update)      p -= rate v, with nesterov p -= rate (g + μ v)

    g includes weight_decay · p. Raises ValueError for numbers out of range and for nesterov without momentum.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, bias=False, seed=0)
    >>> layer.flat[:], layer.flat_gradient[:] = 1, 2
    >>> SGD(layer, 0.25).step()
    >>> float(layer.flat[0])
    0.5
    """

    def __init__(
        self,
        model: Module,
        learning_rate: float | Schedule,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.momentum = _real(self._name, "momentum", momentum, 0, 1)
        self.nesterov = bool(nesterov)
        self.weight_decay = _real(self._name, "weight_decay", weight_decay)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        self.moments = ("velocity",) if momentum else ()
        super().__init__(model, learning_rate)

    def _begin(self, rate: float) -> None:
        self._now = rate

    def _update(self, p: Array, g: Array, own: list[Array]) -> None:
        if self.weight_decay:
            g = g + p * self.weight_decay
        if own:
            (v,) = own
            np.multiply(v, self.momentum, out=v)
            np.add(v, g, out=v)  # v = μ v + g
            g = g + v * self.momentum if self.nesterov else v
        np.subtract(p, g * self._now, out=p)  # p -= rate g


class RMSprop(Optimizer):
    """Steps divided by a running root mean square, as torch.optim.RMSprop.

        s = α s + (1 - α) g²      d = g / (√s + ε)      p -= rate d, with momentum v = μ v + d, p -= rate v

    Raises ValueError for numbers out of range.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, bias=False, seed=0)
    >>> layer.flat[:], layer.flat_gradient[:] = 1, 2
    >>> RMSprop(layer, 0.05).step()
    >>> round(float(layer.flat[0]), 4)  # 1 - 0.05 / √0.01
    0.5
    """

    def __init__(
        self,
        model: Module,
        learning_rate: float | Schedule = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.alpha = _real(self._name, "alpha", alpha, 0, 1)
        self.eps = _real(self._name, "eps", eps)
        self.momentum = _real(self._name, "momentum", momentum, 0, 1)
        self.weight_decay = _real(self._name, "weight_decay", weight_decay)
        self.moments = ("square", "velocity") if momentum else ("square",)
        super().__init__(model, learning_rate)

    def _begin(self, rate: float) -> None:
        self._now = rate

    def _update(self, p: Array, g: Array, own: list[Array]) -> None:
        if self.weight_decay:
            g = g + p * self.weight_decay
        s = own[0]
        a = g * (1 - self.alpha)
        np.multiply(a, g, out=a)
        np.multiply(s, self.alpha, out=s)
        np.add(s, a, out=s)  # s = α s + (1 - α) g²
        np.sqrt(s, out=a)
        np.add(a, self.eps, out=a)
        np.divide(g, a, out=a)  # d = g / (√s + ε)
        if self.momentum:
            v = own[1]
            np.multiply(v, self.momentum, out=v)
            np.add(v, a, out=v)
            np.multiply(v, self._now, out=a)
        else:
            np.multiply(a, self._now, out=a)
        np.subtract(p, a, out=p)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), as torch.optim.Adam.

        m = β₁ m + (1 - β₁) g      v = β₂ v + (1 - β₂) g²      with n = k + 1
        p -= rate / (1 - β₁ⁿ) · m / (√(v / (1 - β₂ⁿ)) + ε)

    g includes weight_decay · p; AdamW decays p itself instead. Raises ValueError for numbers out of range.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, bias=False, seed=0)
    >>> layer.flat[:], layer.flat_gradient[:] = 1, 7
    >>> Adam(layer, 0.25).step()  # the first step has the size of the rate
    >>> float(layer.flat[0])
    0.75
    """

    moments = ("mean", "square")
    _block = sys.maxsize  # the kernel goes over everything once
    decoupled = False  # whether weight_decay shrinks p itself (AdamW)

    def __init__(
        self,
        model: Module,
        learning_rate: float | Schedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas = (_real(self._name, "betas[0]", betas[0], 0, 1), _real(self._name, "betas[1]", betas[1], 0, 1))
        self.eps = _real(self._name, "eps", eps)
        self.weight_decay = _real(self._name, "weight_decay", weight_decay)
        super().__init__(model, learning_rate)

    def _begin(self, rate: float) -> None:
        n = self.steps + 1
        correction = math.sqrt(1 - self.betas[1] ** n)
        self._eps = self.eps * correction  # √v / c + ε = (√v + ε c) / c
        self._now = rate * correction / (1 - self.betas[0] ** n)
        self._shrink = 1 - rate * self.weight_decay

    def _update(self, p: Array, g: Array, own: list[Array]) -> None:
        decay, kept = (0.0, self._shrink) if self.decoupled else (self.weight_decay, 1.0)
        mean, square = own
        _core.adam(p, g, mean, square, self._now, *self.betas, self._eps, decay, kept)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW: first p -= rate · decay · p.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, bias=False, seed=0)
    >>> layer.flat[:], layer.flat_gradient[:] = 1, 0
    >>> AdamW(layer, 0.5, weight_decay=0.5).step()
    >>> float(layer.flat[0])
    0.75
    """

    decoupled = True

    def __init__(
        self,
        model: Module,
        learning_rate: float | Schedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(model, learning_rate, betas, eps, weight_decay=weight_decay)


def global_norm(model: Module) -> float:
    """The 2-norm of all gradients of a model as one vector; NaN or infinite if they are.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(2, 1, bias=False, seed=0)
    >>> layer.flat_gradient[:] = 3, 4
    >>> global_norm(layer)
    5.0
    """
    total = 0.0
    for leaf in model.leaves():
        sparse = leaf.rows()
        g = leaf.flat_gradient if sparse is None else leaf.flat_gradient.reshape(-1, sparse[0])[sparse[1]].reshape(-1)
        for start in range(0, g.size, _BLOCK):  # float32 within a block, float64 across
            block = g[start : start + _BLOCK]
            square = float(np.dot(block, block))
            total += square if math.isfinite(square) else float(np.square(block, dtype=np.float64).sum())
    return math.sqrt(total)


def clip_global_norm(model: Module, max_norm: float) -> float:
    """Scales all gradients by max_norm / norm if that is below 1 (Pascanu et al. 2013); returns the norm before.

    A norm that is NaN or infinite is returned and nothing is scaled: the caller decides. Raises ValueError unless
    max_norm > 0.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(2, 1, bias=False, seed=0)
    >>> layer.flat_gradient[:] = 3, 4
    >>> clip_global_norm(layer, 1.0), global_norm(layer) <= 1.0000001
    (5.0, True)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_global_norm: max_norm must be above 0, got {max_norm}")
    norm = global_norm(model)
    if max_norm < norm < math.inf:
        for leaf in model.leaves():
            sparse = leaf.rows()
            if sparse is None:
                leaf.flat_gradient[...] *= max_norm / norm
            else:
                leaf.flat_gradient.reshape(-1, sparse[0])[sparse[1]] *= max_norm / norm
    return norm


def constant(rate: float) -> Schedule:
    """The same rate at every update.

    >>> constant(0.1)(1000)
    0.1
    """
    return lambda k: rate


def linear(rate: float, steps: int) -> Schedule:
    """From `rate` at update 0 in a straight line to 0 at update `steps`, and 0 from there on.

    >>> [linear(1.0, 4)(k) for k in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    steps = _whole("linear", "steps", steps)
    return lambda k: rate * max(0.0, 1 - k / steps)


def cosine(rate: float, steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from `rate` at update 0 to `end` at update `steps`, and `end` from there on.

    >>> [round(cosine(1.0, 4)(k), 3) for k in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """
    steps = _whole("cosine", "steps", steps)
    return lambda k: end + (rate - end) * (1 + math.cos(math.pi * min(1.0, k / steps))) / 2


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """`schedule` multiplied by (k + 1) / (steps + 1) during the first `steps` updates.

    >>> [warmup(constant(1.0), 3)(k) for k in (0, 1, 3, 4)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return lambda k: schedule(k) * min(1.0, (k + 1) / (steps + 1))


def staircase(rate: float, every: int, factor: float = 0.1) -> Schedule:
    """`rate`, multiplied by `factor` after every `every` updates (torch's StepLR).

    >>> [staircase(1.0, 2, 0.5)(k) for k in (0, 1, 2, 4)]
    [1.0, 1.0, 0.5, 0.25]
    """
    every = _whole("staircase", "every", every)
    return lambda k: rate * float(factor ** (k // every))
