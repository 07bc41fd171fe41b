"""Turns run.py's JSON lines into a Markdown page and plots.

    python bench/report.py bench/results/grid.jsonl bench/results/named.jsonl --out docs/benchmarks

Every target is a `Claim`: a measured value that must reach a number. The page opens with how many are met and goes on
with what was measured, section by section, what falls short in bold. Plots (matplotlib): ratio and share of the roof
over B x H, cost against T, thread scaling. Knows the lines' fields and nothing of any library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from shapes import PRECISION, STEP, TRAINING

Record = dict[str, Any]

STRATA = {  # geometric mean of (best peer's time / ours)
    "T=1": 4.0,
    "B<=3 inference": 1.4,
    "B<=3 training": 3.0,
    "B>=8 lstm inference": 1.05,
    "B>=8 lstm training": 1.15,
    "B>=8 gru, rnn inference": 1.4,
    "B>=8 gru, rnn training": 2.0,
}
AGAINST_TORCH = {  # (workload, cell, B, H): torch's time / ours
    **{(TRAINING, "lstm", B, H): ratio for B, H, ratio in ((1, 16, 5), (8, 64, 2), (32, 128, 1.2), (64, 256, 1.2), (64, 512, 1.2))},
    **{(TRAINING, "gru", B, H): ratio for B, H, ratio in ((1, 16, 10), (8, 64, 6), (32, 128, 3.5), (64, 512, 1.25))},
    **{(TRAINING, "rnn_tanh", B, H): ratio for B, H, ratio in ((1, 16, 8), (8, 64, 6), (32, 128, 3), (64, 512, 1.25))},
    **{(STEP, "lstm", B, H): ratio for B, H, ratio in ((50, 128, 1.5), (32, 256, 1.2), (64, 512, 1.1))},
    **{(STEP, "gru", B, H): ratio for B, H, ratio in ((50, 128, 2.5), (32, 256, 2), (64, 512, 1.4))},
    ("ragged", "lstm", 32, 128): 10.0,
    ("ragged", "gru", 32, 128): 6.0,
    ("speech", "lstm", 1, 256): 1.7,
    ("speech", "gru", 1, 256): 3.0,
}
STREAM_US = {("lstm", 16): 1.3, ("lstm", 64): 2.5}  # a step, called from Python
RAGGED_COST = 1.10  # over the useful steps' share of the padded twin's
ROOF = {  # share of the roof by least H: inference with B >= 8 on one thread, training with B >= 32; two points less in inference on more threads
    "inference": {128: 0.85, 256: 0.90},
    "training": {128: 0.78, 256: 0.85},
}
ROOF_OF_A_ROW = 0.80  # inference, B=1, T=100, H from 256 to 1024, all threads
COLUMNS = ("ours ms", "best peer", "peer ms", "ratio", "quartiles", "our share of the roof")
LEVEL = 0.97  # a ratio that counts as level
BFLOAT16, INT8 = 1.7, 1.6  # float32 / bfloat16; bfloat16 / int8 at B=1 and H >= 512
BFLOAT16_TORCH = {"inference": LEVEL, "training": 1.3}  # torch's bfloat16 / ours
NEAR_THE_ROOF = 0.85  # where a peer itself is this near, level is not asked for
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A target, its group in the page's first table, and what was measured; a `cost` must not pass it, other values must reach it."""

    group: str
    what: str
    value: float
    target: float
    cost: bool = False

    @property
    def met(self) -> bool:
        shown = round(self.value, 2)  # as the page shows it
        return shown <= self.target if self.cost else shown >= self.target

    @property
    def reach(self) -> float:
        """How much of the target is reached; 1 is all."""
        return self.target / self.value if self.cost else self.value / self.target

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.met else f"**{self.value:.2f}**"


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same shape."""
    fields = ("name", "cell", "T", "B", "I", "H", "L", "D", "R", "V", "mode", "threads", "dtype", "steps")
    return tuple(record.get(field, 0) for field in fields)


def label(r: Record, name: bool = False) -> str:
    """A shape in a table's cell."""
    sizes = f"T={r['T']} B={r['B']} " + (f"H={r['H']}" if r["I"] == r["H"] else f"I={r['I']} H={r['H']}")
    extra = "".join(f" {f}={r[f]}" for f in ("L", "D") if r[f] > 1) + (f" V={r['V']}" if r.get("V") else "")
    projected = f" R={r['R']}" if r["R"] != r["H"] else ""
    text = f"{NAMES.get(r['cell'], r['cell'])} {sizes}{extra}{projected} {r['mode']}, {_threads(r)}"
    return f"{r['name']}: {text}" if name and r["name"] else text


