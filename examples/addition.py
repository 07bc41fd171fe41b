"""Adding numbers of any length, learnt from short ones ("MLPs vs RNNs", "The addition problem").

The net reads two numbers bit by bit, least significant first, and writes their sum: all it has to carry is the carry. Supervision is per step (the
bit of the sum). Trained on pairs of 1 to 16 bits until fresh pairs of that size (the validation) have a loss below 1e-4, then judged once: a pair
of 512 bits counts only if all 513 bits of the sum are right. Bar: all of 1,000 pairs.

Measured: all 1,000 for each of 3 seeds after 1,344 to 1,712 updates (about 2 s each).

    python examples/addition.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from report import arguments, picture, save, verdict
from rnnfast import RNN, Adam, Graph, Linear, losses, training
from rnnfast.data import Batch


def pairs(rng: np.random.Generator, bits: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x (bits + 1, B, 2) as -1 and 1, the numbers' bits from the least, then a pair of zeros; and the sum's bits (bits + 1, B)."""
    a, b = rng.integers(0, 2, (2, bits + 1, count))
    a[-1] = b[-1] = 0
    total, carry = np.empty_like(a), np.zeros(count, np.int64)
    for t in range(bits + 1):
        whole = a[t] + b[t] + carry
        total[t], carry = whole % 2, whole // 2
    return (2.0 * np.stack((a, b), axis=-1) - 1).astype(np.float32), total


def batches(rng: np.random.Generator, count: int, longest: int = 16) -> list[Batch]:
    """One batch of every length from 1 to `longest` bits, in random order."""
    return [Batch(*pairs(rng, int(bits), count)) for bits in rng.permutation(np.arange(1, longest + 1))]


def train(seed: int, epochs: int = 300, goal: float = 1e-4) -> tuple[Graph, int]:
    """One net and the number of updates it took."""
    rng = np.random.default_rng(seed)
    model = Graph({"h": (RNN(2, 16, learn_initial_state=True, seed=seed), "x"), "y": (Linear(16, 2, seed=seed + 1), "h")})
    loss = losses.softmax_cross_entropy
    validation = batches(rng, 128)

    def stop(run: training.Run) -> None:
        run.stop = bool(run.rows) and run.rows[-1]["validation"] < goal

    run = training.fit(
        model,
        lambda epoch: batches(rng, 64),
        loss,
        Adam(model, 0.01),
        epochs=epochs,
        clip=1.0,
        validation=validation,
        callbacks=[stop],
        progress=False,
    )
    return model.eval(), run.step


def main(given: Sequence[str] | None = None) -> float:
    """Prints the number of exact sums and returns its median."""
    args = arguments("addition", __doc__, given)
    bits = 48 if args.quick else 512
    exact, curves = [], []
    for seed in args.seeds:
        model, steps = train(seed, goal=1e-2 if args.quick else 1e-4)
        x, total = pairs(np.random.default_rng(1000 + seed), bits, 1000)
        right = model(x)[0].argmax(axis=-1) == total
        exact.append(int(right.all(axis=0).sum()))
        curves.append(np.logical_and.accumulate(right).mean(axis=1))
        print(f"seed {seed}: {steps} updates on pairs of up to 16 bits; {exact[-1]} of 1,000 pairs of {bits} bits added exactly")
    if args.figure:
        figure = picture()
        left, right_axes = figure.subplots(1, 2)
        for seed, curve in zip(args.seeds, curves, strict=True):
            left.plot(np.arange(1, bits + 2), 100 * curve, label=f"seed {seed}")
        left.axvspan(1, 17, alpha=0.2, label="lengths trained on")
        left.set(xlabel="bits of the sum", ylabel="% all right so far", ylim=(0, 104), xscale="log", title="addition")
        left.legend()
        a, b = (x[:40, 0] > 0).astype(int).T
        whole, carry = 0, []
        for t in range(40):
            whole = (a[t] + b[t] + whole) // 2
            carry.append(whole)
        h = model["h"](x[:40, :1])[0][:, 0]
        unit = int(np.argmax([abs(np.corrcoef(h[:, k], carry)[0, 1]) for k in range(h.shape[1])]))
        right_axes.step(range(40), carry, where="mid", label="carry")
        right_axes.plot(h[:, unit], "o-", ms=3, label=f"h, unit {unit}")
        right_axes.set(xlabel="bit", title="the unit that holds the carry")
        right_axes.legend()
        save(figure, args.figure)
    return verdict(f"pairs of {bits} bits added exactly, of 1,000", exact, 1000, low=False)


if __name__ == "__main__":
    main()
