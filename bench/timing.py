"""How two libraries are timed on one machine without fooling anyone.

A `Side` is one library in one mode on one thread count, ready to run. Sides run in *blocks*: a settle (thread pools
that still spin after a call go to sleep), one call that does not count, then calls of which the median counts. Blocks
of the sides alternate, so that all meet the machine's good and bad moments, and each side's fastest block counts: what
else runs on a core, or on the core that a virtual one shares, only ever adds (Chen and Revels, "Robust benchmarking in
noisy environments", 2016). Before every call the input is another one, and where a side's weights may change one is
written in place, so that nothing remembered can look free. Knows no library.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SETTLE = 0.012  # seconds of quiet before a block: other libraries' pools spin after a call, onnxruntime's for 40 ms
PATIENCE = 0.5  # seconds after which a pool that still spins is taken for its library's way of waiting
INPUTS = 4  # rotated
LONG = 0.4  # seconds: longer calls need no second trial; two rounds do where all sides' are, or for one that takes twice as long as another


@dataclasses.dataclass
class Side:
    """A library in one mode: `call(k)` runs once on input k, `touch(k)` writes a weight, `enter()` sets threads."""

    library: str
    mode: str
    threads: int
    call: Callable[[int], Any]
    results: Callable[[int], dict[str, Array]]  # one call's outputs and gradients, by rnnfast's names
    touch: Callable[[int], None] = lambda k: None
    enter: Callable[[], None] = lambda: None


@dataclasses.dataclass
class Timing:
    """Seconds a call, block by block."""

    side: Side
    blocks: list[float]

    @property
    def seconds(self) -> float:
        return min(self.blocks)


class Disagreement(AssertionError):
    """Two sides do not compute the same, so that timing them would mean nothing."""


def differences(mine: dict[str, Array], theirs: dict[str, Array], who: str) -> dict[str, float]:
    """The largest difference in each of their arrays, relative to its largest entry.

    Raises Disagreement where one lacks an array or has another shape.
    """
    found = {}
    for name, b in theirs.items():
        if name not in mine:
            raise Disagreement(f"{who} returns {name}, the other does not")
        a = mine[name]
        if a.shape != b.shape:
            raise Disagreement(f"{name}: {a.shape}, of {who} {b.shape}")
        if a.size:
            scale = max(float(np.abs(b).max()), 1e-3)
            found[name] = float(np.abs(a.astype(np.float64) - b).max()) / scale
    return found


def results(side: Side) -> dict[str, Array]:
    """One call's outputs and gradients on input 0."""
    side.enter()
    return side.results(0)


def agree(ours: Sequence[dict[str, Array]], peer: Side, tolerance: float) -> float:
    """The largest difference between a peer's results and any of ours. Raises Disagreement beyond the tolerance."""
    theirs, worst = results(peer), 0.0
    for mine in ours:
        for name, difference in differences(mine, theirs, peer.library).items():
            if not difference <= tolerance:
                raise Disagreement(f"{name}: rnnfast and {peer.library}, {peer.mode}, differ by {difference:.2e} > {tolerance:.2e}")
            worst = max(worst, difference)
    return worst


def settle() -> None:
    """Waits until this process is quiet, so that no pool that still spins takes a core from the next side."""
    until = time.perf_counter() + PATIENCE
    quiet = False
    while not quiet and time.perf_counter() < until:
        before = time.process_time()
        time.sleep(SETTLE)
        quiet = time.process_time() - before < SETTLE / 20


def block(side: Side, seconds: float, first: int, cold: bool = False) -> tuple[float, int]:
    """Median seconds a call over at least one call and about `seconds`; and the number of the next call. `cold`: a first LONG call counts."""
    side.enter()
    settle()
    k = first

    def timed(k: int) -> float:
        side.touch(k)
        start = time.perf_counter()
        side.call(k % INPUTS)
        return time.perf_counter() - start

    warm = timed(k)
    if cold and warm > LONG:
        return warm, k + 1
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        k += 1
        times.append(timed(k))
    return statistics.median(times), k + 1


def fastest(sides: Sequence[Side], seconds: float = 0.03) -> Side:
    """The side that is fastest in two short trials each: a library always gets its best mode and thread count."""
    if len(sides) == 1:
        return sides[0]

    def trial(side: Side) -> float:
        first = block(side, seconds, 0, cold=True)[0]
        return first if first > LONG else min(first, block(side, seconds, 0)[0])

    return min(sides, key=trial)


def alternate(sides: Sequence[Side], rounds: int = 7, seconds: float = 0.03) -> list[Timing]:
    """Times the sides in alternating blocks; each round starts with another side."""
    timings = [Timing(side, []) for side in sides]
    k = 0
    for r in range(rounds):
        order = timings[r % len(timings) :] + timings[: r % len(timings)]
        least = min((timing.seconds for timing in timings), default=0.0) if r else 0.0
        for timing in order:
            done = r > 0 and (least > LONG or timing.seconds > max(LONG, 2 * least))  # LONG like all, or far behind
            if r < 2 or not done:
                figure, k = block(timing.side, seconds, k, cold=done)
                timing.blocks.append(figure)
    return timings


def ratio(slower: Timing, faster: Timing) -> tuple[float, float, float]:
    """How many times as long `slower` takes, and the quartiles of neighbouring blocks' ratios."""
    ratios = [a / b for a, b in zip(slower.blocks, faster.blocks)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return slower.seconds / faster.seconds, low, high
