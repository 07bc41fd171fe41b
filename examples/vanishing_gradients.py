"""Vanishing and exploding gradients ("Vanishing gradient examples..", "Recurrent nets are very deep nets", "Vanishing stuff..").

First the lecture's figure: MNIST, 19 layers of 1,024 units with ELU, ReLU, sigmoid and tanh, at their start values (U(-1/√I, 1/√I)), in float64;
log10 of |∇_{W_neuron} DIV|, a point a neuron, for a batch and for four single pictures. Then the same thing over time: |dDIV/dh_t| by lag for RNN, LSTM
and GRU; the largest singular value of dh_t/dh_0, with a sweep of the recurrent weights' spectral radius below and above 1; and what the forward
pass forgets: the distance between two states that differ by one early input. The number: for a linear net with W = ρ Q, Q orthogonal, all singular
values of dh_t/dh_0 must be ρ^t; the largest deviation of their log10 over 500 steps. Bar: 1e-9.

    python examples/vanishing_gradients.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import mnist
from report import arguments, picture, save, verdict
from rnnfast import GRU, LSTM, RNN, Graph, Linear, softmax_cross_entropy
from rnnfast.conv import Activation
from rnnfast.diagnostics import lag_norms, log_singular_values, neuron_gradients, state_gradients

ACTIVATIONS = ("elu", "relu", "sigmoid", "tanh")


def deep_net(kind: str, depth: int, width: int, seed: int) -> Graph:
    """`depth` hidden layers and a softmax's scores, in float64."""
    nodes, below, wide = {}, "x", 784
    for k in range(1, depth + 1):
        nodes[f"a{k}"] = (Linear(wide, width, dtype="float64", seed=1000 * seed + k), below)
        nodes[f"z{k}"] = (Activation(kind), f"a{k}")
        below, wide = f"z{k}", width
    nodes["y"] = (Linear(wide, 10, dtype="float64", seed=seed), below)
    return Graph(nodes)


def depth_norms(kind: str, x: np.ndarray, digits: np.ndarray, depth: int, width: int, singles: int) -> tuple[np.ndarray, np.ndarray]:
    """log10 of each neuron's gradient norm (depth, width): of the batch's mean loss, and of single pictures (depth, singles, width)."""
    net, found = deep_net(kind, depth, width, 0), []
    for rows in (slice(None), *(slice(k, k + 1) for k in range(singles))):
        net.zero_gradients()
        y, _ = net(x[rows])
        net.backward(softmax_cross_entropy(y, digits[rows])[1])
        norms = neuron_gradients(net)
        with np.errstate(divide="ignore"):
            found.append(np.log10([norms[f"a{k}.weight"] for k in range(1, depth + 1)]))
    return found[0], np.stack(found[1:], axis=1)


def draw_neurons(axes, values: np.ndarray, title: str) -> None:
    """A point a neuron, side by side within its layer (depth, ..., width), and the layers' median; a gradient of 0 has no place here and is counted."""
    depth, *others, width = values.shape
    x = np.broadcast_to((np.arange(depth)[:, None] + (np.arange(width) + 0.5) / width + 0.5).reshape(depth, *(1 for _ in others), width), values.shape)
    axes.plot(x.ravel(), values.ravel(), ",", color="C0", alpha=0.3 / np.prod(others), rasterized=True)
    rows = [row[np.isfinite(row)] for row in values.reshape(depth, -1)]
    axes.plot(range(1, depth + 1), [np.median(row) if len(row) else np.nan for row in rows], color="C1")
    none = 1 - np.isfinite(values).mean()
    axes.set_title(f"{title}, {100 * none:.0f} % are 0" if none else title, fontsize=9)


def random_rnn(radius: float, hidden: int, nonlinearity: str = "tanh") -> RNN:
    """A net whose recurrent matrix is Gaussian, of the given spectral radius."""
    layer = RNN(8, hidden, nonlinearity=nonlinearity, dtype="float64", seed=0)
    w = np.random.default_rng(1).standard_normal((hidden, hidden))
    layer.parameters()["weight_hh_l0"][...] = w * (radius / np.abs(np.linalg.eigvals(w)).max())
    return layer


