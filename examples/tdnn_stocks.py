"""The stock predictor ("Should I invest..", "The stock predictor": TDNN; NARX; the state-space model; "We can also have skips.."), side by side.

Twenty years of the S&P 500 and the NASDAQ, daily. The stock vector of a day: both returns, both logarithms of the day's size |return|, both changes
of volume. Every model reads the same days and predicts two things of the S&P's next day: its return, and the logarithm of its size (volatility). A
TDNN sees 21 days back; the NARX three days and its three last true values; RNN, two-layer RNN with skips and LSTM as far as they like, their
initial state learned. Split by time: 70 % training, 10 % validation (stopping), 20 % test (2015 to 2018), read once.

Honest about the naive baseline: tomorrow's price is today's (return 0) is as good as anything here, and no net is claimed to beat it; what can be
forecast is volatility. Bar: the median net's error in log |return| over the best naive one's (mean of the last 1, 5, 20 or 60 days, the constant
mean), for the LSTM: ratio < 1.

Measured (3 seeds, 14 s of one core; medians of the ratios): return 0.997 (LSTM) to 1.021; log |return| LSTM 0.969, TDNN 0.971, RNN 0.976, with skips
0.985, NARX 1.012: the last one is no better than a mean of 20 days.

    python examples/tdnn_stocks.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import nasdaq, sp500
from report import arguments, picture, save, verdict
from rnnfast import LSTM, NARX, RNN, AdamW, Graph, Linear, clip_global_norm, mean_squared_error
from rnnfast.conv import Activation, CausalConv1d
from rnnfast.narx import Feedback

WARM = 25  # steps of a window that no loss reads


def table() -> tuple[np.ndarray, np.ndarray]:
    """x (days, 6) and the next day's d (days, 2): return in per cent and log size of the S&P 500."""
    columns = []
    for _, series in (sp500(), nasdaq()):
        step = 100 * np.diff(np.log(series[:, 0]))
        columns.append((step, np.log(np.abs(step) + 0.05), np.clip(np.diff(np.log(np.maximum(series[:, 1], 1))), -2, 2)))
    x = np.stack([c for pair in zip(*columns, strict=True) for c in pair], axis=1)
    return x[:-1].astype(np.float32), x[1:, [0, 2]].astype(np.float32)


def nets(hidden: int) -> dict[str, Callable[[int], Graph]]:
    """name -> a function of the seed that makes the net, a graph that reads "x" and, the NARX, the true "d" of the days before."""

    def tdnn(seed: int) -> Graph:
        return Graph(
            {
                "days": (CausalConv1d(6, hidden, 5, seed=seed), "x"),
                "a": (Activation("tanh"), "days"),
                "weeks": (CausalConv1d(hidden, hidden, 5, dilation=4, seed=seed + 1), "a"),
                "b": (Activation("tanh"), "weeks"),
                "y": (Linear(hidden, 2, seed=seed + 2), "b"),
            }
        )

    def recurrent(layer: Callable[[int], Any]) -> Callable[[int], Graph]:
        def make(seed: int) -> Graph:
            h = layer(seed)
            return Graph({"h": (h, "x"), "y": (Linear(h.output_size, 2, seed=seed + 1), "h")})

        return make

    return {
        "TDNN": tdnn,
        "NARX": lambda seed: Graph({"y": (Feedback(NARX(6, 2, hidden, input_taps=3, output_taps=3, seed=seed), "true"), ["x", "d"])}),
        "RNN": recurrent(lambda seed: RNN(6, hidden, learn_initial_state=True, seed=seed)),
        "RNN, 2 layers, skips": recurrent(lambda seed: RNN(6, hidden, 2, skip=True, learn_initial_state=True, seed=seed)),
        "LSTM": recurrent(lambda seed: LSTM(6, hidden, learn_initial_state=True, forget_bias=1.0, seed=seed)),
    }