def _threads(r: Record) -> str:
    return {0: "all threads", 1: "1 thread"}.get(r["threads"], f"{r['threads']} threads")


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean of the logs; NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


class Shape:
    """All libraries' records of one shape."""

    def __init__(self, by_library: dict[str, Record]) -> None:
        self.by_library = by_library
        self.ours = by_library["rnnfast"]
        self.peers = [r for r in by_library.values() if "ratio" in r]
        self.best = min(self.peers, key=lambda r: r["ratio"]) if self.peers else None

    @property
    def short(self) -> bool:
        """Slower than the best peer, where that peer is not itself at the roof."""
        return self.best is not None and round(self.best["ratio"], 2) < LEVEL and self.best["share_of_roof"] < NEAR_THE_ROOF

    def ratio(self, slower: str, faster: str) -> float:
        """How many times as long one library takes as another; NaN where one is not there."""
        if slower not in self.by_library or faster not in self.by_library:
            return math.nan
        return float(self.by_library[slower]["ms"] / self.by_library[faster]["ms"])


def group(records: Sequence[Record]) -> list[Shape]:
    """Records by shape; of a shape measured twice the latest counts."""
    found: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    for record in records:
        found[key(record)][record["library"]] = _by_fastest_block(record)
    for by_library in found.values():
        for record in by_library.values():
            if "ratio" in record and "rnnfast" in by_library:
                record["ratio"] = record["ms"] / by_library["rnnfast"]["ms"]
    return [Shape(by_library) for by_library in found.values() if "rnnfast" in by_library]


def _by_fastest_block(record: Record) -> Record:
    """The record with its fastest block's time and rates, also where a median was recorded."""
    best = min(record["blocks_ms"])
    return record | {"ms": best} | {rate: record[rate] * record["ms"] / best for rate in ("gflops", "share_of_peak", "share_of_roof")}


