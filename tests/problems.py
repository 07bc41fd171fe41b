"""A problem: a cell, a shape and options, from which the same arrays follow every time; and what an implementation,
`rnnfast.reference` or `rnnfast.functional`, makes of it.

The law of accuracy lives here too. Knows no implementation's inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, product
from typing import Any, NamedTuple

import numpy as np
import rnnfast
from rnnfast import reference
from shapes import SHAPES, Shape

GATES = {"lstm": 4, "lstm_peephole": 4, "gru": 3, "gru_reset_before": 3}
WIDER = {"float32": np.float64, "float64": np.longdouble}  # the dtype that counts as exact


@dataclass(frozen=True)
class Problem:
    cell: str
    shape: str | Shape = "prime batch"  # a name, or one made up
    layers: int = 1
    directions: int = 1
    skip: bool = False
    bias: bool = True
    projection: str = "none"  # or "plain", "biased"
    taps: int = 1
    lengths: str = "full"  # or "ragged": any order, from T down to 0; "ragged from 1"
    reset: bool = False
    dropout: bool = False
    state: str = "zero"  # or "given", "learned", "given and learned"
    scale: float = 1  # of x
    seed: int = 0

    def __str__(self) -> str:
        plain = Problem(self.cell, self.shape)
        options = (f"{name}={value}" for name, value in vars(self).items() if value != vars(plain)[name])
        return ", ".join((self.cell, str(self.shape), *options))

    @property
    def dims(self) -> Shape:
        return SHAPES[self.shape] if isinstance(self.shape, str) else self.shape

    @property
    def R(self) -> int:
        return self.dims.H if self.projection == "none" else (self.dims.H + 1) // 2

    @property
    def paired(self) -> bool:
        """Is the state a pair (h, c)?"""
        return self.cell.startswith("lstm") or (self.cell == "gru" and self.projection != "none")

    @property
    def makes_sense(self) -> bool:
        return (
            not (self.cell == "gru_reset_before" and (self.projection != "none" or self.taps > 1))
            and not (self.taps > 1 and (self.layers > 1 or self.directions > 1))
            and not (self.layers == 1 and (self.skip or self.dropout))
        )


class Arrays(NamedTuple):
    """What a call reads: forward's arguments and the gradients that backward starts from."""

    x: Any  # (T, B, I)
    state: Any
    params: dict[str, Any]
    options: dict[str, Any]
    dy: Any  # like y
    dstate: Any


def parameter_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, in the order of torch's state_dict, initial states last."""
    inputs, H = problem.dims.I, problem.dims.H
    G, R, L, D, K = GATES.get(problem.cell, 1), problem.R, problem.layers, problem.directions, problem.taps
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, direction in product(range(L), range(D)):
        suffix = f"_l{layer}" + "_reverse" * direction
        shapes["weight_ih" + suffix] = (G * H, inputs if layer == 0 else D * R + inputs * problem.skip)
        shapes["weight_hh" + suffix] = (G * H, K * R)
        if problem.bias:
            shapes["bias_ih" + suffix] = shapes["bias_hh" + suffix] = (G * H,)
        if problem.projection != "none":
            shapes["weight_hr" + suffix] = (R, H)
        if problem.projection == "biased":
            shapes["bias_hr" + suffix] = (R,)
        if problem.cell == "lstm_peephole":
            shapes["weight_peep" + suffix] = (3, H)
    if "learned" in problem.state:
        shapes["h_0"] = (L * D, 1, K * R)
        if problem.paired:
            shapes["c_0"] = (L * D, 1, H)
    return shapes


def arrays(problem: Problem, dtype: str) -> Arrays:
    """The problem's arrays, drawn in double precision and rounded to dtype; weights as torch draws them."""
    rng = np.random.default_rng([problem.seed, *problem.dims[:4]])
    T, B, inputs, H, _ = problem.dims
    L, D, R, K = problem.layers, problem.directions, problem.R, problem.taps

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype)

    def uniform(*shape: int) -> Any:
        return (rng.uniform(-1, 1, shape) / np.sqrt(H)).astype(dtype)

    def state() -> Any:
        h, c = normal(L * D, B, K * R), normal(L * D, B, H)
        return (h, c) if problem.paired else h

    options: dict[str, Any] = {
        "num_layers": L,
        "bidirectional": D == 2,
        "skip": problem.skip,
        "output_taps": K,
        "cells": problem.cell.startswith("lstm"),
    }
    if problem.lengths != "full":
        shortest = 1 if problem.lengths == "ragged from 1" else 0
        options["lengths"] = rng.permutation(np.linspace(T, shortest, B).astype(np.int64))
    if problem.reset:
        options["reset"] = rng.random((T, B)) < 0.3
    if problem.dropout:
        keep = [(rng.random((T, B, D * R)) < 0.7) / 0.7 for _ in range(L - 1)]
        options["dropout_masks"] = [mask.astype(dtype) for mask in keep]
    return Arrays(
        x=(problem.scale * rng.normal(size=(T, B, inputs))).astype(dtype),
        state=state() if "given" in problem.state else None,
        params={name: uniform(*shape) for name, shape in parameter_shapes(problem).items()},
        options=options,
        dy=normal(T, B, D * R * (L if problem.skip else 1)),
        dstate=state(),
    )


