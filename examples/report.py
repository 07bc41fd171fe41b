"""What every example shares: its arguments, the line that holds a number against its bar, and an empty picture.

time     processor time of all cores, of the processes that an example starts, too
seeds    an example trains once a seed (3 of them where that fits five minutes of two cores, one with --quick); the bar applies to the median, the
         worst is printed beside it
kept     the long ones put every seed's result into a JSON file (--keep FILE) as soon as it is there; run again with it, they go on from there
figure   docs/figures/NAME.png; with --quick nothing is drawn unless --figure says where
It knows neither models nor data.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


class Kept:
    """Results by name; with a path they are in a JSON file as soon as they are there, and what the file holds is not worked out again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._done: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """work()'s result: numbers, strings, lists and dicts of them. The file takes its place at once, whole."""
        if name not in self._done:
            self._done[name] = work()
            if self._path:
                beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
                beside.write_text(json.dumps(self._done))
                os.replace(beside, self._path)
        return self._done[name]


class Arguments(NamedTuple):
    """--quick (seconds instead of minutes, and no claim), where the picture goes (or nowhere), the seeds, and what an earlier run kept."""

    quick: bool
    figure: Path | None
    seeds: list[int]
    kept: Kept


def arguments(name: str, doc: str | None, given: Sequence[str] | None, seeds: int = 3, keep: bool = False) -> Arguments:
    """Reads --quick, --figure PATH and --seeds N (default: `seeds`), with `keep` --keep FILE too; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds")
    parser.add_argument("--figure", type=Path, help=f"where the picture goes (default: docs/figures/{name}.png, none with --quick)")
    parser.add_argument("--seeds", type=int, help=f"how many seeds (default: {seeds}, with --quick 1)")
    if keep:
        parser.add_argument("--keep", type=Path, help="a JSON file that takes every seed's result; seeds that it holds are not trained again")
    args = parser.parse_args(given)
    figure = args.figure or (None if args.quick else FIGURES / f"{name}.png")
    return Arguments(args.quick, figure, list(range(args.seeds or (1 if args.quick else seeds))), Kept(args.keep if keep else None))


def verdict(what: str, values: Sequence[float], bar: float, *, low: bool = True, form: str = ".4g") -> float:
    """Prints median and worst of the seeds against the bar (low: smaller is better), the time so far on all cores; returns the median."""
    median = statistics.median(values)
    worst = max(values) if low else min(values)
    met = median <= bar if low else median >= bar
    seeds = f"median {median:{form}}, worst {worst:{form}} of {len(values)} seeds" if len(values) > 1 else f"{median:{form}}"
    print(f"{what}: {seeds}; bar {'<=' if low else '>='} {bar:{form}}: {'met' if met else 'NOT met'} ({sum(os.times()[:4]):.0f} s of processor time)")
    return median


def picture(width: float = 7.0, height: float = 3.5) -> Any:
    """An empty matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a small PNG of 256 colours."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="png", optimize=True)
    print(f"picture: {path}")
