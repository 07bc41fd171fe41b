"""Optimizers, clipping and schedules against torch.optim, on the same gradients; states that resume; sparse rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rnnfast import optim
from rnnfast.dense import Embedding, Linear
from rnnfast.graph import Graph
from rnnfast.module import Module

KINDS: dict[str, tuple[Callable[..., optim.Optimizer], Any, dict[str, Any]]] = {
    "sgd": (optim.SGD, torch.optim.SGD, {}),
    "sgd, decay": (optim.SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov, decay": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, torch.optim.RMSprop, {}),
    "rmsprop, all": (
        optim.RMSprop,
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
    ),
    "adam": (optim.Adam, torch.optim.Adam, {}),
    "adam, all": (optim.Adam, torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {}),
    "adamw, decay": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.3}),
}
SIZES = {"small": 5, "a block and a tail": 40_000}


def vector(size: int, dtype: str = "float64", seed: int = 0) -> Module:
    return Linear(size, 1, bias=False, dtype=dtype, seed=seed)


def gradients(size: int, count: int) -> Any:
    """Gradients of very different sizes, 0 among them."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, size)) * 10.0 ** rng.integers(-6, 3, size) * (rng.random((count, size)) < 0.8)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_optimizer_is_torchs(kind: Any, size: int) -> None:
    ours_of, theirs_of, options = kind
    layer = vector(size)
    p = torch.tensor(layer.flat.copy(), requires_grad=True)
    ours, theirs = ours_of(layer, 0.01, **options), theirs_of([p], lr=0.01, **options)
    for g in gradients(size, 20):
        layer.flat_gradient[:] = g
        p.grad = torch.tensor(g)
        ours.step()
        theirs.step()
    # each of the 20 updates rounds a dozen times, relative to the weight and to the step
    scale = np.abs(layer.flat) + 1
    assert (np.abs(layer.flat - p.detach().numpy()) <= 20 * 12 * np.finfo(np.float64).eps * scale).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float32_is_float64_to_rounding(kind: Any) -> None:
    ours_of, _, options = kind
    narrow, wide = vector(50, "float32"), vector(50, "float64")
    wide.flat[:] = narrow.flat
    optimizers = [ours_of(layer, 0.01, **options) for layer in (narrow, wide)]
    for g in gradients(50, 20):
        narrow.flat_gradient[:] = g
        wide.flat_gradient[:] = narrow.flat_gradient
        for optimizer in optimizers:
            optimizer.step()
    scale = np.abs(wide.flat) + 1
    assert (np.abs(narrow.flat - wide.flat) <= 20 * 12 * np.finfo(np.float32).eps * scale).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_saved_state_goes_on_bit_for_bit(kind: Any) -> None:
    ours_of, _, options = kind
    rate = optim.linear(0.01, 10)
    one, two = vector(50), vector(50)
    first, second = ours_of(one, rate, **options), ours_of(two, rate, **options)
    for k, g in enumerate(gradients(50, 10)):
        if k == 4:
            two.load_state_dict(one.state_dict())
            second.load_state_dict(first.state_dict())
        for layer, optimizer in ((one, first), (two, second)) if k >= 4 else ((one, first),):
            layer.flat_gradient[:] = g
            optimizer.step()
    np.testing.assert_array_equal(one.flat, two.flat)
    assert first.steps == second.steps == 10


def test_a_graphs_layers_are_updated_once_each() -> None:
    shared = Linear(2, 2, bias=False, seed=0)
    net = Graph({"a": (shared, "x"), "b": (shared, "a"), "y": (Linear(2, 1, seed=1), "b")})
    net.zero_gradients()
    for leaf in net.leaves():
        leaf.flat_gradient[:] = 1
    before = net.state_dict()
    optim.SGD(net, 0.5).step()
    for name, p in net.parameters().items():
        np.testing.assert_array_equal(p, (before[name] - np.float32(0.5)))


# ---- Sparse rows -----------------------------------------------------------------------------------------------------


def embeddings(dtype: str = "float64") -> tuple[Embedding, Embedding]:
    return tuple(Embedding(50, 3, sparse=sparse, dtype=dtype, seed=0) for sparse in (True, False))  # type: ignore[return-value]


def test_sparse_sgd_and_clipping_are_dense_ones() -> None:
    rng = np.random.default_rng(0)
    layers = embeddings()
    optimizers = [optim.SGD(layer, 0.1, weight_decay=0.0) for layer in layers]
    for _ in range(5):
        tokens, dy = rng.integers(0, 50, (4, 2)), rng.standard_normal((4, 2, 3))
        norms = []
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_gradients()
            layer(tokens)
            layer.backward(dy)
            norms.append(optim.clip_global_norm(layer, 1.0))
            optimizer.step()
        np.testing.assert_allclose(*norms, rtol=1e-14)
    np.testing.assert_allclose(layers[0].flat, layers[1].flat, rtol=1e-14)


def test_sparse_adam_is_torchs() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = embeddings()[0], torch.nn.Embedding(50, 3, sparse=True, dtype=torch.float64)
    theirs.load_state_dict({"weight": torch.from_numpy(ours.state_dict()["weight"])})
    # torch's sparse Adam adds eps before the correction for the start, its dense one after it: take next to none
    pairs = optim.Adam(ours, 0.1, eps=1e-30), torch.optim.SparseAdam(theirs.parameters(), 0.1, eps=1e-30)
    for _ in range(10):
        tokens, dy = rng.integers(0, 50, (4, 2)), rng.standard_normal((4, 2, 3))
        for optimizer in pairs:
            getattr(optimizer, "zero_gradients", getattr(optimizer, "zero_grad", None))()  # type: ignore[misc]
        ours(tokens)
        ours.backward(dy)
        theirs(torch.from_numpy(tokens)).backward(torch.from_numpy(dy))
        for optimizer in pairs:
            optimizer.step()
    np.testing.assert_allclose(ours.parameters()["weight"], theirs.weight.detach(), rtol=0, atol=1e-12)


