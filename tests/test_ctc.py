"""CTC: against every path counted one by one, against torch, and laws of its decoders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from rnnfast.ctc import ctc_beam, ctc_greedy, ctc_loss, edit_distance
from rnnfast.losses import check_gradient


def reading(path, blank: int = 0) -> tuple[int, ...]:
    """What a path reads as."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def every_reading(logits: np.ndarray, blank: int = 0) -> dict[tuple[int, ...], float]:
    """p(labels) of one row (T, V), by the sum over all V^T paths."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        sums[reading(path, blank)] = sums.get(reading(path, blank), 0.0) + math.prod(p[range(len(p)), path])
    return sums


@pytest.mark.parametrize("blank", [0, 2])
def test_the_loss_is_the_sum_over_all_paths(blank: int) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 1, 3))
    for labels, p in every_reading(logits[:, 0], blank).items():
        assert ctc_loss(logits, [labels], blank=blank)[0] == pytest.approx(-math.log(p), rel=1e-12)


def test_the_gradient_is_that_of_central_differences() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 4, 4))
    targets = [[1, 1, 2], [3], [], [2, 1]]
    assert check_gradient(lambda y: ctc_loss(y, targets, [6, 4, 5, 2]), logits) < 1e-7


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("repeats", [False, True], ids=["many symbols", "few symbols, runs"])
def test_value_and_gradient_are_torchs(kind, repeats: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    T, B, V = 50, 7, 4 if repeats else 30
    logits = (3 * rng.normal(size=(T, B, V))).astype(kind)
    lengths = rng.integers(25, T + 1, B)
    targets = [rng.integers(1, V, n) for n in rng.integers(0, 11, B)]
    loss, da = ctc_loss(logits, targets, lengths)

    a = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([len(row) for row in targets])
    want = torch.nn.CTCLoss(reduction="sum")(a.log_softmax(2), torch.tensor(np.concatenate(targets)), torch.tensor(lengths), counts) / B
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-10)
    assert da.dtype == kind
    np.testing.assert_allclose(da, a.grad.numpy(), rtol=0, atol=1e-7 if kind is np.float32 else 1e-12)


def test_a_row_does_not_know_its_batch() -> None:
    rng = np.random.default_rng(3)
    logits, targets, lengths = rng.normal(size=(9, 3, 5)), [[1, 2], [4, 4, 3, 1], []], [9, 7, 3]
    for b, end in enumerate(lengths):
        logits[end:, b] = np.nan
    loss, da = ctc_loss(logits, targets, lengths)
    alone = [ctc_loss(logits[:end, [b]], [row]) for b, (row, end) in enumerate(zip(targets, lengths))]
    assert loss == pytest.approx(np.mean([one for one, _ in alone]), rel=1e-14)
    for b, end in enumerate(lengths):
        np.testing.assert_allclose(da[:end, b], alone[b][1][:, 0] / 3, atol=1e-15)
        assert not da[end:, b].any()


def test_what_cannot_be_said_in_time_has_no_path() -> None:
    logits = np.zeros((2, 2, 3))
    loss, da = ctc_loss(logits, [[1, 1], [1]])
    assert loss == math.inf and not da[:, 0].any() and da[:, 1].any()
    assert ctc_loss(logits, [[1, 1], [1]], zero_infinity=True)[0] == pytest.approx(-math.log(3 / 9) / 2)


def test_no_time_and_no_batch() -> None:
    assert ctc_loss(np.zeros((0, 2, 3)), [[], []])[0] == 0.0
    assert ctc_loss(np.zeros((4, 0, 3)), [])[0] == 0.0
    assert ctc_greedy(np.zeros((0, 2, 3))) == [[], []]
    assert ctc_beam(np.zeros((0, 1, 3))) == [[([], 0.0)]]


def test_a_wide_beam_finds_the_likeliest_reading_and_its_probability() -> None:
    rng = np.random.default_rng(4)
    for _ in range(5):
        logits = rng.normal(size=(5, 1, 3))
        sums = every_reading(logits[:, 0])
        found = ctc_beam(logits, width=1000)[0]
        assert tuple(found[0][0]) == max(sums, key=sums.__getitem__)
        for labels, log_p in found:
            assert log_p == pytest.approx(math.log(sums[tuple(labels)]), rel=1e-9)


def test_where_every_frame_is_sure_beam_and_greedy_agree() -> None:
    rng = np.random.default_rng(5)
    logits = 20 * np.eye(4)[rng.integers(0, 4, (12, 3))]
    lengths = [12, 5, 0]
    greedy = ctc_greedy(logits, lengths)
    assert greedy == [rows[0][0] for rows in ctc_beam(logits, lengths, width=4)]
    assert greedy[2] == []


def test_a_bonus_moves_the_beam() -> None:
    logits = np.log([[[0.2, 0.41, 0.39]]])
    assert ctc_beam(logits)[0][0][0] == [1]
    assert ctc_beam(logits, bonus=lambda prefix, label: 1.0 if label == 2 else 0.0)[0][0][0] == [2]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ctc_loss(np.zeros((2, 1)), [[1]]), ValueError, r"\(T, B, V\)"),
        (lambda: ctc_loss(np.zeros((2, 1, 3), int), [[1]]), TypeError, "float32 or float64"),
        (lambda: ctc_loss(np.zeros((2, 1, 3)), [[1], [1]]), ValueError, "one a row"),
        (lambda: ctc_loss(np.zeros((2, 1, 3)), [[0]]), IndexError, "blank"),
        (lambda: ctc_loss(np.zeros((2, 1, 3)), [[3]]), IndexError, "labels"),
        (lambda: ctc_loss(np.zeros((2, 1, 3)), [[0.5]]), TypeError, "integers"),
        (lambda: ctc_loss(np.zeros((2, 1, 3)), [[1]], [3]), ValueError, "lengths"),
        (lambda: ctc_greedy(np.zeros((2, 1, 3)), blank=3), ValueError, "blank"),
        (lambda: ctc_beam(np.zeros((2, 1, 3)), width=0), ValueError, "width"),
    ],
)
def test_what_is_wrong_is_said(call, error, says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_edit_distance() -> None:
    assert edit_distance([], [1, 2]) == 2
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance("abc", "abc") == 0
