"""Losses against torch in both dtypes, their gradients against central differences, and what they leave unread."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rnnfast.losses import check_gradient, mean_squared_error, softmax_cross_entropy

FLOATS = ("float32", "float64")
SHAPES = {
    "a batch": (7, 5, 11),
    "a row": (4, 3),
    "one class": (5, 2, 1),
    "many classes": (3, 2, 70_001),
    "one number": (1, 1),
}
Loss = Callable[..., tuple[float, Any]]


def case(shape: tuple[int, ...], dtype: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """Logits, targets, weights of which some are 0."""
    rng = np.random.default_rng(seed)
    logits = (4 * rng.standard_normal(shape)).astype(dtype)
    return logits, rng.integers(0, shape[-1], shape[:-1]), rng.integers(0, 3, shape[:-1]) * 0.5


@pytest.mark.parametrize("weighted", (False, True), ids=("mean", "weighted"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy_is_torchs(shape: tuple[int, ...], dtype: str, weighted: bool) -> None:
    logits, targets, weights = case(shape, dtype)
    weights = weights + (weights.sum() == 0) if weighted else np.ones(targets.shape)
    a = torch.tensor(logits, dtype=torch.float64, requires_grad=True)  # the truth, for either dtype
    each = torch.nn.functional.cross_entropy(a.reshape(-1, shape[-1]), torch.tensor(targets.ravel()), reduction="none")
    w = torch.tensor(weights.ravel(), dtype=torch.float64)
    expected = (each * w).sum() / w.sum()
    expected.backward()
    loss, da = softmax_cross_entropy(logits, targets, weights if weighted else None)
    eps = float(np.finfo(dtype).eps)
    size = float(np.abs(logits).max())  # a shifted logit has an error of eps times its size, and so has log p
    assert abs(loss - expected.item()) <= 8 * eps * (size + np.log(shape[-1]))
    assert a.grad is not None and da is not None and da.dtype == dtype
    np.testing.assert_allclose(da, a.grad, rtol=8 * eps * (size + 8), atol=2 * eps * float(weights.max() / weights.sum()))


def test_cross_entropys_gradient_is_its_derivative() -> None:
    logits, targets, weights = case((3, 2, 4), "float64")
    assert check_gradient(lambda a: softmax_cross_entropy(a, targets, weights), logits) < 1e-8


def test_masked_steps_are_not_read() -> None:
    logits, targets, _ = case((6, 4, 5), "float32")
    mask = np.random.default_rng(1).random((6, 4)) < 0.5
    loss, da = softmax_cross_entropy(logits, targets, mask)
    logits[~mask], targets[~mask] = np.nan, -100
    again, da_again = softmax_cross_entropy(logits, targets, mask)
    assert again == loss
    np.testing.assert_array_equal(da_again, da)
    assert da is not None and not da[~mask].any()


def test_nothing_that_counts_is_no_loss() -> None:
    logits, targets, _ = case((6, 4, 5), "float32")
    for loss, da in (
        softmax_cross_entropy(logits, targets, np.zeros((6, 4))),
        softmax_cross_entropy(logits[:0], targets[:0]),
        softmax_cross_entropy(logits[:, :0], targets[:, :0]),
    ):
        assert loss == 0 and da is not None and not da.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_huge_logits_do_not_overflow(dtype: str) -> None:
    loss, da = softmax_cross_entropy(np.array([[1e30, 0], [-1e30, -1e30]], dtype), np.array([0, 1]))
    assert abs(loss - np.log(2) / 2) < 1e-7
    assert da is not None
    np.testing.assert_allclose(da, [[0, 0], [0.25, -0.25]], atol=1e-7)


def test_the_gradient_may_take_the_logits_place() -> None:
    logits, targets, weights = case((600, 5, 31), "float32")
    loss, da = softmax_cross_entropy(logits, targets, weights)
    copy = logits.copy()
    again, same = softmax_cross_entropy(copy, targets, weights, out=copy)
    assert again == loss and same is not None and np.shares_memory(same, copy)
    np.testing.assert_array_equal(same, da)
    assert softmax_cross_entropy(logits, targets, weights, gradient=False) == (loss, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", (False, True), ids=("mean", "weighted"))
def test_mean_squared_error_is_torchs(dtype: str, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((2, 7, 5, 3)).astype(dtype)
    weights = rng.integers(0, 3, (7, 5)) if weighted else np.ones((7, 5))
    a = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(weights, dtype=torch.float64)[..., None]
    expected = ((a - torch.tensor(target, dtype=torch.float64)) ** 2 * w).sum() / (w.sum() * 3)
    expected.backward()
    loss, dy = mean_squared_error(y, target, weights if weighted else None)
    eps = float(np.finfo(dtype).eps)
    assert abs(loss - expected.item()) <= 8 * eps * expected.item()
    assert a.grad is not None and dy.dtype == dtype
    np.testing.assert_allclose(dy, a.grad, rtol=8 * eps, atol=8 * eps * float(weights.max() / weights.sum()))


def test_mean_squared_errors_gradient_is_its_derivative_and_a_mask_hides() -> None:
    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((2, 4, 3, 2))
    mask = rng.random((4, 3)) < 0.5
    assert check_gradient(lambda a: mean_squared_error(a, target, mask), y) < 1e-8
    loss, dy = mean_squared_error(y, target, mask)
    y[~mask], target[~mask] = np.nan, np.nan
    again, dy_again = mean_squared_error(y, target, mask)
    assert again == loss
    np.testing.assert_array_equal(dy_again, dy)


def test_check_gradient_finds_a_wrong_one() -> None:
    assert check_gradient(lambda y: (float((y**2).sum()), y), np.ones((2, 3))) > 0.4
    with pytest.raises(ValueError, match=r"dY must have shape \(2, 3\), got \(3,\)"):
        check_gradient(lambda y: (0.0, y[0]), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda a, t: softmax_cross_entropy(a, t[1:]), ValueError, r"targets must have shape \(4, 3\)"),
        (lambda a, t: softmax_cross_entropy(a, t + 9), IndexError, r"targets must lie in \[0, 5\)"),
        (lambda a, t: softmax_cross_entropy(a, t - 9), IndexError, r"targets must lie in \[0, 5\)"),
        (lambda a, t: softmax_cross_entropy(a, t * 1.0), TypeError, "targets must be integers, got dtype float64"),
        (lambda a, t: softmax_cross_entropy(a.astype(int), t), TypeError, "logits must have dtype float32 or float64"),
        (lambda a, t: softmax_cross_entropy(a, t, t[1:]), ValueError, r"weights must be numbers of shape \(4, 3\)"),
        (lambda a, t: softmax_cross_entropy(a, t, t - 9), ValueError, "finite and not negative"),
        (lambda a, t: softmax_cross_entropy(a, t, t + np.nan), ValueError, "finite and not negative"),
        (lambda a, t: softmax_cross_entropy(a, t, out=a[:2]), ValueError, "out must be a contiguous float32 array"),
        (lambda a, t: softmax_cross_entropy(a, t, out=np.broadcast_to(a, a.shape)), ValueError, "out is read-only"),
        (lambda a, t: softmax_cross_entropy(a[..., :0], t), IndexError, r"targets must lie in \[0, 0\)"),
        (lambda a, t: mean_squared_error(a, t), ValueError, r"target must have the shape of y \(4, 3, 5\)"),
        (lambda a, t: mean_squared_error(t, t), TypeError, "y must have dtype float32 or float64"),
    ),
)
def test_a_wrong_argument_is_named(call: Loss, error: Any, message: str) -> None:
    logits, targets, _ = case((4, 3, 5), "float32")
    with pytest.raises(error, match=message):
        call(logits, targets)