def main(given: Sequence[str] | None = None) -> float:
    """Prints what is left of the gradients and returns the check's deviation."""
    args = arguments("vanishing_gradients", __doc__, given)
    depth, width, batch, singles = (6, 64, 32, 2) if args.quick else (19, 1024, 256, 4)
    T, hidden = (60, 16) if args.quick else (200, 64)
    rng = np.random.default_rng(0)

    pictures, digits = mnist()
    rows = rng.permutation(len(digits))[:batch]
    x, d = pictures[rows].reshape(batch, -1).astype(np.float64), digits[rows]
    by_layer = {kind: depth_norms(kind, x, d, depth, width, singles) for kind in ACTIVATIONS}
    for kind, (whole, _) in by_layer.items():
        middle = np.nanmedian(np.where(np.isfinite(whole), whole, np.nan), axis=1)
        last, half, first = middle[[-1, depth // 2 - 1, 0]]
        print(f"{kind:8} median log10 |gradient| of a neuron: layer {depth} {last:6.1f}, {depth // 2} {half:6.1f}, 1 {first:6.1f}")

    layers = {
        "RNN": RNN(8, hidden, dtype="float64", seed=0),
        "GRU": GRU(8, hidden, dtype="float64", seed=0),
        "LSTM": LSTM(8, hidden, dtype="float64", seed=0),
        "LSTM, forget_bias 3": LSTM(8, hidden, forget_bias=3.0, dtype="float64", seed=0),
    }
    inputs = rng.standard_normal((T, 16, 8))
    dy = np.zeros((T, 16, hidden))
    dy[-1] = rng.standard_normal((16, hidden))
    by_lag = {name: np.log10(lag_norms(state_gradients(layer, inputs, dy)) + 1e-300) for name, layer in layers.items()}
    jacobians = {name: log_singular_values(layer, inputs[:, 0])[:, 0] for name, layer in layers.items()}
    for name in layers:
        left = by_lag[name][-1] - by_lag[name][0]
        print(f"{name:20} over {T} steps: log10 |dDIV/dstate| falls by {-left:5.1f}, log10 |dstate_t/dstate_0| is {jacobians[name][-1]:5.1f}")
    radii = (0.5, 0.9, 1.0, 1.1, 1.5, 3.0)
    sweep = {r: log_singular_values(random_rnn(r, hidden), 0.1 * inputs[:, 0])[:, 0] for r in radii}
    for r, values in sweep.items():
        print(f"tanh RNN, spectral radius {r}: log10 |dh_t/dh_0| = {values[-1]:.1f} after {T} steps")

    forgets = {}
    other = inputs.copy()
    other[0] += 1
    for name, layer in layers.items():
        gap = np.linalg.norm(layer(inputs)[0] - layer(other)[0], axis=-1).mean(axis=1)
        layer.zero_gradients()
        forgets[name] = np.log10(gap / gap[0] + 1e-300)
        under = np.flatnonzero(forgets[name] < -2)
        print(f"{name:20} forgets the first input (1 % of the trace left) after {f'{under[0]} steps' if len(under) else f'more than {T} steps'}")

    deviations = []
    q, _ = np.linalg.qr(rng.standard_normal((hidden, hidden)))
    for r in (0.9, 1.0, 1.1):
        linear = random_rnn(1.0, hidden, "identity")
        linear.parameters()["weight_hh_l0"][...] = r * q
        steps = 60 if args.quick else 500
        values = log_singular_values(linear, np.zeros((steps, 8)))
        deviations.append(float(np.abs(values - np.arange(1, steps + 1)[:, None] * np.log10(r)).max()))

    if args.figure:
        figure = picture(10, 7.5)
        axes = figure.subplots(3, 4)
        for column, kind in enumerate(ACTIVATIONS):
            for row, (values, what) in enumerate(zip(by_layer[kind], ("a batch", "single pictures"), strict=True)):
                draw_neurons(axes[row, column], values, f"{kind}, {what}")
                axes[row, column].set_xlabel("layer (1: next to the input)", fontsize=8)
            axes[0, 0].set_ylabel("log10 |gradient| of a neuron", fontsize=8)
            axes[1, 0].set_ylabel("log10 |gradient| of a neuron", fontsize=8)
        for axis, curves, title in (
            (axes[2, 0], by_lag, "|dDIV/dstate| by lag"),
            (axes[2, 1], jacobians, "|dstate_t/dstate_0|"),
            (axes[2, 2], {f"radius {r}": v for r, v in sweep.items()}, "|dh_t/dh_0|, tanh RNN"),
            (axes[2, 3], forgets, "trace of the input x_0"),
        ):
            for name, values in curves.items():
                axis.plot(values, label=name)
            axis.set_title(f"log10 {title}", fontsize=9)
            axis.set_xlabel("steps", fontsize=8)
            axis.set_ylim(bottom=max(-30, min(v.min() for v in curves.values())))
            axis.legend(fontsize=6)
        save(figure, args.figure)
    return verdict("largest deviation from ρ^t (log10)", [max(deviations)], 1e-9)


if __name__ == "__main__":
    main()
