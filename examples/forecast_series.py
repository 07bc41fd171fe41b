"""Any series, one call: a forecast with its band, and a back-test against the naive ones ("Predicting", the slides' stock predictor, for other series).

The yearly numbers of sunspots, 11 years ahead, and CO₂ above Mauna Loa by months, 12 ahead, through what `rnnfast forecast` runs: an LSTM reads a
window of the past and says what a naive forecast (the last value, or the one a season before, whichever did better within the training part) will
miss. Season and stopping come from the training part; the last fifth is the back-test, every step of it an origin. Bar: for CO₂ the mean absolute
error is below both naive ones': ratio < 1. The sunspots stand beside it with no claim: on 250 yearly numbers a net is about as good as looking one
season back.

    python examples/forecast_series.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import co2, sunspots
from report import arguments, picture, save, verdict
from rnnfast.forecast import Settings, forecast_series

SERIES = {"sunspots": (sunspots, 11, "a year"), "CO₂, ppm": (co2, 12, "a month")}


def main(given: Sequence[str] | None = None) -> float:
    """Prints the errors and returns the median ratio to the best naive forecast of CO₂."""
    args = arguments("forecast_series", __doc__, given)
    ratios: dict[str, list[float]] = {name: [] for name in SERIES}
    kept = {}
    for seed in args.seeds:
        for name, (load, horizon, step) in SERIES.items():
            values = load()
            report = forecast_series({name: values}, name, horizon, settings=Settings(epochs=5 if args.quick else 60, validation_fraction=0.25, seed=seed))
            net, naive, seasonal = (report.errors[key] for key in ("net", "naive", "seasonal-naive"))
            ratios[name].append(net / min(naive, seasonal))
            kept.setdefault(name, (values, report))
            print(
                f"seed {seed}: {name}, {horizon} steps of {step}, {report.origins} origins, season {report.season}: "
                f"mean absolute error {net:.3g}, naive {naive:.3g}, seasonal-naive {seasonal:.3g}",
                flush=True,
            )
    if args.figure:
        figure = picture(8, 3.4)
        for axes, (name, (values, report)) in zip(figure.subplots(1, 2), kept.items(), strict=True):
            steps = np.arange(1, len(report.forecast) + 1)
            axes.plot(np.arange(-59, 1), values[-60:], "k", lw=1)
            axes.fill_between(steps, report.low, report.high, color="C1", alpha=0.3, label="80 % of the back-test's errors")
            axes.plot(steps, report.forecast, color="C1", label="forecast")
            axes.set(title=name, xlabel=f"steps of {SERIES[name][2]} from the last known")
        axes.legend(fontsize=7)
        save(figure, args.figure)
    print("sunspots: ratio of the net's error to the better naive one " + ", ".join(f"{ratio:.3f}" for ratio in ratios["sunspots"]))
    return verdict("CO₂: ratio of the net's error to the better naive one", ratios["CO₂, ppm"], 0.999, form=".3f")


if __name__ == "__main__":
    main()
