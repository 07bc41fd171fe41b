"""The recurrent layers as objects: LSTM, GRU, RNN and NARX hold parameters, their start values and the tapes of `functional`.

Dims    T time, B batch, I input, H hidden, R output width (H, or proj_size), L layers, D directions.
Names and gate order are torch's, so that a state_dict moves both ways; beside them weight_peep_l{k} (3, H), rows i f o, bias_hr_l0 of a NARX,
and h_0 (L*D, 1, R), c_0 (L*D, 1, H) where initial states are learned. The equations are in `rnnfast.reference`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import functional
from ._core import Stream
from .functional import State
from .module import Array, Module

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GRU", "LSTM", "NARX", "RNN", "NarxStream", "Stream"]


def _whole(name: str, what: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: {what} must be a whole number of at least {least}, got {value!r}")
    return int(value)


class _Recurrent(Module):
    """What LSTM, GRU and RNN share: everything but the cell."""

    recurrent = True
    _gates = 1

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float, bidirectional: bool,
        proj_size: int, skip: bool, learn_initial_state: bool, forget_bias: float, dtype: DTypeLike, seed: int | None, compute_dtype: str | None,
        recompute: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self._snapshot: dict[str, Any] = {}
        self._quick: tuple[int, Stream] | None = None  # for a batch of so many rows
        name = self._name
        self.input_size = _whole(name, "input_size", input_size)
        self.hidden_size = _whole(name, "hidden_size", hidden_size)
        self.num_layers = _whole(name, "num_layers", num_layers)
        self.proj_size = _whole(name, "proj_size", proj_size, 0)
        if self.proj_size >= hidden_size:
            raise ValueError(f"{name}: proj_size must be smaller than hidden_size = {hidden_size}, got {proj_size}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{name}: dropout must be a probability in [0, 1], got {dropout!r}")
        if forget_bias and not bias:
            raise ValueError(f"{name}: forget_bias needs bias=True")
        self.cell, self.bias, self.batch_first, self.dropout = cell, bool(bias), bool(batch_first), float(dropout)
        self.bidirectional, self.skip = bool(bidirectional), bool(skip)
        if compute_dtype not in ((None, "float32", "bfloat16", "int8") if np.dtype(dtype) == np.float32 else (None, "float64")):
            raise ValueError(f"{name}: compute_dtype must be bfloat16 or int8, with dtype float32, or None, got {compute_dtype!r} with {np.dtype(dtype)}")
        self.compute_dtype, self.recompute = compute_dtype, bool(recompute)
        self.generator = np.random.default_rng(seed)
        G, H, I, D = self._gates, hidden_size, input_size, 1 + self.bidirectional
        R = proj_size or H
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(num_layers):
            wide = I if layer == 0 else D * R + (I if skip else 0)
            for direction in range(D):
                s = f"_l{layer}" + ("_reverse" if direction else "")
                shapes |= {f"weight_ih{s}": (G * H, wide), f"weight_hh{s}": (G * H, R)}
                if bias:
                    shapes |= {f"bias_ih{s}": (G * H,), f"bias_hh{s}": (G * H,)}
                if proj_size:
                    shapes[f"weight_hr{s}"] = (R, H)
                if cell == "lstm_peephole":
                    shapes[f"weight_peep{s}"] = (3, H)
        self.learn_initial_state = bool(learn_initial_state)
        if learn_initial_state:
            shapes["h_0"] = (num_layers * D, 1, R)
            if self.paired:
                shapes["c_0"] = (num_layers * D, 1, H)
        self._allocate(shapes, dtype)
        bound = 1 / math.sqrt(H)
        for key, value in self.parameters().items():
            if key not in ("h_0", "c_0"):
                value[...] = self.generator.uniform(-bound, bound, value.shape)  # torch's: U(−1/√H, 1/√H) for all
            if forget_bias and key.startswith("bias_ih"):
                value[H : 2 * H] += forget_bias

    def train(self, mode: bool = True) -> Self:
        """Training mode, or with mode=False eval mode: parameters are read-only, and calls reuse the weights in the kernels' order."""
        self._snapshot, self._quick = {}, None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_snapshot", "_quick")}

    @property
    def paired(self) -> bool:
        """Is the state a pair (h, c)?"""
        return self.cell.startswith("lstm") or (self.cell == "gru" and self.proj_size > 0)

    @property
    def output_size(self) -> int:
        """Width of y: D*R, with skip L*D*R."""
        return (1 + self.bidirectional) * (self.proj_size or self.hidden_size) * (self.num_layers if self.skip else 1)

    def __repr__(self) -> str:
        options = {"num_layers": 1, "bidirectional": False, "proj_size": 0, "dropout": 0.0, "skip": False, "compute_dtype": None}
        said = "".join(f", {k}={getattr(self, k)}" for k, default in options.items() if getattr(self, k) != default)
        return f"{self._name}({self.input_size}, {self.hidden_size}{said}, cell={self.cell!r}, dtype={self.dtype})"

    def __call__(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None, *, cells: bool = False) -> Any:
        """y, state = layer(x, state=None, lengths=None, reset=None); with cells=True (LSTMs) y, state, c.

        Args:
            x: (T, B, I), with batch_first (B, T, I), or (T, I) for one sequence, in the parameters' dtype.
            state: h (L*D, B, R), or (h, c) with c (L*D, B, H); (L*D, R) and (L*D, H) for one sequence. None: learned or zeros.
            lengths: whole numbers (B,) in any order, 0 allowed; past a row's end y is 0 and x is never read.
            reset: bool (T, B), with batch_first (B, T): True starts a row afresh before that step.

        Returns:
            y (T, B, D*R), with skip (T, B, L*D*R), laid out like x, and the state at each row's own end. In training mode y is read-only, since
            backward reads it, and x must not change before backward (RNNFAST_DEBUG=1 checks that).

        Raises:
            ValueError: naming the argument, the shape or dtype expected and what came.
        """
        if not self.training:
            if lengths is None and reset is None and not (cells or self.batch_first or self.bidirectional or self.skip):
                result = self._short(x, state)
                if result is not None:
                    return result
            return self._forward(x, state, lengths, reset, cells, False)[0]
        with self._alone():
            result, tape = self._forward(x, state, lengths, reset, cells, True)
            self._push(tape)
            return result

    def _short(self, x: Any, state: Any) -> tuple[Array, State] | None:
        """y and the state of a plain call, the same bits without the general call's checks, where those would count; or None."""
        weights = max(self.input_size, self.hidden_size) * self.hidden_size * self._gates
        if not isinstance(x, np.ndarray) or x.ndim != 3 or weights > 1 << 22 or not 0 < x.shape[0] * x.shape[1] * weights < 1 << 25:
            return None
        B = x.shape[1]
        quick = self._quick
        if quick is None or quick[0] != B:
            self._quick = quick = (B, self.stream(B))
        try:
            return quick[1].sequence(x, state)
        except (TypeError, ValueError, RuntimeError):  # the general call has the better words
            return None

    def _forward(self, x: Any, state: Any, lengths: Any, reset: Any, cells: bool, training: bool) -> tuple[Any, Any]:
        x = functional._array(x, "x", self._name)
        single = x.ndim == 2
        if x.ndim not in (2, 3):
            raise ValueError(f"{self._name}: x must have shape {'(B, T, I)' if self.batch_first else '(T, B, I)'} or (T, I), got {x.shape}")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"{self._name}: x must have input_size = {self.input_size} in its last axis, got shape {x.shape}")
        flip = self.batch_first and not single
        if single:
            x = x[:, None]
            if state is not None:
                state = tuple(np.asarray(part)[:, None] for part in state) if self.paired else np.asarray(state)[:, None]
            reset = None if reset is None else np.asarray(reset)[:, None]
        elif flip:
            x = x.swapaxes(0, 1)
            reset = None if reset is None else np.asarray(reset).swapaxes(0, 1)
        masks = None
        if training and self.dropout > 0 and self.num_layers > 1:
            shape = (*x.shape[:2], (1 + self.bidirectional) * (self.proj_size or self.hidden_size))
            scale = self.dtype.type(0 if self.dropout == 1 else 1 / (1 - self.dropout))
            assert self.generator is not None
            masks = [scale * (self.generator.random(shape, np.float32) >= self.dropout) for _ in range(self.num_layers - 1)]
        y, new, tape, *c = functional.forward(
            self.cell, x, state, self._parameters, num_layers=self.num_layers, bidirectional=self.bidirectional, skip=self.skip, lengths=lengths,
            reset=reset, dropout_masks=masks, cells=cells, tape=training, snapshot=None if training else self._snapshot, compute_dtype=self.compute_dtype,
            recompute=self.recompute,
        )  # fmt: skip
        parts = [y, *c]
        if single:
            parts = [part[:, 0] for part in parts]
            new = tuple(part[:, 0] for part in new) if self.paired else new[:, 0]
        elif flip:
            parts = [part.swapaxes(0, 1) for part in parts]
        return (parts[0], new, *parts[1:]), (tape, single, flip)

    def backward(self, dy: Any, dstate: Any = None, *, need_dx: bool = True, need_dstate: bool = True) -> tuple[Array, State]:
        """dx, dstate = layer.backward(dy, dstate=None): undoes the latest forward that is not undone yet.

        dy is laid out like y and never read past a row's end; dstate is like the state, None for zeros. Returns the gradients of x and of the
        initial state; parameter gradients add to `gradients()`. need_dx=False saves a product and returns None for dx, need_dstate=False
        saves one step's and returns None for dstate.

        Raises RuntimeError without a forward in training mode, ValueError for a wrong shape or dtype, after which the tape is still there.
        """
        with self._alone():
            tape, single, flip = self._pop()
            try:
                dy = functional._array(dy, "dy", self._name)
                dy = dy[:, None] if single else dy.swapaxes(0, 1) if flip else dy
                if single and dstate is not None:
                    dstate = tuple(np.asarray(part)[:, None] for part in dstate) if self.paired else np.asarray(dstate)[:, None]
                _ = self.flat_gradient
                dx, d, _ = functional.backward(tape, dy, dstate, self._gradients, need_dx=need_dx, need_dstate=need_dstate)
            except (KeyError, TypeError, ValueError, IndexError):
                self._push((tape, single, flip))  # a wrong dy costs nothing
                raise
        if single:
            dx = None if dx is None else dx[:, 0]
            d = (d[0][:, 0], d[1][:, 0]) if isinstance(d, tuple) else None if d is None else d[:, 0]
        elif flip and dx is not None:
            dx = dx.swapaxes(0, 1)
        return dx, d  # type: ignore[return-value]

    def stream(self, batch: int = 1, state: Any = None) -> Stream:
        """A handle that runs one time step a call over a snapshot of the weights: y = stream(x), x (B, I) -> y (B, R), with skip (B, L*R).

        `stream.state` reads and sets the state (L, B, R) or the pair; `stream.reset(mask=None)` puts rows back to the initial state;
        `stream.copy()` branches; `stream.refresh()` reads the weights anew. Bit for bit what the layer itself gives on the whole sequence. A step
        that is worth it runs on several threads, as many as there were at the snapshot, and on one where their number has changed since.

        Raises ValueError where the layer is bidirectional: its backward direction would need the future.

        >>> layer = GRU(2, 3, seed=0).eval()
        >>> x = np.ones((4, 1, 2), np.float32)
        >>> stream = layer.stream()
        >>> bool(np.array_equal(np.stack([stream(step) for step in x]), layer(x)[0]))
        True
        """
        if self.bidirectional:
            raise ValueError(f"{self._name}: a bidirectional layer has no stream: its reverse direction starts at the end of the sequence")
        weights = [functional._weights(self._parameters, f"_l{layer}", self._name) for layer in range(self.num_layers)]
        fresh = [self._parameters.get(key) for key in ("h_0", "c_0")]
        stream = Stream(self.cell, weights, self.compute_dtype or self.dtype.name, _whole(self._name, "batch", batch), 1, self.skip, *fresh)
        if state is not None:
            stream.state = state
        return stream


