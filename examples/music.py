"""Music: a next-step model of Bach's four-part chorales writes a MIDI file (after "The unreasonable effectiveness of recurrent neural networks").

A score is read voice by voice within every sixteenth: soprano, alto, tenor, bass; a symbol is a pitch that is struck, "goes on" or silence. The
LSTM is given the symbol before, which voice comes next and where in the bar it stands, so that p(chord) = Π p(voice | everything before, voices
above included): the likelihood is that of whole polyphonic steps. Chorales are split by order (1 in 10 test, 1 in 10 validation); training pieces
are moved up or down by up to 5 semitones where they fit, the others never are.

Beside it stands an order-2 Markov model of each voice (its next symbol from its latest two; interpolated modified Kneser-Ney, with the same
transpositions), and, stronger, one that also sees the voice above at this step. Negative log-likelihood in nats a step of four voices. Bar: below
both.

Measured: median 2.372 nats, worst 2.378 of 3 seeds (106 s of one core in all); the Markov models 4.460 and 3.926.

    python examples/music.py            writes docs/figures/music.png and music.mid beside it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from chorales import HOLD, LOW, REST, SYMBOLS, chorales, notes, write_midi
from report import arguments, picture, save, verdict
from rnnfast import LSTM, Adam, Dropout, Embedding, Graph, Linear, losses, optim, training
from rnnfast.data import Batch
from rnnfast.models import KneserNey
from rnnfast.plots import piano_roll

STOP = SYMBOLS  # the piece is over; also what stands before its first note
PLACES = 64  # voice and sixteenth of the bar, as one number


def symbols(score: np.ndarray) -> np.ndarray:
    """(4 T,) the voices one after the other."""
    return score.reshape(-1).astype(np.int64)


def moved(score: np.ndarray, by: int) -> np.ndarray:
    """A score transposed by semitones; as it was if a note would leave the range."""
    struck = score > HOLD
    out = np.where(struck, score + by, score)
    return out if not struck.any() or (out[struck].min() > HOLD and out[struck].max() < SYMBOLS) else score


def sounding(score: np.ndarray) -> np.ndarray:
    """(4 T,) for each symbol the note that its voice sounded at the step before, as a symbol; STOP at the start."""
    now = np.full(4, STOP)
    out = np.empty((len(score), 4), np.int64)
    for t, step in enumerate(score):
        out[t] = now
        now = np.where(step == HOLD, now, step)
    return out.reshape(-1)


def model_of(hidden: int, seed: int) -> Graph:
    """The symbol before, what this voice sounds, the voice and place in the bar -> logits of the next symbol."""
    return Graph(
        {
            "before": (Embedding(STOP + 1, 48, seed=seed), "symbols"),
            "own": (Embedding(STOP + 1, 48, seed=seed + 1), "sounding"),
            "place": (Embedding(PLACES, 16, seed=seed + 2), "places"),
            "lstm": (LSTM(112, hidden, forget_bias=1.0, seed=seed + 3), ["before", "own", "place"]),
            "drop": (Dropout(0.3, seed=seed + 4), "lstm"),
            "logits": (Linear(hidden, SYMBOLS, seed=seed + 5), ["drop"]),
        }
    )


def batch(scores: Sequence[np.ndarray]) -> Batch:
    """Pieces side by side, padded; every symbol counts once."""
    rows = [symbols(score) for score in scores]
    lengths = np.array(list(map(len, rows)))
    x, own, y = np.zeros((3, lengths.max(), len(rows)), np.int64)
    for b, (row, score) in enumerate(zip(rows, scores, strict=True)):
        x[: len(row), b], y[: len(row), b] = np.concatenate(([STOP], row[:-1])), row
        own[: len(row), b] = sounding(score)
    places = np.broadcast_to(np.arange(len(x))[:, None] % PLACES, x.shape)
    return Batch({"symbols": x, "sounding": own, "places": places}, (y, np.arange(len(x))[:, None] < lengths), {"lstm": lengths})


def loss(y, target):
    """Mean negative log likelihood of a symbol."""
    return losses.softmax_cross_entropy(y, target[0], target[1])


def nats(model: Graph, scores: Sequence[np.ndarray]) -> float:
    """Negative log likelihood of a step of four voices."""
    model.eval()
    total = 0.0
    for s in range(0, len(scores), 8):
        item = batch(scores[s : s + 8])
        y, _ = model(item.x, None, item.lengths)
        total += losses.softmax_cross_entropy(y, *item.target, gradient=False)[0] * float(item.target[1].sum())
    model.train()
    return total / sum(map(len, scores))


def crop(rng: np.random.Generator, scores: Sequence[np.ndarray], count: int, bars: int) -> list[np.ndarray]:
    """Random pieces of training chorales, cut at bars, moved at random."""
    found = []
    for i in rng.integers(len(scores), size=count):
        start = 16 * int(rng.integers(max(1, len(scores[i]) // 16 - bars + 1)))
        found.append(moved(scores[i], int(rng.integers(-5, 6)))[start : start + 16 * bars])
    return found


def grams(scores: Sequence[np.ndarray], above: bool) -> np.ndarray:
    """(N, n) contexts of the Markov model and the symbol: voice, its latest two, with `above` also the note that the voice above sounds now."""
    out = []
    for score in scores:
        now = np.full((len(score), 5), STOP)  # what sounds: the voice above of each voice
        for t, step in enumerate(score):
            now[t, 1:] = np.where(step == HOLD, now[t - 1, 1:] if t else STOP, step)
        past = np.concatenate((np.full((2, 4), STOP), score))
        for v in range(4):
            voice = np.full(len(score), SYMBOLS + 1 + v)
            columns = [past[:-2, v], past[1:-1, v], *([now[:, v]] if above else []), voice, score[:, v]]
            out.append(np.stack(columns, axis=1).astype(np.int64))
    return np.concatenate(out)


def markov(train: Sequence[np.ndarray], test: Sequence[np.ndarray], above: bool) -> float:
    """Negative log likelihood a step under the Markov model of order 2."""
    counted = KneserNey(np.concatenate([grams([moved(s, by) for s in train], above) for by in range(-5, 6)]), SYMBOLS + 5)
    return float(-counted.log_probability(grams(test, above)).sum()) / sum(map(len, test))


def write(model: Graph, steps: int, rng: np.random.Generator, temperature: float = 0.8) -> np.ndarray:
    """A new score (steps, 4), drawn voice by voice."""
    model.eval()
    state, before, now, out = None, STOP, [STOP] * 4, np.zeros((steps, 4), np.int64)
    for k in range(4 * steps):
        x = {"symbols": before, "sounding": now[k % 4], "places": k % PLACES}
        y, state = model({name: np.array([[value]]) for name, value in x.items()}, state)
        a = y[0, 0].astype(np.float64)
        if now[k % 4] in (STOP, REST):
            a[HOLD] = -np.inf  # nothing is there to go on
        p = np.exp((a - a.max()) / temperature)
        before = int(rng.choice(len(p), p=p / p.sum()))
        out[k // 4, k % 4] = before
        now[k % 4] = now[k % 4] if before == HOLD else before
    return out


def main(given: Sequence[str] | None = None) -> float:
    """Prints the likelihoods and returns the LSTM's median."""
    args = arguments("music", __doc__, given)
    scores = chorales(10 if args.quick else None)
    place = np.arange(len(scores)) % 10
    train, valid, test = (
        [s for s, p in zip(scores, place, strict=True) if want(p)] for want in (lambda p: p > 1, lambda p: p == 1, lambda p: p == 0)
    )
    print(f"{len(train)} chorales to learn, {len(valid)} to validate, {len(test)} to test: {sum(map(len, test)):,} steps", flush=True)
    plain, above = markov(train, test, False), markov(train, test, True)
    print(f"order-2 Markov: {plain:.3f} nats a step; with the voice above: {above:.3f}", flush=True)
    steps, hidden, count, bars = (80, 64, 8, 2) if args.quick else (300, 192, 16, 6)
    results = []
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        model = model_of(hidden, 10 * seed)
        training.fit(
            model,
            lambda epoch, rng=rng: (batch(crop(rng, train, count, bars)) for _ in range(steps)),
            loss,
            Adam(model, optim.cosine(0.005, steps, 1e-5)),
            steps=steps,
            clip=1.0,
            every=max(steps // 6, 1),
            patience=steps,
            progress=False,
            validation=lambda model=model: nats(model, valid[:20]),
        )
        results.append(nats(model, test))
        print(f"seed {seed}: LSTM {results[-1]:.3f} nats a step", flush=True)
    if args.figure:
        piece = write(model, 32 if args.quick else 192, np.random.default_rng(3))
        write_midi(args.figure.with_suffix(".mid"), piece)
        figure = picture(8, 4.5)
        top, bottom = figure.subplots(2, 1)
        for axes, score, title in ((top, test[0][:192], "a chorale by Bach (test)"), (bottom, piece, "written by the LSTM")):
            piano_roll(notes(score), axes, beat=4)
            axes.set(title=title, ylim=(LOW, 82), xlabel="")
        bottom.set(xlabel="quarter notes")
        save(figure, args.figure)
    return verdict("nats a step", results, min(plain, above))


if __name__ == "__main__":
    main()