def grid_of(shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of the grid: those without a name."""
    return [s for s in shapes if not s.ours["name"]]


def claims(shapes: Sequence[Shape]) -> Iterator[Claim]:
    """Every target that these shapes can be held against."""
    compared = [s for s in grid_of(shapes) if s.best]
    for name, target in STRATA.items():
        ratios = [s.best["ratio"] for s in compared if s.best and s.ours["stratum"] == name]
        if ratios:
            yield Claim("geometric means over the grid, best peer / ours", name, geometric_mean(ratios), target)
    for s in compared:
        assert s.best is not None
        fair = 1.0 if not s.short else s.best["ratio"]
        yield Claim("no shape of the grid slower than the best peer", label(s.ours), fair, LEVEL)
    for s in grid_of(shapes):
        yield from _of_roof(s.ours)
    for s in shapes:
        yield from _of_workload(s, shapes)
        if s.ours["name"] == PRECISION:
            yield from precision_claims(s).values()


def _of_roof(r: Record) -> Iterator[Claim]:
    """What a shape of the grid must reach of the roof; single steps, which use each weight once, and narrow layers need not."""
    mode, share = r["mode"], r["share_of_roof"]
    if r["T"] > 1 and r["B"] >= {"inference": 8, "training": 32}[mode] and (r["H"] == 128 or r["H"] >= 256):
        target = ROOF[mode][128 if r["H"] == 128 else 256] - (0.02 if mode == "inference" and r["threads"] != 1 else 0)
        yield Claim(f"share of the roof, {mode}, B >= {8 if mode == 'inference' else 32}", label(r), share, round(target, 2))
    if mode == "inference" and r["B"] == 1 and r["T"] == 100 and 256 <= r["H"] <= 1024 and r["threads"] != 1:
        yield Claim("share of the roof, one row, T=100", label(r), share, ROOF_OF_A_ROW)


def _of_workload(s: Shape, shapes: Sequence[Shape]) -> Iterator[Claim]:
    r, what = s.ours, label(s.ours, name=True)
    target = AGAINST_TORCH.get((r["name"], r["cell"], r["B"], r["H"]))
    if target and "torch" in s.by_library:
        yield Claim(f"{r['name']}, torch / ours", what, s.by_library["torch"]["ratio"], target)
    if r["name"] == "streaming audio" and (r["cell"], r["H"]) in STREAM_US:
        yield Claim("streaming, microseconds a step", what, 1e3 * r["ms"], STREAM_US[r["cell"], r["H"]], cost=True)
    if r["name"] == "ragged":
        for twin in shapes:
            if twin.ours["name"] == "ragged's padded twin" and twin.ours["cell"] == r["cell"]:
                cost = (r["ms"] / twin.ours["ms"]) / (r["steps"] / twin.ours["steps"])
                yield Claim("ragged, cost over the useful steps' share", what, cost, RAGGED_COST, cost=True)


def precision_claims(s: Shape) -> dict[str, Claim]:
    """What a shape of the precision list must show, by the column that shows it."""
    what = label(s.ours)
    found = {
        "bfloat16": Claim("bfloat16, our float32 / our bfloat16", what, s.ratio("rnnfast", "rnnfast bfloat16"), BFLOAT16),
        "torch": Claim("bfloat16, torch's / ours", what, s.ratio("torch bfloat16", "rnnfast bfloat16"), BFLOAT16_TORCH[s.ours["mode"]]),
    }
    if s.ours["B"] == 1 and s.ours["H"] >= 512:
        found["int8"] = Claim("int8, our bfloat16 / our int8", what, s.ratio("rnnfast bfloat16", "rnnfast int8"), INT8)
    return {column: claim for column, claim in found.items() if not math.isnan(claim.value)}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)] + [""]


def page(shapes: Sequence[Shape], plots: dict[str, str], command: str, method: str) -> str:
    """The whole page; `plots` are file names and their captions, `method` is where bench/README.md lies from there."""
    machine = shapes[-1].ours["machine"]
    threads = machine["cores"]
    builds = {(s.ours["machine"]["cpu"], s.ours["machine"].get("kernels")) for s in shapes}
    every = list(claims(shapes))
    lines = [
        "# Benchmarks",
        "",
        f"Made by `{command}` and `python bench/report.py`. Absolute times are this machine's; the ratios are what counts.",
        "",
        f"- **ratio**: the peer's time over ours, each its fastest block's. Above 1 rnnfast is faster, below {LEVEL} it is slower.",
        "- **quartiles**: of the ratios of neighbouring blocks, which tell how much the machine's moments differ.",
        "- **best peer**: of torch, onnxruntime, JAX and flax the fastest on that shape, each in its fastest mode; xN is its threads. JAX and flax (x0)"
        " are there where rnnfast uses all threads, since theirs cannot be held to one.",
        "- **share of the roof**: the least time that the machine's arithmetic and bandwidth allow for the shape, over the time taken.",
        f"- **1 thread / all threads**: what rnnfast must use; all are {threads} here. A peer may use fewer where that is faster for it.",
        "- T time steps, B rows, I inputs, H units, L layers, D directions, V symbols. Training is forward and backward to every gradient.",
        "",
        f"How shapes are chosen and times are taken: [bench/README.md]({method}).",
        "",
    ]
    groups: dict[str, list[Claim]] = defaultdict(list)
    for claim in every:
        groups[claim.group].append(claim)
    lines += ["## Targets", ""]
    rows = []
    for name, members in groups.items():
        worst = min(members, key=lambda claim: claim.reach)
        met = sum(claim.met for claim in members)
        count = f"{met} of {len(members)}" if met == len(members) else f"**{met} of {len(members)}**"
        rows.append([name, count, "" if worst.met else f"{worst.what}: {worst.value:.2f}, wanted {worst.target:g}"])
    lines += table(["target", "met", "farthest off"], rows)
    lines += _grid_section(grid_of(shapes), every, plots)
    workloads = [s for s in shapes if s.ours["name"] and s.ours["name"] != PRECISION]
    if workloads:
        lines += ["## Workloads", "", "The last column holds the targets that exist for one, against torch; where one is missed, also the share of the"]
        lines += ["roof that would meet it.", ""]
        lines += table(["workload", *COLUMNS, "torch / ours (wanted)"], ([*_row(s), _wanted(s, shapes)] for s in workloads))
    lines += _precision_section([s for s in shapes if s.ours["name"] == PRECISION])
    lines += _scaling_section(shapes)
    lines += ["## Machine", ""]
    if len(builds) > 1:
        lines += [f"The figures come from {len(builds)} machines or builds of rnnfast; these are the last one's facts.", ""]
    lines += table(["fact", "value"], ([k, _fact(v)] for k, v in machine.items()))
    return "\n".join(lines)


def _fact(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in value.items())


def _grid_section(grid: Sequence[Shape], every: Sequence[Claim], plots: dict[str, str]) -> list[str]:
    compared = [s for s in grid if s.best]
    if not compared:
        return []
    lines = ["## The grid, by stratum", "", "Geometric mean of the best peer's time over ours; *at the roof*: what it would be if ours were the roof's.", ""]
    rows = []
    for claim in every:
        if claim.what in STRATA:
            members = [(s.best["ratio"], min(1.0, s.ours["share_of_roof"])) for s in compared if s.best and s.ours["stratum"] == claim.what]
            ratios, most = [ratio for ratio, _ in members], geometric_mean(ratio / share for ratio, share in members)
            rows.append([claim.what, str(len(ratios)), str(claim), f"{min(ratios):.2f}", f"{max(ratios):.1f}", f"{most:.1f}", f"{claim.target:g}"])
    lines += table(["stratum", "shapes", "geometric mean", "worst", "best", "at the roof", "wanted"], rows)
    for name, caption in plots.items():
        lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]
    short = sorted((s for s in compared if s.short), key=lambda s: s.best["ratio"] if s.best else 0)
    excused = sum(round(s.best["ratio"], 2) < LEVEL and not s.short for s in compared if s.best)
    lines += [f"### Shapes where a peer is faster: {len(short)} of {len(compared)}", ""]
    lines += [f"With a ratio below {LEVEL}; {excused} more whose peer is itself at {NEAR_THE_ROOF:.0%} of the roof or above are not counted.", ""]
    return lines + (table(["shape", *COLUMNS], map(_row, short)) if short else [])


def _row(s: Shape) -> list[str]:
    name = label(s.ours, name=True)
    mine = f"{s.ours['ms']:.4g}"
    roof = f"{s.ours['share_of_roof']:.0%}"
    if s.best is None:
        return [name, mine, "", "", "", "", roof]  # no peer has it
    low, high = s.best["ratio_quartiles"]
    peer = f"{s.best['library']} {s.best['library_mode']} x{s.best['library_threads']}"
    return [name, mine, peer, f"{s.best['ms']:.4g}", f"{s.best['ratio']:.2f}", f"{low:.2f} to {high:.2f}", roof]


def _wanted(s: Shape, shapes: Sequence[Shape]) -> str:
    found = [claim for claim in _of_workload(s, shapes) if claim.group.endswith("torch / ours")]
    roof = s.ours["share_of_roof"]
    return ", ".join(f"{claim} ({claim.target:g}{'' if claim.met else f', at {roof * claim.target / claim.value:.0%} of the roof'})" for claim in found)


def _precision_section(shapes: Sequence[Shape]) -> list[str]:
    if not shapes:
        return []

    def number(s: Shape, slower: str, faster: str, column: str = "") -> str:
        claim = precision_claims(s).get(column)
        value = s.ratio(slower, faster)
        return "" if math.isnan(value) else str(claim) if claim else f"{value:.2f}"

    def errors(s: Shape, library: str) -> str:
        found = s.by_library.get(library, {}).get("errors", {})
        return " / ".join(f"{value:.1%}" for value in found.values())

    def row(s: Shape) -> list[str]:
        half = s.by_library.get("rnnfast bfloat16", {}).get("ms", math.nan)
        return [
            label(s.ours), f"{s.ours['ms']:.4g}", f"{half:.4g}", number(s, "rnnfast", "rnnfast bfloat16", "bfloat16"),
            number(s, "torch bfloat16", "rnnfast bfloat16", "torch"), errors(s, "rnnfast bfloat16"), errors(s, "torch bfloat16"),
            number(s, "rnnfast bfloat16", "rnnfast int8", "int8"), number(s, "torch int8", "rnnfast int8"), errors(s, "rnnfast int8"), errors(s, "torch int8"),
        ]  # fmt: skip

    order = {cell: i for i, cell in enumerate(NAMES)}
    shapes = sorted(shapes, key=lambda s: (order.get(s.ours["cell"], 9), s.ours["mode"], s.ours["B"], s.ours["H"], -s.ours["threads"]))
    header = ["shape", "float32 ms", "bf16 ms", "float32 / bf16", "torch bf16 / ours", "our bf16's error", "torch bf16's error"]
    header += ["bf16 / int8", "torch int8 / ours", "our int8's error", "torch int8's error"]
    return [
        "## Reduced precision",
        "",
        f"Wanted: float32 / bf16 {BFLOAT16:g}; torch bf16 / ours {BFLOAT16_TORCH['training']:g} in training, level in inference; "
        f"bf16 / int8 {INT8:g} at B=1 and H >= 512. The modes timed are the fastest, as everywhere.",
        "Errors are the largest of an output and, after the slash, of a gradient against float64, relative to the array's largest entry.",
        "float32's own are around 1e-6. torch has no int8 RNN and no int8 training.",
        "",
        *table(header, map(row, shapes)),
    ]


def _scaling_section(shapes: Sequence[Shape]) -> list[str]:
    """Speed-ups of shapes that were measured on one thread and on all."""
    one = {key(s.ours | {"threads": 0}): s.ours["ms"] for s in shapes if s.ours["threads"] == 1}
    pairs = [(s.ours, one[key(s.ours)] / s.ours["ms"]) for s in shapes if s.ours["threads"] == 0 and key(s.ours) in one]
    if not pairs:
        return []
    hiddens = sorted({r["H"] for r, _ in pairs})
    rows: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r, gain in pairs:
        rows[f"{NAMES.get(r['cell'], r['cell'])} T={r['T']} B={r['B']} {r['mode']}"][r["H"]].append(gain)
    cells = ([name, *(f"{geometric_mean(by[h]):.2f}" if h in by else "" for h in hiddens)] for name, by in sorted(rows.items()))
    lines = ["## Thread scaling", "", "Our float32 time on one thread over that on all, where both were measured.", ""]
    return lines + table(["", *(f"H={h}" for h in hiddens)], cells)


def _mean_by(shapes: Sequence[Shape], of: Callable[[Shape], float], *fields: str) -> dict[tuple[Any, ...], float]:
    cells = defaultdict(list)
    for s in shapes:
        cells[tuple(s.ours[f] for f in fields)].append(of(s))
    return {k: geometric_mean(v) for k, v in cells.items()}


def plot(shapes: Sequence[Shape], folder: pathlib.Path) -> dict[str, str]:
    """Draws what the records allow; returns the files' names and captions."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, str] = {}

    def save(figure: Any, name: str, caption: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=100)
        plt.close(figure)
        found[name] = caption

    def heat(axes: Any, values: dict[tuple[Any, ...], float], title: str, low: float, high: float, log: bool) -> None:
        batches, hiddens = sorted({b for b, _ in values}), sorted({h for _, h in values})
        norm = matplotlib.colors.LogNorm(low, high) if log else matplotlib.colors.Normalize(low, high)
        cells = [[values.get((b, h), math.nan) for h in hiddens] for b in batches]
        axes.imshow(cells, norm=norm, cmap="RdYlGn", aspect="auto")
        axes.set(title=title, xlabel="H", ylabel="B")
        axes.set_xticks(range(len(hiddens)), [str(h) for h in hiddens])
        axes.set_yticks(range(len(batches)), [str(b) for b in batches])
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(j, i, f"{value:.1f}" if log else f"{value:.0%}", ha="center", va="center", fontsize=7)

    grid = grid_of(shapes)
    modes = [mode for mode in ("inference", "training") if any(s.ours["mode"] == mode for s in grid)]
    present = [cell for cell in NAMES if any(s.ours["cell"] == cell for s in grid)]
    for mode in modes:
        figure, axes = plt.subplots(2, len(present), figsize=(5 * len(present), 8), squeeze=False)
        for column, cell in enumerate(present):
            mine = [s for s in grid if s.ours["cell"] == cell and s.ours["mode"] == mode]
            ratios = _mean_by([s for s in mine if s.best], lambda s: s.best["ratio"] if s.best else math.nan, "B", "H")
            heat(axes[0][column], ratios, f"{NAMES[cell]}: best peer's time / ours", 0.25, 4.0, True)
            roofs = _mean_by(mine, lambda s: s.ours["share_of_roof"], "B", "H")
            heat(axes[1][column], roofs, f"{NAMES[cell]}: our share of the roof", 0.0, 1.0, False)
        what = f"{mode.capitalize()}, geometric means over T and threads. Above: best peer's time over ours. Below: our share of the roof"
        save(figure, f"heat-{mode}.png", what)
    if modes:
        times, hiddens = (sorted({s.ours[field] for s in grid}) for field in "TH")  # evenly spaced on their axes
        figure, axes = plt.subplots(2, len(modes), figsize=(5.5 * len(modes), 8), squeeze=False)
        for column, mode in enumerate(modes):
            for cell, colour in zip(present, ("C0", "C1", "C2"), strict=False):
                mine = [s for s in grid if s.ours["cell"] == cell and s.ours["mode"] == mode]
                compared = [s for s in mine if s.best]
                above: Any = axes[0][column]
                for who, style, of in (
                    ("rnnfast", "o-", lambda s: 1 / s.ours["share_of_roof"]),
                    ("best peer", "x:", lambda s: 1 / s.best["share_of_roof"]),
                ):
                    cost = _mean_by(compared, of, "T")
                    at = [i for i, t in enumerate(times) if (t,) in cost]
                    above.semilogy(at, [cost[times[i],] for i in at], style, color=colour, label=f"{NAMES[cell]}, {who}")
                shares = _mean_by(mine, lambda s: s.ours["share_of_roof"], "threads", "H")
                for threads, style in ((1, "o-"), (0, "x:")):
                    at = [i for i, h in enumerate(hiddens) if (threads, h) in shares]
                    name = f"{NAMES[cell]}, {_threads({'threads': threads})}"
                    axes[1][column].plot(at, [shares[threads, hiddens[i]] for i in at], style, color=colour, label=name)
            axes[0][column].axhline(1, color="grey", linewidth=0.8)
            axes[0][column].set(title=f"{mode.capitalize()}: cost against T", xlabel="T", ylabel="time / the roof's")
            axes[0][column].set_xticks(range(len(times)), [str(t) for t in times])
            axes[1][column].set(title=f"{mode.capitalize()}: thread scaling", xlabel="H", ylabel="our share of the roof", ylim=(0, 1))
            axes[1][column].set_xticks(range(len(hiddens)), [str(h) for h in hiddens])
        for axis in axes.flat:
            axis.legend(fontsize=7)
        caption = "Above: time over the roof's against T (1 is the roof), ours and the best peer's. Below: our share of the roof, on one thread and on all"
        save(figure, "time-and-threads.png", caption)
    return found


def main(arguments: list[str]) -> int:
    """Writes folder/README.md and its plots; prints the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=pathlib.Path, nargs="+")
    parser.add_argument(
        "--out", type=pathlib.Path, help="a folder for README.md, which ends with the folder's notes.md, and the plots; default: print the tables"
    )
    parser.add_argument("--command", default="python bench/run.py", help="the command to quote on the page")
    options = parser.parse_args(arguments)
    records = [json.loads(line) for path in options.lines for line in path.read_text().splitlines() if line]
    shapes = group(records)
    if not shapes:
        print("no measurement of rnnfast in these files", file=sys.stderr)
        return 1
    plots = {}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        plots = plot(shapes, options.out)
    method = os.path.relpath(pathlib.Path(__file__).with_name("README.md"), options.out or ".")
    text = page(shapes, plots, options.command, method)
    notes = options.out / "notes.md" if options.out else None
    if notes and notes.exists():  # what a person found out about the figures
        text += "\n" + notes.read_text()
    if options.out:
        (options.out / "README.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
