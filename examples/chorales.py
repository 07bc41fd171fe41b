"""Bach's four-part chorales as arrays: read once from music21's corpus, kept as a small .npz; and notes written as a MIDI file.

step     a sixteenth note; a score is (T, 4) integers, voices soprano, alto, tenor, bass
REST     0, HOLD 1 (the note before goes on), else MIDI pitch - LOW + 2
It knows no model.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

REST, HOLD, LOW, HIGH = 0, 1, 36, 81  # the chorales lie within C2 and A5
SYMBOLS = HIGH - LOW + 3
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rnnfast" / "chorales.npz"


def score(parts: Sequence[Sequence[tuple[float, float, int]]], steps: int) -> np.ndarray:
    """(steps, V) of voices given as (start, duration, MIDI pitch) in quarter notes."""
    out = np.full((steps, len(parts)), REST, np.int16)
    for voice, notes in enumerate(parts):
        for start, duration, pitch in notes:
            first, last = round(4 * start), round(4 * (start + duration))
            if last > first:
                out[first:last, voice] = HOLD
                out[first, voice] = pitch - LOW + 2
    return out


def parse(limit: int | None = None) -> list[np.ndarray]:
    """Every chorale of music21's corpus with exactly four voices (about 370), in the order of its file names."""
    from music21 import corpus

    found = []
    for path in sorted(corpus.getComposer("bach"), key=str):
        if limit is not None and len(found) >= limit:
            break
        stream = corpus.parse(path)
        if len(stream.parts) != 4:
            continue
        parts = []
        for part in stream.parts:
            notes = part.flatten().notes
            parts.append([(float(n.offset), float(n.quarterLength), max(p.midi for p in n.pitches)) for n in notes if not n.duration.isGrace])
        pitches = [pitch for part in parts for *_, pitch in part]
        if all(parts) and min(pitches) >= LOW and max(pitches) <= HIGH:
            found.append(score(parts, round(4 * float(stream.duration.quarterLength))))
    return found


def chorales(limit: int | None = None) -> list[np.ndarray]:
    """The scores (T, 4); the whole corpus is parsed once (a minute) and cached, `limit` of them are parsed each time."""
    if CACHE.exists():
        with np.load(CACHE) as kept:
            return np.split(kept["steps"], np.cumsum(kept["lengths"])[:-1])[:limit]
    scores = parse(limit)
    if limit is None:
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        beside = CACHE.with_name(f"{os.getpid()}.writing.npz")
        np.savez_compressed(beside, steps=np.concatenate(scores).astype(np.int8), lengths=[len(s) for s in scores])
        os.replace(beside, CACHE)
    return scores


def notes(steps: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(voice, first step, steps, MIDI pitch) of a score (T, 4)."""
    found = []
    for voice, line in enumerate(np.asarray(steps, int).T):
        t = 0
        while t < len(line):
            end = t + 1
            if line[t] > HOLD:
                while end < len(line) and line[end] == HOLD:
                    end += 1
                found.append((voice, t, end - t, int(line[t]) + LOW - 2))
            t = end
    return found


def write_midi(path: Path, steps: np.ndarray, tempo: int = 90) -> None:
    """A MIDI file, format 0, four steps a beat, one channel a voice."""

    def quantity(n: int) -> bytes:  # seven bits a byte, most significant first, all but the last with the eighth bit set
        out = [n & 127]
        while n := n >> 7:
            out.insert(0, n & 127 | 128)
        return bytes(out)

    events = [(t, 1, bytes([0x90 | voice, pitch, 80])) for voice, t, _, pitch in notes(steps)]
    events += [(t + length, 0, bytes([0x80 | voice, pitch, 0])) for voice, t, length, pitch in notes(steps)]
    track, now = b"\x00\xff\x51\x03" + struct.pack(">I", 60_000_000 // tempo)[1:], 0
    for t, _, event in sorted(events):
        track += quantity(120 * (t - now)) + event
        now = t
    track += b"\x00\xff\x2f\x00"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, 480, b"MTrk", len(track)) + track)
