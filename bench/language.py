"""A character model's whole training step, embedding to Adam, in rnnfast and in torch: what `rnnfast lm train` repeats.

    python bench/language.py             # where rnnfast's step spends its time, at three sizes; run.py --list named compares

Tokens -> embedding -> recurrent layers -> softmax, the state carried from batch to batch; gradients clipped to a norm, Adam.
peers.py draws the weights and tokens. `results` are those of three steps from the same weights: the losses, and the first gradients.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import rnnfast
from rnnfast.data import Alphabet
from rnnfast.lm import Config, LanguageModel
from rnnfast.losses import softmax_cross_entropy
from rnnfast.optim import Adam, clip_global_norm
from timing import Array, Side

if TYPE_CHECKING:
    from peers import Problem

RATE, CLIP = Config().learning_rate, Config().clip
ADAMS: dict[str, dict[str, bool]] = {"Adam": {}, "foreach Adam": {"foreach": True}, "fused Adam": {"fused": True}}


class _Trainer(Protocol):
    def start(self) -> None:
        """The weights as drawn, a fresh optimizer, no state."""

    def step(self, k: int) -> float:
        """Trains on batch k; returns the loss."""

    def gradients(self) -> dict[str, Array]:
        """The last step's, clipped."""


class _Ours:
    """The graph of `rnnfast lm train`, and what `fit` does to it in a step."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        sizes = Config(cell=shape.cell, layers=shape.num_layers, hidden=shape.H, embedding=shape.I, seq_length=shape.T, batch_size=shape.B)
        self.graph = LanguageModel(sizes, Alphabet(bytes(range(shape.vocabulary - 1)))).graph
        self.problem = problem

    def start(self) -> None:
        self.graph.load_state_dict(self.problem.params)
        self.optimizer, self.state = Adam(self.graph, RATE), None

    def step(self, k: int) -> float:
        self.optimizer.zero_gradients()
        y, self.state = self.graph(self.problem.x[k], self.state)
        loss, dy = softmax_cross_entropy(y, self.problem.dy[k], out=y)
        self.graph.backward(dy)
        clip_global_norm(self.graph, CLIP)
        self.optimizer.step()
        return loss

    def gradients(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self.graph.gradients().items()}


class _Torch:
    """bench/torch_lm.py's model, with one of torch's Adams."""

    def __init__(self, problem: Problem, adam: dict[str, bool]) -> None:
        import torch
        import torch_lm

        shape = problem.shape
        self.model, self.detach = torch_lm.Model(shape.vocabulary, shape.I, shape.H, shape.num_layers, shape.cell), torch_lm.detach
        self.start_values = {name: torch.from_numpy(value) for name, value in problem.params.items()}
        self.x, self.target = ([torch.from_numpy(value) for value in values] for values in (problem.x, problem.dy))
        self.adam = adam

    def start(self) -> None:
        import torch

        self.model.load_state_dict(self.start_values)
        self.optimizer, self.state = torch.optim.Adam(self.model.parameters(), RATE, **self.adam), None

    def step(self, k: int) -> float:
        import torch

        y, state = self.model(self.x[k], self.state)
        loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), self.target[k].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.state = self.detach(state)
        return loss.item()

    def gradients(self) -> dict[str, Array]:
        return {name: p.grad.numpy().copy() for name, p in self.model.named_parameters()}


def _results(trainer: _Trainer, k: int) -> dict[str, Array]:
    trainer.start()
    losses = [trainer.step(k)]
    gradients = trainer.gradients()
    losses += [trainer.step(k) for _ in range(2)]
    return {"loss": np.array(losses)} | gradients


def _side(library: str, mode: str, threads: int, trainer: _Trainer, enter: Callable[[], None]) -> Side:
    trainer.start()
    return Side(library, mode, threads, trainer.step, functools.partial(_results, trainer), enter=enter)


def ours(problem: Problem, threads: int) -> Side:
    """rnnfast's one way."""
    return _side("rnnfast", "training", threads, _Ours(problem), functools.partial(rnnfast.set_num_threads, threads))


def torch_sides(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """torch with each of its Adams."""
    import torch

    for mode, adam in ADAMS.items():
        trainer = _Torch(problem, adam)
        for n in threads:
            yield _side("torch", mode, n, trainer, functools.partial(torch.set_num_threads, n))


def parts(problem: Problem, threads: int, steps: int = 8) -> dict[str, float]:
    """Median seconds of each part of rnnfast's step, its forward and backward added up."""
    rnnfast.set_num_threads(threads)
    trainer = _Ours(problem)
    trainer.start()
    graph, times = trainer.graph, defaultdict[str, list[float]](list)

    def timed(part: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **named)
        spent[part] += time.perf_counter() - start
        return result

    for k in range(steps):
        spent: dict[str, float] = defaultdict(float)
        x, target = problem.x[k % len(problem.x)], problem.dy[k % len(problem.x)]
        timed("zero", trainer.optimizer.zero_gradients)
        below = timed("embedding", graph["embedding"], x)
        y, _ = timed("recurrent", graph["rnn"], below)
        logits = timed("logits", graph["logits"], y)
        _, dy = timed("softmax", softmax_cross_entropy, logits, target, out=logits)
        dy = timed("logits", graph["logits"].backward, dy)
        dy, _ = timed("recurrent", graph["rnn"].backward, dy)
        timed("embedding", graph["embedding"].backward, dy)
        timed("clip", clip_global_norm, graph, CLIP)
        timed("Adam", trainer.optimizer.step)
        for part, seconds in spent.items():
            times[part].append(seconds)
    return {part: statistics.median(each) for part, each in times.items()}


def main() -> int:
    """Prints a line a size and number of threads: milliseconds, and each part's share."""
    import limits
    import peers
    import shapes

    for shape in shapes.named():
        if shape.name == shapes.STEP:
            for threads in sorted({1, limits.cores()}):
                found = parts(peers.Problem(shape), threads)
                whole = sum(found.values())
                shares = ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in found.items())
                print(f"{shape.cell} T={shape.T} B={shape.B} H={shape.H}, {threads} threads: {whole * 1e3:.1f} ms; {shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