class LSTM(_Recurrent):
    """Long short-term memory over sequences; torch.nn.LSTM's parameters, order of gates i f g o.

        i = σ(W_i x + b_ii + U_i h' + b_hi [+ p_i c'])      f, g alike (g with tanh, and without peephole)
        c = f c' + i g
        o = σ(W_o x + b_io + U_o h' + b_ho [+ p_o c])       h = o tanh(c), projected y = W_hr h

    Args:
        input_size, hidden_size: I and H.
        num_layers: L layers, each reading the one below.
        bias: whether bias_ih and bias_hh exist.
        batch_first: x and y are (B, T, ·) instead of (T, B, ·); the state is not.
        dropout: probability of zeroing an element of y_{l-1} where layer l reads it, in training.
        bidirectional: a second set of weights reads the sequence from its end; y is (T, B, 2*R).
        proj_size: R > 0 projects h to R values, which are the output and what the recurrence reads.
        peephole: diagonal weight_peep_l{k} (3, H), rows i f o: i and f see c_{t-1}, o sees c_t.
        skip: layers above the first also read x, and y is every layer's output side by side (T, B, L*D*R).
        learn_initial_state: parameters h_0 and c_0 are the state of a call that is given none, and what a reset puts.
        forget_bias: added to bias_ih's forget gate at the start; 1 or more helps with long gaps.
        dtype: "float32" or "float64".
        seed: of the start values U(-1/√H, 1/√H) and of dropout.
        compute_dtype: "bfloat16", or in eval mode "int8", rounds the factors of every product, as `rnnfast.functional.forward` says; parameters
            and states stay float32.
        recompute: keep a fifth of what backward needs and compute the rest again there, for the same bits in a third more time.

    Sources: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate); Gers & Schmidhuber 2000 (peepholes); Sak et al. 2014
    (projection).

    >>> layer = LSTM(10, 20, num_layers=2, seed=0)
    >>> y, (h, c) = layer(np.zeros((5, 3, 10), np.float32))
    >>> y.shape, h.shape, c.shape
    ((5, 3, 20), (2, 3, 20), (2, 3, 20))
    >>> dx, (dh, dc) = layer.backward(np.ones_like(y))
    >>> dx.shape, layer.gradients()["weight_hh_l1"].shape
    ((5, 3, 10), (80, 20))
    """

    _gates = 4

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
        bidirectional: bool = False, proj_size: int = 0, *, peephole: bool = False, skip: bool = False, learn_initial_state: bool = False,
        forget_bias: float = 0.0, dtype: DTypeLike = "float32", seed: int | None = None, compute_dtype: str | None = None,
        recompute: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            "lstm_peephole" if peephole else "lstm", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, skip,
            learn_initial_state, forget_bias, dtype, seed, compute_dtype, recompute,
        )  # fmt: skip


