from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

class Layout:
    T: int
    B: int
    packed: bool
    ragged: bool
    tokens: int
    def __init__(self, T: int, B: int, lengths: NDArray[np.int64] | None = None) -> None: ...
    @staticmethod
    def from_batch_sizes(batch_sizes: NDArray[np.int64]) -> Layout: ...

class Packs:
    """A layer's weights in the kernels' order, kept from call to call."""

class Run:
    """A layer's forward as its backward needs it: what was checked, and a tape for each direction."""

    tapes: list[Array]  # (n,), as csrc/sequence.hpp lays them out
    def check_kept(self) -> None: ...  # raises where an array that backward reads has been resized

class Stream:
    """One step at a time over a snapshot of a layer's weights; `layer.stream()` makes one."""

    state: Any
    def __init__(
        self, cell: str, weights: list[list[Array | None]], compute: str, batch: int, taps: int, skip: bool, fresh_h: Array | None, fresh_c: Array | None
    ) -> None: ...
    def __call__(self, x: Array, out: Array | None = None) -> Array: ...
    def sequence(self, x: Array, state: Any, threads: int = ...) -> tuple[Array, Any] | None: ...
    def reset(self, mask: NDArray[np.bool_] | None = None) -> None: ...
    def copy(self) -> Stream: ...
    def refresh(self) -> None: ...

def tape_size(cell: str, layout: Layout, weights: list[Array | None]) -> int: ...

# One layer, in as many directions as there are tuples of names. x, y, cells, dy and dx are the layer's; states and their gradients
# (L*D, B, ...) are those of all layers; resets and snapshot are empty or hold one entry a direction.
def forward(
    cell: str,
    layout: Layout,
    params: dict[str, Array],
    names: tuple[tuple[str, ...], ...],
    layer: int,
    compute: str | None,
    taps: int,
    x: Array,
    y: Array | None,
    h_0: Array | None,
    c_0: Array | None,
    h_T: Array | None,
    c_T: Array | None,
    resets: list[NDArray[np.int64]],
    fresh_h: Array | None,
    fresh_c: Array | None,
    cells: Array | None,
    tape: bool,
    recompute: bool,
    snapshot: list[Packs],
    threads: int | None,
) -> tuple[Array, Run | None]: ...  # y, and what backward needs where a tape is wanted
def forward_plain(
    cell: str, params: dict[str, Array], names: tuple[tuple[str, ...], ...], x: Array, tape: bool
) -> tuple[Array, Any, Run | None, tuple[int, int, int, int, int, int]] | None: ...  # as rnnfast.functional.forward; None: not such a call
def backward(
    run: Run,
    dy: Array,
    dh_T: Array | None,
    dc_T: Array | None,
    need_dx: bool,
    dh_0: Array | None,
    dc_0: Array | None,
    gradients: dict[str, Array],
    accumulate: bool,
    threads: int | None,
) -> tuple[Array | None, list[tuple[Array, Array]]]: ...  # dx, and for each direction with resets the gradients of the states they put
def peak(compute: str, rounds: int) -> float: ...  # operations done in registers: what a product can reach at most
def targets() -> list[str]: ...
def target() -> str: ...
def use_target(name: str) -> None: ...
def softmax(
    logits: Array, targets: NDArray[np.int64], weights: NDArray[np.float64] | None, weight: float, gradient: Array | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def scatter(table: Array, rows: NDArray[np.int64], values: Array) -> None: ...
def adam(
    p: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    rate: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    decay: float,
    kept: float,
) -> None: ...
def share_small_jobs(always: bool) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def lend_threads(parallel: int, number: int, count: int) -> None: ...
def exchange(capsule: object, types: tuple[type, type]) -> None: ...

# Over the tensors of the library named by `exchange`: None where they are not plain CPU memory of one float type and fitting shapes.
# low: products may be in bfloat16, where that is faster.
def stack_forward(
    cell: int,
    layers: int,
    directions: int,
    batch_first: bool,
    low: bool,
    threads: int,
    grad: bool,
    x: object,
    batch_sizes: object,
    h: object,
    c: object,
    weights: Sequence[object],
    /,
) -> tuple[Any, Any, Any, Any] | None: ...
def stack_backward(
    cell: int,
    layers: int,
    directions: int,
    batch_first: bool,
    low: bool,
    threads: int,
    grad: bool,
    x: object,
    batch_sizes: object,
    h: object,
    c: object,
    weights: Sequence[object],
    tape: object,
    dy: object,
    dh_T: object,
    dc_T: object,
    needs: tuple[bool, ...],
    /,
) -> tuple[Any, ...] | None: ...
