"""What this machine can do at most, measured: multiply-adds and bytes a second, and the roof they put over a shape.

Vocabulary: the *peak* of an instruction set, dtype and thread count is the better of a measured loop and the count
lanes * 2 * pipes * clock; *bandwidth* is reading one cache level. Compiles limits.cpp with the system's
compiler. Knows nothing of any library.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from shapes import Shape

BYTES = {"float32": 4, "float64": 8}


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache
def _library(march: str) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("bench needs a C++ compiler (c++, g++ or clang++) to measure this machine's limits")
    folder = tempfile.mkdtemp(prefix="rnnfast-bench-")
    path = os.path.join(folder, "limits.so")
    source = pathlib.Path(__file__).parent / "limits.cpp"
    flags = ["-O3", f"-march={march}", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", path], check=True)
    library = ctypes.CDLL(path)
    shutil.rmtree(folder)
    library.fma32.restype = ctypes.c_float
    library.fma64.restype = ctypes.c_double
    library.cycles.restype = ctypes.c_uint64
    library.read.restype = library.chains.restype = ctypes.c_int64
    for name in ("fma32", "fma64", "cycles"):
        getattr(library, name).argtypes = [ctypes.c_int64]
    library.read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library


def march_of(target: str | None) -> str:
    """The compiler's name for a target of rnnfast: 'x86-64-v3' and the like are -march names; others run natively."""
    if target and target.startswith("x86-64-v"):
        return "-".join(target.split("-")[:3])
    return "native"


def _rate(run: Callable[[], Any], work: float, threads: int) -> float:
    """work a second of `threads` concurrent runs, the best of several."""
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            for future in [pool.submit(run) for _ in range(threads)]:
                future.result()
            best = max(best, threads * work / (time.perf_counter() - start))
    return best


@dataclasses.dataclass(frozen=True)
class Peak:
    """Floating point operations a second: as measured, and as lanes * 2 * pipes * clock."""

    measured: float
    computed: float
    pipes: int  # read off the measurement: the whole number of pipes that comes nearest to it
    clock: float  # cycles a second

    @property
    def best(self) -> float:
        return max(self.measured, self.computed)


def peak(dtype: str = "float32", threads: int = 1, march: str = "native", seconds: float = 0.02) -> Peak:
    """The multiply-add peak of `threads` threads."""
    library = _library(march)
    loop = library.fma32 if dtype == "float32" else library.fma64
    lanes = library.width() // BYTES[dtype]
    per_round = library.chains() * lanes * 2
    start = time.perf_counter()
    loop(100_000)
    rounds = max(1000, int(seconds / (time.perf_counter() - start) * 100_000))
    measured = _rate(lambda: loop(rounds), float(per_round * rounds), threads)
    clock = _rate(lambda: library.cycles(int(seconds * 3e7)), 96.0 * int(seconds * 3e7), 1)
    pipes = max(1, round(measured / (threads * lanes * 2 * clock)))
    return Peak(measured, threads * lanes * 2 * pipes * clock, pipes, clock)


