"""The drop-in against torch itself: one process, the same weights, the same number of threads, results compared before anything is timed.

    python bench/torch_dropin.py [--threads 1] [--quick]

Latency of one step (T = 1, B = 1, H = 16), then training (forward and backward) of layers, padded and packed. One JSON line a measurement: torch's
seconds, ours under install() and as our module, in inference also frozen, and the ratio torch / ours under install() (above 1: ours is faster),
medians over interleaved blocks.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import rnnfast.torch as fast
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

Run = Callable[[nn.Module], Any]


def tensors(out: Any) -> list[torch.Tensor]:
    """Every tensor of a module's results."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, nn.utils.rnn.PackedSequence):
        return [out.data]
    return [t for part in out for t in tensors(part)]


def block(run: Run, module: nn.Module, seconds: float) -> float:
    """Seconds a call, the median of as many as fit."""
    run(module)
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 3:
        start = time.perf_counter()
        run(module)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def compare(name: str, module: nn.Module, run: Run, rounds: int, seconds: float, tolerance: float = 1e-3) -> None:
    """Prints one line: torch, ours under install, ours as a module, and frozen where no gradient is wanted."""
    ours = fast.convert(copy.deepcopy(module))
    for a, b in zip(tensors(run(module)), tensors(run(ours)), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(1.0, float(a.detach().abs().max())))
    sides: dict[str, list[float]] = {"torch": [], "installed": [], "module": []}
    frozen = None if torch.is_grad_enabled() else fast.freeze(copy.deepcopy(module))
    for _ in range(rounds):
        sides["torch"].append(block(run, module, seconds))
        with fast.installed():
            sides["installed"].append(block(run, module, seconds))
        sides["module"].append(block(run, ours, seconds))
        if frozen is not None:
            sides.setdefault("frozen", []).append(block(run, frozen, seconds))
    seconds_of = {side: statistics.median(took) for side, took in sides.items()}
    ratio = statistics.median(t / o for t, o in zip(sides["torch"], sides["installed"]))
    print(json.dumps({"name": name, "threads": torch.get_num_threads(), **seconds_of, "ratio": round(ratio, 2)}), flush=True)


def training(x: Any) -> Run:
    """Forward and backward; returns y, dx and every parameter's gradient."""

    def run(module: nn.Module) -> Any:
        module.zero_grad()
        out = tensors(module(x))
        out[0].backward(torch.ones_like(out[0]))
        return [out[0].detach(), *(p.grad for p in module.parameters())]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds, seconds = (3, 0.05) if args.quick else (7, 0.3)
    x, h = torch.randn(1, 16), torch.randn(1, 16)
    state: dict[str, Any] = {"LSTM": (h, h), "GRU": h, "RNN": h}
    for kind in ("LSTM", "GRU", "RNN"):
        hx = state[kind]
        layer_state = tuple(s[None] for s in hx) if kind == "LSTM" else hx[None]

        def step(m: nn.Module, hx: Any = hx) -> Any:
            return m(x, hx)

        def call(m: nn.Module, hx: Any = layer_state) -> Any:
            return m(x[None], hx)

        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                mode = "grad" if grad else "no_grad"
                compare(f"{kind}Cell T=1 B=1 H=16 {mode}", getattr(nn, kind + "Cell")(16, 16), step, rounds, seconds)
                compare(f"{kind} T=1 B=1 H=16 {mode}", getattr(nn, kind)(16, 16), call, rounds, seconds)
        for H in (128, 512):  # one step of a decoder
            wide, states = torch.randn(1, 1, H), torch.zeros(1, 1, H)
            given = (states, states) if kind == "LSTM" else states
            with torch.no_grad():
                compare(f"{kind} T=1 B=1 H={H} no_grad", getattr(nn, kind)(H, H), lambda m, x=wide, s=given: m(x, s), rounds, seconds)
    shapes = ((50, 32, 64), (100, 32, 256)) if args.quick else ((20, 8, 20), (50, 32, 64), (100, 32, 256), (500, 32, 128), (100, 128, 512))
    for kind in ("LSTM", "GRU", "RNN"):
        for T, B, H in shapes:
            layer = getattr(nn, kind)(H, H)
            compare(f"{kind} T={T} B={B} H={H} training", layer, training(torch.randn(T, B, H)), rounds, seconds)
    T, B, H = (100, 32, 64) if args.quick else (500, 32, 128)
    lengths = torch.linspace(T // 10, T, B).long().flip(0)
    packed = pack_padded_sequence(torch.randn(T, B, H), lengths)
    for kind in ("LSTM", "GRU"):
        compare(f"{kind} T={T} B={B} H={H} packed training", getattr(nn, kind)(H, H), training(packed), min(rounds, 3), seconds)
    with torch.no_grad():
        model = nn.ModuleList([nn.Linear(128, 128), nn.LSTM(128, 128), nn.Linear(128, 1000)])
    z = torch.randn(50, 32, 128)

    def mixed(m: nn.Module) -> Any:
        m.zero_grad()
        y = m[2](m[1](torch.relu(m[0](z)))[0]).log_softmax(-1)  # type: ignore[index]
        y[..., 0].mean().backward()
        return [y.detach(), *(p.grad for p in m.parameters())]

    compare("Linear, LSTM, Linear, softmax: T=50 B=32 H=128 training", model, mixed, rounds, seconds)


if __name__ == "__main__":
    main()
