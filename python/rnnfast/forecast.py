"""Series in tables: a net from windows to an answer, and the forecast of a column of a CSV file with back-test and baselines.

window   W steps of a series' past, x (N, W, F) for N windows of F columns; y (N, O) what follows, or a class
horizon  how many steps ahead a forecast goes, all given at once
origin   the last known step of a forecast; nothing later goes in
The net is a Graph: a recurrent layer, its last output, a linear layer. It does not know scikit-learn (estimators.py does).
"""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import losses, optim, training
from .data import InputError
from .dense import Dropout, Linear
from .graph import Graph
from .layers import GRU, LSTM, RNN
from .module import Array

CELLS = ("lstm", "gru", "rnn")


@dataclass(frozen=True)
class Settings:
    """How a window net looks and is trained.

    >>> Settings(cell="gru").hidden_size
    32
    """

    cell: str = "lstm"
    hidden_size: int = 32
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    learning_rate: float = 0.005
    batch_size: int = 32
    epochs: int = 60
    validation_fraction: float = 0.1
    patience: int = 10
    seed: int | None = None


class WindowNet:
    """Many to one: reads windows (N, W, F) and answers (N, O) numbers, or scores of O classes.

    Inputs and numbers are standardised with the training part's mean and scale. With validation_fraction > 0 the last windows judge the epochs and
    the best weights are kept.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((200, 5, 1))
    >>> net = WindowNet(Settings(epochs=40, seed=0)).fit(x, x[:, -1] + x[:, -2])
    >>> bool(np.abs(net(x) - x[:, -1] - x[:, -2]).mean() < 0.3)
    True
    """

    def __init__(self, settings: Settings) -> None:
        if settings.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {settings.cell!r}")
        self.settings = settings
        self.epochs = 0  # trained

    def _make(self, F: int, O: int) -> Graph:
        s, seed = self.settings, self.settings.seed
        options: dict[str, Any] = {"num_layers": s.num_layers, "bidirectional": s.bidirectional, "dropout": s.dropout, "seed": seed}
        if s.cell == "lstm":
            options["forget_bias"] = 1.0
        layer: Any = {"lstm": LSTM, "gru": GRU, "rnn": RNN}[s.cell](F, s.hidden_size, **options)
        after = None if seed is None else seed + 1
        return Graph({"h": (layer, "x"), "drop": (Dropout(s.dropout, seed=after), "h"), "y": (Linear(layer.output_size, O, seed=after), "drop")})

    def _last(self, y: Array) -> Array:
        """The answer (N, O): the last step's; of a bidirectional layer the mean over all steps, as its reverse direction ends at the first."""
        answer: Array = y.mean(axis=0) if self.settings.bidirectional else y[-1]
        return answer

    def fit(self, windows: ArrayLike, answers: ArrayLike, classes: int = 0) -> WindowNet:
        """Trains on windows (N, W, F) and answers (N, O), or with classes > 0 integers (N,). Returns itself."""
        s = self.settings
        x: Array = np.asarray(windows, np.float64)
        y: Array = np.asarray(answers)
        held = round(s.validation_fraction * len(x)) if s.patience and len(x) >= 20 else 0
        rng = np.random.default_rng(s.seed)
        order = rng.permutation(len(x)) if classes else np.arange(len(x))  # series: the last windows judge; classes: any
        known, rest = np.sort(order[: len(x) - held]), order[len(x) - held :]
        self._middle, scale = x[known].mean(axis=(0, 1)), x[known].std(axis=(0, 1))
        self._scale = np.where(scale > 0, scale, 1)
        self._classes = classes
        if not classes:
            y = y.astype(np.float64)
            self._y_middle, scale = y[known].mean(axis=0), y[known].std(axis=0)
            self._y_scale = np.where(scale > 0, scale, 1)
            y = ((y - self._y_middle) / self._y_scale).astype(np.float32)
        series = self._prepared(x)
        self._sizes = x.shape[2], classes or y.shape[1]
        self.model = self._make(*self._sizes)

        def loss(out: Array, target: Array) -> tuple[float, Array]:
            value, d = (losses.softmax_cross_entropy if classes else losses.mean_squared_error)(self._last(out), target)
            dy = np.zeros_like(out)
            assert d is not None
            if s.bidirectional:
                dy[:] = d / len(out)
            else:
                dy[-1] = d
            return value, dy

        def batches(epoch: int) -> Any:
            shuffled = known[np.random.default_rng(None if s.seed is None else [s.seed, epoch]).permutation(len(known))]
            return ((series[:, shuffled[i : i + s.batch_size]], y[shuffled[i : i + s.batch_size]]) for i in range(0, len(known), s.batch_size))

        steps = max(s.epochs, 1) * math.ceil(len(known) / s.batch_size)
        optimizer = optim.AdamW(self.model, optim.linear(s.learning_rate, steps + 1), weight_decay=0.01)
        validation = [(series[:, rest], y[rest])] if held else None
        run = training.fit(
            self.model, batches, loss, optimizer, epochs=max(s.epochs, 1), validation=validation, patience=s.patience if held else None,
            clip=1.0, progress=False,
        )  # fmt: skip
        self.epochs = run.epoch - (run.stale if held else 0)
        self.model.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Plain values and the weights by name: what pickle keeps."""
        kept = {name: value for name, value in self.__dict__.items() if name != "model"}
        return kept | ({"weights": self.model.state_dict()} if hasattr(self, "model") else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("weights", None)
        self.__dict__.update(state)
        if weights is not None:
            self.model = self._make(*self._sizes)
            self.model.load_state_dict(weights)
            self.model.eval()

    def _prepared(self, x: Array) -> Array:
        return np.ascontiguousarray(((x - self._middle) / self._scale).astype(np.float32).swapaxes(0, 1))

    def __call__(self, x: ArrayLike) -> Array:
        """Numbers (N, O) in the units of y, or the log of each class's probability (N, classes)."""
        series = self._prepared(np.asarray(x, np.float64))
        parts = [self._last(self.model(series[:, i : i + 1024])[0]) for i in range(0, series.shape[1], 1024)]
        out: Array = np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, self._classes or len(self._y_middle)))
        if self._classes:
            out = out - out.max(axis=1, keepdims=True)
            out = out - np.log(np.exp(out).sum(axis=1, keepdims=True))
        else:
            out = out * self._y_scale + self._y_middle
        return out