class GRU(_Recurrent):
    """Gated recurrent unit over sequences; torch.nn.GRU's parameters, order of gates r z n.

        r, z = σ(W x + b_i + U h' + b_h)
        reset_after:   n = tanh(W_n x + b_in + r (U_n h' + b_hn))    torch, cuDNN
        else:          n = tanh(W_n x + b_in + b_hn + U_n (r h'))    Cho et al., ONNX's default
        h = (1 − z) n + z h'

    Args as for `LSTM`; reset_after chooses between the two forms. proj_size > 0 keeps h as the state c beside the projected output, so that the state
    is a pair (h, c) as an LSTM's; it needs reset_after=True.

    Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder".

    >>> layer = GRU(10, 20, bidirectional=True, seed=0)
    >>> y, h = layer(np.zeros((5, 3, 10), np.float32), lengths=[5, 0, 2])
    >>> y.shape, h.shape, bool(y[2:, 2].any())
    ((5, 3, 40), (2, 3, 20), False)
    """

    _gates = 3

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
        bidirectional: bool = False, proj_size: int = 0, *, reset_after: bool = True, skip: bool = False, learn_initial_state: bool = False,
        dtype: DTypeLike = "float32", seed: int | None = None, compute_dtype: str | None = None,
        recompute: bool = False,
    ) -> None:  # fmt: skip
        if proj_size and not reset_after:
            raise ValueError("GRU: proj_size needs reset_after=True: r multiplies the H-wide state before the product")
        super().__init__(
            "gru" if reset_after else "gru_reset_before", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, skip,
            learn_initial_state, 0.0, dtype, seed, compute_dtype, recompute,
        )  # fmt: skip


