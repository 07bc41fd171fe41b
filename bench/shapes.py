"""What is measured: a fixed grid, a fixed short subset of it, and workloads named after who runs them.

Dims as everywhere: T time, B batch, I input, H hidden, L layers, D directions, R state width. One `Shape` is one
measurement: a cell, its sizes, a mode and a thread count. Knows nothing of any library and nothing of time.
"""

from __future__ import annotations

import dataclasses
import functools
import random

BATCHES = (1, 2, 3, 8, 31, 32, 64, 128, 256)
HIDDENS = (16, 33, 64, 128, 250, 256, 512, 1024, 2048)
TIMES = (1, 10, 100, 1000)
CELLS = ("lstm", "gru", "rnn_tanh")
MODES = ("inference", "training")
LARGEST = 2**22  # T * B * H of the largest shape
SEED = 20260101
# names of workloads that targets are set for
PRECISION = "precision"  # timed in every precision
STEP = "character model's step"
TRAINING = "one layer's training"

GATES = {
    "rnn_tanh": 1,
    "rnn_relu": 1,
    "rnn_sigmoid": 1,
    "rnn_identity": 1,
    "lstm": 4,
    "lstm_peephole": 4,
    "gru": 3,
    "gru_reset_before": 3,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One measurement. `threads` 0 means all of them; `lengths` None means padded, else each row's length. With a `vocabulary` V the layers
    are a language model's: an embedding of V symbols in I numbers before them, a softmax over V behind, and a training step ends with Adam."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    mode: str = "inference"
    threads: int = 1
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    skip: bool = False
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None
    vocabulary: int = 0
    name: str = ""

    @property
    def D(self) -> int:
        """Directions."""
        return 2 if self.bidirectional else 1

    @property
    def R(self) -> int:
        """Width of what a direction hands on in time and upwards."""
        return self.proj_size or self.H

    @property
    def G(self) -> int:
        """Gates."""
        return GATES[self.cell]

    def layer_input(self, layer: int) -> int:
        """What layer `layer` reads: x, then the layer below, with skip both."""
        if layer == 0:
            return self.I
        return self.D * self.R + (self.I if self.skip else 0)

    @property
    def steps(self) -> int:
        """Row-steps that carry data: T * B, or the sum of the lengths."""
        return sum(self.lengths) if self.lengths is not None else self.T * self.B

    @property
    def flops(self) -> float:
        """Useful floating point operations of one call: 2 * G * H * (I + R) a row-step, training three times that. Adam's are not counted."""
        per_step = 0
        for layer in range(self.num_layers):
            per_step += 2 * self.G * self.H * (self.layer_input(layer) + self.R)
            if self.proj_size:
                per_step += 2 * self.R * self.H
        per_step = per_step * self.D + 2 * self.D * self.R * self.vocabulary
        return float(per_step * self.steps * (3 if self.mode == "training" else 1))

    @property
    def label(self) -> str:
        """The shape in one short line."""
        parts = [self.cell, f"T={self.T} B={self.B} I={self.I} H={self.H}"]
        if self.num_layers > 1:
            parts.append(f"L={self.num_layers}")
        if self.bidirectional:
            parts.append("D=2")
        if self.proj_size:
            parts.append(f"R={self.proj_size}")
        if self.skip:
            parts.append("skip")
        if self.vocabulary:
            parts.append(f"V={self.vocabulary}")
        if self.lengths is not None:
            parts.append("ragged")
        if self.dtype != "float32":
            parts.append(self.dtype)
        parts += [self.mode, f"threads={self.threads or 'all'}"]
        return (f"{self.name}: " if self.name else "") + " ".join(parts)

    @property
    def stratum(self) -> str:
        """The row of the targets' table that this shape counts in."""
        if self.T == 1:
            return "T=1"
        if self.B <= 3:
            return f"B<=3 {self.mode}"
        return f"B>=8 {'lstm' if self.cell.startswith('lstm') else 'gru, rnn'} {self.mode}"


@functools.lru_cache
def grid() -> tuple[Shape, ...]:
    """Every (T, B, H) that fits, with every cell; mode and threads are drawn, with a fixed seed. Shuffled, so that any
    prefix is a fair sample and a slow drift of the machine touches no stratum alone."""
    draw = random.Random(SEED)
    shapes = []
    for T in TIMES:
        for B in BATCHES:
            for H in HIDDENS:
                if T * B * H > LARGEST:
                    continue
                for cell in CELLS:
                    shapes.append(Shape(cell, T, B, H, H, mode=draw.choice(MODES), threads=draw.choice((1, 0))))
    draw.shuffle(shapes)
    return tuple(shapes)


@functools.lru_cache
def short() -> tuple[Shape, ...]:
    """The ten-minute subset: the first shapes of the grid's own order, the ten dearest of them left out."""
    first = grid()[:150]
    dear = set(sorted(first, key=lambda shape: -shape.flops)[:10])
    return tuple(shape for shape in first if shape not in dear)


def ragged_lengths(T: int, B: int, shortest: int) -> tuple[int, ...]:
    """B lengths uniform in shortest..T from a fixed seed; the longest is T, as in any padded batch."""
    draw = random.Random(SEED)
    lengths = [draw.randint(shortest, T) for _ in range(B)]
    lengths[draw.randrange(B)] = T
    return tuple(lengths)


@functools.lru_cache
def named() -> tuple[Shape, ...]:
    """Workloads that people run. Sizes and the peers' figures for them are discussed in bench/README.md."""
    shapes: list[Shape] = []
    for cell in ("lstm", "gru"):
        # a character model's recurrent part, at three sizes
        for T, B, H in ((50, 50, 128), (100, 32, 256), (100, 64, 512)):
            shapes.append(Shape(cell, T, B, H, H, "training", 0, num_layers=2, name="character model"))
            # and its whole step: embedding, softmax, clipping and Adam too
            shapes.append(Shape(cell, T, B, 64, H, "training", 0, num_layers=2, vocabulary=129, name=STEP))
    for cell in CELLS:
        # the sizes that training is often measured at
        for B, H in ((1, 16), (8, 64), (32, 128), (64, 256), (64, 512)):
            shapes.append(Shape(cell, 100, B, H, H, "training", 0, name=TRAINING))
        # reinforcement learning: small nets, many updates
        shapes.append(Shape(cell, 128, 8, 64, 64, "training", 0, num_layers=2, name="RL update"))
        # speech: one utterance through a deep bidirectional stack
        shapes.append(Shape(cell, 200, 1, 256, 256, "inference", 0, num_layers=4, bidirectional=True, name="speech"))
        # forecasting: a week of hours, few inputs
        shapes.append(Shape(cell, 168, 64, 8, 64, "training", 0, name="forecasting"))
        # packed sequences: a batch of very unequal lengths
        shapes.append(Shape(cell, 500, 32, 128, 128, "training", 0, lengths=ragged_lengths(500, 32, 50), name="ragged"))
        shapes.append(Shape(cell, 500, 32, 128, 128, "training", 0, name="ragged's padded twin"))
    for cell in ("lstm", "gru"):
        # streaming audio: one frame at a time, one stream
        for H in (16, 64, 256):
            shapes.append(Shape(cell, 1, 1, H, H, "streaming", 1, name="streaming audio"))
    shapes.append(Shape("lstm", 100, 32, 512, 512, "training", 0, proj_size=256, name="projected"))
    return tuple(shapes)


@functools.lru_cache
def precision() -> tuple[Shape, ...]:
    """Where bfloat16 and int8 are timed beside float32: weights that stream (B=1), and products (B=32)."""
    sizes = [(1, 256), (1, 512), (1, 1024), (32, 256), (32, 512)]
    return tuple(Shape(cell, 100, B, H, H, mode, n, name=PRECISION) for B, H in sizes for mode in MODES for cell in CELLS for n in (1, 0))


LISTS = {"grid": grid, "short": short, "named": named, "precision": precision}

if __name__ == "__main__":
    for list_name, shapes_of in LISTS.items():
        print(f"{list_name}: {len(shapes_of())} shapes, {sum(s.flops for s in shapes_of()) / 1e9:.0f} GFLOP a pass")
