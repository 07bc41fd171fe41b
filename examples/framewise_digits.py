"""A label for every frame: which digit does each column of a strip belong to, or is it a gap ("Variants", 3: "Sequence
based prediction or classification, e.g. Speech recognition").

A strip of 3 to 8 handwritten digits is heard as a sound would be: one column of 28 pixels a time step. Two bidirectional LSTMs with an MLP layer
between them ("Its also possible to have MLP feed-forward layers between the hidden layers") see the strip from both ends and name each column by a
softmax; the same without recurrence (a window of 9 columns and a dense layer, the TDNN of speech recognition) stands beside it. Strips are made
anew at every step from 3,800 training images; the weights kept are the best on strips of 200 others, the test strips come from 1,000 images of
their own. Frame error rate: wrong columns over all columns. Bar: the LSTM below half of the window's.

Measured: median 3.90 % of the columns wrong, worst 4.11 % of 3 seeds; the window 17.54 % (96 s of one core in all).

    python examples/framewise_digits.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from digits import Digits, Strips, load, strips
from report import arguments, picture, save, verdict
from rnnfast import Adam, Graph, Linear, losses, optim, training
from rnnfast.conv import Activation, CausalConv1d
from rnnfast.data import Batch
from rnnfast.models import recurrent_stack

AHEAD = 4  # the window's centre lies so many columns back


def recurrent(seed: int) -> Graph:
    """Two bidirectional LSTMs, a dense layer between: (W, B, 28) -> (W, B, 11)."""
    return recurrent_stack(28, [64, 64], 11, between=[64], seed=seed)


def window(seed: int) -> Graph:
    """What can be said from 9 columns alone."""
    return Graph(
        {
            "taps": (CausalConv1d(28, 128, 2 * AHEAD + 1, seed=seed), "columns"),
            "relu": (Activation("relu"), "taps"),
            "labels": (Linear(128, 11, seed=seed + 1), "relu"),
        }
    )


def batch(rows: Strips, late: int = 0) -> Batch:
    """Columns (W, B, 28); their labels, `late` columns later, with weight 1 within the strip. late: delayed many-to-many."""
    x = np.ascontiguousarray(rows.pictures[:, 0].transpose(2, 0, 1))
    x = np.concatenate((x, np.zeros((late, *x.shape[1:]), x.dtype)))
    y = np.concatenate((np.zeros((late, rows.columns.shape[1]), np.int64), rows.columns))
    t = np.arange(len(x))[:, None]
    weights = (t >= late) & (t < rows.widths + late)
    return Batch(x, (y, weights), None if late else rows.widths)


def loss(y, target):
    """Cross-entropy of a column."""
    return losses.softmax_cross_entropy(y, target[0], target[1])


def error(model: Graph, item: Batch) -> float:
    """Percent of the columns with a wrong label."""
    model.eval()
    y, _ = model(item.x, None, item.lengths)
    model.train()
    wrong = y.argmax(axis=-1) != item.target[0]
    return 100 * float(wrong[item.target[1]].mean())


def train(model: Graph, seed: int, steps: int, size: int, parts: tuple[Digits, Digits, Digits], late: int) -> None:
    """Trains; the weights with the best validation stay."""
    rng = np.random.default_rng(seed)
    valid = batch(strips(rng, parts[1], 100 if steps > 100 else 10), late)
    training.fit(
        model,
        lambda epoch: (batch(strips(rng, parts[0], size), late) for _ in range(steps)),
        loss,
        Adam(model, optim.cosine(0.006, steps, 1e-5)),
        steps=steps,
        clip=1.0,
        every=max(steps // 8, 1),
        validation=lambda: error(model, valid),
        patience=steps,
        progress=False,
    )


def draw(model: Graph, rows: Strips, path) -> None:
    """Strips, below each the labels of its columns: true, and said by the LSTM."""
    item = batch(rows)
    model.eval()
    said = model(item.x, None, item.lengths)[0].argmax(axis=-1)
    figure = picture(7, 4)
    axes = figure.subplots(6, 1, height_ratios=[3, 1] * 3)
    for b in range(3):
        axes[2 * b].imshow(rows.pictures[b, 0, :, : rows.widths[b]], cmap="gray_r", aspect="auto")
        both = np.stack((rows.columns[: rows.widths[b], b], said[: rows.widths[b], b])).astype(float)
        both[both == 0] = np.nan
        axes[2 * b + 1].imshow(both, cmap="tab10", vmin=0.5, vmax=10.5, aspect="auto", interpolation="nearest")
        axes[2 * b].set(xticks=[], yticks=[], title="digits " + " ".join(map(str, rows.labels[b])))
        axes[2 * b + 1].set(xticks=[], yticks=[0, 1], yticklabels=["true", "said"])
    save(figure, path)


def main(given: Sequence[str] | None = None) -> float:
    """Prints the frame error rates and returns the LSTM's median."""
    args = arguments("framewise_digits", __doc__, given)
    parts = load()
    steps, size, count = (60, 12, 20) if args.quick else (400, 32, 300)
    test = strips(np.random.default_rng(1000), parts[2], count)
    results: dict[str, list[float]] = {"LSTM": [], "window": []}
    for seed in args.seeds:
        for name in results:
            model, late = (recurrent(10 * seed), 0) if name == "LSTM" else (window(10 * seed), AHEAD)
            train(model, seed, steps, size, parts, late)
            results[name].append(error(model, batch(test, late)))
            if name == "LSTM" and seed == args.seeds[0] and args.figure:
                draw(model, test, args.figure)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f} % of the columns wrong" for name, values in results.items()), flush=True)
    gaps = 100 * float((test.columns[batch(test).target[1]] != 0).mean())
    print(f"always saying gap: {gaps:.1f} %; a window of {2 * AHEAD + 1} columns: median {np.median(results['window']):.2f} %")
    return verdict("columns wrong (%)", results["LSTM"], float(np.median(results["window"])) / 2)


if __name__ == "__main__":
    main()
