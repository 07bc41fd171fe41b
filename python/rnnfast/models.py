"""Models of sequences, all of them graphs: stacks and heads, language models, encoder-decoders, projections of words; how they write, what to beat.

symbol   an integer in [0, V): a word, a character, a note
step     how anything that writes is seen here: logits (B, V), state = step(symbols (B,), state), one symbol a call
start    the symbol that stands before the first one; stop: the one that ends a sequence
P        the projection (V, E): symbols as one-hot vectors of length V times P, that is, rows of an Embedding
It does not know texts, pictures or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import losses
from .conv import Activation
from .dense import Dropout, Embedding, Linear, _Map
from .graph import Graph
from .layers import GRU, LSTM, RNN
from .module import Array, Module

Integers = NDArray[np.int64]
Step = Callable[[Integers, Any], tuple[Array, Any]]
Divergence = Callable[[Any, Any], tuple[float, Any]]
_CELLS: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


def _recurrent(cell: str, *sizes: int, dropout: float = 0.0, bidirectional: bool = False, seed: int | None = None) -> Any:
    if cell not in _CELLS:
        raise ValueError(f"cell must be one of {', '.join(_CELLS)}, got {cell!r}")
    more = {"forget_bias": 1.0} if cell == "lstm" else {}
    return _CELLS[cell](*sizes, dropout=dropout if sizes[-1] > 1 else 0.0, bidirectional=bidirectional, seed=seed, **more)


def _seeds(seed: int | None, count: int) -> list[int | None]:
    return [None] * count if seed is None else [int(n) for n in np.random.SeedSequence(seed).generate_state(count)]


class TiedLinear(_Map):
    """Logits by the projection that reads: y = x Pᵀ + b, where P (V, E) is an Embedding's table, shared with it.

    x (..., E) -> y (..., V). Parameter of its own: bias (V,), 0 at first; the gradient of P adds to the embedding's. In a graph the embedding is a
    node too: that is where P is trained. Raises ValueError for a sparse embedding, whose unmet rows an optimizer would skip, and for a wrong shape,
    TypeError for a wrong dtype.

    Source: Press & Wolf 2017, "Using the output embedding to improve language models".

    >>> table = Embedding(5, 2, seed=0)
    >>> layer = TiedLinear(table)
    >>> y = layer(np.ones((3, 1, 2), np.float32))
    >>> bool(np.allclose(y[0, 0], table.parameters()["weight"].sum(axis=1))), layer.backward(np.ones_like(y)).shape
    (True, (3, 1, 2))
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        if embedding.sparse:
            raise ValueError("TiedLinear: the embedding must not be sparse: every row has a gradient here")
        self.embedding = embedding
        self._allocate({"bias": (embedding.num_embeddings,)}, embedding.dtype)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        V, E = self.embedding.num_embeddings, self.embedding.embedding_dim
        self._check("x", x, (*x.shape[:-1], E))
        flat = x.reshape(-1, E)
        y: Array = flat @ self.embedding.parameters()["weight"].T  # (N, V)
        y += self._parameters["bias"]
        return y.reshape(*x.shape[:-1], V), (flat, x.shape)

    def _backward(self, tape: Any, dy: Array) -> Array:
        flat, shape = tape
        V = self.embedding.num_embeddings
        self._check("dy", dy, (*shape[:-1], V))
        dy2 = dy.reshape(len(flat), V)
        self.gradients()["bias"][...] += np.ones(len(dy2), dy2.dtype) @ dy2
        self.embedding.gradients()["weight"][...] += dy2.T @ flat
        dx: Array = (dy2 @ self.embedding.parameters()["weight"]).reshape(shape)
        return dx