# ---- a column of a CSV file


def read_csv(path: str | os.PathLike[str], target: str) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """The numeric columns of a CSV file (name -> values; every column whose cells are all numbers) and its first column as text.

    Raises InputError in one line for a file or target that cannot be used.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.csv").write_text("day,sold\\nMon,3\\nTue,4\\n")
    ...     read_csv(Path(folder, "a.csv"), "sold")
    ({'sold': array([3., 4.])}, ['Mon', 'Tue'])
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {error}") from error
    if not rows:
        raise InputError(f"{path} is empty")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    if target not in header:
        raise InputError(f"{path} has no column {target!r}; its columns are {', '.join(header)}")
    for k, row in enumerate(body, 2):
        if len(row) != len(header):
            raise InputError(f"{path}, row {k}: {len(row)} cells for {len(header)} columns")
    found = {}
    for name, cells in zip(header, zip(*body, strict=True), strict=False):
        try:
            values = np.array([float(cell) for cell in cells])
        except ValueError:
            if name == target:
                wrong = next(k for k, cell in enumerate(cells, 2) if not _is_number(cell))
                raise InputError(f"{path}, row {wrong}: {target!r} is not a number: {cells[wrong - 2]!r}") from None
            continue
        if np.isfinite(values).all():
            found[name] = values
        elif name == target:
            wrong = int(np.flatnonzero(~np.isfinite(values))[0]) + 2
            raise InputError(f"{path}, row {wrong}: {target!r} must be finite")
    return found, [row[0] for row in body]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def season_of(values: ArrayLike, longest: int = 400) -> int:
    """The lag from 2 on with the largest autocorrelation of the differences, 1 where none exceeds 0.3.

    >>> season_of(np.sin(np.arange(200) * 2 * np.pi / 12))
    12
    """
    d = np.diff(np.asarray(values, np.float64))
    d = d - d.mean()
    power = float(d @ d)
    lags = range(2, min(longest, len(d) // 3) + 1)
    if not power or not lags:
        return 1
    found = {lag: float(d[lag:] @ d[:-lag]) / power for lag in lags}
    best = max(found.values())
    return 1 if best < 0.3 else min(lag for lag, r in found.items() if r > 0.95 * best)


@dataclass
class Report:
    """What `forecast_series` found: the forecast, its band, and the back-test's mean absolute errors by name.

    >>> Report(np.zeros(2), np.zeros(2), np.zeros(2), {"net": 1.0}, 1, 3).errors["net"]
    1.0
    """

    forecast: Array  # (horizon,)
    low: Array  # (horizon,)
    high: Array  # (horizon,)
    errors: dict[str, float]
    season: int
    origins: int  # forecasts in the back-test


def _windows(columns: Array, target: Array, width: int, horizon: int, season: int, base: str, origins: Array) -> tuple[Array, Array, Array]:
    """x (N, W, F + 1), y (N, horizon) less its base, and the base (N, horizon), for origins o: windows end at o, forecasts begin at o + 1."""
    back = origins[:, None] + np.arange(1 - width, 1)
    ahead = origins[:, None] + np.arange(1, horizon + 1)
    steps = np.arange(1, horizon + 1)
    seasons = season * -(-steps // season)
    bases = target[origins[:, None] + steps - seasons] if base == "season" else np.repeat(target[origins][:, None], horizon, axis=1)
    x = np.concatenate((columns[back], (target[back] - target[origins][:, None])[..., None]), axis=2)
    known = ahead < len(target)
    y = np.where(known, target[np.minimum(ahead, len(target) - 1)], np.nan) - bases
    return x, y, bases


def forecast_series(
    columns: dict[str, NDArray[np.float64]], target: str, horizon: int, *, season: int | None = None, width: int | None = None,
    test_fraction: float = 0.2, coverage: float = 0.8, settings: Settings | None = None,
) -> Report:  # fmt: skip
    """Trains on the first part, back-tests on the last against naive and seasonal-naive, then trains on all and forecasts.

    The net forecasts what a naive forecast misses: it is added to the last value, or to the value a season before, whichever is better within the
    training part. Intervals are quantiles of the back-test's own errors, step by step. Other numeric columns are read up to the origin only.

    Raises InputError for a series too short.
    """
    s = settings or Settings(seed=0)
    values = columns[target]
    n = len(values)
    cut = n - max(round(test_fraction * n), horizon)  # the first step of the back-test
    season = season_of(values[: max(cut, 0)]) if season is None else season
    width = min(max(2 * season, 24), 200) if width is None else width
    first = max(width, season) - 1
    origins = np.arange(first, cut - horizon)
    if len(origins) < 20:
        raise InputError(
            f"{n} rows are too few: windows of {width} steps, a horizon of {horizon} and a season of {season} leave {max(len(origins), 0)}"
        )
    table = np.stack(list(columns.values()), axis=1)
    inner = origins[: int(0.8 * len(origins))]
    miss = {base: np.abs(_windows(table, values, width, horizon, season, base, origins[len(inner) :])[1]).mean() for base in ("last", "season")}
    base = min(miss, key=lambda name: float(miss[name]))

    def trained(up_to: Array, how: Settings) -> WindowNet:
        x, y, _ = _windows(table, values, width, horizon, season, base, up_to)
        return WindowNet(how).fit(x, y)

    net = trained(origins, s)
    tests = np.arange(cut - 1, n - horizon, 1)
    x, y, bases = _windows(table, values, width, horizon, season, base, tests)
    truth, guess = y + bases, net(x) + bases
    naive = {name: _windows(table, values, width, horizon, season, name, tests)[2] for name in ("last", "season")}
    errors = {"net": float(np.abs(guess - truth).mean()), "naive": float(np.abs(naive["last"] - truth).mean())}
    errors["seasonal-naive"] = float(np.abs(naive["season"] - truth).mean())
    final = trained(
        np.arange(first, n - horizon), Settings(**{**s.__dict__, "epochs": max(net.epochs, 1), "validation_fraction": 0.0, "patience": 0})
    )
    x, _, bases = _windows(table, values, width, horizon, season, base, np.array([n - 1]))
    point = (final(x) + bases)[0]
    low, high = np.quantile(truth - guess, [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
    return Report(point, point + low, point + high, errors, season, len(tests))


def write_forecast(path: str | os.PathLike[str], report: Report, target: str) -> None:
    """A CSV file: step, forecast, low, high."""
    rows = enumerate(zip(report.forecast, report.low, report.high, strict=True), 1)
    training.write_csv(path, [("step", target, "low", "high"), *((k, *(f"{value:.6g}" for value in row)) for k, row in rows)])
