"""Language models of words: "Predicting words: the TDNN model" (Bengio et al. 2003) and the LSTM over a shared projection; then it writes.

The text: the documentation topics of Python itself and every docstring of its standard library, which are on every machine. Documents are split by
a hash of their content (1 in 10 test, 1 in 20 validation), so that a docstring that stands in two places is on one side. Words are runs of letters,
digits or single signs, in lower case; those seen fewer than 3 times in the training documents are <rare>; every document ends with <end>.
Perplexity is over all test words, <rare> and <end> included, each given all the words of its document before it (TDNN and Kneser-Ney: the 16 and
the 2 before it).

Bar: both nets are below an interpolated modified Kneser-Ney trigram (discounts from the training counts) on the same words and split. Weights kept
and the end of training are chosen on the validation.

The softmax is adaptive: a head of the 1,000 most frequent words and a cluster of the others; 200 steps of the LSTM take 10 s instead of 17. The TDNN
sees 16 words through two gated layers; with one tanh layer over 5 words, as in 2003, its validation perplexity was 43, now it is 33.

The nets are trained in two processes side by side, of one thread each: 200 s the LSTM, 221 s the TDNN.

Measured: Kneser-Ney 51.4; LSTM median 40.5, worst 40.9 of 3 seeds, TDNN 48.1, 48.2.

    python examples/words_lm.py                                    # one seed: four minutes of two cores
    python examples/words_lm.py --seeds 3 --keep words.json        # three; cut off, it goes on from what the file holds
"""

from __future__ import annotations

import ast
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from report import Kept, arguments, picture, save, verdict
from rnnfast import Adam, Dropout, Embedding, Graph, Linear, losses, optim, training
from rnnfast.conv import Activation, CausalConv1d
from rnnfast.data import Batch, standard_library
from rnnfast.models import AdaptiveSoftmax, KneserNey, language_model, nearest, ngrams, sample, stepper

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


