"""Incremental prediction: a tracker that answers at every step, one step at a time ("Variants", sequence to sequence; "tracking").

A point moves in the plane with a slowly changing speed and sometimes bounces off the walls of a box; a sensor sees its place with noise. An LSTM is
trained on whole sequences to say where the point is and where it will be at the next step. Then it runs as a stream: one reading in, one answer
out, the state carried inside. Bar: the streamed answers equal the batch's bit for bit (0 different numbers). Beside it: root mean square errors
against the raw readings and an alpha-beta filter whose gains are tuned on the training tracks, on 200 test tracks read once.

    python examples/tracker.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from report import arguments, picture, save, verdict
from rnnfast import LSTM, Adam, Graph, Linear, mean_squared_error, optim, training

NOISE = 0.08


def tracks(rng: np.random.Generator, T: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Readings (T, B, 2), and the true places now and one step on (T, B, 4), in a box from -1 to 1."""
    place, speed = rng.uniform(-0.8, 0.8, (count, 2)), rng.normal(0, 0.04, (count, 2))
    found = np.empty((T + 1, count, 2))
    for t in range(T + 1):
        found[t] = place
        speed = 0.99 * speed + rng.normal(0, 0.005, (count, 2))
        place = place + speed
        outside = np.abs(place) > 1
        place = np.where(outside, np.sign(place) * 2 - place, place)
        speed = np.where(outside, -speed, speed)
    readings = found[:-1] + rng.normal(0, NOISE, (T, count, 2))
    return readings.astype(np.float32), np.concatenate((found[:-1], found[1:]), axis=-1).astype(np.float32)


def alpha_beta(readings: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The classical filter's places now and one step on, (T, B, 4)."""
    place, speed = readings[0].astype(float), np.zeros_like(readings[0], float)
    found = np.empty((*readings.shape[:2], 4))
    for t, seen in enumerate(readings):
        guess = place + speed if t else place
        place, speed = guess + alpha * (seen - guess), speed + beta * (seen - guess)
        found[t] = np.concatenate((place, place + speed), axis=-1)
    return found


def errors(y: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Root mean square errors now and one step on, without the first 10 steps."""
    square = np.square(y[10:] - truth[10:], dtype=np.float64)
    return float(np.sqrt(square[..., :2].mean())), float(np.sqrt(square[..., 2:].mean()))


def train(seed: int, steps: int) -> Graph:
    """An LSTM and a linear answer that reads the reading, too: a correction of it."""
    rng = np.random.default_rng(seed)
    model = Graph({"h": (LSTM(2, 64, forget_bias=1.0, seed=seed), "x"), "y": (Linear(66, 4, seed=seed + 1), ["x", "h"])})
    data = (tracks(rng, 100, 32) for _ in range(steps))
    training.fit(model, lambda _: data, mean_squared_error, Adam(model, optim.linear(0.005, steps)), steps=steps, clip=1.0, progress=False)
    return model.eval()


def main(given: Sequence[str] | None = None) -> float:
    """Prints the number of answers that differ between stream and batch, and returns it."""
    args = arguments("tracker", __doc__, given)
    steps = 40 if args.quick else 3000
    x, truth = tracks(np.random.default_rng(999), 300, 200)
    known, known_truth = tracks(np.random.default_rng(998), 300, 200)
    tries = [(a, b) for a in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7) for b in (0.02, 0.05, 0.1, 0.2)]
    gains = min(tries, key=lambda g: sum(errors(alpha_beta(known, *g), known_truth)))
    rows = {"raw readings": errors(np.concatenate((x, x), axis=-1), truth), f"alpha-beta {gains}": errors(alpha_beta(x, *gains), truth)}
    differing = []
    for seed in args.seeds:
        model = train(seed, steps)
        y, _ = model(x)
        rows[f"LSTM, seed {seed}"] = errors(y, truth)
        stream = model["h"].stream(batch=200)
        linear = model["y"]
        begun = time.perf_counter()
        streamed = np.stack([linear(np.concatenate((reading, stream(reading)), axis=-1)) for reading in x])
        micros = (time.perf_counter() - begun) / len(x) * 1e6
        differing.append(int((streamed != y).sum()))
        one = model["h"].stream()
        alone = np.stack([linear(np.concatenate((reading[:1], one(reading[:1])), axis=-1)) for reading in x])
        differing[-1] += int((alone[:, 0] != y[:, 0]).sum())
        print(f"seed {seed}: {y.size:,} answers of 200 tracks streamed, {micros:.0f} µs a step; track 0 alone as well")
    for name, (now, ahead) in rows.items():
        print(f"{name:28} root mean square error now {now:.4f}, one step on {ahead:.4f}")
    if args.figure:
        figure = picture()
        left, right = figure.subplots(1, 2)
        k = int(np.argmax(np.abs(np.diff(truth[:120, :, :2], axis=0)).sum(axis=(0, 2))))
        left.plot(*x[10:120, k].T, ".", ms=3, color="grey", label="readings")
        left.plot(*truth[10:120, k, :2].T, label="truth")
        left.plot(*y[10:120, k, :2].T, label="LSTM")
        left.set(aspect="equal", title="one track")
        left.legend(fontsize=7)
        names = [name for name in rows if "seed" not in name or name.endswith(" 0")]
        right.bar([name.replace(" (", "\n(") for name in names], [rows[name][1] for name in names])
        right.set(title="error one step on")
        right.tick_params(axis="x", labelsize=7)
        save(figure, args.figure)
    return verdict("answers that differ between stream and batch", differing, 0)


if __name__ == "__main__":
    main()