def _cache_sizes() -> dict[str, int]:
    sizes = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (index / "type").read_text().strip()
        size = (index / "size").read_text().strip()
        if kind != "Instruction":
            sizes["L" + (index / "level").read_text().strip()] = int(size.rstrip("KM")) * (1 << 20 if size.endswith("M") else 1 << 10)
    return sizes or {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


@functools.lru_cache
def caches() -> dict[str, int]:
    """Bytes of each data cache level; L1 and L2 a core's own, L3 shared."""
    return _cache_sizes()


@functools.lru_cache
def bandwidth(level: str, threads: int = 1) -> float:
    """Bytes a second that `threads` threads together read from `level` ('L1', 'L2', 'L3' or 'DRAM')."""
    library = _library("native")
    sizes = caches()
    last = sizes.get("L3", 16 << 20)
    fitting = {"L1": sizes["L1"] // 2, "L2": sizes["L2"] // 2, "L3": min(last // 2, 8 << 20) // threads}
    size = fitting.get(level, 2 * last)
    size -= size % 4096
    rounds = max(1, (128 << 20) // size)
    gate = threading.Barrier(threads)

    def read(data: np.ndarray[Any, Any]) -> float:
        best = 0.0
        for _ in range(6):
            gate.wait()
            start = time.perf_counter()
            library.read(data.ctypes.data, size, rounds)
            best = max(best, size * rounds / (time.perf_counter() - start))
        return best

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, [np.ones(size, dtype=np.uint8) for _ in range(threads)]))


def level_of(nbytes: float, threads: int) -> str:
    """The nearest cache level that holds `nbytes` when `threads` threads own a slice each."""
    sizes = caches()
    for level in ("L1", "L2"):
        if nbytes / threads <= 0.8 * sizes[level]:
            return level
    return "L3" if nbytes <= sizes.get("L3", 0) else "DRAM"


def roof(shape: Shape, threads: int, machine: dict[str, Any]) -> float:
    """Seconds that `shape` takes at least on a machine of these facts: over its products, the sum of max(flops / peak, bytes / bandwidth).

    A product in the loop reads its weights every step, from the level they live in; a product over all of time reads
    its operands once. Training adds the transposed products and reads and writes each weight gradient once; Adam, where it takes part, is
    left out.
    """
    flops_a_second = 1e9 * machine[f"peak {shape.dtype} x{threads}"]["best"]
    bandwidths = machine[f"bandwidth x{threads}"]
    size = BYTES[shape.dtype]
    training = shape.mode == "training"

    def product(rows: float, k: int, n: int, times: float = 1, passes: int = 1) -> float:
        nbytes = size * (passes * k * n + rows * k)
        rate = 1e9 * bandwidths[level_of(nbytes, threads)]
        return times * max(2 * rows * k * n / flops_a_second, nbytes / rate)

    seconds = 0.0
    rows = shape.steps / shape.T if shape.T else 0.0  # of one step; ragged: on average
    for layer in range(shape.num_layers):
        width = shape.layer_input(layer)
        loop = product(rows, shape.R, shape.G * shape.H, shape.T)
        once = product(shape.steps, width, shape.G * shape.H)
        gradients = product(shape.steps, width, shape.G * shape.H, passes=2)
        gradients += product(shape.steps, shape.R, shape.G * shape.H, passes=2)
        if shape.proj_size:
            loop += product(rows, shape.H, shape.R, shape.T)
            gradients += product(shape.steps, shape.H, shape.R, passes=2)
        seconds += shape.D * ((2 * loop + 2 * once + gradients) if training else loop + once)
    softmax = product(shape.steps, shape.D * shape.R, shape.vocabulary)
    return seconds + softmax * (3 if training else 1)


def identity() -> dict[str, Any]:
    """What machine this is and what runs on it: where this differs, figures do not go together."""
    import rnnfast

    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": name,
        "cores": cores(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "rnnfast": rnnfast.__version__,
        "target": rnnfast.target(),
        "kernels": f"{zlib.crc32(pathlib.Path(rnnfast._core.__file__).read_bytes()):08x}",  # tells builds of one version apart
        "versions": {name: v for name in ("numpy", "torch", "onnxruntime", "jax", "flax") if (v := _version(name))},
    }


def facts() -> dict[str, Any]:
    """What a reader of a measurement must know of the machine, figures in 1e9 a second."""
    from rnnfast.bench import peak as in_registers

    everyone = cores()
    result = identity()
    for dtype in BYTES:
        for threads in sorted({1, everyone}):
            p = peak(dtype, threads)
            result[f"peak {dtype} x{threads}"] = {
                "measured": round(p.measured / 1e9, 1),
                "lanes*2*pipes*clock": round(p.computed / 1e9, 1),
                "pipes": p.pipes,
                "clock": round(p.clock / 1e9, 2),
                "best": round(p.best / 1e9, 1),
            }
    for dtype in ("bfloat16", "int8"):
        for threads in sorted({1, everyone}):
            result[f"peak {dtype} x{threads}"] = {"best": round(in_registers(dtype, threads) / 1e9, 1)}
    for threads in sorted({1, everyone}):
        result[f"bandwidth x{threads}"] = {level: round(bandwidth(level, threads) / 1e9, 1) for level in ("L1", "L2", "L3", "DRAM")}
    return result


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    import json

    json.dump(facts(), sys.stdout, indent=1)
    print()
