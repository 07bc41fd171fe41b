"""The drop-in against torch itself: one process, the same weights, the same number of threads, results compared before anything is timed.

    python bench/torch_dropin.py [--threads 1] [--quick] [--only TEXT] [--out FILE [--seconds N]]

Latency of one step (T = 1, B = 1, H = 16) against its budgets; then layers and cells over a grid of T, B and H, inference and training (forward and
backward); packed training; halves; a model with torch's layers around ours; the layers that report.py has a target for. One JSON line a measurement:
torch's seconds, ours under install() and as our module, in inference also frozen, and the ratio torch / ours under install() (above 1: ours is
faster); blocks alternate, and each side's fastest counts. At the end, what falls short: a ratio that is less than level (0.97), or less
than 0.95 of a target, and seconds above a budget.
With --out the lines go to a file too, and what it has already of this build is not measured again, so that --seconds splits the whole into runs of
that length.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rnnfast.torch as fast
import torch
from limits import identity
from report import AGAINST_TORCH, LEVEL, NAMES
from shapes import TRAINING
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
    """Seconds a call, the median of as many as fit, at least one after a first that does not count."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 2:
        start = time.perf_counter()
        run(module)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


class Table:
    """Measures, prints a line a measurement, and remembers what falls short."""

    def __init__(self, rounds: int, seconds: float, only: str, out: Path | None, most: float) -> None:
        self.rounds, self.seconds, self.only, self.out, self.end = rounds, seconds, only, out, time.perf_counter() + most
        self.short, self.left = list[str](), 0
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out is not None and out.exists() else []
        self.same = {"threads": torch.get_num_threads(), "kernels": identity()["kernels"]}
        self.done: dict[str, dict[str, Any]] = {line["name"]: line for line in lines if all(line.get(k) == v for k, v in self.same.items())}

    def compare(self, name: str, module: nn.Module, run: Run, budget: dict[str, float] | None = None, least: float = LEVEL, tolerance: float = 1e-3) -> None:
        """torch, ours under install, ours as a module, and frozen where no gradient is wanted; budget: seconds that a side may take at most."""
        line = self.wanted(name)
        if line is None:
            return
        line = line or self.measure(name, module, run, tolerance)
        if line["ratio"] < least:
            self.short.append(f"{name}: {line['ratio']:.2f} times torch's speed, less than {least:g}")
        for side, most in (budget or {}).items():
            if line[side] > most:
                self.short.append(f"{name}, {side}: {line[side] * 1e6:.1f} us, more than {most * 1e6:.0f}")

    def wanted(self, name: str) -> dict[str, Any] | None:
        """A line that is there already, an empty one to be measured, or None."""
        if self.only not in name:
            return None
        if name not in self.done and time.perf_counter() > self.end:
            self.left += 1
            return None
        return self.done.get(name, {})

    def measure(self, name: str, module: nn.Module, run: Run, tolerance: float) -> dict[str, Any]:
        ours = fast.convert(copy.deepcopy(module))
        for a, b in zip(tensors(run(module)), tensors(run(ours)), strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(1.0, float(a.detach().abs().max())))
        sides: dict[str, list[float]] = {"torch": [], "installed": [], "module": []}
        frozen = None if torch.is_grad_enabled() else fast.freeze(copy.deepcopy(module))
        for _ in range(self.rounds):
            sides["torch"].append(block(run, module, self.seconds))
            with fast.installed():
                sides["installed"].append(block(run, module, self.seconds))
            sides["module"].append(block(run, ours, self.seconds))
            if frozen is not None:
                sides.setdefault("frozen", []).append(block(run, frozen, self.seconds))
        return self.keep(name, sides)

    def keep(self, name: str, sides: dict[str, list[float]]) -> dict[str, Any]:
        """Prints a line, and writes it down."""
        best = {side: min(took) for side, took in sides.items()}
        line = {"name": name, **self.same, **best, "ratio": round(best["torch"] / best["installed"], 2)}
        print(json.dumps(line), flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line


def training(x: Any, hx: Any = None) -> Run:
    """Forward and backward; returns y, x's gradient where it has one, and every parameter's."""

    def run(module: nn.Module) -> Any:
        module.zero_grad()
        if isinstance(x, torch.Tensor):
            x.grad = None
        out = tensors(module(x, hx))
        out[0].backward(torch.ones_like(out[0]))
        inputs = [x.grad] if isinstance(x, torch.Tensor) and x.requires_grad else []
        return [out[0].detach(), *inputs, *(p.grad for p in module.parameters())]

    return run


GRID = (
    (1, 1, 128), (1, 1, 512), (1, 1, 1024), (1, 32, 64), (1, 32, 512), (10, 1, 64), (20, 8, 20), (20, 128, 512), (50, 32, 64), (100, 1, 128),
    (100, 32, 256), (500, 32, 128), (100, 128, 512),
)  # fmt: skip
STEPS = ((1, 64), (1, 256), (1, 512), (8, 256), (32, 128), (32, 512))


def latency(table: Table) -> None:
    """One step at H = 16, the seconds of whose call are mostly overhead."""
    x, h = torch.randn(1, 16), torch.randn(1, 16)
    for kind in ("LSTM", "GRU", "RNN"):
        hx: Any = (h, h) if kind == "LSTM" else h
        layer_state: Any = (h[None], h[None]) if kind == "LSTM" else h[None]
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                mode = "grad" if grad else "no_grad"
                most = {"installed": 18e-6 if grad else 9e-6}
                table.compare(f"{kind}Cell T=1 B=1 H=16 {mode}", getattr(nn, kind + "Cell")(16, 16), lambda m, s=hx: m(x, s), most)
                most = {} if grad else {"installed": 16e-6, "module": 15e-6}
                table.compare(f"{kind} T=1 B=1 H=16 {mode}", getattr(nn, kind)(16, 16), lambda m, s=layer_state: m(x[None], s), most)


def grid(table: Table, quick: bool) -> None:
    """Layers without a state, cells with one."""
    for kind in ("LSTM", "GRU", "RNN"):
        for T, B, H in GRID[: -2 if quick else None]:
            layer, x = getattr(nn, kind)(H, H), torch.randn(T, B, H)
            table.compare(f"{kind} T={T} B={B} H={H} training", layer, training(x))
            with torch.no_grad():
                table.compare(f"{kind} T={T} B={B} H={H} inference", layer, lambda m, x=x: m(x))
        for B, H in STEPS:
            cell, x, h = getattr(nn, kind + "Cell")(H, H), torch.randn(B, H), torch.randn(B, H)
            hx: Any = (h, h) if kind == "LSTM" else h
            table.compare(f"{kind}Cell B={B} H={H} training", cell, training(x, hx))
            with torch.no_grad():
                table.compare(f"{kind}Cell B={B} H={H} inference", cell, lambda m, x=x, hx=hx: m(x, hx))


def halves(table: Table) -> None:
    """Under autocast, and in bfloat16 altogether."""
    for kind in ("LSTM", "GRU"):
        for T, B, H in ((1, 1, 512), (20, 8, 20), (50, 32, 64), (100, 32, 256)):
            layer, x = getattr(nn, kind)(H, H), torch.randn(T, B, H)
            run, low = training(x), training(x.bfloat16())

            def under(m: nn.Module, run: Run = run) -> Any:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return run(m)

            table.compare(f"{kind} T={T} B={B} H={H} autocast training", layer, under, tolerance=0.05)
            table.compare(f"{kind} T={T} B={B} H={H} bfloat16 training", copy.deepcopy(layer).bfloat16(), low, tolerance=0.05)


def wanted(table: Table) -> None:
    """What one layer's training must reach against torch by itself, through torch's tensors and graph, which may cost a twentieth of it."""
    for (name, cell, B, H), ratio in AGAINST_TORCH.items():
        if name == TRAINING:
            kind, x = NAMES[cell], torch.randn(100, B, H, requires_grad=True)
            table.compare(f"{kind} T=100 B={B} H={H} training, x's gradient too", getattr(nn, kind)(H, H), training(x), least=0.95 * ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="the measurements whose names hold this text")
    parser.add_argument("--out", type=Path, help="a file of measurements to read and to add to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no measurement after so many; the next run with the same --out goes on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = Table(*((3, 0.03) if args.quick else (5, 0.1)), args.only, args.out, args.seconds)
    latency(table)
    grid(table, args.quick)
    T, B, H = (100, 32, 64) if args.quick else (500, 32, 128)
    lengths = torch.linspace(T // 10, T, B).long().flip(0)
    packed = pack_padded_sequence(torch.randn(T, B, H), lengths)
    for kind in ("LSTM", "GRU"):
        table.compare(
            f"{kind} T={T} B={B} H={H} packed training", getattr(nn, kind)(H, H), training(packed), least=10 if kind == "LSTM" and not args.quick else LEVEL
        )
    halves(table)
    with torch.no_grad():
        model = nn.ModuleList([nn.Linear(128, 128), nn.LSTM(128, 128), nn.Linear(128, 1000)])
    z = torch.randn(50, 32, 128)

    def mixed(m: nn.Module) -> Any:
        m.zero_grad()
        y = m[2](m[1](torch.relu(m[0](z)))[0]).log_softmax(-1)  # type: ignore[index]
        y[..., 0].mean().backward()
        return [y.detach(), *(p.grad for p in m.parameters())]

    table.compare("Linear, LSTM, Linear, softmax: T=50 B=32 H=128 training", model, mixed)
    wanted(table)
    print("\n".join(["short of what is wanted:", *(table.short or ["nothing"]), *([f"{table.left} not measured yet"] if table.left else [])]))


if __name__ == "__main__":
    main()
