"""The language model: what its bits mean, what it learns, how it draws, and that looking at it changes nothing."""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rnnfast.data import Alphabet, InputError
from rnnfast.dense import Linear
from rnnfast.lm import Config, LanguageModel, train
from rnnfast.training import CheckpointError, load_checkpoint, save_checkpoint

TINY = {"layers": 1, "hidden": 16, "embedding": 8, "seq_length": 16, "batch_size": 4, "steps": 20, "every": 5}
POEM = b"the rain in spain stays mainly in the plain; how now, brown cow?\n" * 40


def write(folder: Path, text: bytes = POEM) -> str:
    path = folder / "text"
    path.write_bytes(text)
    return str(path)


def trained(folder: Path, text: bytes = POEM, **options: Any) -> LanguageModel:
    train(folder / "run", {**TINY, "text": write(folder, text), **options}, log=io.StringIO(), sample_every=0)
    return LanguageModel.load(folder / "run")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_checkpoint(folder)[0].items()}


# ---- Bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_bits_are_torchs_cross_entropy(cell: str) -> None:
    """One row: every byte is predicted from all before it, by torch's layers under the same names."""
    model = LanguageModel(Config(cell=cell, layers=2, hidden=16, embedding=8), Alphabet.of(POEM))

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(len(model.alphabet), 8)
            self.rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell](8, 16, 2)
            self.logits = torch.nn.Linear(16, len(model.alphabet))

    twin = Twin()
    twin.load_state_dict({name: torch.from_numpy(p) for name, p in model.graph.state_dict().items()})
    tokens = torch.from_numpy(model.alphabet.encode(POEM[:300]).astype(np.int64))
    with torch.no_grad():
        logits = twin.logits(twin.rnn(twin.embedding(tokens[:-1]))[0])
        expected = torch.nn.functional.cross_entropy(logits.double(), tokens[1:]).item() / math.log(2)
    found = [model.bits(POEM[:300], batch_size=1, seq_length=length) for length in (7, 200, 1000)]
    assert max(abs(bits - expected) for bits in found) < 64 * np.finfo(np.float32).eps * math.log2(len(model.alphabet))


def test_every_byte_but_the_first_counts_once() -> None:
    """A model that always says the same: each byte's bits are known, however the text is cut into rows."""
    text = b"abacabad" * 9 + b"abc"
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(text))
    model.graph["logits"].parameters()["weight"][...] = 0
    p = {0: 0.01, **{i + 1: share for i, share in enumerate((0.5, 0.2, 0.2, 0.09))}}
    model.graph["logits"].parameters()["bias"][...] = np.log(list(p.values()))
    expected = np.mean([-math.log2(p[t]) for t in model.alphabet.encode(text)[1:]])
    for rows in (1, 2, 7, 32, 1000):
        assert abs(model.bits(text, batch_size=rows, seq_length=3) - expected) < 1e-5
    assert math.isnan(model.bits(b"a")) and math.isnan(model.bits(b""))


def test_an_unknown_byte_costs_unknown_and_which_one() -> None:
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(b"abcd"))
    model.graph["logits"].parameters()["weight"][...] = 0
    model.graph["logits"].parameters()["bias"][...] = np.log([0.01, 0.5, 0.2, 0.2, 0.09])
    assert abs(model.bits(b"aa!") - (-math.log2(0.5) - math.log2(0.01) + math.log2(252)) / 2) < 1e-5


def test_bits_that_fail_leave_the_model_in_its_mode() -> None:
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(b"abcd"))
    with pytest.raises(ValueError):
        model.bits(b"abcd", seq_length=0)
    assert model.graph.training


