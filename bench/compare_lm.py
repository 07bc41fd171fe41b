"""rnnfast's language model against the same in torch, one after the other, for the same time, on the same held-out
bytes.

    python bench/compare_lm.py                      # rnnfast lm train with its defaults, then torch for as long
    python bench/compare_lm.py --steps 40           # a smoke test

rnnfast runs as a user runs it, through its command line; torch then trains for as long as rnnfast's steps took.
Starting up, samples and judging count for neither. Prints held-out bits per byte of each; exits 1 unless rnnfast is
lower by 0.02 bits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

MARGIN = 0.02  # bits per byte


def main(arguments: list[str]) -> int:
    """Runs both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="of rnnfast (default: lm train's own)")
    parser.add_argument("--learning-rate", type=float, default=None, help="of torch (default: rnnfast's)")
    parser.add_argument("--text", default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    common = ["--seed", str(options.seed)] + (["--text", options.text] if options.text else [])

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rnnfast.cli", "lm", "train", "--out", folder + "/run", *common]
        if options.steps:
            command += ["--steps", str(options.steps)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(run.stdout)
    done = re.search(r"done: ([\d.]+) bits per byte on [\d,]+ held-out bytes, in (?:(\d+):)?(\d+):(\d+)", run.stdout)
    if done is None:
        raise SystemExit("rnnfast lm train did not report its held-out bits")
    ours = float(done[1])
    seconds = 3600 * int(done[2] or 0) + 60 * int(done[3]) + int(done[4]) + 0.5

    command = [
        sys.executable,
        str(pathlib.Path(__file__).parent / "torch_lm.py"),
        "--seconds",
        f"{seconds:.1f}",
        *common,
    ]
    if options.learning_rate:
        command += ["--learning-rate", str(options.learning_rate)]
    theirs = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])

    print(f"rnnfast      {ours:.4f} bits per byte in {seconds:.0f} s of training")
    print(
        f"torch {theirs['library'].split()[-1]:<6} {theirs['bits']:.4f} bits per byte in {theirs['seconds']:.0f} s, "
        f"{theirs['bytes_per_second']:,.0f} bytes a second, {theirs['threads']} threads"
    )
    print(f"difference   {theirs['bits'] - ours:+.4f} (wanted: at least {MARGIN})")
    return 0 if theirs["bits"] - ours >= MARGIN else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
