"""Times rnnfast against the other libraries: one JSON line a measurement, with machine facts.

    python bench/run.py --list short --out bench/results/short.jsonl     # about ten minutes
    python bench/run.py --list grid                                      # about an hour
    python bench/run.py --list named --only streaming

For each shape: agreement first (a shape on which the libraries differ is reported and not timed), then each library's
fastest mode and thread count in short trials, then alternating blocks. `bench/report.py` turns the lines into a page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import time
from typing import Any, TextIO

import limits
import peers
import timing
from shapes import LISTS, Shape


def measure(shape: Shape, libraries: tuple[str, ...], rounds: int, seconds: float, peak: float) -> list[dict[str, Any]]:
    """One record per library, ours first; `ratio` is how many times as long as rnnfast the library takes."""
    threads = shape.threads or limits.cores()
    problem = peers.Problem(shape)
    ours = peers.ours(problem, threads)
    candidates = peers.sides(problem, libraries)
    differences = {}
    for peer in {side.library: side for side in candidates}.values():
        differences[peer.library] = max(timing.agree(mine, peer, problem.tolerance) for mine in ours)
    best = [
        timing.fastest([side for side in candidates if side.library == library])
        for library in dict.fromkeys(side.library for side in candidates)
    ]
    mine, *theirs = timing.alternate([timing.fastest(ours), *best], rounds, seconds)
    roof = limits.roof(shape, threads, peak)
    records = []
    for t in (mine, *theirs):
        record: dict[str, Any] = {
            "library": t.side.library,
            "library_mode": t.side.mode,
            "library_threads": t.side.threads,
            "ms": t.seconds * 1e3,
            "spread_ms": [min(t.blocks) * 1e3, max(t.blocks) * 1e3],
            "gflops": shape.flops / t.seconds / 1e9,
            "share_of_peak": shape.flops / t.seconds / peak,
            "share_of_roof": roof / t.seconds,
        }
        if t is not mine:
            middle, low, high = timing.ratio(t, mine)
            record |= {"ratio": middle, "ratio_quartiles": [low, high], "difference": differences[t.side.library]}
        records.append(record)
    return records


def describe(shape: Shape) -> dict[str, Any]:
    """The shape's fields as JSON, lengths as their sum."""
    return {
        "name": shape.name,
        "cell": shape.cell,
        "T": shape.T,
        "B": shape.B,
        "I": shape.I,
        "H": shape.H,
        "L": shape.num_layers,
        "D": shape.D,
        "R": shape.R,
        "mode": shape.mode,
        "threads": shape.threads,
        "dtype": shape.dtype,
        "steps": shape.steps,
        "stratum": shape.stratum,
    }


def main(arguments: list[str]) -> int:
    """Runs a list and prints or appends its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=sorted(LISTS), default="short")
    parser.add_argument("--only", default="", help="a regular expression that a shape's label must match")
    parser.add_argument("--first", type=int, default=None, metavar="N", help="the first N shapes only")
    parser.add_argument("--libraries", default="torch,onnxruntime,jax")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.03, help="a block's length")
    parser.add_argument("--out", type=pathlib.Path, help="a file to append to; default: standard output")
    options = parser.parse_args(arguments)

    shapes = [s for s in LISTS[options.list]() if re.search(options.only, s.label)][: options.first]
    machine = limits.facts()
    print(json.dumps(machine, indent=1), file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    out: TextIO = options.out.open("a") if options.out else sys.stdout
    disagreements = 0
    start = time.monotonic()
    for number, shape in enumerate(shapes, 1):
        peak = 1e9 * machine[f"peak {shape.dtype} x{shape.threads or limits.cores()}"]["best"]
        try:
            records = measure(shape, tuple(options.libraries.split(",")), options.rounds, options.seconds, peak)
        except timing.Disagreement as error:
            disagreements += 1
            print(f"NOT TIMED {shape.label}: {error}", file=sys.stderr)
            continue
        for record in records:
            line = describe(shape) | record | {"time": round(time.time()), "machine": machine}
            print(json.dumps(line), file=out, flush=True)
        ratios = [f"{r['library']} {r['ratio']:.2f}" for r in records[1:]]
        print(
            f"[{number}/{len(shapes)} {time.monotonic() - start:.0f} s] {shape.label}: {records[0]['ms']:.4g} ms, "
            f"{records[0]['share_of_roof']:.0%} of the roof; " + ", ".join(ratios),
            file=sys.stderr,
            flush=True,
        )
    if options.out:
        out.close()
    if disagreements:
        print(f"{disagreements} shapes were not timed because the libraries disagree", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
