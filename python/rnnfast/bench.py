"""`rnnfast bench`: what this machine can do, what the kernels make of it, and torch beside them where it is installed.

The short form for whoever has installed the package; the repository's bench/ compares more libraries on more shapes. Dims: T time, B batch,
H = I units. A *share* is the share of the peak, multiply-adds in registers, measured in the same run.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import _core, functional

__all__ = ["SHAPES", "measure", "peak"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
SHAPES = ((1, 1, 64), (100, 1, 256), (100, 8, 64), (100, 32, 256))  # T, B, H


def peak(compute: str, threads: int = 1) -> float:
    """Operations a second of multiply-adds in registers, the best of several tries: "float32", "float64", "bfloat16" or "int8" products.

    Raises ValueError for another name.
    """
    rounds = 1 << 12
    while _once(compute, rounds, 1)[1] < 0.002:
        rounds *= 2
    return max(done / seconds for done, seconds in (_once(compute, rounds, threads) for _ in range(5)))


def _once(compute: str, rounds: int, threads: int) -> tuple[float, float]:
    done = [0.0] * threads

    def work(i: int) -> None:
        done[i] = _core.peak(compute, rounds)

    others = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    start = time.perf_counter()
    for other in others:
        other.start()
    work(0)
    for other in others:
        other.join()
    return sum(done), time.perf_counter() - start


def measure(shapes: tuple[tuple[int, int, int], ...] = SHAPES, seconds: float = 0.05, peers: bool = True) -> Iterator[dict[str, Any]]:
    """One dict a cell, shape and mode: "cell", "T", "B", "H", "mode", "ms", "gflops", and with torch "torch_ms" and "difference".

    Blocks of about `seconds` alternate, three of each side, and their medians count. The parameters are torch's as it draws them, and the
    largest difference of the outputs is found before anything is timed. Threads are `rnnfast.get_num_threads()`, for torch the faster of one
    and that many.
    """
    draw = np.random.default_rng(0)
    for cell, gates in GATES.items():
        for T, B, H in shapes:
            size = {"weight_ih_l0": (gates * H, H), "weight_hh_l0": (gates * H, H), "bias_ih_l0": (gates * H,), "bias_hh_l0": (gates * H,)}
            params = {name: draw.uniform(-(H**-0.5), H**-0.5, s).astype(np.float32) for name, s in size.items()}
            x, dy = (draw.standard_normal((T, B, H)).astype(np.float32) for _ in range(2))
            ours = _ours(cell, params, x, dy)
            torchs = _torch(cell, params, x, dy) if peers else {}
            for mode, call in ours.items():
                flops = 2.0 * gates * 2 * H * H * T * B * (3 if mode == "training" else 1)
                sides = [call, *torchs.get(mode, ())]
                found: dict[str, Any] = {"cell": cell, "T": T, "B": B, "H": H, "mode": mode}
                if len(sides) > 1:
                    found["difference"] = float(np.abs(call() - sides[1]()).max())
                blocks = [[_block(side, seconds) for side in sides] for _ in range(3)]
                times = [statistics.median(column) for column in zip(*blocks)]
                found |= {"ms": times[0] * 1e3, "gflops": flops / times[0] / 1e9}
                if len(sides) > 1:
                    found["torch_ms"] = min(times[1:]) * 1e3
                yield found


def _block(call: Callable[[], Any], seconds: float) -> float:
    quiet = False
    until = time.perf_counter() + 0.2
    while not quiet and time.perf_counter() < until:  # the other side's threads may still spin
        before = time.process_time()
        time.sleep(0.01)
        quiet = time.process_time() - before < 0.001
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _ours(cell: str, params: dict[str, Any], x: Any, dy: Any) -> dict[str, Callable[[], Any]]:
    gradients = {name: np.zeros_like(value) for name, value in params.items()}

    def infer() -> Any:
        return functional.forward(cell, x, None, params, tape=False)[0]

    def train() -> Any:
        y, _, tape = functional.forward(cell, x, None, params)
        functional.backward(tape, dy, None, gradients, need_dstate=False)
        return y

    return {"inference": infer, "training": train}


def _torch(cell: str, params: dict[str, Any], x: Any, dy: Any) -> dict[str, list[Callable[[], Any]]]:
    """torch's calls by mode, one a number of threads; none where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    H = x.shape[-1]
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[cell](H, H)
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in params.items()})
    inputs, dys = torch.from_numpy(x), torch.from_numpy(dy)

    def infer(threads: int) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(inputs)[0].numpy()

    def train(threads: int) -> Any:
        torch.set_num_threads(threads)
        leaf = inputs.detach().requires_grad_()
        y = module(leaf)[0]
        y.backward(dys)
        return y.detach().numpy()

    counts = sorted({1, _core.get_num_threads()})
    return {
        "inference": [lambda n=n: infer(n) for n in counts],  # type: ignore[misc]
        "training": [lambda n=n: train(n) for n in counts],  # type: ignore[misc]
    }
