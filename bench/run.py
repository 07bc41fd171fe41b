"""Times rnnfast against the other libraries: one JSON line a measurement, with machine facts.

    python bench/run.py --list short --out bench/results/short.jsonl     # about ten minutes
    python bench/run.py --list grid --out bench/results/grid.jsonl       # about an hour; after Ctrl-C --resume goes on
    python bench/run.py --list precision                                 # bfloat16 and int8 beside float32
    python bench/run.py --list named --only streaming

For each shape: agreement first (a shape on which the libraries differ is reported and not timed), then each library's
fastest mode and thread count in short trials, then alternating blocks. `bench/report.py` turns the lines into a page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import sys
import time
from typing import Any

import limits
import peers
import timing
from shapes import LISTS, PRECISION, Shape

NO_PRIMITIVE = "could not create a primitive"  # what torch says of its bfloat16 LSTM where the CPU has no such instructions
WRONG = 0.5  # of the largest entry: an error that no rounding to less precision explains


def measure(shape: Shape, libraries: tuple[str, ...], rounds: int, seconds: float, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per library, ours first; `ratio` is how many times as long as rnnfast the library takes."""
    threads = shape.threads or limits.cores()
    problem = peers.Problem(shape)
    ours = peers.ours(problem, threads)
    notes: dict[tuple[str, str], dict[str, Any]] = {}  # by library and mode
    if shape.name == PRECISION:
        candidates = peers.reduced(problem, libraries)
        for side in _one_a_mode([*ours, *candidates]):
            try:
                notes[side.library, side.mode] = {"errors": errors(problem, side)}
            except RuntimeError as error:
                if NO_PRIMITIVE not in str(error):
                    raise
                print(f"left out, since this CPU cannot run it: {side.library}, {side.mode}", file=sys.stderr)
        candidates = [side for side in candidates if (side.library, side.mode) in notes]
    else:
        candidates = peers.sides(problem, libraries)
        mine = [timing.results(side) for side in ours]
        for side in _one_a_mode(candidates):
            notes[side.library, side.mode] = {"difference": timing.agree(mine, side, problem.tolerance)}
    best = [timing.fastest([side for side in candidates if side.library == library]) for library in dict.fromkeys(side.library for side in candidates)]
    timings = timing.alternate([timing.fastest(ours), *best], rounds, seconds)
    peak = 1e9 * machine[f"peak {shape.dtype} x{threads}"]["best"]
    roof = limits.roof(shape, threads, machine)
    records = []
    for t in timings:
        record: dict[str, Any] = {
            "library": t.side.library,
            "library_mode": t.side.mode,
            "library_threads": t.side.threads,
            "ms": t.seconds * 1e3,
            "blocks_ms": [block * 1e3 for block in t.blocks],
            "gflops": shape.flops / t.seconds / 1e9,
            "share_of_peak": shape.flops / t.seconds / peak,
            "share_of_roof": roof / t.seconds,
        }
        if t is not timings[0]:
            middle, low, high = timing.ratio(t, timings[0])
            record |= {"ratio": middle, "ratio_quartiles": [low, high]}
        records.append(record | notes.get((t.side.library, t.side.mode), {}))
    return records


def _one_a_mode(sides: list[timing.Side]) -> list[timing.Side]:
    return list({(side.library, side.mode): side for side in sides}.values())


def errors(problem: peers.Problem, side: timing.Side) -> dict[str, float]:
    """The largest errors of outputs and of gradients against float64, each relative to its array's largest entry."""
    found = timing.differences(timing.results(side), peers.truth(problem), "float64")
    if not max(found.values()) <= WRONG:
        raise timing.Disagreement(f"{side.library}, {side.mode}: off by {found}")
    outputs = found.pop("y")
    return {"outputs": outputs} | ({"gradients": max(found.values())} if found else {})


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
        "V": shape.vocabulary,
        "mode": shape.mode,
        "threads": shape.threads,
        "dtype": shape.dtype,
        "steps": shape.steps,
        "stratum": shape.stratum,
    }


def earlier(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The records in an output file, from which the line that a killed run left unfinished is taken away."""
    if path is None or not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main(arguments: list[str]) -> int:
    """Runs a list and prints or appends its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=sorted(LISTS), default="short")
    parser.add_argument("--only", default="", help="a regular expression that a shape's label must match")
    parser.add_argument("--first", type=int, default=None, metavar="N", help="the first N shapes only")
    parser.add_argument("--libraries", default="torch,onnxruntime,jax,flax")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.03, help="a block's length")
    parser.add_argument("--out", type=pathlib.Path, help="a file to append to; default: standard output")
    parser.add_argument("--resume", action="store_true", help="leave out what the file holds from this machine and this build, and keep its facts")
    options = parser.parse_args(arguments)

    shapes = [s for s in LISTS[options.list]() if re.search(options.only, s.label)][: options.first]
    identity = limits.identity()
    known = [r for r in earlier(options.out) if options.resume and all(r["machine"].get(fact) == value for fact, value in identity.items())]
    machine = known[-1]["machine"] if known else limits.facts()
    print(json.dumps(machine, indent=1), file=sys.stderr)
    finished = [{field: r[field] for field in describe(shapes[0])} for r in known if r["library"] == "rnnfast"] if shapes else []
    left = [s for s in shapes if describe(s) not in finished]
    if known:
        print(f"{len(shapes) - len(left)} of {len(shapes)} shapes are in {options.out}", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    disagreements = 0
    start = time.monotonic()
    with options.out.open("a") if options.out else contextlib.nullcontext(sys.stdout) as out:
        for number, shape in enumerate(left, 1 + len(shapes) - len(left)):
            try:
                records = measure(shape, tuple(options.libraries.split(",")), options.rounds, options.seconds, machine)
            except timing.Disagreement as error:
                disagreements += 1
                print(f"NOT TIMED {shape.label}: {error}", file=sys.stderr)
                continue
            lines = [describe(shape) | record | {"time": round(time.time()), "machine": machine} for record in records]
            out.writelines(json.dumps(line) + "\n" for line in reversed(lines))  # ours last: with it the shape is complete
            out.flush()
            ratios = [f"{r['library']} {r['ratio']:.2f}" for r in records[1:]]
            print(
                f"[{number}/{len(shapes)} {time.monotonic() - start:.0f} s] {shape.label}: {records[0]['ms']:.4g} ms, "
                f"{records[0]['share_of_roof']:.0%} of the roof; " + ", ".join(ratios),
                file=sys.stderr,
                flush=True,
            )
    if disagreements:
        print(f"{disagreements} shapes were not timed because the libraries disagree", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("cut off; with --resume the same command goes on")