def test_a_text_that_repeats_costs_next_to_nothing(tmp_path: Path) -> None:
    model = trained(tmp_path, b"abcdefgh" * 400, steps=150, learning_rate=0.02)
    assert model.bits(b"abcdefgh" * 50) < 0.05
    assert b"".join(model.sample(b"abc", 16, 0)) == b"defghabcdefghabc"


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_text(tmp_path: Path) -> None:
    model = trained(tmp_path)
    first, again, other = (b"".join(model.sample(b"the ", 80, 0.9, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 80
    assert set(first) <= set(POEM)


def test_samples_follow_the_softmax_and_the_temperature() -> None:
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(b"ab"))
    model.graph["logits"].parameters()["weight"][...] = 0
    model.graph["logits"].parameters()["bias"][...] = np.log([0.9, 0.08, 0.02])  # "unknown" is likely, and never drawn
    for temperature, share in ((1.0, 0.8), (0.5, 16 / 17), (0.0, 1.0)):
        drawn = b"".join(model.sample(b"a", 4000, temperature, np.random.default_rng(0)))
        assert abs(drawn.count(b"a") / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


def test_the_prompt_is_what_the_layers_read() -> None:
    """The stream of the sampler is the layer itself: the likeliest byte after a prompt is the argmax of the graph."""
    model = LanguageModel(Config(layers=2, hidden=16, embedding=8, seed=3), Alphabet.of(POEM))
    model.graph["logits"].flat[:] *= 10
    model.graph.eval()
    tokens = model.alphabet.encode(POEM[:40]).astype(np.int64)
    y, _ = model.graph(tokens[:, None])
    for count in (1, 2, 40):
        byte = next(model.sample(POEM[:count], 1, 0))
        assert model.alphabet.encode(byte)[0] == 1 + y[count - 1, 0, 1:].argmax()


def test_an_empty_or_unknown_prompt_is_no_error() -> None:
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(b"ab"))
    for prompt in (b"", b"\xff", "ü".encode()):
        assert len(b"".join(model.sample(prompt, 3))) == 3


@pytest.mark.parametrize("temperature", (-1, math.nan, math.inf))
def test_a_nonsense_temperature_is_refused(temperature: float) -> None:
    model = LanguageModel(Config(layers=1, hidden=4, embedding=2), Alphabet.of(b"ab"))
    with pytest.raises(InputError, match="temperature must be a number from 0 on"):
        next(model.sample(b"a", 3, temperature))


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_samples_rows_and_checkpoints_change_nothing(tmp_path: Path) -> None:
    text = write(tmp_path)
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    given = {**TINY, "text": text, "dropout": 0.3, "layers": 2}
    train(quiet, {**given, "every": 20}, log=io.StringIO(), sample_every=0, checkpoint_every=100)
    log = io.StringIO()
    train(loud, {**given, "every": 1}, log=log, sample_every=1, checkpoint_every=1)
    assert weights(quiet) == weights(loud)
    assert log.getvalue().count("-" * 72) == 2 * 19


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_a_resumed_run_is_the_run_never_stopped(tmp_path: Path, cell: str) -> None:
    given = {**TINY, "text": write(tmp_path), "cell": cell, "dropout": 0.2, "layers": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, given, log=io.StringIO())
    train(parts, given, log=io.StringIO(), stop_after=7)
    train(parts, log=io.StringIO(), resume=True, stop_after=6)
    train(parts, log=io.StringIO(), resume=True)
    assert weights(whole) == weights(parts)
    tables = [[line.split(",")[:6] for line in (path / "history.csv").read_text().split()] for path in (whole, parts)]
    assert tables[0] == tables[1] and len(tables[0]) == 5
    again = train(parts, log=io.StringIO(), resume=True)  # it is over, and says so
    assert again.step == 20 and weights(whole) == weights(parts)


def test_threads_change_nothing_in_the_layers(tmp_path: Path, set_num_threads: Any) -> None:
    found = []
    for threads in (1, 2):
        set_num_threads(threads)
        model = LanguageModel(Config(layers=2, hidden=16, embedding=8), Alphabet.of(POEM))
        y, _ = model.graph["rnn"](model.graph["embedding"](model.alphabet.encode(POEM[:400]).reshape(40, 10)))
        found.append(y.copy())
    np.testing.assert_array_equal(*found)


def test_a_run_writes_what_it_says(tmp_path: Path) -> None:
    log = io.StringIO()
    train(tmp_path / "run", {**TINY, "text": write(tmp_path)}, log=log, sample_every=10)
    assert sorted(os.listdir(tmp_path / "run")) == ["history.csv", "last", "loss.png", "previous"]
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    said = log.getvalue()
    assert all(word in said for word in ("bits/byte", "bytes/s", " left", "done: ", "held-out bytes")), said


def test_a_text_that_moved_resumes_and_one_that_changed_does_not(tmp_path: Path) -> None:
    given = {**TINY, "text": write(tmp_path)}
    train(tmp_path / "run", given, log=io.StringIO(), stop_after=5)
    os.rename(tmp_path / "text", tmp_path / "moved")
    with pytest.raises(InputError, match="text does not exist"):
        train(tmp_path / "run", log=io.StringIO(), resume=True)
    train(tmp_path / "run", {"text": str(tmp_path / "moved")}, log=io.StringIO(), resume=True, stop_after=5)
    (tmp_path / "moved").write_bytes(POEM + b"!")
    with pytest.raises(InputError, match="has changed since the run"):
        train(tmp_path / "run", log=io.StringIO(), resume=True)


def test_what_a_run_is_cannot_change(tmp_path: Path) -> None:
    trained(tmp_path)
    for name, value in {"hidden": 17, "steps": 21, "cell": "gru", "learning_rate": 0.1}.items():
        with pytest.raises(InputError, match=f"{name} is fixed at .*; it cannot become {value}"):
            train(tmp_path / "run", {name: value}, log=io.StringIO(), resume=True)
    assert train(tmp_path / "run", {"hidden": 16}, log=io.StringIO(), resume=True).step == 20


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    trained(tmp_path)
    before = weights(tmp_path / "run")
    given = {**TINY, "text": write(tmp_path), "seed": 1}
    with pytest.raises(InputError, match="already holds a run"):
        train(tmp_path / "run", given, log=io.StringIO())
    assert weights(tmp_path / "run") == before
    train(tmp_path / "run", given, log=io.StringIO(), overwrite=True)
    assert weights(tmp_path / "run") != before


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(tmp_path / "run", log=io.StringIO(), resume=True)


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Linear(1, 1).state_dict(), {}, {"config": {"hidden": 3}})
    with pytest.raises(CheckpointError, match="is not of a language model"):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"hidden": 0}, "hidden must be a whole number from 1"),
        ({"layers": 1.5}, "layers must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"cell": "transformer"}, "cell must be one of lstm, gru, rnn"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"hidden": 10_000_000}, "a model of this size needs about .* GiB of memory"),
        ({"batch_size": 2_000_000_000}, "a model of this size needs about .* GiB of memory"),
    ),
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**values).check()