class AdaptiveSoftmax(Module):
    """A softmax over many symbols that costs as a small one: the frequent first, the rare in clusters that are seldom looked into.

        p(w) = softmax([P_0; C] x + [b_0; c])_w                               w < cutoffs[0], the head: C (K, E) stands for the clusters
        p(w) = softmax([P_0; C] x + [b_0; c])_k · softmax(P_k x + b_k)_w      w in cluster k, from cutoffs[k-1] to cutoffs[k] (the last: to V)

    P (V, E) is an Embedding's table, shared with it as in TiedLinear; its symbols must be sorted by how frequent they are. Parameters of its own:
    bias (V,), cluster.weight C (K, E), cluster.bias c (K,), 0 at first. The last node of a graph.

    In training mode y = x, and `loss(y, target)` looks only into the clusters of the targets: that is what `fit` is to be given. In eval mode
    x (..., E) -> y (..., V), log p of every symbol, and `loss` is its cross-entropy: both are the same number.

    Raises ValueError for cutoffs that do not rise within (0, V), for a sparse embedding and for a wrong shape.

    Source: Grave, Joulin, Cissé, Grangier & Jégou 2017, "Efficient softmax approximation for GPUs", with projections of one width, tied.

    >>> layer = AdaptiveSoftmax(Embedding(9, 4, seed=0), [3, 6])
    >>> x, target = np.ones((5, 1, 4), np.float32), np.array([[0], [1], [4], [5], [8]])
    >>> value, dx = layer.loss(layer(x), target)
    >>> log_p = layer.eval()(x)
    >>> bool(np.allclose(np.exp(log_p).sum(axis=-1), 1)), bool(np.isclose(layer.loss(log_p, target)[0], value))
    (True, True)
    """

    def __init__(self, embedding: Embedding, cutoffs: Sequence[int]) -> None:
        super().__init__()
        V, E = embedding.num_embeddings, embedding.embedding_dim
        if embedding.sparse:
            raise ValueError("AdaptiveSoftmax: the embedding must not be sparse: every row has a gradient here")
        ends = [0, *cutoffs, V]
        if len(ends) < 3 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"AdaptiveSoftmax: cutoffs must rise within (0, V) = (0, {V}), got {list(cutoffs)}")
        self.embedding, self.cutoffs = embedding, tuple(int(n) for n in cutoffs)
        K = len(self.cutoffs)
        self._allocate({"bias": (V,), "cluster.weight": (K, E), "cluster.bias": (K,)}, embedding.dtype)
        self._clusters = list(zip(self.cutoffs, ends[2:]))

    def _head(self) -> tuple[Array, Array]:
        """The head's weights (cutoffs[0] + K, E) and biases."""
        p, H = self._parameters, self.cutoffs[0]
        return (
            np.concatenate((self.embedding.parameters()["weight"][:H], p["cluster.weight"])),
            np.concatenate((p["bias"][:H], p["cluster.bias"])),
        )

    def __call__(self, x: ArrayLike) -> Array:
        x = np.asarray(x)
        E = self.embedding.embedding_dim
        if x.shape[-1:] != (E,):
            raise ValueError(f"AdaptiveSoftmax: x must have shape (..., E) with E = {E}, got {x.shape}")
        if self.training:
            return x
        flat, table, bias = x.reshape(-1, E), self.embedding.parameters()["weight"], self._parameters["bias"]
        weight, offset = self._head()
        head = _log_softmax(flat @ weight.T + offset, x.dtype)
        H = self.cutoffs[0]
        y = np.empty((len(flat), len(bias)), x.dtype)
        y[:, :H] = head[:, :H]
        for k, (low, high) in enumerate(self._clusters):
            y[:, low:high] = _log_softmax(flat @ table[low:high].T + bias[low:high], x.dtype) + head[:, H + k, None]
        return y.reshape(*x.shape[:-1], len(bias))

    def loss(self, y: ArrayLike, target: ArrayLike) -> tuple[float, Array]:
        """The mean negative log likelihood of targets (...) in nats and its gradient by y; in training mode the parameters' gradients too."""
        y, t = np.asarray(y), np.asarray(target, np.int64).reshape(-1)
        if not self.training:
            value, dy = losses.softmax_cross_entropy(y, target)
            assert dy is not None
            return value, dy
        flat, H, N = y.reshape(-1, y.shape[-1]), self.cutoffs[0], max(len(t), 1)
        own, table, dtable = self.gradients(), self.embedding.parameters()["weight"], self.embedding.gradients()["weight"]
        weight, offset = self._head()
        of = np.searchsorted(self.cutoffs, t, side="right")  # 0: in the head, k + 1: in cluster k
        logits = flat @ weight.T
        logits += offset
        value, da = losses.softmax_cross_entropy(logits, np.where(of == 0, t, H + of - 1), out=logits)
        assert da is not None
        dx: Array = da @ weight
        dweight, doffset = da.T @ flat, np.ones(len(da), da.dtype) @ da
        dtable[:H] += dweight[:H]
        own["bias"][:H] += doffset[:H]
        own["cluster.weight"] += dweight[H:]
        own["cluster.bias"] += doffset[H:]
        for k, (low, high) in enumerate(self._clusters):
            rows = np.flatnonzero(of == k + 1)
            if len(rows) == 0:
                continue
            part = flat[rows]
            logits = part @ table[low:high].T
            logits += self._parameters["bias"][low:high]
            share, da = losses.softmax_cross_entropy(logits, t[rows] - low, out=logits)
            assert da is not None
            da *= da.dtype.type(len(rows) / N)  # a mean over these rows -> over all
            value += share * len(rows) / N
            dx[rows] += da @ table[low:high]
            dtable[low:high] += da.T @ part
            own["bias"][low:high] += np.ones(len(da), da.dtype) @ da
        return value, dx.reshape(y.shape)

    def backward(self, dy: ArrayLike) -> Array:
        """dx = dy, what `loss` gave: y was x."""
        return np.asarray(dy)


