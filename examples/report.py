"""What every example shares: its arguments, the line that holds a number against its bar, and an empty picture.

seeds    an example trains once a seed (3 of them where that fits five minutes of two cores, one with --quick); the bar applies to the median, the
         worst is printed beside it
figure   docs/figures/NAME.png; with --quick nothing is drawn unless --figure says where
It knows neither models nor data.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


class Arguments(NamedTuple):
    """--quick (seconds instead of minutes, and no claim), where the picture goes (or nowhere), and the seeds."""

    quick: bool
    figure: Path | None
    seeds: list[int]


def arguments(name: str, doc: str | None, given: Sequence[str] | None, seeds: int = 3) -> Arguments:
    """Reads --quick, --figure PATH and --seeds N (default: `seeds`); `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds")
    parser.add_argument("--figure", type=Path, help=f"where the picture goes (default: docs/figures/{name}.png, none with --quick)")
    parser.add_argument("--seeds", type=int, help=f"how many seeds (default: {seeds}, with --quick 1)")
    args = parser.parse_args(given)
    figure = args.figure or (None if args.quick else FIGURES / f"{name}.png")
    return Arguments(args.quick, figure, list(range(args.seeds or (1 if args.quick else seeds))))


def verdict(what: str, values: Sequence[float], bar: float, *, low: bool = True, form: str = ".4g") -> float:
    """Prints median and worst of the seeds against the bar (low: smaller is better) and returns the median."""
    median = statistics.median(values)
    worst = max(values) if low else min(values)
    met = median <= bar if low else median >= bar
    seeds = f"median {median:{form}}, worst {worst:{form}} of {len(values)} seeds" if len(values) > 1 else f"{median:{form}}"
    print(f"{what}: {seeds}; bar {'<=' if low else '>='} {bar:{form}}: {'met' if met else 'NOT met'}")
    return median


def picture(width: float = 7.0, height: float = 3.5) -> Any:
    """An empty matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a small PNG: 8-bit palette colours where Pillow can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", pil_kwargs={"optimize": True})
    print(f"picture: {path}")
