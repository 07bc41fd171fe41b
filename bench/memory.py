"""Peak memory of one training step, ours and torch's, over the live inputs, output gradients, parameters and their gradients.

    python bench/memory.py                     # T=100 B=64 H=512, each cell; a minute
    python bench/memory.py --T 200 --B 32 --H 256

Each measurement is a process of its own (Linux): it allocates what is live anyway, runs a step to warm up, sets the kernel's high-water mark
back, runs another, and reports the mark above the memory that was in use before the first step. In units of T*B*H floats, as a tape is.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
TARGET = 0.5  # of torch's


def used(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most since the mark was set back."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("bench/memory.py needs Linux's /proc/self/status")


def ours(cell: str, T: int, B: int, H: int) -> int:
    """Bytes of a step of rnnfast.functional."""
    import numpy as np
    import rnnfast.functional as F

    G = GATES[cell]
    draw = np.random.default_rng(0)
    sizes = {"weight_ih_l0": (G * H, H), "weight_hh_l0": (G * H, H), "bias_ih_l0": (G * H,), "bias_hh_l0": (G * H,)}
    params = {name: draw.standard_normal(size).astype(np.float32) / np.float32(H) for name, size in sizes.items()}
    gradients = {name: np.ones_like(value) for name, value in params.items()}
    x, dy = (draw.standard_normal((T, B, H)).astype(np.float32) for _ in range(2))

    def step() -> None:
        _, _, tape = F.forward(cell, x, None, params)
        F.backward(tape, dy, None, gradients)

    return above(step)


def torchs(cell: str, T: int, B: int, H: int) -> int:
    """Bytes of a step of torch.nn."""
    import torch

    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[cell](H, H)
    x, dy = torch.randn(T, B, H), torch.randn(T, B, H)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)

    def step() -> None:
        leaf = x.detach().requires_grad_()
        module(leaf)[0].backward(dy)

    return above(step)


def above(step: Any) -> int:
    """What a second step needs at the most beyond what was in use before the first."""
    before = used("VmRSS")
    step()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    step()
    return used("VmHWM") - before


def main(arguments: list[str]) -> int:
    """Prints a table, and what falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", type=int, default=100)
    parser.add_argument("--B", type=int, default=64)
    parser.add_argument("--H", type=int, default=512)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "CELL"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = (options.T, options.B, options.H)
    if options.one:
        library, cell = options.one
        print(json.dumps((ours if library == "rnnfast" else torchs)(cell, *size)))
        return 0
    floats = 4.0 * options.T * options.B * options.H
    print(f"T={size[0]} B={size[1]} H={size[2]}, in T*B*H floats = {floats / 1e6:.1f} MB\n{'cell':10}{'rnnfast':>9}{'torch':>9}{'share':>7}")
    for cell in GATES:
        found = []
        for library in ("rnnfast", "torch"):
            command = [sys.executable, __file__, "--one", library, cell, *(f"--{n}={v}" for n, v in zip("TBH", size, strict=True))]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / floats)
        share = found[0] / found[1]
        print(f"{cell:10}{found[0]:9.2f}{found[1]:9.2f}{share:7.0%}{'' if share <= TARGET else '  falls short'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