def language_model(
    vocabulary: int, projection: int, hidden: int, layers: int = 1, *, cell: str = "lstm", dropout: float = 0.0, input_dropout: float | None = None,
    tied: bool = True, cutoffs: Sequence[int] = (), seed: int | None = None,
) -> Graph:  # fmt: skip
    """Symbols -> P -> recurrent layers -> softmax's logits, of words or of characters: tokens (T, B) -> (T, B, V).

    tied: the logits are made with P too, through a linear map down to its width where H != E. dropout acts between the layers and before the
    logits, input_dropout (None: the same) on the projected words. cutoffs: AdaptiveSoftmax's, the node to be trained by `model["logits"].loss`.
    Raises ValueError for cutoffs without tied.

    >>> model = language_model(100, 16, 32, seed=0)
    >>> logits, state = model(np.zeros((5, 2), np.int64))
    >>> logits.shape, sorted(name for name in model.parameters() if "rnn" not in name)
    ((5, 2, 100), ['down.bias', 'down.weight', 'logits.bias', 'projection.weight'])
    """
    if len(cutoffs) and not tied:
        raise ValueError("language_model: cutoffs need tied=True")
    s = _seeds(seed, 6)
    table = Embedding(vocabulary, projection, seed=s[0])
    nodes: dict[str, Any] = {"projection": (table, "tokens")}
    if tied:
        table.flat *= 1 / math.sqrt(projection)  # so that the first logits are of order 1
    last = "projection"
    if first := dropout if input_dropout is None else input_dropout:
        nodes["projection_dropout"], last = (Dropout(first, seed=s[1]), last), "projection_dropout"
    nodes["rnn"], last = (_recurrent(cell, projection, hidden, layers, dropout=dropout, seed=s[2]), last), "rnn"
    if dropout:
        nodes["rnn_dropout"], last = (Dropout(dropout, seed=s[3]), last), "rnn_dropout"
    if tied and hidden != projection:
        nodes["down"], last = (Linear(hidden, projection, seed=s[4]), last), "down"
    logits = AdaptiveSoftmax(table, cutoffs) if len(cutoffs) else TiedLinear(table) if tied else Linear(hidden, vocabulary, seed=s[5])
    nodes["logits"] = (logits, last)
    return Graph(nodes)


# ---- sequences in, sequences out: what stands around recurrent layers, and which steps a divergence looks at