def predict(model: Graph, x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """One pass over all days (days, 2): a day's answer reads that day and those before."""
    model.eval()
    series = {"x": x[:, None], "d": d[:, None]}
    y = model({name: series[name] for name in model.inputs})[0][:, 0]
    model.train()
    return y


def train(model: Graph, x: np.ndarray, d: np.ndarray, ends: tuple[int, int], steps: int, rng: np.random.Generator) -> None:
    """Windows of 100 days at random before ends[0]; the weights with the best error on [ends[0], ends[1]) are kept."""
    optimizer = AdamW(model, 0.003, weight_decay=0.1)
    weights = np.repeat((np.arange(100) >= WARM)[:, None], 32, axis=1)
    series = {"x": x, "d": d}
    best, kept = np.inf, model.state_dict()
    for k in range(steps):
        rows = rng.integers(0, ends[0] - 100, 32) + np.arange(100)[:, None]
        model.zero_gradients()
        y, _ = model({name: series[name][rows] for name in model.inputs})
        model.backward(mean_squared_error(y, d[rows], weights)[1])
        clip_global_norm(model, 1.0)
        optimizer.step()
        if k % 20 == 19:
            miss = float(np.square(predict(model, x[: ends[1]], d[: ends[1]])[ends[0] :] - d[ends[0] : ends[1]]).mean())
            if miss < best:
                best, kept = miss, model.state_dict()
    model.load_state_dict(kept)


def main(given: Sequence[str] | None = None) -> float:
    """Prints the errors and returns the LSTM's median ratio for volatility."""
    args = arguments("tdnn_stocks", __doc__, given)
    steps, hidden = (120, 8) if args.quick else (600, 16)
    x, d = table()
    ends = int(0.7 * len(x)), int(0.8 * len(x))
    test = slice(ends[1], len(x))
    scale = d[: ends[0]].std(axis=0)
    middle = d[: ends[0]].mean(axis=0)
    xs, ds = (x - x[: ends[0]].mean(axis=0)) / x[: ends[0]].std(axis=0), (d - middle) / scale

    def error(guess: np.ndarray, column: int) -> float:
        return float(np.sqrt(np.square(guess - d[test, column], dtype=np.float64).mean()))

    size = x[:, 2]  # log |return| of the day itself: known when its next day is predicted
    means = {n: np.convolve(size, np.ones(n) / n)[: len(size)][test] for n in (1, 5, 20, 60)}
    naive = {"price of today (return 0)": (error(np.zeros(1), 0), np.nan), "constant mean": (error(middle[:1], 0), error(middle[1:], 1))}
    naive |= {f"mean of {n} days": (np.nan, error(values, 1)) for n, values in means.items()}
    bars = naive["price of today (return 0)"][0], min(v for _, v in naive.values() if v == v)
    print(f"{len(x):,} days, {len(x) - ends[1]} of them to test; root mean square errors of the next day's (nets: medians of the seeds)")
    for name, (a, b) in naive.items():
        print(f"    {name:28} return {a:7.4f} %, log |return| {b:.4f}")
    ratios: dict[str, list[tuple[float, float]]] = {}
    lines = {}
    for name, make in nets(hidden).items():
        for seed in args.seeds:
            model = make(10 * seed)
            train(model, xs, ds, ends, steps, np.random.default_rng(seed))
            y = predict(model, xs, ds)[test] * scale + middle
            lines[name] = y
            a, b = error(y[:, 0], 0), error(y[:, 1], 1)
            ratios.setdefault(name, []).append((a / bars[0], b / bars[1]))
        median = np.median(ratios[name], axis=0)
        a, b = median * bars
        print(f"    {name:28} return {a:7.4f} %, log |return| {b:.4f}; ratios to the naive ones {median[0]:.4f}, {median[1]:.4f}")
    if args.figure:
        figure = picture(8, 3.5)
        left, right = figure.subplots(1, 2)
        last = slice(-250, None)
        left.plot(d[test, 1][last], ".", ms=2, color="grey", label="log |return|, measured")
        left.plot(means[20][last], label="mean of 20 days")
        left.plot(lines["LSTM"][last, 1], label="LSTM")
        left.set(xlabel="day of 2018", ylim=(-3.2, 2))
        left.legend(fontsize=7)
        at = np.arange(len(ratios))
        right.bar(at - 0.2, [np.median([r[0] for r in v]) for v in ratios.values()], 0.4, label="return / today's price")
        right.bar(at + 0.2, [np.median([r[1] for r in v]) for v in ratios.values()], 0.4, label="volatility / best naive")
        right.axhline(1, color="k", lw=0.8)
        right.set_xticks(at, [n.replace(", ", ",\n") for n in ratios], fontsize=7)
        right.set(ylim=(0.9, 1.05), title="error over the naive one's")
        right.legend(fontsize=7)
        save(figure, args.figure)
    return verdict("LSTM, error in log |return| over the best naive one's", [b for _, b in ratios["LSTM"]], 0.999, form=".4f")


if __name__ == "__main__":
    main()