class RNN(_Recurrent):
    """The simple recurrent (Elman) net over sequences: h = f(W x + b_i + U h' + b_h), projected y = W_hr h.

    Args as for `LSTM`; nonlinearity f is "tanh", "relu", "sigmoid" or "identity". proj_size > 0 makes it a net with output recurrence.

    Source: Elman 1990, "Finding structure in time".

    >>> layer = RNN(10, 20, nonlinearity="relu", seed=0)
    >>> y, h = layer(np.zeros((5, 10), np.float32))
    >>> y.shape, h.shape
    ((5, 20), (1, 20))
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
        bidirectional: bool = False, proj_size: int = 0, *, nonlinearity: str = "tanh", skip: bool = False, learn_initial_state: bool = False,
        dtype: DTypeLike = "float32", seed: int | None = None, compute_dtype: str | None = None,
        recompute: bool = False,
    ) -> None:  # fmt: skip
        if nonlinearity not in ("tanh", "relu", "sigmoid", "identity"):
            raise ValueError(f"RNN: nonlinearity must be tanh, relu, sigmoid or identity, got {nonlinearity!r}")
        super().__init__(
            f"rnn_{nonlinearity}", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, skip, learn_initial_state,
            0.0, dtype, seed, compute_dtype, recompute,
        )  # fmt: skip


class NARX(Module):
    """A nonlinear autoregressive net with exogenous inputs, running on its own outputs.

        hidden_t = σ(W [x_t, …, x_{t-N+1}] + b_i + U [y_{t-1}, …, y_{t-K}] + b_h)
        y_t      = V hidden_t + b_r

    Args:
        input_size, output_size, hidden_size: I, O and H.
        input_taps: N >= 1, how many inputs it sees, the present one among them.
        output_taps: K >= 1, how many of its own outputs it sees.
        dtype: "float32" or "float64".        seed: of the start values U(-1/√H, 1/√H).

    The state is (x_past (N-1, B, I), newest first, y_past (1, B, K*O), newest first). Parameters: weight_ih_l0 (H, N*I), weight_hh_l0 (H, K*O), bias_ih_l0,
    bias_hh_l0 (H,), weight_hr_l0 (O, H), bias_hr_l0 (O,), taps newest first.

    Sources: Lin, Horne, Tiňo & Giles 1996, "Learning long-term dependencies in NARX recurrent neural networks".

    >>> layer = NARX(1, 1, 8, input_taps=3, output_taps=2, seed=0)
    >>> y, (x_past, y_past) = layer(np.ones((6, 4, 1), np.float32))
    >>> y.shape, x_past.shape, y_past.shape, bool((y_past[0, :, 0] == y[-1, :, 0]).all())
    ((6, 4, 1), (2, 4, 1), (1, 4, 2), True)
    """

    recurrent = True

    def __init__(
        self, input_size: int, output_size: int, hidden_size: int, input_taps: int, output_taps: int, *, dtype: DTypeLike = "float32", seed: int | None = None
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "output_size": output_size, "hidden_size": hidden_size, "input_taps": input_taps, "output_taps": output_taps}
        self.input_size, self.output_size, self.hidden_size, self.input_taps, self.output_taps = (_whole("NARX", *item) for item in sizes.items())
        H, wide, past = hidden_size, input_taps * input_size, output_taps * output_size
        self._allocate(
            {
                "weight_ih_l0": (H, wide), "weight_hh_l0": (H, past), "bias_ih_l0": (H,), "bias_hh_l0": (H,), "weight_hr_l0": (output_size, H),
                "bias_hr_l0": (output_size,),
            },
            dtype,
        )  # fmt: skip
        self.generator = np.random.default_rng(seed)
        self.flat[...] = self.generator.uniform(-1 / math.sqrt(H), 1 / math.sqrt(H), self.flat.shape)

    def __call__(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> tuple[Array, tuple[Array, Array]]:
        """y, state = layer(x, state=None, lengths=None, reset=None), as for the other layers; x (T, B, I) or (T, I).

        A reset makes both pasts zero. Raises ValueError for wrong shapes or dtypes.
        """
        if not self.training:
            return self._forward(x, state, lengths, reset, False)[0]
        with self._alone():
            result, tape = self._forward(x, state, lengths, reset, True)
            self._push(tape)
            return result

    def _forward(self, x: Any, state: Any, lengths: Any, reset: Any, training: bool) -> tuple[tuple[Array, tuple[Array, Array]], Any]:
        x = functional._array(x, "x", "narx")
        single = x.ndim == 2
        x = x[:, None] if single else x
        if x.ndim != 3 or x.shape[2] != self.input_size or x.dtype != self.dtype:
            raise ValueError(f"narx: x must be {self.dtype} of shape (T, B, I) or (T, I) with I = {self.input_size}, got {x.dtype} of {x.shape}")
        T, B, I = x.shape
        N, S = self.input_taps, self.output_taps * self.output_size
        if state is None:
            x_past, y_past = np.zeros((N - 1, B, I), self.dtype), None
        else:
            if not isinstance(state, (tuple, list)) or len(state) != 2:
                raise ValueError("narx: state must be a pair (x_past, y_past)")
            x_past, y_past = (np.asarray(part) for part in state)
            if single:
                x_past, y_past = x_past[:, None], y_past[:, None]
            if x_past.shape != (N - 1, B, I) or y_past.shape != (1, B, S) or x_past.dtype != self.dtype:
                raise ValueError(f"narx: state must be x_past {(N - 1, B, I)} and y_past {(1, B, S)} of {self.dtype}, got {x_past.shape} and {y_past.shape}")
        ends = None if lengths is None else functional._whole(lengths, "lengths", "narx")
        functional._layout(x, ends, None, "narx")  # the lengths fit
        cut = functional._reset(None if reset is None else np.asarray(reset)[:, None] if single else reset, T, B, ends, "narx")
        whole = np.concatenate((x_past[::-1], x))  # (N-1+T, B, I), oldest first
        known = None
        if cut is not None:  # of the N inputs a step sees, those before its row's latest reset count as zeros
            latest = np.maximum.accumulate(np.where(cut, np.arange(T)[:, None], -T - N), axis=0)
            known = np.arange(T)[:, None, None] - np.arange(N) >= latest[..., None]  # (T, B, N)
        windows = np.lib.stride_tricks.sliding_window_view(whole, N, axis=0)[..., ::-1].swapaxes(2, 3)  # (T, B, N, I), newest first
        if known is not None:
            windows = np.where(known[..., None], windows, 0)
        taps = np.ascontiguousarray(windows).reshape(T, B, N * I)
        y, y_past, tape = functional.forward(
            "rnn_sigmoid", taps, y_past, self._parameters, lengths=ends, reset=cut, output_taps=self.output_taps, tape=training
        )
        rows = np.full(B, T) if ends is None else ends
        at = rows + np.arange(N - 2, -1, -1)[:, None]  # (N-1, B): where each row's latest inputs lie, newest first
        x_past = whole[at, np.arange(B)]
        seen = None
        if cut is not None:
            latest = np.where(cut, np.arange(T)[:, None], -T - N).max(axis=0, initial=-T - N)
            seen = (at - (N - 1) >= latest)[..., None]
            x_past = np.where(seen, x_past, 0)
        parts = (y[:, 0], (x_past[:, 0], y_past[:, 0])) if single else (y, (x_past, y_past))
        return parts, (tape, single, known, at, seen)

    def backward(self, dy: Any, dstate: Any = None) -> tuple[Array, tuple[Array, Array]]:
        """dx, (dx_past, dy_past) = layer.backward(dy, dstate=None); parameter gradients add to `gradients()`. As for the other layers."""
        with self._alone():
            kept = self._pop()
            tape, single, known, at, seen = kept
            try:
                dy = functional._array(dy, "dy", "narx")
                dy = dy[:, None] if single else dy
                dx_end, dy_end = (None, None) if dstate is None else (np.asarray(part)[:, None] if single else np.asarray(part) for part in dstate)
                if dx_end is not None:
                    functional._expect(dx_end, "dstate x_past", "(N-1, B, I)", (*at.shape, self.input_size), self.dtype, "narx")
                _ = self.flat_gradient
                dtaps, dy_past, _ = functional.backward(tape, dy, dy_end, self._gradients)
            except (KeyError, TypeError, ValueError, IndexError):
                self._push(kept)
                raise
        assert dtaps is not None and isinstance(dy_past, np.ndarray)
        T, B, _ = dtaps.shape
        N = self.input_taps
        d = dtaps.reshape(T, B, N, self.input_size)
        if known is not None:
            d = np.where(known[..., None], d, 0)
        whole = np.zeros((N - 1 + T, B, self.input_size), self.dtype)
        for lag in range(N):
            whole[N - 1 - lag : N - 1 - lag + T] += d[:, :, lag]  # step t saw x_{t-lag}
        if dx_end is not None:
            np.add.at(whole, (at, np.arange(B)), dx_end if seen is None else np.where(seen, dx_end, 0))
        dx, dx_past = whole[N - 1 :], whole[: N - 1][::-1]
        return (dx[:, 0], (dx_past[:, 0], dy_past[:, 0])) if single else (dx, (dx_past, dy_past))

    def stream(self, batch: int = 1, state: Any = None) -> NarxStream:
        """A handle that runs one time step a call over a snapshot of the weights, as of the other layers."""
        return NarxStream(self, _whole("NARX", "batch", batch), state)


class NarxStream:
    """A NARX one step at a time: y = stream(x, out=None), x (B, I) -> y (B, O); state, copy, reset and refresh as of `Stream`."""

    def __init__(self, layer: NARX, batch: int, state: Any = None) -> None:
        self._sizes = (layer.input_taps, batch, layer.input_size)
        self._x = np.zeros((batch, layer.input_taps * layer.input_size), layer.dtype)  # newest first; the first I are the present input
        weights = functional._weights(layer.parameters(), "_l0", "narx")
        self._stream = Stream("rnn_sigmoid", [weights], layer.dtype.name, batch, layer.output_taps, False, None, None)
        if state is not None:
            self.state = state

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        _, B, I = self._sizes
        x = np.asarray(x)
        if x.shape != (B, I) or x.dtype != self._x.dtype:
            raise ValueError(f"narx: stream: x must be {self._x.dtype} of shape (B, I) = {(B, I)}, got {x.dtype} of {x.shape}")
        taps = np.empty_like(self._x)
        taps[:, :I], taps[:, I:] = x, self._x[:, :-I]
        y = self._stream(taps, out)
        self._x = taps  # only now: a wrong out costs nothing
        return y

    @property
    def state(self) -> tuple[Array, Array]:
        """(x_past (N-1, B, I), y_past (1, B, K*O)), newest first: a copy; assign to set it."""
        N, B, I = self._sizes
        past = self._x.reshape(B, N, I)[:, : N - 1]
        return np.ascontiguousarray(past.swapaxes(0, 1)), self._stream.state

    @state.setter
    def state(self, state: tuple[Array, Array]) -> None:
        N, B, I = self._sizes
        x_past, y_past = (np.asarray(part) for part in state)
        if x_past.shape != (N - 1, B, I):
            raise ValueError(f"narx: stream: x_past must have shape (N-1, B, I) = {(N - 1, B, I)}, got {x_past.shape}")
        self._stream.state = np.ascontiguousarray(y_past)
        self._x.reshape(B, N, I)[:, : N - 1] = x_past.swapaxes(0, 1)

    def reset(self, mask: NDArray[np.bool_] | None = None) -> None:
        """Puts rows (all, or those where mask (B,) is true) back to zero pasts."""
        B = self._sizes[1]
        rows = np.ones(B, np.bool_) if mask is None else np.asarray(mask)
        if rows.dtype != np.bool_ or rows.shape != (B,):
            raise ValueError(f"narx: stream: mask must be bool of shape (B,) = {(B,)}, got {rows.dtype} of {rows.shape}")
        self._stream.reset(rows)
        self._x[rows] = 0

    def copy(self) -> NarxStream:
        """A stream of its own from here on, with the same snapshot and state."""
        twin = object.__new__(NarxStream)
        twin._sizes, twin._x, twin._stream = self._sizes, self._x.copy(), self._stream.copy()
        return twin

    def refresh(self) -> None:
        """Reads the layer's weights anew."""
        self._stream.refresh()