def mlp(sizes: Sequence[int], activation: str = "relu", *, dropout: float = 0.0, seed: int | None = None) -> Graph:
    """A time-distributed MLP: the same dense layers at every step, x (T, B, sizes[0]) -> y (T, B, sizes[-1]), linear at the end.

        h_1 = f(W_1 x_t + b_1)    h_2 = f(W_2 h_1 + b_2)    ..    y_t = W_n h_{n-1} + b_n

    dropout acts behind every activation. Raises ValueError for fewer than two sizes.

    >>> y, _ = mlp([3, 8, 2], seed=0)(np.ones((5, 4, 3), np.float32))
    >>> y.shape, bool((y == y[:1]).all())  # every step alike
    ((5, 4, 2), True)
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes must name at least what goes in and what comes out, got {list(sizes)}")
    nodes: dict[str, Any] = {}
    s = _seeds(seed, len(sizes))
    last = _hidden(nodes, "x", "", sizes[:-1], activation, dropout, s[-1])
    nodes["y"] = (Linear(sizes[-2], sizes[-1], seed=s[0]), last)
    return Graph(nodes)


def _hidden(nodes: dict[str, Any], last: str, name: str, sizes: Sequence[int], activation: str, dropout: float, seed: int | None) -> str:
    """Adds dense layers with their activation to a graph's nodes; returns the last one's name."""
    s = _seeds(seed, 2 * len(sizes))
    for i, (a, b) in enumerate(pairwise(sizes)):
        nodes[f"dense{name}{i}"] = (Linear(a, b, seed=s[2 * i]), last)
        nodes[f"{activation}{name}{i}"], last = (Activation(activation), f"dense{name}{i}"), f"{activation}{name}{i}"
        if dropout:
            nodes[f"drop{name}{i}"], last = (Dropout(dropout, seed=s[2 * i + 1]), last), f"drop{name}{i}"
    return last


def recurrent_stack(
    inputs: int, hidden: Sequence[int], outputs: int, *, cell: str = "lstm", bidirectional: bool = True, between: Sequence[int] = (),
    activation: str = "relu", dropout: float = 0.0, seed: int | None = None,
) -> Graph:  # fmt: skip
    """Recurrent layers on top of one another, each of both directions, with MLP layers between them: x (T, B, inputs) -> y (T, B, outputs).

    hidden: the units of each recurrent layer (of one direction); between: the widths of the dense layers, each with its activation, that stand behind
    every recurrent layer but the last; dropout acts behind every layer. At the end stands a linear layer. The recurrent layers are called rnn0,
    rnn1, ..; lengths and resets go to all of them. Raises ValueError for no layer or an unknown cell.

    >>> net = recurrent_stack(12, [16, 16], 9, between=[20], seed=0)
    >>> y, state = net(np.zeros((7, 2, 12), np.float32), None, [7, 4])
    >>> y.shape, sorted(state)
    ((7, 2, 9), ['rnn0', 'rnn1'])
    """
    if len(hidden) == 0:
        raise ValueError("recurrent_stack: hidden must name at least one layer")
    s = _seeds(seed, 3 * len(hidden) + 1)
    nodes: dict[str, Any] = {}
    last, width = "x", inputs
    for i, units in enumerate(hidden):
        nodes[f"rnn{i}"], last = (_recurrent(cell, width, units, 1, bidirectional=bidirectional, seed=s[3 * i]), last), f"rnn{i}"
        width = units * (1 + bidirectional)
        if dropout:
            nodes[f"rnn_drop{i}"], last = (Dropout(dropout, seed=s[3 * i + 1]), last), f"rnn_drop{i}"
        if i + 1 < len(hidden):
            last = _hidden(nodes, last, f"{i}_", [width, *between], activation, dropout, s[3 * i + 2])
            width = [width, *between][-1]
    nodes["y"] = (Linear(width, outputs, seed=s[-1]), last)
    return Graph(nodes)


def one_to_many(inputs: int, vocabulary: int, projection: int, hidden: int, *, cell: str = "gru", seed: int | None = None) -> Graph:
    """A vector in, a sequence out: the state begins as a linear map of the vector, then symbols are written (a picture's features to its caption).

        h_{-1} = W v + b        p(y_t | y_1 .. y_{t-1}, v) = softmax(V h_t + c)

    Inputs "vector" (1, B, inputs), the first axis being the state's layer, and "tokens" (T, B), the symbols one step late; logits (T, B, vocabulary).
    cell is "gru" or "rnn", whose state is one array. To write: `stepper` of the nodes words, rnn and logits, from {"rnn": W v + b}.

    Raises ValueError for another cell. Source: Vinyals, Toshev, Bengio & Erhan 2015, "Show and tell".

    >>> model = one_to_many(10, 7, 4, 8, seed=0)
    >>> logits, _ = model({"vector": np.ones((1, 2, 10), np.float32), "tokens": np.zeros((5, 2), np.int64)})
    >>> logits.shape
    (5, 2, 7)
    """
    if cell not in ("gru", "rnn"):
        raise ValueError(f"one_to_many: cell must be gru or rnn, got {cell!r}")
    s = _seeds(seed, 4)
    return Graph(
        {
            "first": (Linear(inputs, hidden, seed=s[0]), "vector"),
            "words": (Embedding(vocabulary, projection, seed=s[1]), "tokens"),
            "rnn": (_recurrent(cell, projection, hidden, 1, seed=s[2]), "words"),
            "rnn.state": "first",
            "logits": (Linear(hidden, vocabulary, seed=s[3]), "rnn"),
        }
    )


def many_to_one(loss: Divergence) -> Divergence:
    """The divergence that looks at each row's last step alone: y (T, B, O), target (B, ..) or (target, lengths (B,)); dY is 0 at every other step.

    Raises ValueError for a length of 0: it has no last step.

    >>> divergence = many_to_one(losses.softmax_cross_entropy)
    >>> value, dy = divergence(np.zeros((4, 2, 3), np.float32), (np.array([0, 2]), np.array([4, 2])))
    >>> np.argwhere(np.abs(dy).sum(axis=2)).tolist()
    [[1, 1], [3, 0]]
    """

    def divergence(y: Array, target: Any) -> tuple[float, Any]:
        wanted, lengths = target if isinstance(target, tuple) else (target, len(y))
        at = np.broadcast_to(np.asarray(lengths, np.int64) - 1, y.shape[1]), np.arange(y.shape[1])
        if (at[0] < 0).any():
            raise ValueError("many_to_one: a row of length 0 has no last step")
        value, d = loss(y[at], wanted)
        dy = np.zeros_like(y)
        dy[at] = d
        return value, dy

    return divergence


def delayed(loss: Divergence, delay: int) -> Divergence:
    """The divergence of an answer that comes `delay` steps late: y_{t + delay} is held against target_t, so that a causal net has seen more.

    y (T, B, O), target (T - delay, B, ..): give the input `delay` more steps (zeros) at its end. dY is 0 at the first `delay` steps. Raises ValueError
    for a negative delay.

    >>> value, dy = delayed(losses.mean_squared_error, 2)(np.ones((5, 1, 1)), np.zeros((3, 1, 1)))
    >>> value, dy[:, 0, 0].round(2).tolist()
    (1.0, [0.0, 0.0, 0.67, 0.67, 0.67])
    """
    if delay < 0:
        raise ValueError(f"delayed: delay must be at least 0, got {delay}")

    def divergence(y: Array, target: Any) -> tuple[float, Any]:
        value, d = loss(y[delay:], target)
        return value, np.concatenate((np.zeros_like(y[:delay]), d))

    return divergence


# ---- writing: one symbol at a time


def stepper(model: Graph, source: str = "tokens") -> Step:
    """A graph from symbols to logits as a step. Put the model in eval mode first, or its tapes pile up.

    >>> step = stepper(language_model(7, 4, 8, seed=0).eval())
    >>> logits, state = step(np.array([1, 2]), None)
    >>> logits.shape, step(np.array([3, 3]), state)[0].shape
    ((2, 7), (2, 7))
    """

    def step(symbols: Integers, state: Any) -> tuple[Array, Any]:
        logits, state = model({source: np.asarray(symbols)[None]}, state)
        return logits[0], state

    return step


def _rows(state: Any, rows: Any) -> Any:
    """The batch rows of a state: dicts, pairs and arrays (L, B, H) alike."""
    if isinstance(state, Mapping):
        return {name: _rows(part, rows) for name, part in state.items()}
    if isinstance(state, tuple):
        return tuple(_rows(part, rows) for part in state)
    return None if state is None else np.ascontiguousarray(state[:, rows])


def _log_softmax(a: Array, dtype: DTypeLike = "float64") -> Array:
    b = a.astype(dtype)
    b -= b.max(axis=-1, keepdims=True)
    b -= np.log(np.exp(b).sum(axis=-1, keepdims=True))
    return b


def greedy(step: Step, state: Any, start: ArrayLike, stop: int, limit: int) -> list[list[int]]:
    """The likeliest next symbol again and again, for B rows together, until each has met `stop` (left out) or has `limit` symbols.

    start: B symbols; state: what the step begins with, for B rows.

    >>> count = lambda symbols, state: (np.eye(5)[(symbols + 1) % 5], None)  # the symbol after this one
    >>> greedy(count, None, [0, 2], stop=4, limit=2)
    [[1, 2], [3]]
    """
    now: Integers = np.asarray(start, np.int64)
    out: list[list[int]] = [[] for _ in now]
    going = np.ones(len(now), bool)
    for _ in range(limit):
        logits, state = step(now, state)
        now = logits.argmax(axis=1).astype(np.int64)
        going &= now != stop
        if not going.any():
            break
        for b in np.flatnonzero(going):
            out[b].append(int(now[b]))
    return out


def beam(step: Step, state: Any, start: int, stop: int, limit: int, *, width: int = 8, length_power: float = 0.0) -> list[tuple[list[int], float]]:
    """Beam search for one row: up to `width` sequences with log p(sequence, stop), best first by log p / length^length_power (stop counted).

    state: for one row. A sequence is given out once it has met `stop`, with at most `limit` symbols before it. With a width of all sequences the
    first is the true maximum. Raises ValueError for a width or a limit below 1.

    >>> p = np.log([[0.1, 0.5, 0.4], [0.5, 0.25, 0.25], [0.98, 0.01, 0.01]])  # p(next | this); 0 is start and stop
    >>> step = lambda symbols, state: (p[symbols], None)
    >>> greedy(step, None, [0], stop=0, limit=4), beam(step, None, 0, 0, 4, width=2)[0][0]
    ([[1]], [2])
    """
    if width < 1 or limit < 1:
        raise ValueError(f"beam: width and limit must be at least 1, got {width} and {limit}")
    live: list[tuple[list[int], float]] = [([], 0.0)]
    done: list[tuple[list[int], float]] = []
    now: Integers = np.array([start], np.int64)

    def merit(item: tuple[list[int], float]) -> float:
        return item[1] / math.pow(len(item[0]) + 1, length_power)

    for _ in range(limit + 1):
        logits, state = step(now, state)
        log_p = _log_softmax(logits) + np.array([p for _, p in live])[:, None]  # (beams, V)
        done += [(symbols, float(log_p[i, stop])) for i, (symbols, _) in enumerate(live)]
        done = sorted(done, key=merit, reverse=True)[:width]
        if len(live[0][0]) == limit:
            break
        log_p[:, stop] = -np.inf
        flat = log_p.reshape(-1)
        best = np.argsort(-flat, kind="stable")[: min(width, flat.size - len(live))]
        rows, symbols = np.divmod(best, log_p.shape[1])
        live = [([*live[i][0], int(v)], float(flat[k])) for i, v, k in zip(rows, symbols, best)]
        if not live or (length_power == 0 and len(done) == width and live[0][1] < done[-1][1]):
            break  # log p only falls: nothing alive can come back
        state, now = _rows(state, rows), symbols.astype(np.int64)
    return done


def sample(
    step: Step,
    prompt: Sequence[int],
    limit: int,
    *,
    state: Any = None,
    temperature: float = 1.0,
    stop: int | None = None,
    forbidden: Sequence[int] = (),
    generator: np.random.Generator | None = None,
) -> Iterator[int]:
    """Primes a model with a prompt, then draws from softmax(logits / temperature), feeding each symbol back, until `stop` or `limit` symbols.

    temperature 0 takes the likeliest. `stop` itself is not given out; `forbidden` symbols (unknown words, say) are never drawn.
    Raises ValueError for an empty prompt or a negative temperature.

    >>> count = lambda symbols, state: (50 * np.eye(5)[(symbols + 1) % 5], None)
    >>> list(sample(count, [0, 1], 10, stop=4))
    [2, 3]
    """
    if len(prompt) == 0:
        raise ValueError("sample: the prompt must hold at least one symbol")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature must be a number from 0 on, got {temperature}")
    draw = np.random.default_rng() if generator is None else generator
    for symbol in prompt[:-1]:
        _, state = step(np.array([symbol]), state)
    symbol = int(prompt[-1])
    for _ in range(limit):
        logits, state = step(np.array([symbol]), state)
        a = logits[0].astype(np.float64)
        a[list(forbidden)] = -np.inf
        if temperature == 0:
            symbol = int(a.argmax())
        else:
            chances = np.cumsum(np.exp((a - a.max()) / temperature))
            symbol = int(np.searchsorted(chances, draw.random() * chances[-1], side="right"))
        if symbol == stop:
            return
        yield symbol


class EncoderDecoder:
    """Sequence to sequence: one net reads the source, its last state is the first state of the net that writes the target.

        state_0 = encoder(source)      p(y_t | y_1 .. y_{t-1}, source) = softmax(decoder(y_{t-1}, state_{t-1}))

    `graph` is what is trained: inputs "source" (T_s, B) and "target" (T_t, B), the target one step late with `start` in front; logits (T_t, B, V).
    Lengths of the sources go in as {"encoder": lengths}. `encode` gives the state, `step` writes; `greedy` and `beam` do both.

    Source: Sutskever, Vinyals & Le 2014, "Sequence to sequence learning with neural networks".

    >>> model = EncoderDecoder(9, 5, 4, 8, seed=0)
    >>> logits, _ = model.graph({"source": np.zeros((6, 2), np.int64), "target": np.zeros((3, 2), np.int64)})
    >>> logits.shape, len(model.greedy(np.zeros((6, 2), np.int64), None, start=0, stop=1, limit=4))
    ((3, 2, 5), 2)
    """

    def __init__(
        self, sources: int, targets: int, projection: int, hidden: int, layers: int = 1, *, cell: str = "lstm", dropout: float = 0.0,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        s = _seeds(seed, 5)
        reads = {
            "source_projection": (Embedding(sources, projection, seed=s[0]), "source"),
            "encoder": (_recurrent(cell, projection, hidden, layers, dropout=dropout, seed=s[1]), "source_projection"),
        }
        writes = {
            "target_projection": (Embedding(targets, projection, seed=s[2]), "target"),
            "decoder": (_recurrent(cell, projection, hidden, layers, dropout=dropout, seed=s[3]), "target_projection"),
            "logits": (Linear(hidden, targets, seed=s[4]), "decoder"),
        }
        self.graph = Graph({**reads, **writes, "decoder.state": "encoder.state"})
        self._reads, self._writes = Graph(reads), Graph(writes)
        self.step: Step = stepper(self._writes, "target")

    def encode(self, source: ArrayLike, lengths: ArrayLike | None = None) -> dict[str, Any]:
        """The state with which `step` starts, from sources (T_s, B) of the given lengths (B,)."""
        _, state = self._reads(np.asarray(source), None, lengths)
        return {"decoder": state["encoder"]}

    def _quiet(self) -> None:
        for graph in (self.graph, self._reads, self._writes):
            graph.eval()

    def greedy(self, source: ArrayLike, lengths: ArrayLike | None, *, start: int, stop: int, limit: int) -> list[list[int]]:
        """The likeliest symbol at each step, for all rows together. The model goes to eval mode."""
        self._quiet()
        return greedy(self.step, self.encode(source, lengths), np.full(np.shape(source)[1], start), stop, limit)

    def beam(
        self, source: ArrayLike, lengths: ArrayLike | None, *, start: int, stop: int, limit: int, width: int = 8, length_power: float = 0.0
    ) -> list[list[tuple[list[int], float]]]:
        """For every row up to `width` sequences with their log probabilities, best first. The model goes to eval mode."""
        self._quiet()
        state = self.encode(source, lengths)
        rows = range(np.shape(source)[1])
        return [beam(self.step, _rows(state, [b]), start, stop, limit, width=width, length_power=length_power) for b in rows]


# ---- projections of words without a recurrent net


class Projections(Module):
    """Word projections learnt from neighbours alone: the soft bag of words (CBOW) and skip-gram, with negative sampling.

        v = mean over the words read of P[word]      score of a candidate = C[candidate] · v

    x is {"words": (N, K), "candidates": (N, 1 + M)}: K words are read (CBOW: the window, skip-gram: K = 1, the middle word); the first candidate is
    the word that was there, the others are drawn at random. y (N, 1 + M) are scores for `negative_sampling_loss`. Two tables: `table` P and `context`
    C, (V, E) each.

    Source: Mikolov et al. 2013, "Distributed representations of words and phrases and their compositionality".

    >>> model = Projections(10, 4, seed=0)
    >>> y = model({"words": np.array([[1, 2]]), "candidates": np.array([[3, 4, 5]])})
    >>> model.backward(np.ones_like(y)), y.shape, sorted(model.gradients())
    (None, (1, 3), ['context.weight', 'table.weight'])
    """

    def __init__(self, vocabulary: int, projection: int, *, sparse: bool = False, seed: int | None = None) -> None:
        super().__init__()
        self.table = Embedding(vocabulary, projection, sparse=sparse, seed=seed)
        self.context = Embedding(vocabulary, projection, sparse=sparse, seed=seed)
        self.table.flat *= 0.5 / math.sqrt(projection)
        self.context.flat[...] = 0

    def leaves(self) -> list[Module]:
        """Both tables."""
        return [self.table, self.context]

    def parameters(self) -> dict[str, Array]:
        """ "table.weight" and "context.weight" -> live views."""
        return {"table.weight": self.table.parameters()["weight"], "context.weight": self.context.parameters()["weight"]}

    def gradients(self) -> dict[str, Array]:
        """ "table.weight" and "context.weight" -> live views."""
        return {"table.weight": self.table.gradients()["weight"], "context.weight": self.context.gradients()["weight"]}

    def zero_gradients(self) -> None:
        """Sets every gradient to 0 and drops the tapes that no backward took."""
        self._tapes.clear()
        self.table.zero_gradients()
        self.context.zero_gradients()

    def train(self, mode: bool = True) -> Projections:
        """Training or inference mode. Returns the model."""
        super().train(mode)
        self.table.train(mode)
        self.context.train(mode)
        return self

    def __call__(self, x: Mapping[str, Any]) -> Array:
        read, candidates = self.table(x["words"]), self.context(x["candidates"])  # (N, K, E), (N, 1 + M, E)
        v = read.mean(axis=1)
        if self.training:
            with self._alone():
                self._push((read.shape, v, candidates))
        y: Array = np.matmul(candidates, v[:, :, None])[:, :, 0]
        return y

    def backward(self, dy: ArrayLike) -> None:
        """Adds the gradients of both tables; words have none."""
        with self._alone():
            shape, v, candidates = self._pop()
            dy = np.asarray(dy)
            if dy.shape != candidates.shape[:2] or dy.dtype != v.dtype:
                self._push((shape, v, candidates))  # a wrong dy costs nothing
                raise ValueError(f"Projections: dy must be {v.dtype} of shape (N, 1 + M) = {candidates.shape[:2]}, got {dy.dtype} of {dy.shape}")
        dv = np.matmul(dy[:, None], candidates)  # (N, 1, E)
        self.context.backward(dy[:, :, None] * v[:, None])
        self.table.backward(np.broadcast_to(dv / v.dtype.type(shape[1]), shape))

    def nearest(self, symbols: Sequence[int], count: int = 5) -> list[list[int]]:
        """For each symbol the `count` others whose projections have the largest cosine with its own."""
        return nearest(self.table.parameters()["weight"], symbols, count)


def nearest(table: Array, symbols: Sequence[int], count: int = 5) -> list[list[int]]:
    """For each symbol the `count` other rows of a table (V, E) with the largest cosine.

    >>> nearest(np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), [0], 1)
    [[1]]
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    cosines = unit[list(symbols)] @ unit.T
    cosines[np.arange(len(symbols)), list(symbols)] = -np.inf
    found: list[list[int]] = np.argsort(-cosines, axis=1)[:, :count].tolist()
    return found


