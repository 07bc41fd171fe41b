"""The adding problem: one number to remember for hundreds of steps ("Vanishing gradients", "LSTM").

x_t = (a number in [-1, 1], a mark); two steps are marked, one in the first and one in the second half; after the last step the net must say 0.5 +
their sum / 4. Always answering 0.5 has a mean squared error of 1/24 = 0.042. The LSTM's forget gates start open (biases log U(1, T): Tallec and
Ollivier 2018), a plain tanh RNN of the same width stands beside it. Fresh random sequences at every update, no set to overfit; the best of the
validation scores (2,000 sequences) ends the training at 0.002, 10,000 test sequences are read once. Bar: mean squared error < 0.01 at T = 200.

    python examples/adding_problem.py                # T = 200, in five minutes
    python examples/adding_problem.py --length 400   # the longer run, a minute

Measured (3 seeds, median and worst): T = 200: 0.0011 and 0.0015 after 600 updates (8 s each), the RNN 0.042 after 4,000. T = 400: 0.0009 and 0.0018
after 600 to 800 updates, the RNN 0.043 after 8,000.

Source: Hochreiter and Schmidhuber 1997, "Long short-term memory", section 5.4, in the 1-step-a-number form of Le, Jaitly and Hinton 2015.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from report import arguments, picture, save, verdict
from rnnfast import LSTM, RNN, Adam, Graph, Linear, mean_squared_error, training
from rnnfast.models import many_to_one


def sequences(rng: np.random.Generator, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x (T, B, 2), and the answer (B, 1)."""
    x = np.zeros((length, count, 2), np.float32)
    x[..., 0] = rng.uniform(-1, 1, (length, count))
    rows, half = np.arange(count), length // 2
    first, second = rng.integers(0, half, count), rng.integers(half, length, count)
    x[first, rows, 1] = x[second, rows, 1] = 1
    return x, (0.5 + (x[first, rows, :1] + x[second, rows, :1]) / 4)


last_step = many_to_one(mean_squared_error)


def net(cell: str, length: int, hidden: int, seed: int) -> Graph:
    """A recurrent layer and a linear answer."""
    if cell == "rnn":
        layer = RNN(2, hidden, seed=seed)
    else:
        layer = LSTM(2, hidden, seed=seed)
        p, H = layer.parameters(), hidden
        p["bias_hh_l0"][...] = 0
        p["bias_ih_l0"][H : 2 * H] = np.log(np.random.default_rng(seed).uniform(1, length - 1, H))
        p["bias_ih_l0"][:H] = -p["bias_ih_l0"][H : 2 * H]
    return Graph({"h": (layer, "x"), "y": (Linear(hidden, 1, seed=seed + 1), "h")})


def train(cell: str, length: int, steps: int, seed: int, hidden: int = 32, batch: int = 32) -> tuple[Graph, training.Run]:
    """One net, trained until its validation is below 0.002 or for `steps` updates."""
    rng = np.random.default_rng(seed)
    model = net(cell, length, hidden, seed)
    validation = [sequences(rng, length, 1000) for _ in range(2)]

    def stop(run: training.Run) -> None:
        run.stop = bool(run.rows) and run.rows[-1]["validation"] < 0.002

    run = training.fit(
        model, lambda epoch: (sequences(rng, length, batch) for _ in range(100)), last_step, Adam(model, 0.003), steps=steps, every=200, clip=1.0,
        validation=validation, callbacks=[stop], progress=False,
    )  # fmt: skip
    return model.eval(), run


def main(given: Sequence[str] | None = None) -> float:
    """Prints the LSTM's mean squared errors and returns their median."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--length", type=int, help="T (default: 200, with --quick 30)")
    extra, rest = own.parse_known_args(given)
    args = arguments(f"adding_problem_{extra.length}" if extra.length else "adding_problem", __doc__, rest)
    length = extra.length or (30 if args.quick else 200)
    steps = 600 if args.quick else 4000 * max(1, length // 200)
    test = sequences(np.random.default_rng(999), length, 10_000)
    errors, runs = [], []
    for cell, seeds in (("lstm", args.seeds), ("rnn", args.seeds[:1])):
        for seed in seeds:
            model, run = train(cell, length, steps, seed)
            error = float(np.mean((np.concatenate([model(test[0][:, i : i + 1000])[0][-1] for i in range(0, 10_000, 1000)]) - test[1]) ** 2))
            print(f"{cell} seed {seed}: {run.step} updates in {run.seconds:.0f} s, T = {length}: mean squared error {error:.5f}")
            runs.append((cell, seed, run.rows))
            if cell == "lstm":
                errors.append(error)
    if args.figure:
        figure = picture()
        axes = figure.subplots()
        for cell, seed, rows in runs:
            axes.semilogy([r["step"] for r in rows], [r["validation"] for r in rows], "-" if cell == "lstm" else "k--", label=f"{cell}, seed {seed}")
        axes.axhline(1 / 24, color="grey", lw=0.8, label="always 0.5")
        axes.axhline(0.01, color="red", lw=0.8, ls=":", label="bar")
        axes.set(xlabel="update", ylabel="mean squared error", title=f"the adding problem, T = {length}")
        axes.legend(fontsize=8)
        save(figure, args.figure)
    return verdict(f"LSTM, mean squared error at T = {length}", errors, 0.01)


if __name__ == "__main__":
    main()
