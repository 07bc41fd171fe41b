"""The language model of `rnnfast lm train` in plain torch: same text, same sizes, same held-out bytes, for a given
time.

    python bench/torch_lm.py --seconds 300

Embedding -> 2 x 256 LSTM -> softmax; stateful truncated BPTT, batch 32, length 100; Adam, learning rate falling
linearly to 0 over the time, gradients clipped to a norm of 5. Prints one JSON line. bench/compare_lm.py runs it
beside rnnfast.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import numpy as np
import rnnfast.data as data
import torch
from rnnfast.lm import Config

DEFAULTS = Config()


class Model(torch.nn.Module):
    """Bytes to logits, (T, B) to (T, B, alphabet)."""

    def __init__(self, alphabet: int, embedding: int, hidden: int, layers: int, cell: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(alphabet, embedding)
        self.rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell](embedding, hidden, layers)
        self.logits = torch.nn.Linear(hidden, alphabet)

    def forward(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = self.rnn(self.embedding(tokens), state)
        return self.logits(y), state


def detach(state: Any) -> Any:
    """The state without its history."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def bits(model: Model, alphabet: data.Alphabet, text: bytes, rows: int = 32, seq_length: int = 200) -> float:
    """Mean bits per byte of every byte but the first, read as rnnfast.lm.LanguageModel.bits reads it: in 32 pieces."""
    tokens = alphabet.encode(text)
    count = len(tokens) - 1
    steps = -(-count // rows)
    padded = np.zeros((2, rows * steps), np.int64)
    padded[0, :count], padded[1, :count] = tokens[:-1], tokens[1:]
    x, target = torch.from_numpy(np.ascontiguousarray(padded.reshape(2, rows, steps).transpose(0, 2, 1)))
    real = torch.from_numpy((np.arange(rows * steps) < count).reshape(rows, steps).T.copy())
    nats, state = 0.0, None
    with torch.no_grad():
        for start in range(0, steps, seq_length):
            part = slice(start, start + seq_length)
            y, state = model(x[part], state)
            each = torch.nn.functional.cross_entropy(y.flatten(0, 1), target[part].flatten(), reduction="none")
            nats += float(each[real[part].flatten()].double().sum())
    unknown = int((tokens[1:] == 0).sum()) * math.log2(max(256 - len(alphabet.known), 1))
    return (nats / math.log(2) + unknown) / count


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains for options.seconds and returns the record."""
    torch.manual_seed(options.seed)
    corpus = data.load_corpus(options.text)
    alphabet = data.Alphabet.of(corpus.train)
    tokens = alphabet.encode(corpus.train).astype(np.int64)
    stream = data.Stream(tokens[:-1], tokens[1:], options.batch_size, options.seq_length)
    model = Model(len(alphabet), options.embedding, options.hidden, options.layers, options.cell)

    def step(k: int, optimizer: torch.optim.Optimizer, state: Any) -> Any:
        batch = stream[k]
        if batch.reset is not None and state is not None:  # a place that is back at the text's start
            fresh = torch.from_numpy(batch.reset.any(axis=0))
            state = tuple(s.masked_fill(fresh[None, :, None], 0) for s in state) if isinstance(state, tuple) else state
        y, state = model(torch.from_numpy(batch.x), state)
        loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), torch.from_numpy(batch.target).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        return detach(state)

    threads = options.threads or _best_threads(model, step)
    torch.set_num_threads(threads)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    state, k, began = None, 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < options.seconds:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - spent / options.seconds)
        state = step(k, optimizer, state)
        k += 1
    spent = time.perf_counter() - began
    held_out = corpus.valid[: data.HELD_OUT]
    return {
        "library": f"torch {torch.__version__}",
        "bits": bits(model, alphabet, held_out),
        "held_out_bytes": len(held_out),
        "seconds": spent,
        "steps": k,
        "bytes_per_second": k * options.batch_size * options.seq_length / spent,
        "threads": threads,
        "learning_rate": options.learning_rate,
    }


def _best_threads(model: Model, step: Any) -> int:
    """The thread count with the fastest steps; the weights are put back."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    most = torch.get_num_threads()
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        times = []
        for k in range(4):
            began = time.perf_counter()
            step(k, optimizer, None)
            times.append(time.perf_counter() - began)
        found[threads] = min(times)
        model.load_state_dict(start)
    return min(found, key=lambda threads: found[threads])


def main(arguments: list[str]) -> int:
    """Trains and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--text", default=None, help="default: the standard library, as in rnnfast lm train")
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default=DEFAULTS.cell)
    for name in ("layers", "hidden", "embedding", "seq_length", "batch_size", "seed"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(DEFAULTS, name))
    parser.add_argument("--threads", type=int, default=0, help="0: the faster of one and all")
    parser.add_argument("--clip", type=float, default=DEFAULTS.clip)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: rnnfast's for the cell")
    options = parser.parse_args(arguments)
    options.learning_rate = Config(cell=options.cell, learning_rate=options.learning_rate).learning_rate
    print(json.dumps(train(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