def negative_sampling_loss(scores: Array, target: Any = None) -> tuple[float, Array]:
    """Mean over N of -log σ(s_0) - Σ_{m>0} log σ(-s_m), σ(s) = 1 / (1 + exp -s), and its gradient; the target is not read.

    >>> loss, ds = negative_sampling_loss(np.zeros((2, 3)))
    >>> round(loss / math.log(2), 6), ds[0].tolist()
    (3.0, [-0.25, 0.25, 0.25])
    """
    sign = np.ones(scores.shape[1], scores.dtype)
    sign[0] = -1
    soft = np.logaddexp(0, sign * scores)  # log(1 + exp ±s)
    ds = sign * np.exp(sign * scores - soft) / scores.dtype.type(len(scores))
    return float(soft.sum(dtype=np.float64)) / len(scores), ds


def window_batches(
    tokens: ArrayLike, vocabulary: int, *, radius: int, negatives: int, size: int, kind: str = "cbow", subsample: float = 1e-3, seed: int = 0
) -> Iterator[tuple[dict[str, Integers], None]]:
    """One epoch of batches for `Projections`: kind "cbow" reads the 2·radius words around each word, "skipgram" the word, for each of them.

    Candidates are drawn with p ∝ count^0.75. Before the windows are cut, a word of frequency f stays with probability min(1, sqrt(subsample / f)). A
    negative that happens to be the true word counts as one: rare, and common practice. Raises ValueError for another kind.

    >>> batch, _ = next(window_batches(np.arange(50) % 10, 10, radius=2, negatives=3, size=8, subsample=1))
    >>> batch["words"].shape, batch["candidates"].shape
    ((8, 4), (8, 4))
    """
    if kind not in ("cbow", "skipgram"):
        raise ValueError(f"window_batches: kind must be cbow or skipgram, got {kind!r}")
    rng = np.random.default_rng(seed)
    text: Integers = np.asarray(tokens, np.int64)
    counts = np.bincount(text, minlength=vocabulary).astype(np.float64)
    chance = np.cumsum(counts**0.75)
    keep = np.sqrt(subsample * len(text) / np.maximum(counts, 1))
    text = text[rng.random(len(text)) < keep[text]]
    windows = np.lib.stride_tricks.sliding_window_view(text, 2 * radius + 1)
    around = np.delete(windows, radius, axis=1)  # (N, 2 radius)
    middle = windows[:, radius]
    if kind == "skipgram":
        around, middle = np.repeat(middle, 2 * radius)[:, None], around.reshape(-1)
    order = rng.permutation(len(middle))
    for start in range(0, len(order) - size + 1, size):
        part = order[start : start + size]
        drawn = np.searchsorted(chance, rng.random((size, negatives)) * chance[-1], side="right")
        yield {"words": around[part], "candidates": np.concatenate((middle[part, None], drawn), axis=1)}, None