def test_an_update_without_a_met_row_changes_nothing() -> None:
    layer = embeddings()[0]
    before = layer.flat.copy()
    optim.Adam(layer, 0.1).step()
    assert optim.global_norm(layer) == 0
    np.testing.assert_array_equal(layer.flat, before)


# ---- Clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", (0.5, 1e6), ids=("clipped", "not clipped"))
def test_clipping_is_torchs(limit: float) -> None:
    net = Graph({"a": (Linear(200, 300, dtype="float64"), "x"), "b": (Linear(300, 3, dtype="float64"), "a")})
    rng = np.random.default_rng(0)
    tensors = []
    for g in net.gradients().values():
        g[...] = rng.standard_normal(g.shape)
        tensors.append(torch.zeros(g.shape, dtype=torch.float64, requires_grad=True))
        tensors[-1].grad = torch.tensor(g)
    norm = optim.clip_global_norm(net, limit)
    assert abs(norm / torch.nn.utils.clip_grad_norm_(tensors, limit).item() - 1) < 1e-12
    for ours, theirs in zip(net.gradients().values(), tensors, strict=True):
        assert theirs.grad is not None
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-5 if limit < 1 else 0)  # torch adds 1e-6 to the norm


def test_a_norm_of_numbers_whose_squares_overflow_is_right() -> None:
    layer = vector(2, "float32")
    layer.flat_gradient[:] = 3e25, 4e25
    with np.errstate(over="ignore"):
        assert abs(optim.clip_global_norm(layer, 1.0) / 5e25 - 1) < 1e-6
    np.testing.assert_allclose(layer.flat_gradient, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_gradient_that_is_not_finite_is_told_and_left(bad: float) -> None:
    layer = vector(2)
    layer.flat_gradient[:] = bad, 4
    assert not np.isfinite(optim.clip_global_norm(layer, 1.0))
    assert layer.flat_gradient[1] == 4


# ---- Schedules -------------------------------------------------------------------------------------------------------


def test_schedules_are_torchs() -> None:
    p = torch.zeros(1, requires_grad=True)
    rates = torch.optim.lr_scheduler
    for ours, theirs in (
        (optim.staircase(0.5, 3, 0.1), lambda o: rates.StepLR(o, 3, 0.1)),
        (optim.cosine(0.5, 10, 0.01), lambda o: rates.CosineAnnealingLR(o, 10, 0.01)),
        (optim.linear(0.5, 10), lambda o: rates.LinearLR(o, 1.0, 0.0, 10)),
    ):
        optimizer = torch.optim.SGD([p], lr=0.5)
        schedule = theirs(optimizer)
        for k in range(10):
            assert abs(ours(k) - optimizer.param_groups[0]["lr"]) < 1e-12
            optimizer.step()
            schedule.step()


def test_a_schedule_drives_the_updates() -> None:
    layer = vector(1)
    layer.flat[:], layer.flat_gradient[:] = 0, -1
    optimizer = optim.SGD(layer, optim.warmup(optim.constant(1.0), 1))
    optimizer.step()
    optimizer.step()
    assert layer.flat[0] == 0.5 + 1
    optimizer.learning_rate = 2
    optimizer.step()
    assert layer.flat[0] == 3.5


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda m: optim.SGD(m, -1), r"SGD: learning rate must lie in \[0, inf\), got -1"),
        (lambda m: optim.SGD(m, float("nan")), "learning rate"),
        (lambda m: optim.SGD(m, 1, 1.0), r"momentum must lie in \[0, 1\)"),
        (lambda m: optim.SGD(m, 1, nesterov=True), "nesterov needs a momentum"),
        (lambda m: optim.Adam(m, 1, (0.9, 1.0)), r"betas\[1\] must lie"),
        (lambda m: optim.AdamW(m, 1, weight_decay=-1), "weight_decay must lie"),
        (lambda m: optim.RMSprop(m, 1, eps=-1), "eps must lie"),
        (lambda m: optim.clip_global_norm(m, 0), "max_norm must be above 0"),
        (lambda m: optim.linear(1, 0), "steps must be a whole number of at least 1"),
        (lambda m: optim.staircase(1, 0), "every must be"),
    ),
)
def test_a_number_out_of_range_is_named(call: Callable[[Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(vector(2))


def test_an_update_in_eval_mode_is_an_error() -> None:
    """Where one layer of several is in eval mode, none is updated."""
    net = Graph({"a": (Linear(2, 2, seed=0), "x"), "b": (Linear(2, 2, seed=1).eval(), "a")})
    for leaf in net.leaves():
        leaf.flat_gradient[:] = 1
    before, optimizer = net.state_dict(), optim.SGD(net, 0.1)
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()
    for name, p in net.parameters().items():
        np.testing.assert_array_equal(p, before[name])


def test_a_state_that_does_not_fit_is_refused() -> None:
    optimizer = optim.Adam(vector(3), 0.1)
    state = optimizer.state_dict()
    with pytest.raises(KeyError, match=r"'mean\.0'"):
        optimizer.load_state_dict({name: value for name, value in state.items() if name != "mean.0"})
    with pytest.raises(ValueError, match=r"square\.0 must have shape \(3,\), got \(4,\)"):
        optimizer.load_state_dict({**state, "square.0": np.zeros(4)})
    for steps in (2.5, [1, 2], "one"):
        with pytest.raises(ValueError, match="steps must be one whole number"):
            optimizer.load_state_dict({**state, "mean.0": np.ones(3), "steps": steps})
    assert not optimizer.state_dict()["mean.0"].any()
