"""What the kernels reach of one core's multiply-add peak, against the targets; prints what falls short, and exits 1
if anything does.

    python bench/core.py                 # about two minutes
    python bench/core.py --quick         # seconds, noisy

Forward and training (forward with tape, then backward to every gradient) at T=100, B=32, I=H=256 on one thread. The
peak is the better of a measured loop and lanes * 2 * pipes * clock, measured before and after every row. No peer
takes part: run.py compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator

import limits
import numpy as np
import rnnfast
import rnnfast.functional as F
import timing
from peers import Problem, ours
from shapes import Shape, ragged_lengths

CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "rnn_identity", "lstm", "lstm_peephole", "gru")


@dataclasses.dataclass
class Row:
    """One line of the table: `value` against `target`; shares must reach it, costs must not pass it."""

    what: str
    mode: str
    value: float
    target: float | None
    kind: str  # "share" of the peak, or "cost" in multiples of something plain
    ms: float

    @property
    def short(self) -> bool:
        if self.target is None:
            return False
        return self.value < self.target if self.kind == "share" else self.value > self.target

    def __str__(self) -> str:
        value = f"{self.value:6.1%}" if self.kind == "share" else f"{self.value:5.2f}x"
        target = "" if self.target is None else (f"{self.target:.0%}" if self.kind == "share" else f"{self.target:.2f}x")
        return f"{self.what:<44} {self.mode:<9} {self.ms:9.3f} ms {value} {target:>6} {'SHORT' if self.short else ''}".rstrip()


class Bench:
    """Runs rows at one block length."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self.rounds, self.seconds = rounds, seconds
        self.peaks: dict[tuple[str, str], float] = {}

    def peak(self, dtype: str, march: str) -> float:
        """The best peak seen so far: noise only ever lowers it."""
        found = limits.peak(dtype, 1, march, seconds=0.005)
        self.peaks[dtype, march] = max(found.best, self.peaks.get((dtype, march), 0.0))
        return self.peaks[dtype, march]

    def share(self, what: str, shape: Shape, target: float | None, march: str = "native") -> Row:
        """Flops over time over peak, both at their best: other programs only ever make them slower."""
        self.peak(shape.dtype, march)
        (figure,) = timing.alternate([ours(Problem(shape), 1)[-1]], self.rounds, self.seconds)
        peak = self.peak(shape.dtype, march)
        return Row(what, shape.mode, shape.flops / figure.seconds / peak, target, "share", figure.seconds * 1e3)

    def cost(self, what: str, mode: str, side: timing.Side, plain: timing.Side, flops: float, target: float) -> Row:
        """Time over the plain one's, per flop; `flops` is how many times the plain one's flops this side does."""
        mine, other = timing.alternate([side, plain], self.rounds, self.seconds)
        return Row(what, mode, timing.ratio(mine, other)[0] / flops, target, "cost", mine.seconds * 1e3)


def plain(cell: str, mode: str, **changes: object) -> Shape:
    """T=100, B=32, I=H=256 on one thread."""
    return dataclasses.replace(Shape(cell, 100, 32, 256, 256, mode), **changes)  # type: ignore[arg-type]


