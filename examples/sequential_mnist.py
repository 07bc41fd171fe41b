"""Digits read row by row: 28 steps of 28 pixels, one answer at the end ("Variants", 3: many to one).

5,000 real MNIST pictures, 4,000 to train and 1,000 to test (each digit's last fifth). An LSTM reads the rows from the top and nothing
else, a linear layer sees its last state through dropout. Training pictures are shifted by up to 2 pixels, turned by up to 12 degrees and scaled by
up to 12 %, drawn anew at every epoch. A tenth of the training part chose the settings; the test part is read once. Bar: 95 % right.

Measured: median 97.8 %, worst 97.7 % of 3 seeds (95 s of one core in all).

    python examples/sequential_mnist.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import mnist
from report import arguments, picture, save, verdict
from rnnfast import LSTM, AdamW, Dropout, Graph, Linear, losses, optim, training
from rnnfast.models import many_to_one


def warp(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every picture turned, scaled and shifted a little: (N, 28, 28), bilinear."""
    N = len(pictures)
    angle, size = np.radians(rng.uniform(-12, 12, N)), rng.uniform(0.88, 1.12, N)
    shift = rng.uniform(-2, 2, (2, N)) + 13.5
    r, s = np.mgrid[:28, :28] - 13.5
    cos, sin = (np.cos(angle) / size)[:, None, None], (np.sin(angle) / size)[:, None, None]
    at = cos * r - sin * s + shift[0][:, None, None], sin * r + cos * s + shift[1][:, None, None]
    low = [np.floor(a).astype(int) for a in at]
    part = [a - b for a, b in zip(at, low, strict=True)]
    padded = np.pad(pictures, ((0, 0), (8, 9), (8, 9)))
    n, (i, j) = np.arange(N)[:, None, None], (np.clip(a + 8, 0, 43) for a in low)
    top = padded[n, i, j] * (1 - part[1]) + padded[n, i, j + 1] * part[1]
    bottom = padded[n, i + 1, j] * (1 - part[1]) + padded[n, i + 1, j + 1] * part[1]
    return (top * (1 - part[0]) + bottom * part[0]).astype(np.float32)


def net(seed: int, hidden: int) -> Graph:
    """Rows into an LSTM, and a score for every digit at every step (the last one counts)."""
    return Graph(
        {
            "down": (LSTM(28, hidden, forget_bias=1.0, seed=seed), "rows"),
            "drop": (Dropout(0.3, seed=seed + 2), "down"),
            "y": (Linear(hidden, 10, seed=seed + 3), "drop"),
        }
    )


def rows(pictures: np.ndarray) -> np.ndarray:
    """(28, B, 28): a row of every picture a step."""
    return np.ascontiguousarray(pictures.swapaxes(0, 1))


loss = many_to_one(losses.softmax_cross_entropy)


def train(pictures: np.ndarray, digits: np.ndarray, seed: int, epochs: int, hidden: int = 96) -> Graph:
    """One net."""
    rng = np.random.default_rng(seed)
    model = net(10 * seed, hidden)
    steps = epochs * (len(digits) // 50)

    def epoch_of(_: int):
        order = rng.permutation(len(digits))
        seen = warp(pictures[order], rng)
        return ((rows(seen[i : i + 50]), digits[order[i : i + 50]]) for i in range(0, len(order) - 49, 50))

    optimizer = AdamW(model, optim.linear(0.004, steps), weight_decay=0.01)
    training.fit(model, epoch_of, loss, optimizer, steps=steps, clip=1.0, progress=False)
    return model.eval()


def right(model: Graph, pictures: np.ndarray, digits: np.ndarray) -> float:
    """The share of right answers in per cent."""
    return 100 * float((model(rows(pictures))[0][-1].argmax(axis=-1) == digits).mean())


def main(given: Sequence[str] | None = None) -> float:
    """Prints the share of right digits and returns its median."""
    args = arguments("sequential_mnist", __doc__, given)
    pictures, digits = mnist()  # 500 of each digit, in order
    place = np.arange(len(digits)) % 500
    train_part, test_part = place < 400, place >= 400
    epochs, hidden = (5, 48) if args.quick else (30, 96)
    if not args.quick:
        inner = train_part & (place < 360)
        held = train_part & ~inner
        model = train(pictures[inner], digits[inner], 100, epochs, hidden)
        print(f"a net trained on nine tenths of the training part: {right(model, pictures[held], digits[held]):.1f} % of the other tenth right", flush=True)
    rights = []
    for seed in args.seeds:
        model = train(pictures[train_part], digits[train_part], seed, epochs, hidden)
        rights.append(right(model, pictures[test_part], digits[test_part]))
        print(f"seed {seed}: {rights[-1]:.1f} % of {test_part.sum():,} test pictures right", flush=True)
    if args.figure:
        figure = picture()
        left, middle, last = figure.subplots(1, 3)
        shown = pictures[test_part][350]
        left.imshow(shown, cmap="gray_r")
        left.set(title="read from the top", xlabel="28 pixels a step", ylabel="step")
        y = model(rows(shown[None]))[0][:, 0].astype(np.float64)
        e = np.exp(y - y.max(axis=1, keepdims=True))
        middle.imshow(e / e.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        middle.set(xlabel="digit", title="probability so far", xticks=range(10))
        last.imshow(model["down"](rows(shown[None]))[0][:, 0], aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
        last.set(xlabel="unit", title="h of the rows' LSTM")
        save(figure, args.figure)
    return verdict("digits right (%)", rights, 95, low=False)


if __name__ == "__main__":
    main()