class Text(NamedTuple):
    """The vocabulary (0 is <end>, 1 <rare>) and the words of the three parts as integers, every document ending with 0."""

    words: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def documents(quick: bool = False) -> list[str]:
    """Documentation topics and docstrings, each once."""
    from pydoc_data.topics import topics

    root = standard_library()
    found = list(topics.values())[:10] if quick else list(topics.values())
    for path in sorted((root / "json" if quick else root).rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        found += [text for text in map(ast.get_docstring, nodes) if text]
    return list(dict.fromkeys(found))


def load(quick: bool = False) -> Text:
    """The corpus, split and numbered."""
    parts: tuple[list[list[str]], ...] = ([], [], [])
    for text in documents(quick):
        place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
        parts[2 if place < 0.1 else 1 if place < 0.15 else 0].append(re.findall(r"[^\W\d_]+|\d+|[^\w\s]|_", text.lower()))
    counts = Counter(word for row in parts[0] for word in row)
    words = ["<end>", "<rare>"] + [word for word, n in counts.most_common() if n >= 3]
    index = {word: i for i, word in enumerate(words)}
    return Text(words, *(np.array([i for row in part for i in [*(index.get(w, 1) for w in row), 0]]) for part in parts))


def tdnn(vocabulary: int, seed: int, cutoffs: Sequence[int], projection: int = 128, hidden: int = 192) -> Graph:
    """The word is predicted from the 16 before it: two gated layers of 4 taps over their projections, the second one's 4 words apart; then P again.

    As in Bengio's net, the softmax's layer reads the projections and all hidden layers.
    """
    table = Embedding(vocabulary, projection, seed=seed)
    table.flat *= 1 / math.sqrt(projection)
    return Graph(
        {
            "projection": (table, "tokens"),
            "drop": (Dropout(0.1, seed=seed + 1), "projection"),
            "taps1": (CausalConv1d(projection, 2 * hidden, 4, seed=seed + 2), "drop"),
            "gate1": (Activation("glu"), "taps1"),
            "drop1": (Dropout(0.2, seed=seed + 3), "gate1"),
            "taps2": (CausalConv1d(projection + hidden, 2 * hidden, 4, 4, seed=seed + 4), ["drop", "drop1"]),
            "gate2": (Activation("glu"), "taps2"),
            "drop2": (Dropout(0.2, seed=seed + 5), "gate2"),
            "down": (Linear(projection + 2 * hidden, projection, seed=seed + 6), ["drop", "drop1", "drop2"]),
            "logits": (AdaptiveSoftmax(table, cutoffs), "down"),
        }
    )


def rows(text: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """A text, <end> put in front, as `batch` pieces side by side: what is read and what is to be predicted, (N, B); the remainder is left out."""
    read = np.concatenate(([0], text[:-1]))
    n = len(text) // batch * batch
    return read[:n].reshape(batch, -1).T, text[:n].reshape(batch, -1).T


def batches(text: np.ndarray, batch: int, length: int, shift: int = 0) -> list[Batch]:
    """Pieces of `length` steps that continue one another; a row's state starts afresh behind every <end>."""
    x, y = rows(text[shift:], batch)
    return [Batch(x[s : s + length], y[s : s + length], None, x[s : s + length] == 0) for s in range(0, len(x), length)]


def nats(model: Graph, text: np.ndarray, batch: int = 4, length: int = 400) -> float:
    """Mean negative log likelihood of a text's words in nats, in long pieces: where one begins, the TDNN sees no words before."""
    model.eval()
    state, total, count = None, 0.0, 0
    for item in batches(text, batch, length):
        y, state = model(item.x, state, None, item.reset)
        total += losses.softmax_cross_entropy(y, item.target, gradient=False)[0] * item.target.size
        count += item.target.size
    model.train()
    return total / count


def fit(model: Graph, text: Text, seed: int, epochs: int, batch: int, length: int) -> list[float]:
    """Trains with the state carried from batch to batch; the weights with the best validation stay. Returns the validation perplexities."""
    steps = epochs * (len(text.train) // (length * batch))
    rng = np.random.default_rng(seed)
    run = training.fit(
        model,
        lambda epoch: batches(text.train, batch, length, int(rng.integers(length))),
        model["logits"].loss,
        Adam(model, optim.warmup(optim.cosine(0.004, steps, 4e-5), 50)),
        epochs=epochs,
        clip=1.0,
        stateful=True,
        validation=lambda: nats(model, text.valid),
        patience=2,
        progress=False,
    )
    return [math.exp(row["validation"]) for row in run.rows]


def projections(model: Graph, text: Text) -> dict[str, tuple[float, float]]:
    """Every fourth of the 400 most frequent words, in the plane of the two largest components of the projections."""
    table = model["projection"].parameters()["weight"]
    common = table[2:400] - table[2:400].mean(axis=0)
    plane = common @ np.linalg.svd(common, full_matrices=False)[2][:2].T
    return {text.words[i + 2]: (float(plane[i, 0]), float(plane[i, 1])) for i in range(0, len(plane), 4)}


def says(model: Graph, text: Text) -> list[str]:
    """The neighbours of some words' projections, and what the model writes behind some beginnings."""
    words = [w for w in ("list", "file", "returns", "three", "true", "raise", "is", "url") if w in text.words]
    near = nearest(model["projection"].parameters()["weight"], [text.words.index(w) for w in words])
    lines = [f"nearest to {word}: " + " ".join(text.words[i] for i in others) for word, others in zip(words, near, strict=True)]
    for prompt in ("return a", "this function", "raise"):
        symbols = [0] + [text.words.index(w) for w in prompt.split() if w in text.words]
        said = sample(stepper(model), symbols, 25, temperature=0.7, stop=0, forbidden=[1], generator=np.random.default_rng(1))
        lines.append(f"{prompt} | " + " ".join(text.words[i] for i in said))
    return lines


def learn(kind: str, text: Text, seed: int, quick: bool) -> dict:
    """Trains one model: its test perplexity, its validation perplexities; of an LSTM also its words' places and what it says."""
    cutoffs = [100] if quick else [1000]
    if kind == "LSTM":
        sizes = (32, 32) if quick else (128, 320)
        model = language_model(len(text.words), *sizes, dropout=0.4, input_dropout=0.2, cutoffs=cutoffs, seed=seed)
    else:
        model = tdnn(len(text.words), 10 * seed, cutoffs, *((32, 32) if quick else (128, 192)))
    epochs = 2 if quick else 7 if kind == "LSTM" else 6
    curve = fit(model, text, seed, epochs, *((24, 35) if kind == "LSTM" else (8, 105)))
    found = {"perplexity": math.exp(nats(model, text.test)), "validation": curve}
    if kind == "LSTM":
        model.eval()
        found |= {"words": projections(model, text), "says": says(model, text)}
    return found


def learn_all(text: Text, seeds: Sequence[int], quick: bool, kept: Kept) -> dict[str, list[dict]]:
    """`learn` of every kind and seed that is not kept yet, in two processes of one thread each; kind -> the seeds' results."""
    before = dict(os.environ)
    os.environ |= {name: "1" for name in ("RNNFAST_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            todo = [(kind, seed) for seed in seeds for kind in ("TDNN", "LSTM") if key(kind, text, seed) not in kept]
            running = {pool.submit(learn, kind, text, seed, quick): key(kind, text, seed) for kind, seed in todo}
            for done in as_completed(running):
                kept(running[done], done.result)
    finally:
        os.environ.clear()
        os.environ |= before
    return {kind: [kept(key(kind, text, seed), dict) for seed in seeds] for kind in ("LSTM", "TDNN")}


def key(kind: str, text: Text, seed: int) -> str:
    """Under which a model's result is kept."""
    return f"{kind}, {len(text.train)} words, seed {seed}"


def draw(runs: dict[str, list[dict]], bar: float, path) -> None:
    """Perplexity by epoch; the projections of some words in the plane of their two largest components."""
    figure = picture(8, 4)
    left, right = figure.subplots(1, 2)
    for (name, found), colour in zip(runs.items(), ("C0", "C1"), strict=True):
        for i, curve in enumerate(run["validation"] for run in found):
            left.plot(range(1, len(curve) + 1), curve, color=colour, label=None if i else name)
    left.axhline(bar, color="k", ls="--", label="Kneser-Ney")
    left.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    left.legend()
    places = runs["LSTM"][0]["words"]
    for word, (x, y) in places.items():
        right.text(x, y, word.replace("$", r"\$"), fontsize=6)
    x, y = np.array(list(places.values())).T
    right.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), xticks=[], yticks=[], title="the LSTM's projections")
    save(figure, path)


def main(given: Sequence[str] | None = None) -> float:
    """Prints the perplexities and returns the LSTM's median over Kneser-Ney's: below 1 it wins."""
    args = arguments("words_lm", __doc__, given, seeds=1, keep=True)
    text = load(args.quick)
    V = len(text.words)
    print(f"{len(text.train):,} words to learn, {len(text.valid):,} to validate, {len(text.test):,} to test; vocabulary {V:,}", flush=True)
    counted = KneserNey(ngrams(text.train, 3, 0), V)
    bar, bar_valid = (math.exp(-counted.log_probability(ngrams(part, 3, 0)).mean()) for part in (text.test, text.valid))
    print(f"Kneser-Ney trigram: perplexity {bar:.1f} (validation {bar_valid:.1f})", flush=True)
    runs = learn_all(text, args.seeds, args.quick, args.kept)
    for kind, found in runs.items():
        for seed, run in zip(args.seeds, found, strict=True):
            print(f"seed {seed}: {kind} perplexity {run['perplexity']:.1f}, validation by epoch {[round(v) for v in run['validation']]}")
    print("\n".join(runs["LSTM"][0]["says"]))
    if args.figure:
        draw(runs, bar_valid, args.figure)
    verdict("TDNN perplexity", [run["perplexity"] for run in runs["TDNN"]], bar)
    return verdict("LSTM perplexity", [run["perplexity"] for run in runs["LSTM"]], bar) / bar


if __name__ == "__main__":
    main()