def map_floats(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure of tuples, lists and dicts with the function applied to every floating-point array in it."""
    match value:
        case Arrays():
            return Arrays(*(map_floats(function, part) for part in value))
        case dict():
            return {name: map_floats(function, part) for name, part in value.items()}
        case tuple() | list():
            return type(value)(map_floats(function, part) for part in value)
        case np.ndarray() if np.issubdtype(value.dtype, np.floating):
            return function(value)
    return value


def cast(value: Any, dtype: Any) -> Any:
    """The same structure with every floating-point array in another dtype."""
    return map_floats(lambda array: array.astype(dtype), value)


def named(state: Any, prefix: str = "") -> dict[str, Any]:
    """{"h": ...} or {"h": ..., "c": ...} of a state."""
    return {prefix + name: part for name, part in zip("hc", state if isinstance(state, tuple) else (state,), strict=False)}


def results(implementation: Any, cell: str, a: Arrays) -> dict[str, Any]:
    """Every array that forward and backward return, by name."""
    y, state, tape, *c = implementation.forward(cell, a.x, a.state, a.params, **a.options)
    dx, dstate, gradients = implementation.backward(tape, a.dy, a.dstate)
    return {
        "y": y,
        **named(state),
        **({"every c": c[0]} if c else {}),
        "dx": dx,
        **named(dstate, "d"),
        **{"d" + name: gradient for name, gradient in gradients.items()},
    }


def layer_of(problem: Problem, dtype: str, params: Mapping[str, Any], **options: Any) -> Any:
    """The layer that computes a problem, with its parameters."""
    options |= {
        "lstm_peephole": {"peephole": True},
        "gru_reset_before": {"reset_after": False},
        **{cell: {"nonlinearity": cell[4:]} for cell in reference.CELLS if cell.startswith("rnn")},
    }.get(problem.cell, {})
    layer = getattr(rnnfast, problem.cell.split("_")[0].upper())(
        problem.dims.I,
        problem.dims.H,
        problem.layers,
        bias=problem.bias,
        bidirectional=problem.directions == 2,
        skip=problem.skip,
        proj_size=0 if problem.projection == "none" else problem.R,
        learn_initial_state="learned" in problem.state,
        dtype=dtype,
        **options,
    )
    layer.load_state_dict(params)
    return layer


# ---- The law of accuracy ---------------------------------------------------------------------------------------------


class Oracle(NamedTuple):
    exact: Mapping[str, Any]
    allowed: Mapping[str, float]  # the largest error of each array


def error(found: Any, exact: Any) -> float:
    """The largest difference of two arrays; infinite if their shapes differ or one is not a number."""
    if found.shape != exact.shape or not np.isfinite(found).all():
        return np.inf
    return float(np.abs(found - exact).max(initial=0))


@cache
def oracle(problem: Problem, dtype: str) -> Oracle:
    """Exact results, and how far a good implementation in dtype may be from each: twice as far as plain NumPy.

    One run of NumPy may be lucky, its few rounding errors cancel, and BLAS adds many partial sums where another adds one
    term after the other. So NumPy tries again, with every number that the call reads moved by one rounding, the more
    often the fewer units there are to be lucky with; and no array need be better than √n roundings of its largest
    number, n being the number of roundings of one step in all layers: the terms of its sums, forward, backward and over
    tokens, and some two dozen operations of its unit (Higham & Mary, "A new approach to probabilistic rounding error
    analysis", 2019: roundings of either sign add up to the square root of their number).
    """
    given = arrays(problem, dtype)
    exact = results(reference, problem.cell, cast(given, WIDER[dtype]))
    rng, eps = np.random.default_rng(problem.seed), np.finfo(dtype).eps

    def moved(array: Any) -> Any:
        return (array * (1 + rng.choice([-eps, eps], array.shape))).astype(dtype)

    T, B, _, H, _ = problem.dims
    sums = sum(sum(shape) for shape in parameter_shapes(problem).values() if len(shape) == 2)
    n = sums + problem.layers * (T * B + 24)
    allowed = {name: np.sqrt(n) * eps / 2 * np.abs(array).max(initial=0) for name, array in exact.items()}
    for nearby in (given, *(map_floats(moved, given) for _ in range(max(2, 24 // H)))):
        plain = results(reference, problem.cell, nearby)
        allowed = {name: max(allowed[name], error(plain[name], exact[name])) for name in exact}
    return Oracle(exact, {name: 2 * float(value) for name, value in allowed.items()})


def inaccurate(found: Mapping[str, Any], problem: Problem, dtype: str) -> dict[str, tuple[float, float]]:
    """Those of the arrays found that break the law: name -> (error, allowed error). Empty where all is well."""
    exact, allowed = oracle(problem, dtype)
    assert all(array.dtype == dtype for array in found.values())
    errors = {name: error(array, exact[name]) for name, array in found.items()}
    return {name: (found, allowed[name]) for name, found in errors.items() if found > allowed[name]}


# ---- Choosing problems -----------------------------------------------------------------------------------------------


def pairwise(**factors: Sequence[Any]) -> list[Problem]:
    """Problems in which every value of a factor meets every value of each other factor, where that makes sense.

    Greedy: of 20 random problems that hold the next pair still missing, the one that holds the most of them.
    """
    rng = np.random.default_rng(0)

    def pairs(problem: Problem) -> set[tuple[Any, ...]]:
        return set(combinations(((name, getattr(problem, name)) for name in factors), 2))

    def draw(**fixed: Any) -> Problem:
        return Problem(**{name: values[rng.integers(len(values))] for name, values in factors.items()} | fixed)

    chosen: list[Problem] = []
    missing = {
        ((a, x), (b, y)): None for a, b in combinations(factors, 2) for x, y in product(factors[a], factors[b])
    }  # a dict keeps the order, a set would not
    while missing:
        pair = next(iter(missing))
        draws = (draw(**dict(pair)) for _ in range(400))
        candidates = islice((problem for problem in draws if problem.makes_sense), 20)
        best = max(candidates, key=lambda problem: len(pairs(problem) & missing.keys()), default=None)
        if best is not None:
            chosen.append(best)
        for met in {pair} if best is None else pairs(best):
            missing.pop(met, None)
    return chosen
