"""What kind of text is this: code, documentation or data? Many-to-one: an LSTM reads 120 bytes and speaks once, at the end ("text classification").

All text is the standard library's own: its code without docstrings, its docstrings and documentation topics, and its tables (character encodings,
HTML entities, build settings). Files are split by a hash of their name (1 in 4 test, 1 in 8 validation), so that no test window shares a file with
a training one; each class counts equally. Beside it stands naive Bayes over single bytes, which knows which bytes occur but not in which order.
Bar: fewer errors than naive Bayes, and 90 % right. The picture shows the state of one cell, the one that best tells code from documentation, over a
test text that passes from one to the other.

Measured: median 95.6 % right, worst 94.6 % of 3 seeds; naive Bayes 92.1 % (70 s of one core in all).

    python examples/text_classification.py
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence

import numpy as np
from report import arguments, picture, save, verdict
from rnnfast import LSTM, Adam, Embedding, Graph, Linear, losses, optim, training
from rnnfast.data import Batch, standard_library
from rnnfast.plots import text_activity

CLASSES = ("code", "docs", "data")
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
T = 120  # bytes a window


def texts(quick: bool) -> list[tuple[str, str, bytes]]:
    """(file, class, bytes) of everything."""
    from pydoc_data.topics import topics

    root = standard_library()
    found = [(f"topic {name}", "docs", text.encode()) for name, text in topics.items()]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or "topics" in name.name:
            continue
        if (quick and int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) % 8) or not path.is_file():
            continue
        raw = path.read_bytes()
        if (
            (name.parts[0] == "encodings" and b"decoding_table" in raw)
            or name.name in ("entities.py", "stringprep.py")
            or name.name.startswith("_sysconfigdata")
        ):
            found.append((str(name), "data", raw[raw.find(b"table") if b"decoding_table" in raw else 500 :]))
            continue
        try:
            tree = ast.parse(raw)
        except (SyntaxError, ValueError):
            continue
        lines, docs = raw.decode("utf-8", "replace").splitlines(keepends=True), []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                said = node.body[0]
                docs.append(ast.get_docstring(node) + "\n")
                lines[said.lineno - 1 : said.end_lineno] = [""] * (said.end_lineno - said.lineno + 1)
        found += [(str(name), "code", "".join(lines).encode()), (str(name), "docs", "".join(docs).encode())]
    return found


def windows(rng: np.random.Generator, parts: list[list[list[bytes]]], part: int, count: int) -> Batch:
    """`count` windows of each class, (T, B) bytes; files are drawn by the root of their length."""
    rows, labels = [], []
    for label, files in enumerate(parts[part]):
        chance = np.sqrt([len(text) for text in files])
        for i in rng.choice(len(files), size=count, p=chance / chance.sum()):
            start = int(rng.integers(len(files[i]) - T + 1))
            rows.append(np.frombuffer(files[i], np.uint8, T, start))
            labels.append(label)
    x = np.stack(rows, axis=1).astype(np.int64)
    last = np.zeros(x.shape)
    last[-1] = 1
    return Batch(x, (np.broadcast_to(np.array(labels), x.shape), last))


def loss(y, target):
    """Cross-entropy of the last step alone."""
    return losses.softmax_cross_entropy(y, target[0], target[1])


def right(model: Graph, item: Batch) -> float:
    """Percent of the windows put right by the last step."""
    model.eval()
    y, _ = model(item.x)
    model.train()
    return 100 * float((y[-1].argmax(axis=-1) == item.target[0][-1]).mean())


def naive_bayes(train: Batch, test: Batch) -> float:
    """Percent right by the single bytes of a window."""
    counts = [np.bincount(train.x[:, train.target[0][-1] == k].reshape(-1), minlength=256) + 1.0 for k in range(3)]
    log_p = np.stack([np.log(c / c.sum()) for c in counts])  # (3, 256)
    return 100 * float((log_p[:, test.x].sum(axis=1).argmax(axis=0) == test.target[0][-1]).mean())


def draw(model: Graph, parts: list[list[list[bytes]]], path) -> None:
    """One cell over a text that is code first, then documentation, then code again."""
    model.eval()
    rng = np.random.default_rng(5)
    chosen: list[list[bytes]] = []  # of both classes two pieces of different files
    for label in (0, 1):
        files = [text for text in parts[0][label] if len(text) > 3000]
        texts = [files[i] for i in rng.choice(len(files), 2, replace=False)]
        starts = [text.find(b"\n", 1000) + 1 for text in texts]
        chosen.append([text[start : text.find(b"\n", start + 330) + 1] for text, start in zip(texts, starts, strict=True)])
    pieces = [chosen[label][k] for k in (0, 1) for label in (0, 1)]
    text = b"".join(pieces)
    truth = np.concatenate([np.full(len(piece), label) for piece, label in zip(pieces, (0, 1, 0, 1), strict=True)])
    x = model["bytes"](np.frombuffer(text, np.uint8).astype(np.int64)[:, None])
    _, _, c = model["lstm"](x, cells=True)
    c = np.tanh(c[:, 0])
    score = [abs(np.corrcoef(c[:, k], truth)[0, 1]) if c[:, k].std() > 1e-3 else 0.0 for k in range(c.shape[1])]
    best = int(np.argmax(score))
    figure = picture(8, 5)
    axes = figure.add_subplot()
    text_activity([chr(b) if b < 128 else "?" for b in text], c[:, best].tolist(), axes, width=100, limit=1)
    axes.set_title(f"tanh c of cell {best} over code, documentation, code, documentation")
    save(figure, path)


def main(given: Sequence[str] | None = None) -> float:
    """Prints and returns the median percentage of windows put right."""
    args = arguments("text_classification", __doc__, given)
    parts: list[list[list[bytes]]] = [[[] for _ in CLASSES] for _ in range(3)]  # test, validation, training
    for name, kind, text in texts(args.quick):
        place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        if len(text) > T:
            parts[0 if place < 0.25 else 1 if place < 0.375 else 2][CLASSES.index(kind)].append(text)
    print("files to learn from, to test: " + ", ".join(f"{c} {len(parts[2][k])}, {len(parts[0][k])}" for k, c in enumerate(CLASSES)), flush=True)
    steps, hidden, count = (100, 48, 100) if args.quick else (500, 96, 700)
    test = windows(np.random.default_rng(1000), parts, 0, count)
    bayes = naive_bayes(windows(np.random.default_rng(0), parts, 2, 20 * count // 7), test)
    print(f"naive Bayes of single bytes: {bayes:.1f} % right", flush=True)
    results = []
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        model = Graph(
            {
                "bytes": (Embedding(256, 24, seed=10 * seed), "x"),
                "lstm": (LSTM(24, hidden, forget_bias=1.0, seed=10 * seed + 1), "bytes"),
                "class": (Linear(hidden, 3, seed=10 * seed + 2), "lstm"),
            }
        )
        valid = windows(rng, parts, 1, count)
        training.fit(
            model,
            lambda epoch, rng=rng: (windows(rng, parts, 2, 20) for _ in range(steps)),
            loss,
            Adam(model, optim.cosine(0.006, steps, 1e-5)),
            steps=steps,
            clip=1.0,
            every=max(steps // 8, 1),
            patience=steps,
            progress=False,
            validation=lambda model=model, valid=valid: 100 - right(model, valid),
        )
        results.append(right(model, test))
        print(f"seed {seed}: LSTM {results[-1]:.1f} % right", flush=True)
    if args.figure:
        draw(model, parts, args.figure)
    return verdict("windows put right (%)", results, max(bayes, 90), low=False)


if __name__ == "__main__":
    main()
