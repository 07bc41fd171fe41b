"""Connectionist temporal classification: label sequences learnt without knowing where each label lies.

path      one symbol a frame, labels and blanks; a path's labels are what is left once runs are merged and blanks dropped: a a - a b -> a a b
extended  the labels with a blank before, between and after: S labels give 2 S + 1 states; a path can stay in one, move on, or skip a blank
alpha     log probability of all beginnings of paths that are in state s at frame t; beta: of all ends that follow it
Everything is in the log domain and in float64; the batch goes through every frame together. It knows no model.

Source: Graves, Fernández, Gomez & Schmidhuber 2006, "Connectionist temporal classification".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .module import Array

Integers = NDArray[np.int64]


def _log_softmax(a: Array) -> NDArray[np.float64]:
    """log softmax over the last axis, in float64."""
    shifted = a.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True, initial=-np.inf) if shifted.size else 0.0
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def _logits(name: str, logits: ArrayLike, lengths: ArrayLike | None, blank: int) -> tuple[Array, Integers]:
    """The logits (T, B, V) and the rows' lengths (B,), checked."""
    a: Array = np.asarray(logits)
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: logits must have dtype float32 or float64, got {a.dtype}")
    if a.ndim != 3:
        raise ValueError(f"{name}: logits must have shape (T, B, V), got {a.shape}")
    T, B, V = a.shape
    if not 0 <= blank < V:
        raise ValueError(f"{name}: blank must lie in [0, {V}), got {blank}")
    ends: Array = np.full(B, T) if lengths is None else np.asarray(lengths)
    if ends.shape != (B,) or ends.dtype.kind not in "iu":
        raise ValueError(f"{name}: lengths must be integers of shape (B,) = ({B},), got {ends.dtype} of {ends.shape}")
    if B and not 0 <= int(ends.min()) <= int(ends.max()) <= T:
        raise ValueError(f"{name}: lengths must lie in [0, {T}], got {ends.min()} to {ends.max()}")
    return a, ends.astype(np.int64)


