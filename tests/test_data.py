"""Corpora that split the same way everywhere, alphabets, and streams whose batches continue one another."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rnnfast.data import HELD_OUT, Alphabet, InputError, Stream, load_corpus, standard_library


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# ---- Corpora ---------------------------------------------------------------------------------------------------------


def test_the_standard_library_is_there_and_holds_out_enough() -> None:
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again and corpus.digest == again.digest
    assert len(corpus.valid) >= HELD_OUT and len(corpus.train) > 5_000_000
    own = (standard_library() / "json" / "decoder.py").read_bytes()
    assert (own in corpus.train) != (own in corpus.valid)
    assert b"class IdleConfParser" not in corpus.train + corpus.valid  # idlelib is left out


def test_every_file_goes_to_one_side_by_its_name_alone(tmp_path: Path) -> None:
    texts = {f"sub__f{i}": f"<text {i}>\n".encode() * (i + 1) for i in range(200)}
    corpus = load_corpus(write(tmp_path / "a", **texts))
    sides = [(text in corpus.train, text in corpus.valid) for text in texts.values()]
    assert all(one != other for one, other in sides)
    assert 2 <= sum(held for _, held in sides) <= 20  # about one in twenty
    fewer = load_corpus(write(tmp_path / "b", **dict(list(texts.items())[::2])))
    assert [(text in fewer.train, text in fewer.valid) for text in list(texts.values())[::2]] == sides[::2]


def test_one_files_end_is_held_out(tmp_path: Path) -> None:
    text = bytes(range(97, 122)) * 40
    corpus = load_corpus(write(tmp_path, only=text) / "only")
    assert corpus.train + corpus.valid == text and len(corpus.valid) == 50


def test_binary_and_empty_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, a=b"text " * 50, b=b"\0\1\2" * 50, c=b"", d=bytes(range(1, 256)), e="naïve café ✓\n".encode() * 9)
    write(tmp_path / ".git", hidden=b"hidden " * 50)
    corpus = load_corpus(tmp_path)
    assert corpus.skipped == 3
    assert "café".encode() in corpus.train + corpus.valid and b"hidden" not in corpus.train + corpus.valid


def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, empty=b"", binary=os.urandom(5000), sub__binary=b"\0")
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        ("gone", "gone does not exist"),
        ("empty", "empty is empty"),
        ("binary", "binary is binary, not text"),
        ("sub", "sub contains no text file"),
        ("nothing", "nothing contains no text file"),
        ("pipe", "pipe is neither a file nor a folder"),
    ):
        with pytest.raises(InputError, match=message) as told:
            load_corpus(tmp_path / path)
        assert "\n" not in str(told.value)


def test_a_digest_depends_on_the_text_and_its_split(tmp_path: Path) -> None:
    write(tmp_path, a=b"one two three " * 20, b=b"one two three " * 19 + b"one two three.")
    assert load_corpus(tmp_path / "a").digest != load_corpus(tmp_path / "b").digest


# ---- Alphabets -------------------------------------------------------------------------------------------------------


def test_decode_undoes_encode() -> None:
    text = bytes(range(256)) * 3
    letters = Alphabet.of(text)
    assert len(letters) == 257 and letters.decode(letters.encode(text)) == text
    assert letters.encode(text).min() == 1


def test_unknown_bytes_are_0() -> None:
    letters = Alphabet.of(b"abc")
    assert letters.encode(b"cxa").tolist() == [3, 0, 1] and letters.decode([3, 0, 1]) == b"c?a"
    assert Alphabet(letters.known).encode(b"b").tolist() == [2]
    assert Alphabet.of(b"").encode(b"ab").tolist() == [0, 0]


@pytest.mark.parametrize("known", (b"ba", b"aa"))
def test_an_alphabet_out_of_order_is_refused(known: bytes) -> None:
    with pytest.raises(ValueError, match="different and in order"):
        Alphabet(known)


# ---- Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "B", "T"), ((12, 2, 3), (13, 2, 3), (40, 3, 7), (7, 1, 7), (6, 6, 1)))
def test_a_batch_starts_where_the_one_before_ended(N: int, B: int, T: int) -> None:
    stream = Stream(np.arange(N), np.arange(N) + 100, B, T)
    for k in range(3 * N):
        now, then = stream[k], stream[k + 1]
        assert now.x.shape == now.target.shape == (T, B)
        np.testing.assert_array_equal((now.x[-1] + 1) % N, then.x[0])
        np.testing.assert_array_equal(now.target, now.x + 100)
        fresh = then.x == 0
        assert fresh.any() == (then.reset is not None)
        if then.reset is not None:
            np.testing.assert_array_equal(then.reset, fresh)


def test_every_step_of_the_series_is_read_once_a_round() -> None:
    stream = Stream(np.arange(24), np.arange(24), 2, 3)
    assert sorted(np.concatenate([stream[k].x.ravel() for k in range(4)])) == list(range(24))


def test_a_stream_begins_anywhere() -> None:
    stream = Stream(np.arange(40), np.arange(40), 3, 7)
    for k, batch in zip(range(5, 9), stream.batches(5), strict=False):
        np.testing.assert_array_equal(batch.x, stream[k].x)
    np.testing.assert_array_equal(next(iter(stream)).x, stream[0].x)


def test_series_of_vectors_stream_too() -> None:
    x = np.arange(60.0).reshape(20, 3)
    assert Stream(x, x, 2, 5)[0].x.shape == (5, 2, 3)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    (
        ((5, 5, 2, 3), InputError, "too short: 5 steps for a batch of 2 x 3"),
        ((0, 0, 1, 1), InputError, "too short: 0 steps"),
        ((5, 4, 1, 1), ValueError, "equally long, got 5 and 4"),
        ((5, 5, 0, 1), ValueError, "at least 1, got batch 0"),
    ),
)
def test_a_stream_that_cannot_be_is_refused(sizes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Stream(np.arange(sizes[0]), np.arange(sizes[1]), *sizes[2:])