# ---- what a language model must beat


class KneserNey:
    """Interpolated modified Kneser-Ney: the n-gram model that is hard to beat by counting.

        p_k(w | u) = max(c(u w) - D(c(u w)), 0) / c(u ·) + γ(u) p_{k-1}(w | u without its first),      p_0 = 1 / V

    c are counts for the highest order, below it the number of different words seen before u w; D = D_1, D_2, D_3+ of each order by Chen & Goodman's
    estimate from how many n-grams were seen once, twice, three and four times; γ(u) gives back what D took.

    grams (N, n) integers in [0, vocabulary): every training symbol, last, behind its context. Raises ValueError if vocabulary^n does not fit 62 bits.

    Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling".

    >>> text = np.array([0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 2, 2])
    >>> model = KneserNey(ngrams(text, 3), 4)
    >>> p = [float(np.exp(model.log_probability(np.array([[0, 1, w]])))[0]) for w in range(4)]
    >>> round(sum(p), 9), p[2] > p[3] > p[0]
    (1.0, True)
    """

    def __init__(self, grams: ArrayLike, vocabulary: int) -> None:
        g: Integers = np.asarray(grams, np.int64)
        if g.ndim != 2 or g.shape[1] * math.log2(max(vocabulary, 2)) > 62:
            raise ValueError(f"KneserNey: grams must have shape (N, n) with vocabulary^n below 2^62, got {g.shape} and {vocabulary}")
        self.vocabulary, self.order = vocabulary, g.shape[1]
        self._levels = []
        keys, counts = np.unique(self._key(g), return_counts=True)
        for k in range(self.order, 0, -1):  # keys: the different k-grams of this order, as numbers
            classes = np.minimum(counts, 3)
            n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            discounts = np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])
            contexts, first = np.unique(keys // vocabulary, return_index=True)
            totals = np.add.reduceat(counts, first)
            given = np.add.reduceat(discounts[classes], first) / totals  # γ(u)
            self._levels.append((keys, (counts - discounts[classes]), contexts, totals, given))
            if k > 1:
                keys, counts = np.unique(keys % vocabulary ** (k - 1), return_counts=True)

    def _key(self, grams: Integers) -> Integers:
        out: Integers = grams @ (self.vocabulary ** np.arange(grams.shape[1] - 1, -1, -1, dtype=np.int64))
        return out

    def log_probability(self, grams: ArrayLike) -> NDArray[np.float64]:
        """(N,) log p(last symbol | the ones before it), of grams (N, n)."""
        g: Integers = np.asarray(grams, np.int64)
        p = np.full(len(g), 1 / self.vocabulary)
        for k, (keys, kept, contexts, totals, given) in enumerate(reversed(self._levels), 1):
            key = self._key(g[:, self.order - k :])
            at = np.minimum(np.searchsorted(contexts, key // self.vocabulary), len(contexts) - 1)
            known = contexts[at] == key // self.vocabulary
            seen = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            own = np.where(keys[seen] == key, kept[seen], 0.0)
            p = np.where(known, own / totals[at] + given[at] * p, p)
        out: NDArray[np.float64] = np.log(p)
        return out


def ngrams(tokens: ArrayLike, n: int, stop: int | None = None) -> Integers:
    """(N, n): every symbol of a text behind the n - 1 before it; what lies before the text, or before the latest `stop`, counts as `stop` (or 0).

    >>> ngrams([5, 6, 1, 7], 3, stop=1).tolist()
    [[1, 1, 5], [1, 5, 6], [5, 6, 1], [1, 1, 7]]
    """
    text: Integers = np.asarray(tokens, np.int64)
    fill = 0 if stop is None else stop
    padded = np.concatenate((np.full(n - 1, fill), text))
    out: Integers = np.lib.stride_tricks.sliding_window_view(padded, n).copy()
    if stop is not None:
        for column in range(n - 3, -1, -1):  # once a stop is met, going back, all before it is stops
            out[:, column][out[:, column + 1] == stop] = stop
    return out


class Columns(_Map):
    """A picture as a sequence of its columns, from left to right: x (B, C, h, w) -> y (w, B, C h). Between convolution and LSTM.

    >>> layer = Columns()
    >>> layer(np.zeros((2, 3, 4, 5), np.float32)).shape, layer.backward(np.zeros((5, 2, 12), np.float32)).shape
    ((5, 2, 12), (2, 3, 4, 5))
    """

    def _forward(self, x: Array) -> tuple[Array, Any]:
        if x.ndim != 4:
            raise ValueError(f"Columns: x must have shape (B, C, h, w), got {x.shape}")
        B, C, h, w = x.shape
        return np.ascontiguousarray(x.transpose(3, 0, 1, 2)).reshape(w, B, C * h), x.shape

    def _backward(self, tape: Any, dy: Array) -> Array:
        B, C, h, w = tape
        if dy.shape != (w, B, C * h):
            raise ValueError(f"Columns: dy must have shape (w, B, C h) = {(w, B, C * h)}, got {dy.shape}")
        return np.ascontiguousarray(dy.reshape(w, B, C, h).transpose(1, 2, 3, 0))
