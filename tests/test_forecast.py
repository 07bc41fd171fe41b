"""Forecasts of a CSV file's column, and the scikit-learn pair."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from rnnfast.cli import main
from rnnfast.data import InputError
from rnnfast.forecast import Report, Settings, _windows, forecast_series, read_csv, season_of, write_forecast


def table(path, n=240):
    """A CSV with a daily date, a wave of period 12 on a trend, another number and a text."""
    t = np.arange(n)
    rng = np.random.default_rng(0)
    wave = 10 + 0.02 * t + 3 * np.sin(2 * np.pi * t / 12) + 0.3 * rng.standard_normal(n)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["day", "sold", "other", "note"])
        writer.writerows([f"day {k}", f"{v:.4f}", k % 7, "x"] for k, v in enumerate(wave))
    return path


def test_season_is_found():
    rng = np.random.default_rng(0)
    t = np.arange(500)
    assert season_of(np.sin(2 * np.pi * t / 24) + 0.1 * rng.standard_normal(500)) == 24
    assert season_of(rng.standard_normal(500).cumsum()) == 1


def test_forecast_beats_naive(tmp_path):
    columns, _ = read_csv(table(tmp_path / "a.csv"), "sold")
    assert list(columns) == ["sold", "other"]
    report = forecast_series(columns, "sold", 6, settings=Settings(epochs=15, hidden_size=16, seed=0))
    assert report.season == 12
    assert report.errors["net"] < report.errors["naive"] and report.errors["net"] < report.errors["seasonal-naive"]
    assert (report.low <= report.high).all() and report.forecast.shape == (6,)


@pytest.mark.parametrize("base", ["last", "season"])
def test_no_window_and_no_baseline_reads_beyond_its_origin(base):
    rng = np.random.default_rng(0)
    target, others = rng.standard_normal(60), rng.standard_normal((60, 2))
    for origin in (30, 45, 52):
        known = np.where(np.arange(60) <= origin, 1, np.nan)
        x, _, bases = _windows(others, target, 12, 7, 5, base, np.array([origin]))
        x_known, _, bases_known = _windows(others * known[:, None], target * known, 12, 7, 5, base, np.array([origin]))
        np.testing.assert_array_equal(x, x_known)
        np.testing.assert_array_equal(bases, bases_known)


def test_the_last_part_does_not_move_what_is_learnt():
    """Every forecast of the back-test comes from a net, a season and a baseline that the last part cannot change: the first origin's is the same."""
    t = np.arange(150.0)
    first = np.sin(t / 3) + 0.01 * t
    second = np.where(t < 120, first, 100 - first)
    settings = Settings(epochs=2, hidden_size=4, seed=0)
    kept = [forecast_series({"y": values}, "y", 30, settings=settings) for values in (first, second)]
    errors = [report.errors["net"] for report in kept]  # 30 steps of horizon in a last part of 30: one origin
    assert kept[0].origins == kept[1].origins == 1 and kept[0].season == kept[1].season
    point = kept[0].low - kept[0].forecast  # truth - guess of that origin: low = point + it
    other = kept[1].low - kept[1].forecast
    np.testing.assert_allclose(first[120:] - point, second[120:] - other, atol=1e-9)
    assert errors[0] != errors[1]


def test_command_writes_forecast_and_plot(tmp_path, capsys):
    path = table(tmp_path / "a.csv", 150)
    out = tmp_path / "out.csv"
    assert main(["forecast", str(path), "--target", "sold", "--horizon", "5", "--epochs", "5", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 5 and list(rows[0]) == ["step", "sold", "low", "high"]
    assert (tmp_path / "out.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "naive" in said and "seasonal-naive" in said


def test_the_table_is_not_overwritten(tmp_path, capsys):
    path = table(tmp_path / "a.csv", 150)
    (tmp_path / "link.csv").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link.csv"):
        assert main(["forecast", str(path), "--target", "sold", "--horizon", "5", "--epochs", "1", "--out", str(out)]) == 2
        assert "overwrite" in capsys.readouterr().err and path.read_bytes() == before


def test_the_plot_does_not_overwrite_the_forecasts(tmp_path, capsys):
    path = table(tmp_path / "a.csv", 150)
    assert main(["forecast", str(path), "--target", "sold", "--horizon", "5", "--epochs", "1", "--out", str(tmp_path / "out.png")]) == 2
    assert "as CSV" in capsys.readouterr().err and not (tmp_path / "out.png").exists()


def test_a_forecast_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path, numbers = tmp_path / "out.csv", np.ones(2)
    write_forecast(path, Report(numbers, numbers, numbers, {}, 1, 1), "sold")
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_forecast(path, Report(numbers, numbers, np.array(["?", "?"]), {}, 1, 1), "sold")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "no column 'sold'"),
        ("sold\n1\nx\n", "row 3: 'sold' is not a number"),
        ("sold\n1\nnan\n", "must be finite"),
        ("sold,b\n1\n", "1 cells"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_csv(path, "sold")


def test_short_series_are_refused(tmp_path, capsys):
    assert main(["forecast", str(table(tmp_path / "a.csv", 30)), "--target", "sold", "--horizon", "5"]) == 2
    assert "too few" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["RNNForecaster", "RNNClassifier"])
def test_estimators_keep_scikit_learns_rules(name):
    pytest.importorskip("sklearn")
    from rnnfast import estimators
    from sklearn.utils.estimator_checks import check_estimator

    results = check_estimator(getattr(estimators, name)(hidden_size=8, epochs=20, random_state=0), on_fail=None)
    assert not [r["check_name"] for r in results if r["status"] == "failed"]
    assert sum(r["status"] == "passed" for r in results) > 30


def test_series_of_several_numbers_and_steps():
    pytest.importorskip("sklearn")
    from rnnfast.estimators import RNNClassifier, RNNForecaster

    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 7, 2))
    forecaster = RNNForecaster("gru", 16, epochs=80, random_state=0).fit(X, X[:, -1])
    assert forecaster.predict(X).shape == (80, 2) and forecaster.score(X, X[:, -1]) > 0.5
    classifier = RNNClassifier("rnn", 8, bidirectional=True, epochs=30, random_state=0).fit(X, X[:, :, 0].mean(axis=1) > 0)
    assert classifier.predict_proba(X).shape == (80, 2) and classifier.score(X, X[:, :, 0].mean(axis=1) > 0) > 0.85
