"""Text as bytes, bytes as integers, and series cut into batches that continue one another.

corpus    training bytes and held-out bytes, split by file with a fixed hash
alphabet  the bytes that training text contains, and one more integer for every other: "unknown"
stream    B places in a series that move on T steps a batch, so that the state of one batch starts the next
It does not know models; whatever is wrong with a user's text is an InputError with one line to say so.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .module import Array

HELD_OUT = 200_000  # bytes of held-out text that a model is judged on
_SHARE = 0.05  # of the files (or of one file's end) is held out
_NOT_OURS = {"test", "idlelib", "lib2to3", "site-packages"}  # folders of the standard library left out


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line and says what.

    >>> raise InputError("notes.txt is empty")
    Traceback (most recent call last):
    ...
    rnnfast.data.InputError: notes.txt is empty
    """


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, where they come from, and how many files were skipped as binary or empty.

    >>> Corpus("a poem", b"to be or not", b"to be").digest[:8]
    '1f2afe1d'
    """

    name: str
    train: bytes
    valid: bytes
    skipped: int = 0

    @property
    def digest(self) -> str:
        """A hash of all of the text: the same text trains the same model."""
        return hashlib.sha256(hashlib.sha256(self.train).digest() + hashlib.sha256(self.valid).digest()).hexdigest()


def standard_library() -> Path:
    """The folder of this Python's standard library, which every machine has.

    >>> (standard_library() / "abc.py").exists()
    True
    """
    return Path(sysconfig.get_paths()["stdlib"])


def _files(folder: Path, pattern: str, skip: set[str]) -> Iterator[tuple[str, bytes]]:
    """(relative name, bytes) of the regular files below a folder, in the order of their names."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(names):
            path = Path(at, name)
            if name.endswith(pattern) and not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _is_binary(data: bytes) -> bool:
    """A zero byte, or more than 5 % of control characters that no text uses."""
    if b"\0" in data:
        return True
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=128)
    return bool(counts[[c for c in (*range(32), 127) if c not in b"\t\n\r\f\b\x1b"]].sum() > 0.05 * len(data))


def _place(name: str) -> float:
    """A number in [0, 1) that depends on a file's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def load_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """The text of a file, of all files below a folder, or (None) of the standard library's own *.py.

    Of the standard library, test, idlelib, lib2to3 and site-packages are left out. Files are split by a hash of
    their name, about one in twenty held out; where that leaves either side empty (a single file) the last twentieth
    of the text is. Held-out files come in the order of the hash. Binary and empty files in a folder are skipped.

    Raises InputError for a path that does not exist, is neither a file nor a folder, is binary or empty.

    >>> corpus = load_corpus(standard_library() / "json")
    >>> b"import" in corpus.train and len(corpus.valid) > 0
    True
    """
    source = standard_library() if path is None else Path(path)
    try:
        if source.is_dir():
            found = list(_files(source, ".py" if path is None else "", _NOT_OURS if path is None else set()))
        elif source.is_file():
            found = [(source.name, source.read_bytes())]
        elif source.exists():
            raise InputError(f"{source} is neither a file nor a folder")
        else:
            raise InputError(f"{source} does not exist")
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror or error}") from error
    texts = [(name, data) for name, data in found if data and not _is_binary(data)]
    if not texts:
        one = len(found) == 1 and source.is_file()
        what = ("is empty" if not found[0][1] else "is binary, not text") if one else "contains no text file"
        raise InputError(f"{source} {what}")
    valid = sorted((name for name, _ in texts if _place(name) < _SHARE), key=_place)
    by_name = dict(texts)
    train = b"".join(data for name, data in texts if name not in set(valid))
    held = b"".join(by_name[name] for name in valid)
    if not train or not held:
        whole = train + held
        cut = len(whole) - max(1, int(len(whole) * _SHARE))
        train, held = whole[:cut], whole[cut:]
    name = "the Python standard library" if path is None else str(source)
    return Corpus(name, train, held, len(found) - len(texts))


class Alphabet:
    """Bytes to integers and back: 0 is "unknown", then the bytes of a text in their order.

    >>> letters = Alphabet.of(b"banana")
    >>> len(letters), letters.encode(b"nab!").tolist(), letters.decode([3, 1, 2])
    (4, [3, 1, 2, 0], b'nab')
    """

    def __init__(self, known: bytes) -> None:
        if list(known) != sorted(set(known)):
            raise ValueError("Alphabet: the known bytes must be different and in order")
        self.known = known
        self._table = np.zeros(256, np.uint16)
        self._table[list(known)] = np.arange(1, len(known) + 1)

    @classmethod
    def of(cls, text: bytes) -> Alphabet:
        """The alphabet of a text."""
        return cls(bytes(np.flatnonzero(np.bincount(np.frombuffer(text, np.uint8), minlength=256)).tolist()))

    def __len__(self) -> int:
        return len(self.known) + 1

    def encode(self, text: bytes) -> NDArray[np.uint16]:
        """(len(text),) integers in [0, len(alphabet))."""
        return self._table[np.frombuffer(text, np.uint8)]

    def decode(self, tokens: ArrayLike) -> bytes:
        """The bytes of tokens; "unknown" becomes '?'."""
        return bytes(np.frombuffer(b"?" + self.known, np.uint8)[np.asarray(tokens, np.int64)].tolist())


class Batch(NamedTuple):
    """What a model reads in one step and what it is compared with; target is whatever the loss takes.

    >>> Batch(np.zeros((5, 2, 3)), np.zeros((5, 2, 1))).lengths is None
    True
    """

    x: Any  # (T, B, ...)
    target: Any
    lengths: Any = None  # (B,)
    reset: Any = None  # (T, B), True where a row starts afresh


class Stream:
    """An endless run of batches through a series, for truncated BPTT with the state carried over.

    x (N, ...), target (N, ...) -> batches of x (T, B, ...), target (T, B, ...). Row b starts at b · (N // B) and
    moves on T steps a batch, round the end; where it starts at 0 again, `reset` says so. Batch k depends on k
    alone: that is how a stopped run goes on exactly where it was.

    Raises ValueError for arrays of different lengths, and InputError for a series shorter than one batch.

    >>> stream = Stream(np.arange(12), np.arange(1, 13), batch_size=2, seq_length=3)
    >>> stream[0].x.tolist(), stream[1].x.tolist()
    ([[0, 6], [1, 7], [2, 8]], [[3, 9], [4, 10], [5, 11]])
    >>> stream[2].reset[:, 1].tolist()
    [True, False, False]
    """

    def __init__(self, x: Array, target: Array, batch_size: int, seq_length: int) -> None:
        if len(x) != len(target):
            raise ValueError(f"Stream: x and target must be equally long, got {len(x)} and {len(target)}")
        if batch_size < 1 or seq_length < 1:
            raise ValueError(f"Stream: sizes must be at least 1, got batch {batch_size}, sequence {seq_length}")
        if len(x) < batch_size * seq_length:
            raise InputError(f"the text is too short: {len(x)} steps for a batch of {batch_size} x {seq_length}; take a smaller batch or sequence")
        self.x, self.target = x, target
        self.seq_length, self.batch_size = seq_length, batch_size
        start = np.arange(batch_size) * (len(x) // batch_size)
        self._first = start + np.arange(seq_length)[:, None]  # (T, B)

    def __getitem__(self, k: int) -> Batch:
        at = (self._first + k * self.seq_length) % len(self.x)
        fresh = at == 0
        return Batch(self.x[at], self.target[at], None, fresh if k > 0 and fresh.any() else None)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` on, without end."""
        while True:
            yield self[start]
            start += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()