def ctc_loss(
    logits: ArrayLike,
    targets: Sequence[ArrayLike],
    lengths: ArrayLike | None = None,
    *,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[float, Array]:
    """Mean over the batch of -log p(labels | logits), in nats, and its gradient.

        p(labels) = Σ over paths that read as the labels of Π_t softmax(a_t)_path(t)
        da_tv = (softmax(a_t)_v - Σ_{s of label v} p(the path is in state s at t | labels)) / B

    logits (T, B, V) float32 or float64; targets: B sequences of labels in [0, V) without the blank, of any lengths, 0 included; lengths (B,): frames
    of each row, past which logits are not read and the gradient is 0. A row with too few frames for its labels (a label a frame, one more between two
    equal ones) has no path: the loss is infinite and its gradient 0; with zero_infinity it counts as 0, as torch.nn.CTCLoss's. The mean is over rows,
    whatever their lengths: torch's reduction="sum" divided by B.

    Raises ValueError for wrong shapes, TypeError for wrong dtypes, IndexError for a label out of range or a blank among them.

    >>> loss, da = ctc_loss(np.zeros((2, 1, 3)), [[1]])  # 1-, -1 and 11 of nine paths
    >>> round(math.exp(-loss) * 9, 6), da.shape
    (3.0, (2, 1, 3))
    """
    name = "ctc_loss"
    a, ends = _logits(name, logits, lengths, blank)
    T, B, V = a.shape
    labels = [np.asarray(row if len(np.shape(row)) and np.size(row) else np.zeros(0, np.int64)) for row in targets]
    if len(labels) != B:
        raise ValueError(f"{name}: targets must be {B} sequences, one a row, got {len(labels)}")
    for row in labels:
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise TypeError(f"{name}: a target must be a sequence of integers, got {row.dtype} of shape {row.shape}")
        if row.size and not (row.min() >= 0 and row.max() < V and not (row == blank).any()):
            raise IndexError(f"{name}: labels must lie in [0, {V}) without the blank {blank}, got {row.tolist()}")
    da = np.zeros(a.shape, a.dtype)
    if B == 0:
        return 0.0, da
    sizes = np.array([row.size for row in labels])
    states = 2 * int(sizes.max()) + 1
    extended = np.full((B, states), blank)  # (B, S') blank, label, blank, label, ..., blank
    for b, row in enumerate(labels):
        extended[b, 1 : 2 * row.size : 2] = row
    skips = np.zeros((B, states), bool)  # may the path come from two states before: from a label to a different one
    skips[:, 3::2] = extended[:, 3::2] != extended[:, 1:-2:2]

    frames = np.arange(T)[:, None] < ends
    log_p = _log_softmax(np.where(frames[..., None], a, 0))  # (T, B, V)
    emitted = np.take_along_axis(log_p, np.broadcast_to(extended, (T, B, states)), axis=2)  # (T, B, S')
    rows, last = np.arange(B), 2 * sizes

    alpha = np.full((T, B, states), -np.inf)
    beta = np.full((T, B, states), -np.inf)
    now = np.full((B, states), -np.inf)
    now[:, 0] = 0.0  # before the first frame: as if in the first blank, from which the first label can be reached
    for t in range(T):
        if t == 0:
            come = now.copy()
            come[:, 1:2] = 0.0
        else:
            come = now.copy()
            come[:, 1:] = np.logaddexp(come[:, 1:], now[:, :-1])
            come[:, 2:] = np.logaddexp(come[:, 2:], np.where(skips[:, 2:], now[:, :-2], -np.inf))
        now = np.where(frames[t][:, None], come + emitted[t], now)  # α_t(s) = log p_t(s) + log(α_{t-1}(s) + α_{t-1}(s-1) [+ α_{t-1}(s-2)])
        alpha[t] = now
    total = np.logaddexp(now[rows, last], np.where(sizes > 0, now[rows, last - 1], -np.inf))  # (B,) log p(labels)

    for t in reversed(range(T)):
        if t + 1 < T:
            go = beta[t + 1] + emitted[t + 1]
            come = go.copy()
            come[:, :-1] = np.logaddexp(come[:, :-1], go[:, 1:])
            come[:, :-2] = np.logaddexp(come[:, :-2], np.where(skips[:, 2:], go[:, 2:], -np.inf))
            beta[t] = np.where(frames[t + 1][:, None], come, -np.inf)  # β_t(s): the frames after t
        ending = np.flatnonzero(ends == t + 1)
        beta[t, ending, last[ending]] = 0.0
        with_label = ending[sizes[ending] > 0]
        beta[t, with_label, last[with_label] - 1] = 0.0

    possible = np.isfinite(total)
    posterior = np.exp(alpha + beta - np.where(possible, total, 0.0)[:, None])  # (T, B, S')
    occupied = np.zeros((T, B, V))
    for s in range(states):  # a state at a time, so that no (row, label) is met twice
        occupied[:, rows, extended[:, s]] += posterior[:, :, s]
    da[...] = np.where((frames & possible)[..., None], (np.exp(log_p) - occupied) / B, 0.0)
    return float(-(np.where(possible, total, 0.0) if zero_infinity else total).mean()), da


def ctc_greedy(logits: ArrayLike, lengths: ArrayLike | None = None, *, blank: int = 0) -> list[list[int]]:
    """The labels of the likeliest path of every row: the best symbol of each frame, runs merged, blanks dropped.

    logits (T, B, V), lengths (B,) -> B lists. Raises as `ctc_loss`.

    >>> ctc_greedy(np.eye(3)[[1, 1, 0, 1, 2]][:, None])
    [[1, 1, 2]]
    """
    a, ends = _logits("ctc_greedy", logits, lengths, blank)
    T, B, _ = a.shape
    if T == 0:
        return [[] for _ in range(B)]
    best = a.argmax(axis=2)  # (T, B)
    fresh = np.concatenate((np.ones((1, B), bool), best[1:] != best[:-1])) & (best != blank) & (np.arange(T)[:, None] < ends)
    return [best[fresh[:, b], b].tolist() for b in range(B)]


def ctc_beam(
    logits: ArrayLike, lengths: ArrayLike | None = None, *, width: int = 16, blank: int = 0, bonus: Any = None
) -> list[list[tuple[list[int], float]]]:
    """Prefix beam search: for every row up to `width` label sequences with their log probabilities, likeliest first.

    All paths of a prefix are summed, so that with a width of at least all prefixes the first is the true maximum of p(labels) and the numbers are
    -`ctc_loss` of one row. bonus(prefix, label) -> number is added when a label joins a prefix (a tuple): the log of a language model's opinion, say.

    logits (T, B, V), lengths (B,). Raises as `ctc_loss`, and ValueError for a width below 1.

    >>> p = np.log([[[0.6, 0.4]], [[0.6, 0.4]]])  # the best path is blank blank, the best labels are [1]
    >>> ctc_greedy(p), ctc_beam(p)[0][0][0], round(math.exp(ctc_beam(p)[0][0][1]), 2)
    ([[]], [1], 0.64)
    """
    if width < 1:
        raise ValueError(f"ctc_beam: width must be at least 1, got {width}")
    a, ends = _logits("ctc_beam", logits, lengths, blank)
    V = a.shape[2]
    add, none = np.logaddexp, -math.inf
    results = []
    for b, end in enumerate(ends):
        log_p = _log_softmax(a[: int(end), b])
        beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, none)}  # prefix -> log p of its paths that end in the blank, in its label
        for frame in log_p.tolist():
            grown: dict[tuple[int, ...], list[float]] = {}
            for prefix, (blanks, label) in beams.items():
                kept = grown.setdefault(prefix, [none, none])
                both = float(add(blanks, label))
                kept[0] = float(add(kept[0], both + frame[blank]))
                if prefix:
                    kept[1] = float(add(kept[1], label + frame[prefix[-1]]))
                for v in range(V):
                    if v == blank:
                        continue
                    before = blanks if prefix and prefix[-1] == v else both  # the same label again needs a blank between
                    gain = before + frame[v] + (0.0 if bonus is None else bonus(prefix, v))
                    if gain > none:
                        entry = grown.setdefault((*prefix, v), [none, none])
                        entry[1] = float(add(entry[1], gain))
            best = sorted(grown.items(), key=lambda item: -float(add(item[1][0], item[1][1])))[:width]
            beams = {prefix: (ends_in[0], ends_in[1]) for prefix, ends_in in best}
        results.append([(list(prefix), float(add(*ends_in))) for prefix, ends_in in beams.items()])
    return results


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Insertions, deletions and substitutions that turn a into b (Levenshtein): the numerator of a label error rate.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
