"""Gates: LSTM, its peepholes and both GRUs, as the slides write them ("The complete LSTM unit", "Gated Recurrent Units: Lets simplify the LSTM").

First the equations, step by step in float64, against the layers: LSTM; peepholes, diagonal, i and f see c_{t-1}, o sees c_t; the GRU with r before
the product (colah's form, whose z is 1 - ours) and after it (torch's). Bar: no number differs by more than 1e-12.

Then what the kinds of gates can count. A string is aⁿbⁿcⁿ; after the first b every next symbol is certain: n b's, n c's, the end. Trained on n = 1 to
10, the weights kept are the best on n = 1 to 15; then every n up to 200 is tried once: up to which n is every string right to its end? A cell that
i adds to and f keeps is a counter, which goes on somewhat beyond what training showed; a GRU's state, a mean of numbers between -1 and 1, hardly
does. (forget_bias=6 was chosen on seeds 100 to 102.)

Measured (3 seeds, 38 s of one core): LSTM up to n = 13, 14, 16, with peepholes 12, 13, 15; GRU 11, 11, 0 (reset before) and 7, 9, 0.

    python examples/gates.py

Sources: Gers and Schmidhuber 2001, "LSTM recurrent networks learn simple context-free and context-sensitive languages"; Weiss, Goldberg and Yahav
2018, "On the practical computational power of finite precision RNNs for language recognition".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from report import arguments, picture, save, verdict
from rnnfast import GRU, LSTM, Adam, Graph, Linear, losses, optim, training
from rnnfast.data import Batch

KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda *sizes, **options: LSTM(*sizes, forget_bias=6.0, **options),
    "LSTM, peepholes": lambda *sizes, **options: LSTM(*sizes, peephole=True, forget_bias=6.0, **options),
    "GRU, reset before": lambda *sizes, **options: GRU(*sizes, reset_after=False, **options),
    "GRU, reset after": lambda *sizes, **options: GRU(*sizes, **options),
}


def sigmoid(a: np.ndarray) -> np.ndarray:
    """σ(a)."""
    return 1 / (1 + np.exp(-a))


def written_out(kind: str, x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """The slides' equations, one step after the other, from a state of zeros: h (T, H)."""
    H = p["weight_hh_l0"].shape[1]
    W, U = (np.split(p[f"weight_{k}_l0"], len(p["weight_ih_l0"]) // H) for k in ("ih", "hh"))
    b, d = (np.split(p[f"bias_{k}_l0"], len(W)) for k in ("ih", "hh"))
    h, c, out = np.zeros(H), np.zeros(H), []
    for x_t in x:
        if kind.startswith("LSTM"):
            pi, pf, po = p.get("weight_peep_l0", np.zeros((3, H)))
            i = sigmoid(W[0] @ x_t + U[0] @ h + pi * c + b[0] + d[0])
            f = sigmoid(W[1] @ x_t + U[1] @ h + pf * c + b[1] + d[1])
            g = np.tanh(W[2] @ x_t + U[2] @ h + b[2] + d[2])
            c = f * c + i * g
            o = sigmoid(W[3] @ x_t + U[3] @ h + po * c + b[3] + d[3])
            h = o * np.tanh(c)
        else:
            r = sigmoid(W[0] @ x_t + U[0] @ h + b[0] + d[0])
            z = sigmoid(-(W[1] @ x_t + U[1] @ h + b[1] + d[1]))  # the slides' z: the share of what is new
            past = U[2] @ (r * h) + d[2] if kind == "GRU, reset before" else r * (U[2] @ h + d[2])
            n = np.tanh(W[2] @ x_t + b[2] + past)
            h = (1 - z) * h + z * n
        out.append(h)
    return np.array(out)


def deviation(kind: str) -> float:
    """The largest difference between a layer and its equations, 100 steps of float64."""
    layer = KINDS[kind](3, 8, dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    if "weight_peep_l0" in layer.parameters():
        layer.parameters()["weight_peep_l0"][...] = rng.normal(size=(3, 8))
    x = rng.normal(size=(100, 3))
    return float(np.abs(layer.eval()(x[:, None])[0][:, 0] - written_out(kind, x, layer.parameters())).max())


def strings(ns: Sequence[int]) -> Batch:
    """aⁿbⁿcⁿ side by side: one-hot (T, B, 3), the next symbol (3: the end), and weight 1 where it is certain."""
    T = 3 * max(ns)
    x, y = np.zeros((T, len(ns), 3), np.float32), np.zeros((T, len(ns)), np.int64)
    t = np.arange(T)[:, None]
    symbol = np.minimum(t // np.array(ns), 3)
    x[...] = np.eye(4, 3, dtype=np.float32)[symbol]
    y[...] = np.minimum((t + 1) // np.array(ns), 3)
    return Batch(x, (y, (t >= ns) & (symbol < 3)), np.array(ns) * 3)


def loss(y, target):
    """Cross-entropy of the certain symbols."""
    return losses.softmax_cross_entropy(y, target[0], target[1])


def train(kind: str, seed: int, steps: int) -> Graph:
    """One net of 16 units."""
    model = Graph({"h": (KINDS[kind](3, 16, seed=seed), "x"), "y": (Linear(16, 4, seed=seed + 1), "h")})
    short = strings(range(1, 11))
    training.fit(
        model, lambda epoch: [short] * steps, loss, Adam(model, optim.cosine(0.01, steps, 1e-4)), steps=steps, clip=1.0,
        validation=[strings(range(1, 16))], every=max(steps // 40, 1), patience=steps, progress=False,
    )  # fmt: skip
    return model.eval()


def counts_to(model: Graph, longest: int) -> int:
    """The largest n so that every string up to it is right to its end."""
    item = strings(range(1, longest + 1))
    wrong = (model(item.x, None, item.lengths)[0].argmax(axis=-1) != item.target[0]) & item.target[1]
    missed = np.flatnonzero(wrong.any(axis=0))
    return int(missed[0]) if len(missed) else longest


def main(given: Sequence[str] | None = None) -> float:
    """Prints how far each kind counts, and returns the largest deviation from the equations."""
    args = arguments("gates", __doc__, given)
    apart = {kind: deviation(kind) for kind in KINDS}
    steps, longest = (300, 20) if args.quick else (8000, 200)
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    kept = {}
    for kind, counts in found.items():
        for seed in args.seeds:
            model = train(kind, seed, steps)
            counts.append(counts_to(model, longest))
            kept.setdefault(kind, model)
        print(f"{kind:18} within {apart[kind]:.0e} of its equations; trained to n = 10, right up to n = {', '.join(map(str, counts))}", flush=True)
    if args.figure:
        figure = picture(8, 4.5)
        axes = figure.subplots(2, 2, sharex=True)
        n = 3 * longest // 20
        for axis, (kind, model) in zip(axes.flat, kept.items(), strict=True):
            x = strings([n]).x
            h = model["h"](x, cells=True)[2] if kind.startswith("LSTM") else model["h"](x)[0]
            axis.plot(h[:, 0])
            for t in (n, 2 * n):
                axis.axvline(t - 0.5, color="k", lw=0.8, ls=":")
            axis.set_title(f"{kind}: {'c' if kind.startswith('LSTM') else 'h'} over a^{n} b^{n} c^{n}, right up to n = {found[kind][0]}", fontsize=8)
        save(figure, args.figure)
    return verdict("largest deviation from the equations", [max(apart.values())], 1e-12, form=".1e")


if __name__ == "__main__":
    main()