def narx(mode: str) -> tuple[timing.Side, timing.Side]:
    """A free-running NARX with K=L=24, H=32, B=32, and a sigmoid RNN of H=32 with exactly as many multiply-adds."""
    T, B, H, taps = 1000, 32, 32, 24
    draw = np.random.default_rng(20260101)

    def uniform(*size: int) -> timing.Array:
        return draw.uniform(-0.2, 0.2, size).astype(np.float32)

    def side(params: dict[str, timing.Array], inputs: int, outputs: int, taps: int) -> timing.Side:
        x = [draw.standard_normal((T, B, inputs)).astype(np.float32) for _ in range(timing.INPUTS)]
        dy = draw.standard_normal((T, B, outputs)).astype(np.float32)
        gradients = {name: np.zeros_like(value) for name, value in params.items()}

        def call(k: int) -> object:
            if mode == "inference":
                return F.forward("rnn_sigmoid", x[k], None, params, output_taps=taps, tape=False)
            _, _, tape = F.forward("rnn_sigmoid", x[k], None, params, output_taps=taps)
            return F.backward(tape, dy, None, gradients)

        return timing.Side("rnnfast", mode, 1, call, lambda k: {}, enter=lambda: rnnfast.set_num_threads(1))

    ours_ = {
        "weight_ih_l0": uniform(H, taps),
        "weight_hh_l0": uniform(H, taps),
        "bias_ih_l0": uniform(H),
        "bias_hh_l0": uniform(H),
        "weight_hr_l0": uniform(1, H),
        "bias_hr_l0": uniform(1),
    }
    inputs = 2 * taps + 1 - H  # H * (inputs + H) = H * (taps + taps) + H
    rnn = {
        "weight_ih_l0": uniform(H, inputs),
        "weight_hh_l0": uniform(H, H),
        "bias_ih_l0": uniform(H),
        "bias_hh_l0": uniform(H),
    }
    return side(ours_, taps, 1, taps), side(rnn, inputs, H, 1)


def rows(bench: Bench) -> Iterator[Row]:
    """The table, row by row."""
    goals = {"float32": (0.80, 0.65), "float64": (0.70, 0.55)}
    for dtype, goal in goals.items():
        for cell in CELLS:
            for mode, target in zip(("inference", "training"), goal, strict=True):
                yield bench.share(f"{cell} {dtype}", plain(cell, mode, dtype=dtype), target)
    for mode, target in (("inference", 0.65), ("training", 0.50)):
        yield bench.share("gru_reset_before float32", plain("gru_reset_before", mode), target)
        yield bench.share("lstm projected to 128, float32", plain("lstm", mode, proj_size=128), target)

    if "x86-64-v3" in rnnfast.targets():
        before = rnnfast.target()
        rnnfast.use_target("x86-64-v3")
        for cell in ("rnn_tanh", "lstm", "gru"):
            for mode, goal3 in (("inference", 0.75), ("training", None)):
                yield bench.share(f"{cell} float32 on x86-64-v3", plain(cell, mode), goal3, "x86-64-v3")
        rnnfast.use_target(before)

    lengths = ragged_lengths(100, 32, 1)
    for mode in ("inference", "training"):
        for cell in ("lstm", "gru", "rnn_tanh"):
            base = plain(cell, mode)
            for what, shape, other in (
                ("lengths 1..100", dataclasses.replace(base, lengths=lengths), base),
                (
                    "skip, 2 layers",
                    dataclasses.replace(base, num_layers=2, skip=True),
                    dataclasses.replace(base, num_layers=2),
                ),
                ("projected to 128", dataclasses.replace(base, proj_size=128), base),
            ):
                mine, reference = ours(Problem(shape), 1)[-1], ours(Problem(other), 1)[-1]
                yield bench.cost(f"{cell} {what}, per flop", mode, mine, reference, shape.flops / other.flops, 1.3)
        side, rnn = narx(mode)
        yield bench.cost("NARX K=L=24 H=32 against RNN", mode, side, rnn, 1.0, 2.0)


def main(arguments: list[str]) -> int:
    """Prints the table, then what falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short block a row: a smoke test")
    parser.add_argument("--only", default="", help="print only rows that contain this; all still run")
    parser.add_argument("--out", type=pathlib.Path, help="also append the rows as JSON lines, with machine facts")
    options = parser.parse_args(arguments)
    bench = Bench(1, 0.0) if options.quick else Bench(5, 0.1)
    machine = limits.facts()
    print(json.dumps(machine, indent=1))
    short = []
    for row in rows(bench):
        if options.only in f"{row.what} {row.mode}":
            print(row, flush=True)
        if row.short:
            short.append(row)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                print(json.dumps(dataclasses.asdict(row) | {"short": row.short, "machine": machine}), file=file)
    for (dtype, march), peak in bench.peaks.items():
        print(f"peak {dtype} {march}: {peak / 1e9:.1f} GFLOP/s")
    print(f"\n{len(short)} rows fall short" + (":" if short else ""))
    for row in short:
        print(row)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
