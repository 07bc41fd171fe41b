"""Turns run.py's JSON lines into a Markdown page and plots.

    python bench/report.py bench/results/grid.jsonl --out docs/benchmarks

Tables: geometric means by stratum against their targets, the shapes that fall short, the named workloads. Plots
(matplotlib): ratio over B x H, share of the roof, cost against T, thread scaling. Knows the lines' fields and nothing
of any library.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]

TARGETS = {  # geometric mean of (best peer's time / ours)
    "T=1": 4.0,
    "B<=3 inference": 1.4,
    "B<=3 training": 3.0,
    "B>=8 lstm inference": 1.05,
    "B>=8 lstm training": 1.15,
    "B>=8 gru, rnn inference": 1.4,
    "B>=8 gru, rnn training": 2.0,
}
COLUMNS = ("ours ms", "best peer", "peer ms", "ratio", "quartiles", "our share of the roof")
LEVEL = 0.97  # a ratio that counts as level
NEAR_THE_ROOF = 0.85  # where a peer itself is this near, level is not asked for


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same shape."""
    return tuple(
        record[f] for f in ("name", "cell", "T", "B", "I", "H", "L", "D", "R", "mode", "threads", "dtype", "steps")
    )


def label(r: Record) -> str:
    """A shape in a table's cell."""
    extra = "".join(f" {f}={r[f]}" for f in ("L", "D") if r[f] > 1)
    projected = f" R={r['R']}" if r["R"] != r["H"] else ""
    return f"{r['cell']} T={r['T']} B={r['B']} I={r['I']} H={r['H']}{extra}{projected} {r['mode']}, {r['threads'] or 'all'} threads"


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean of the logs; NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


class Shape:
    """All libraries' records of one shape."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.ours = next(r for r in records if r["library"] == "rnnfast")
        self.peers = [r for r in records if r["library"] != "rnnfast"]
        self.best = min(self.peers, key=lambda r: r["ratio"]) if self.peers else None

    @property
    def short(self) -> bool:
        """Slower than the best peer, where that peer is not itself at the roof."""
        return self.best is not None and self.best["ratio"] < LEVEL and self.best["share_of_roof"] < NEAR_THE_ROOF


def group(records: Sequence[Record]) -> list[Shape]:
    """Records by shape; of a shape measured twice the latest counts."""
    found: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    for record in records:
        found[key(record)][record["library"]] = record
    return [Shape(list(by_library.values())) for by_library in found.values() if "rnnfast" in by_library]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)] + [""]


def page(shapes: Sequence[Shape], plots: Sequence[str], command: str) -> str:
    """The whole page."""
    grid = [s for s in shapes if not s.ours["name"]]
    named = [s for s in shapes if s.ours["name"]]
    machine = shapes[0].ours["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"Made by `{command}`; every figure comes from one machine, the ratios are what counts.",
        "",
    ]
    lines += table(["fact", "value"], ([k, json.dumps(v).strip('"')] for k, v in machine.items()))
    compared = [s for s in grid if s.best]
    if compared:
        lines += ["## By stratum", "", "Geometric mean of the best peer's time over ours; 1 is level.", ""]
        rows = []
        for name, target in TARGETS.items():
            ratios = [s.best["ratio"] for s in compared if s.best and s.ours["stratum"] == name]
            if ratios:
                mean = geometric_mean(ratios)
                verdict = "met" if mean >= target else "**short**"
                rows.append([name, str(len(ratios)), f"{mean:.2f}", f"{min(ratios):.2f}", f"{target:.2f}", verdict])
        lines += table(["stratum", "shapes", "geometric mean", "worst", "target", ""], rows)
        short = sorted((s for s in compared if s.short), key=lambda s: s.best["ratio"] if s.best else 0)
        lines += [f"## Shapes where a peer is faster: {len(short)} of {len(compared)}", ""]
        if short:
            lines += table(["shape", *COLUMNS], map(_row, short))
    if named:
        lines += ["## Named workloads", ""]
        lines += table(["workload", *COLUMNS], map(_row, named))
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines) + "\n"


def _row(s: Shape) -> list[str]:
    name = (f"{s.ours['name']}: " if s.ours["name"] else "") + label(s.ours)
    mine = f"{s.ours['ms']:.4g}"
    roof = f"{s.ours['share_of_roof']:.0%}"
    if s.best is None:
        return [name, mine, "", "", "", "", roof]
    low, high = s.best["ratio_quartiles"]
    peer = f"{s.best['library']} {s.best['library_mode']} x{s.best['library_threads']}"
    return [name, mine, peer, f"{s.best['ms']:.4g}", f"{s.best['ratio']:.2f}", f"{low:.2f} to {high:.2f}", roof]


def _mean_by(shapes: Sequence[Shape], of: Callable[[Shape], float], *fields: str) -> dict[tuple[Any, ...], float]:
    cells = defaultdict(list)
    for s in shapes:
        cells[tuple(s.ours[f] for f in fields)].append(of(s))
    return {k: geometric_mean(v) for k, v in cells.items()}


def plot(shapes: Sequence[Shape], folder: pathlib.Path) -> list[str]:
    """Draws what the records allow; returns the files' names."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
        names.append(name)

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
                    axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7)

    grid = [s for s in shapes if not s.ours["name"]]
    for mode in ("inference", "training"):
        chosen = [s for s in grid if s.ours["mode"] == mode]
        cells = sorted({s.ours["cell"] for s in chosen})
        if not cells:
            continue
        figure, axes = plt.subplots(2, len(cells), figsize=(5 * len(cells), 8), squeeze=False)
        for column, cell in enumerate(cells):
            mine = [s for s in chosen if s.ours["cell"] == cell]
            compared = [s for s in mine if s.best]
            ratios = _mean_by(compared, lambda s: s.best["ratio"] if s.best else math.nan, "B", "H")
            heat(axes[0][column], ratios, f"{cell} {mode}: best peer / rnnfast", 0.25, 4.0, True)
            roofs = _mean_by(mine, lambda s: s.ours["share_of_roof"], "B", "H")
            heat(axes[1][column], roofs, f"{cell} {mode}: share of the roof", 0.0, 1.0, False)
        save(figure, f"heat-{mode}.png")
    if grid:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for cell in sorted({s.ours["cell"] for s in grid}):
            mine = [s for s in grid if s.ours["cell"] == cell]
            cost = _mean_by(mine, lambda s: 1 / s.ours["gflops"], "T")
            axes[0].loglog([t for (t,) in sorted(cost)], [cost[t] for t in sorted(cost)], "o-", label=cell)
            scaling = _mean_by(mine, lambda s: s.ours["share_of_roof"], "threads", "H")
            for threads, style in ((1, "-"), (0, "--")):
                hiddens = sorted(h for t, h in scaling if t == threads)
                values = [scaling[threads, h] for h in hiddens]
                axes[1].semilogx(hiddens, values, style, label=f"{cell}, {threads or 'all'} threads")
        axes[0].set(title="cost against T", xlabel="T", ylabel="ns per flop")
        axes[1].set(title="share of the roof, by threads", xlabel="H", ylim=(0, 1))
        for axis in axes:
            axis.legend(fontsize=7)
        save(figure, "time-and-threads.png")
    return names


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
    plots = []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        plots = plot(shapes, options.out)
    text = page(shapes, plots, options.command)
    notes = options.out / "notes.md" if options.out else None
    if notes and notes.exists():  # what a person found out about the figures
        text += "\n" + notes.read_text()
    if options.out:
        (options.out / "README.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
