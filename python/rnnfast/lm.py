"""A language model of bytes: embedding -> recurrent layers -> softmax, trained by stateful truncated BPTT.

The whole program of `rnnfast lm`, without its command line: what a run is (Config), the model with its alphabet,
how it is trained, judged and sampled. Bits are per byte: the mean of -log2 p(byte | all bytes before it).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .data import HELD_OUT, Alphabet, Batch, Corpus, InputError, Stream, load_corpus
from .dense import Embedding, Linear
from .graph import Graph
from .losses import softmax_cross_entropy
from .module import Array
from .optim import Adam, linear
from .training import CheckpointError, Replicas, Run, fit, load_checkpoint

CELLS = ("lstm", "gru", "rnn")
RATES = {"lstm": 0.006, "gru": 0.006, "rnn": 0.003}  # of Adam at the start; a plain RNN takes no more
_GLIMPSE = 20_000  # held-out bytes for the rows of the history; the end of a run is judged on HELD_OUT


@dataclass(frozen=True)
class Config:
    """What fixes a run, bit for bit: the model, its training, its text.

    `text` is a path, or None for the standard library; `digest` its hash and `alphabet` its bytes in hexadecimal,
    both filled in when the run starts.

    >>> Config(hidden=64).cell, Config().learning_rate, Config(cell="rnn").learning_rate
    ('lstm', 0.006, 0.003)
    """

    cell: str = "lstm"
    layers: int = 2
    hidden: int = 256
    embedding: int = 64
    dropout: float = 0.0
    seq_length: int = 100
    batch_size: int = 32
    steps: int = 3000  # 9.6 million bytes: 5 minutes at 32,000 a second
    learning_rate: float = None  # type: ignore[assignment]  # None: RATES of the cell
    clip: float = 5.0
    seed: int = 0
    every: int = 0  # steps between rows of the history; 0: a fifteenth of the run, 250 at most
    text: str | None = None
    digest: str = ""
    alphabet: str = ""

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.cell in RATES:
            object.__setattr__(self, "learning_rate", RATES[self.cell])

    def check(self) -> None:
        """Raises InputError for sizes and rates that make no sense, or that this machine's memory cannot hold."""
        if self.cell not in CELLS:
            raise InputError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        for name in ("layers", "hidden", "embedding", "seq_length", "batch_size", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise InputError(f"{name} must be a whole number from 1 to {2**31 - 1}, got {value!r}")
        for name in ("seed", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(f"{name} must be a whole number from 0 on, got {value!r}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), got {self.dropout}")
        gates = {"lstm": 4, "gru": 3, "rnn": 1}[self.cell]
        weights = self.layers * gates * self.hidden * 2 * self.hidden + gates * self.hidden * self.embedding
        tape = self.seq_length * self.batch_size * (self.layers * (gates + 3) * self.hidden + 3 * self.embedding)
        needed, there = 4 * (4 * weights + tape), _memory()
        if needed > there:
            raise InputError(
                f"a model of this size needs about {needed / 2**30:,.0f} GiB of memory, this machine has "
                f"{there / 2**30:,.0f}; take a smaller hidden, batch_size or seq_length"
            )


def _memory() -> float:
    """The machine's memory in bytes, infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _bits(y: Array, target: Array) -> tuple[float, Any]:
    """The loss that fit reports, in bits, with the gradient of the mean in nats: the scale that rates are used to."""
    nats, dy = softmax_cross_entropy(y, target, out=y)
    return nats / math.log(2), dy


class LanguageModel:
    """A graph of embedding, recurrent layers and softmax, with the alphabet of the text it learns.

    >>> model = LanguageModel(Config(layers=1, hidden=8, embedding=4), Alphabet.of(b"to be or not"))
    >>> round(model.bits(b"to be or not to be"))  # untrained: about log2 of the alphabet's 8
    3
    >>> len(b"".join(model.sample(b"to ", 10)))
    10
    """

    def __init__(self, config: Config, alphabet: Alphabet) -> None:
        from . import layers

        config.check()
        self.config, self.alphabet = config, alphabet
        seeds = [int(n) for n in np.random.SeedSequence(config.seed).generate_state(3)]
        sizes = (config.embedding, config.hidden, config.layers)
        rnn: Any
        if config.cell == "lstm":
            rnn = layers.LSTM(*sizes, dropout=config.dropout, seed=seeds[1])
        else:
            kind = {"gru": layers.GRU, "rnn": layers.RNN}[config.cell]
            rnn = kind(*sizes, dropout=config.dropout, seed=seeds[1])
        self.graph = Graph(
            {
                "embedding": (Embedding(len(alphabet), config.embedding, seed=seeds[0]), "tokens"),
                "rnn": (rnn, "embedding"),
                "logits": (Linear(config.hidden, len(alphabet), seed=seeds[2]), "rnn"),
            }
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LanguageModel:
        """The model of a run's latest checkpoint. Raises CheckpointError for one that is missing or corrupt."""
        weights, _, content = load_checkpoint(folder)
        config = _stored(folder, content)
        model = cls(config, Alphabet(bytes.fromhex(config.alphabet)))
        try:
            model.graph.load_state_dict(weights)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"the checkpoint in {folder} is not of this model: {error}") from error
        model.graph.eval()
        return model

    def bits(self, text: bytes, *, batch_size: int = 32, seq_length: int = 200) -> float:
        """Mean bits per byte over a text, every byte but the first, read as `batch_size` pieces side by side.

        A byte that the alphabet lacks costs what "unknown" costs, and log2 of how many such bytes there are.
        """
        tokens = self.alphabet.encode(text)
        count = max(len(tokens) - 1, 0)
        if count == 0:
            return math.nan
        rows = min(batch_size, count)
        steps = -(-count // rows)
        padded = np.zeros((2, rows * steps), np.int64)
        padded[0, :count], padded[1, :count] = tokens[:-1], tokens[1:]
        x, target = padded.reshape(2, rows, steps).transpose(0, 2, 1)  # each (steps, rows)
        real = (np.arange(rows * steps) < count).reshape(rows, steps).T
        was_training, state, nats = self.graph.training, None, 0.0
        self.graph.eval()
        try:
            for start in range(0, steps, seq_length):
                part = slice(start, start + seq_length)
                y, state = self.graph(x[part], state)
                mean, _ = softmax_cross_entropy(y, target[part], real[part], gradient=False)
                nats += mean * int(real[part].sum())
        finally:
            self.graph.train(was_training)
        unknown = int((tokens[1:] == 0).sum()) * math.log2(max(256 - len(self.alphabet.known), 1))
        return (nats / math.log(2) + unknown) / count

    def sample(self, prompt: bytes, length: int, temperature: float = 0.7, generator: np.random.Generator | None = None) -> Iterator[bytes]:
        """`length` bytes, one at a time, that go on from a prompt: each drawn from softmax(logits / temperature).

        temperature 0 takes the likeliest byte. "unknown" is never drawn. The model is not changed.
        Raises InputError for a temperature that is negative or no number, or a length below 1.
        """
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature must be a number from 0 on, got {temperature}")
        if length < 1:
            raise InputError(f"length must be at least 1, got {length}")
        draw = np.random.default_rng() if generator is None else generator
        known = self.alphabet.known
        start = prompt or (b"\n" if b"\n" in known else known[:1])
        weights = self.graph.parameters()
        table, w, b = weights["embedding.weight"], weights["logits.weight"], weights["logits.bias"]
        stream = self.graph["rnn"].stream(batch=1)
        for token in self.alphabet.encode(start)[:-1]:
            stream(table[token][None])
        token = int(self.alphabet.encode(start)[-1])
        for _ in range(length):
            logits = (w @ stream(table[token][None])[0] + b).astype(np.float64)[1:]  # without "unknown"
            if temperature == 0:
                token = 1 + int(logits.argmax())
            else:
                chances = np.cumsum(np.exp((logits - logits.max()) / temperature))
                token = 1 + int(np.searchsorted(chances, draw.random() * chances[-1], side="right"))
                token = min(token, len(known))
            yield known[token - 1 : token]


def _stored(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> Config:
    """The Config that a checkpoint holds."""
    try:
        values = content["config"]
        config = Config(**{field.name: values[field.name] for field in fields(Config)})
        config.check()
        Alphabet(bytes.fromhex(config.alphabet))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is not of a language model: {error}") from error
    return config


def _merge(given: Mapping[str, Any], stored: Config, folder: Path) -> Config:
    """The stored Config; what the user gives again must not differ. A text may have moved: its digest decides."""
    for name, value in given.items():
        kept = getattr(stored, name)
        if name != "text" and value is not None and value != kept:
            raise InputError(f"{name} is fixed at {kept} since the run in {folder} began; it cannot become {value}")
    if given.get("text") is None:
        return stored
    return Config(**{**asdict(stored), "text": str(given["text"])})


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Reporter:
    """The callback that talks: a bar in bytes where there is a terminal, a line a row, a sample now and then."""

    def __init__(self, model: LanguageModel, first: int, sample_every: int, out: TextIO) -> None:
        self.model, self.sample_every, self.out = model, sample_every, out
        self.first, self.began, self.rows, self.smooth = first, time.perf_counter(), -1, math.nan
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            unit = model.config.batch_size * model.config.seq_length
            total, initial = model.config.steps * unit, first * unit
            self.bar = tqdm(total=total, initial=initial, unit="B", unit_scale=True, file=sys.stderr)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.out, flush=True)

    def __call__(self, run: Run) -> None:
        config = self.model.config
        self.smooth = run.loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * run.loss
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.smooth:.3f} bits/byte", refresh=False)
            self.bar.update(config.batch_size * config.seq_length)
        if len(run.rows) > max(self.rows, 0) and run.rows[-1]["step"] == run.step:
            row = run.rows[-1]
            left = (time.perf_counter() - self.began) / (run.step - self.first) * (config.steps - run.step)
            self.say(
                f"step {run.step:>6}/{config.steps}   {row['loss']:.3f} bits/byte, held out {row['validation']:.3f}   "
                f"{row['per_second']:,.0f} bytes/s   {_clock(left)} left"
            )
            self.rows = len(run.rows)
        if self.sample_every and run.step % self.sample_every == 0 and run.step < config.steps:
            generator = np.random.default_rng([config.seed, run.step])  # a stream of its own: training never notices
            prompt = b"\n" if b"\n" in self.model.alphabet.known else self.model.alphabet.known[:1]
            text = b"".join(self.model.sample(prompt, 200, 0.7, generator)).decode("utf-8", "replace")
            self.say("-" * 72 + f"\n{text}\n" + "-" * 72)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Share:
    """One process's rows of every batch of a stream."""

    def __init__(self, stream: Stream, rank: int, size: int) -> None:
        width = stream.batch_size // size
        self.stream, self.rows = stream, slice(rank * width, rank * width + width)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for batch in self.stream.batches(start):
            reset = None if batch.reset is None else batch.reset[:, self.rows]
            yield Batch(batch.x[:, self.rows], batch.target[:, self.rows], None, reset)


def train(
    out: str | os.PathLike[str],
    given: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    checkpoint_every: int = 500,
    sample_every: int = 500,
    log: TextIO | None = None,
    replicas: Replicas | None = None,
) -> Run:
    """Trains a language model into a folder: checkpoints, history.csv and, where matplotlib is there, loss.png.

    given     values of Config by name, None or missing for the default (with resume: for the stored one)
    resume    continue the run in `out`, bit for bit as if never stopped
    replicas  processes that share the batch, as `fit` has them: the first one writes and talks; all must see the text, and to resume `out`

    After Ctrl-C it saves a checkpoint and raises KeyboardInterrupt. Raises InputError for what cannot be used,
    OSError for a folder that cannot be written, FloatingPointError for a run that diverges; nothing is lost then.

    >>> import io, tempfile
    >>> from rnnfast.data import standard_library
    >>> tiny = dict(layers=1, hidden=8, embedding=4, seq_length=10, batch_size=2, steps=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train(folder, tiny | {"text": str(standard_library() / "this.py")}, log=io.StringIO())
    >>> run.step
    3
    """
    leads = replicas is None or replicas.rank == 0
    folder, log, given = Path(out), log or sys.stdout, dict(given or {})
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    used = [name for name in ("last", "previous", "history.csv") if (folder / name).exists()]
    if resume:
        config = _merge(given, _stored(folder, load_checkpoint(folder)[2]), folder)
    else:
        config = Config(**{name: value for name, value in given.items() if value is not None})
        if used and not overwrite and leads:
            raise InputError(f"{folder} already holds a run ({used[0]}): give --resume, --overwrite or another --out")
    config.check()
    if replicas is not None and config.batch_size % replicas.size:
        raise InputError(f"batch_size must be a multiple of the {replicas.size} processes, got {config.batch_size}")
    corpus = load_corpus(config.text)
    alphabet = Alphabet.of(corpus.train)
    if resume and corpus.digest != config.digest:
        raise InputError(f"{corpus.name} has changed since the run in {folder} began: its hash differs")
    text = None if config.text is None else os.path.abspath(config.text)
    config = Config(
        **{**asdict(config), "text": text, "digest": corpus.digest, "alphabet": alphabet.known.hex()},
    )
    tokens = alphabet.encode(corpus.train)
    stream = Stream(tokens[:-1], tokens[1:], config.batch_size, config.seq_length)
    model = LanguageModel(config, alphabet)
    first = load_checkpoint(folder)[2]["run"]["step"] if resume else 0

    def say(message: str) -> None:
        if leads:
            print(message, file=log, flush=True)

    say(_headline(config, corpus, model))
    reporter = _Reporter(model, first, sample_every, log) if leads else None
    rows = config.every or max(1, min(250, config.steps // 15))
    glimpse = corpus.valid[:_GLIMPSE]
    run: Run | None = None

    def remember(now: Run) -> None:
        nonlocal run
        run = now

    try:
        run = fit(
            model.graph,
            stream if replicas is None else _Share(stream, replicas.rank, replicas.size),
            _bits,
            Adam(model.graph, linear(config.learning_rate, config.steps)),
            steps=config.steps,
            validation=lambda: model.bits(glimpse),
            every=rows,
            clip=config.clip,
            stateful=True,
            callbacks=[remember] if reporter is None else [remember, reporter],
            history=folder / "history.csv",
            checkpoint=folder,
            checkpoint_every=checkpoint_every,
            config=asdict(config),
            resume=resume,
            stop_after=stop_after,
            progress=False,
            replicas=replicas,
        )
    finally:
        if reporter is not None:
            reporter.close()
        if run is not None and run.rows and leads:
            _draw(run, folder, say)
    if not leads:
        return run
    if run.step >= config.steps:
        held_out = corpus.valid[:HELD_OUT]
        bits, clock = model.bits(held_out), _clock(run.seconds)
        say(f"done: {bits:.4f} bits per byte on {len(held_out):,} held-out bytes, in {clock}")
    else:
        say(f"stopped after step {run.step} of {config.steps}: --resume goes on from here")
    return run


def _headline(config: Config, corpus: Corpus, model: LanguageModel) -> str:
    size = sum(p.size for p in model.graph.parameters().values())
    skipped = f" ({corpus.skipped} binary or empty files skipped)" if corpus.skipped else ""
    return (
        f"text: {corpus.name}, {len(corpus.train):,} bytes to learn, {len(corpus.valid):,} held out, "
        f"{len(model.alphabet) - 1} different{skipped}\n"
        f"model: {config.cell} {config.layers} x {config.hidden}, {size:,} parameters; {config.steps} steps of "
        f"{config.batch_size} x {config.seq_length} bytes"
    )


def _draw(run: Run, folder: Path, say: Any) -> None:
    from .plots import loss_curve

    try:
        loss_curve(run.rows, folder / "loss.png", "bits per byte")
    except ImportError as error:
        say(f"no loss.png: {error}")
