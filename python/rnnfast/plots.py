"""Pictures of a training. The only file that knows matplotlib (the extra "plots")."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence


def loss_curve(rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], unit: str = "loss") -> None:
    """Draws the loss, and the validation where there is one, over the steps of a run's rows into a PNG file.

    Needs no display and leaves matplotlib's global state alone. Raises ImportError naming the extra to install if
    matplotlib is missing, OSError if the file cannot be written.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loss_curve([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}], f"{folder}/loss.png")
    ...     os.listdir(folder)
    ['loss.png']
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("loss_curve needs matplotlib: pip install 'rnnfast[plots]'") from error

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("validation", "held out")):
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else "")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, format="png")
