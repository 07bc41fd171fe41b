"""Pictures of a training. The only file that knows matplotlib (the extra "plots")."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any


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


def piano_roll(notes: Sequence[tuple[int, float, float, int]], axes: Any, *, beat: float = 1.0) -> None:
    """Draws notes (voice, start, length, MIDI pitch) as bars into matplotlib axes, a colour a voice; `beat` units of time are one on the axis.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot()
    >>> piano_roll([(0, 0, 4, 60), (1, 2, 2, 48)], axes)
    >>> axes.get_ylabel(), len(axes.collections)
    ('pitch', 2)
    """
    for voice in sorted({voice for voice, *_ in notes}):
        for pitch in sorted({p for v, _, _, p in notes if v == voice}):
            spans = [(start / beat, 0.92 * length / beat) for v, start, length, p in notes if (v, p) == (voice, pitch)]
            axes.broken_barh(spans, (pitch - 0.4, 0.8), color=f"C{voice}")
    octaves = range(min((p for *_, p in notes), default=60) // 12, max((p for *_, p in notes), default=60) // 12 + 2)
    axes.set_yticks([12 * octave for octave in octaves], [f"C{octave - 1}" for octave in octaves])
    axes.set(xlabel="time", ylabel="pitch")
    axes.grid(alpha=0.3)


def text_activity(text: Sequence[str], activity: Sequence[float], axes: Any, *, width: int = 80, limit: float | None = None) -> None:
    """Writes pieces of text (characters or words) into matplotlib axes, each on a ground coloured by one cell's state: blue below 0, red above.

    width: characters a line; limit: the activity of full colour, the largest one if None. As in Karpathy, Johnson & Fei-Fei 2015, "Visualizing and
    understanding recurrent networks". Raises ValueError if the two differ in length.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot()
    >>> text_activity("if x:", [0, 0.5, 1, -1, 0], axes)
    >>> len(axes.texts)
    5
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if len(text) != len(activity):
        raise ValueError(f"text_activity: {len(text)} pieces of text, but {len(activity)} activities")
    most = limit or max((abs(a) for a in activity), default=0) or 1.0
    line, column = 0, 0
    for piece, a in zip(text, activity, strict=True):
        if column + len(piece) > width and column:
            line, column = line + 1, 0
        shown = piece.replace("\n", "\u23ce").replace("\t", " ")
        axes.add_patch(Rectangle((column, -line), len(piece), 1, color=colormaps["RdBu_r"](0.5 + 0.5 * a / most), lw=0, alpha=0.7))
        axes.text(column + len(piece) / 2, -line + 0.5, shown.replace("$", r"\$"), ha="center", va="center", family="monospace", fontsize=6)
        column += len(piece)
        if piece.endswith("\n"):
            line, column = line + 1, 0
    axes.set(xlim=(0, width), ylim=(-line, 1))
    axes.axis("off")


def _figure(width: float, height: float) -> Any:
    """An empty figure that needs no display and leaves matplotlib's global state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("rnnfast.plots needs matplotlib: pip install 'rnnfast[plots]'") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def forecast_plot(past: Any, forecast: Any, low: Any, high: Any, path: str | os.PathLike[str], name: str = "") -> None:
    """Draws the end of a series, its forecast and the band from low to high into a PNG file.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     forecast_plot([1.0, 2.0], [3.0], [2.0], [4.0], f"{folder}/f.png")
    ...     os.listdir(folder)
    ['f.png']
    """
    figure = _figure(8, 3.5)
    axes = figure.add_subplot()
    shown = list(past)[-max(5 * len(forecast), 50) :]
    axes.plot(range(1 - len(shown), 1), shown, color="black", lw=1, label="measured")
    steps = range(1, len(forecast) + 1)
    axes.fill_between(steps, low, high, alpha=0.3, color="C1", label="80 % of the back-test's errors")
    axes.plot(steps, forecast, color="C1", label="forecast")
    axes.set(xlabel="steps from the last known", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def activity_plot(activity: Any, path: str | os.PathLike[str], labels: Sequence[str] | None = None, title: str = "") -> None:
    """Draws units over time, (T, units) of h, c or a gate, as a picture from -1 (red) to 1 (blue); `labels` stand below the steps.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     activity_plot([[0.5, -1.0], [1.0, 0.0]], f"{folder}/a.png", ["a", "b"])
    ...     os.listdir(folder)
    ['a.png']
    """
    T = len(activity)
    figure = _figure(max(4.0, min(12.0, 0.16 * T)), 3.5)
    axes = figure.add_subplot()
    picture = axes.imshow(list(zip(*activity, strict=True)), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    if labels is not None:
        axes.set_xticks(range(T), list(labels), fontsize=7)
    axes.set(xlabel="step", ylabel="unit", title=title)
    figure.colorbar(picture)
    figure.savefig(path, format="png")


def gradient_flow(norms: Mapping[str, Sequence[float]], path: str | os.PathLike[str], xlabel: str = "lag") -> None:
    """Draws gradient norms over lag, layer or neuron, one curve a name, on a logarithmic axis: diagnostics.py's numbers.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gradient_flow({"rnn": [1.0, 0.1, 0.01]}, f"{folder}/g.png")
    ...     os.listdir(folder)
    ['g.png']
    """
    figure = _figure(7, 3.5)
    axes = figure.add_subplot()
    for name, values in norms.items():
        axes.semilogy(range(len(values)), values, label=name)
    axes.set(xlabel=xlabel, ylabel="norm of the gradient")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")
