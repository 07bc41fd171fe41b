"""PyTorch's recurrent layers on rnnfast's kernels: the same modules, the same functions, the same results within float error.

modules    LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell are torch.nn's own classes with another forward; `convert` and `to_torch` swap classes.
functions  `install` puts ours in torch._VF, which every torch.nn module calls: models built long ago run on our kernels unchanged.
halves     under autocast, and of modules in bfloat16 or float16, sums and states are float32; bfloat16's products are in it where the CPU has them.
decline    what the kernels do not take (other devices, dtypes and layouts, functorch, tracing, forward AD) goes to torch's own function,
           which computes it or complains; so every error text is torch's.
extras     what torch's layers lack (peepholes, resets, learned states, a frozen snapshot) runs on rnnfast.functional, and where that declines, on
           torch's operations.

Dims    T time, B batch, I input, H hidden, R output width, L layers, D directions. No weights are kept from call to call, save by `freeze`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import _core, functional
from .functional import CELLS

__all__ = [
    "GRU", "LSTM", "RNN", "Compilable", "GRUCell", "LSTMCell", "RNNCell", "Replicas", "compilable", "convert", "freeze", "install", "installed",
    "to_torch", "unfreeze", "uninstall",
]  # fmt: skip

_Result = tuple[Tensor, ...] | None
_core.exchange(torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, nn.Parameter))


def _lend_threads() -> None:
    """torch's OpenMP threads spin for milliseconds after each of torch's own regions: our kernels run on them, not on others beside them."""
    with contextlib.suppress(OSError, AttributeError):
        loaded = ctypes.CDLL(torch._C.__file__)  # finds a name in what torch depends on
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        _core.lend_threads(*(ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in names))


_lend_threads()
_LSTM, _GRU = CELLS.index("lstm"), CELLS.index("gru")
_LAYERS = {"lstm": _LSTM, "gru": _GRU, "rnn_tanh": CELLS.index("rnn_tanh"), "rnn_relu": CELLS.index("rnn_relu")}  # the names in torch._VF
_ATEN: dict[str, Callable[..., Any]] = {name + suffix: getattr(torch._VF, name + suffix) for name in _LAYERS for suffix in ("", "_cell")}
_NAMES = {cell: name for name, cell in _LAYERS.items()}
_TORCHS_STEPS = {cell: _ATEN[name + "_cell"] for name, cell in _LAYERS.items()}

_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_trace = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled
_compiles = torch.compiler.is_dynamo_compiling
_grads, _threads = torch.is_grad_enabled, torch.get_num_threads


def _is_plain() -> bool:
    """Whether tensors are just memory now: nobody traces, transforms or watches the calls."""
    if _compiles() or _transforms() is not None or _dispatch_modes() or _trace() is not None or forward_ad._current_level >= 0:
        return False
    if _function_modes() == 0:
        return True
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _eager(function: _Function) -> _Function:
    """Keeps Dynamo from making a graph that begins with this function: where torch.compile breaks its own, as before nn.LSTM, our kernels run."""
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


# ---- one call of the kernels -------------------------------------------------------------------------------------------------------------


class _Call:
    """What a backward must know of its forward beside tensors."""

    __slots__ = ("batch_first", "batch_sizes", "cell", "directions", "layers", "low", "single")

    def __init__(
        self, cell: int, layers: int, directions: int, batch_first: bool, low: bool, batch_sizes: Tensor | None, single: bool
    ) -> None:  # low: products in bfloat16
        self.cell, self.layers, self.directions, self.batch_first, self.low = cell, layers, directions, batch_first, low
        self.batch_sizes, self.single = batch_sizes, single


_STEPS = [_Call(cell, 1, 1, False, False, None, True) for cell in range(len(CELLS))]  # of one layer, in the weights' own precision


class _Node(torch.autograd.Function):
    """Puts results that the kernels have computed already into the graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, results: tuple[Any, ...], x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> Any:
        y, h_T, c_T, tape = results
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, tape, *weights)
        if call.single:
            return y if c_T is None else (y, c_T)
        return (y, h_T) if c_T is None else (y, h_T, c_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        call: _Call = ctx.call
        x, h, c, tape, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if all(g is None for g in gradients):
            return (None,) * (2 + len(needs))
        if not torch.is_grad_enabled() and _is_plain():
            dy, dh_T, dc_T = (gradients[0], None, gradients[-1]) if call.single else (*gradients, None)[:3]
            if call.cell != _LSTM:
                dc_T = None
            for again in (False, True):
                if again:
                    dy, dh_T, dc_T = (None if d is None else d.contiguous() for d in (dy, dh_T, dc_T))
                result = _core.stack_backward(
                    call.cell, call.layers, call.directions, call.batch_first, call.low, torch.get_num_threads(), False, x, call.batch_sizes, h, c,
                    weights, tape, dy, dh_T, dc_T, needs,
                )  # fmt: skip
                if result is not None:
                    return (None, None, *result)
        return (None, None, *_differentiable_backward(call, x, h, c, weights, gradients, needs))


_into_graph: Callable[..., Any] = super(torch.autograd.Function, _Node).apply  # without the look for transforms, which `_is_plain` has taken


def _differentiable_backward(
    call: _Call, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor | None], gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by torch's own operations, run again from the start, for whoever differentiates them."""
    create = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        given = [None if t is None else t.view_as(t) for t in (x, h, c, *weights)]  # apart, where h is c
        x_, h_, c_, *w = given
        name = _NAMES[call.cell]
        state = h_ if c_ is None else (h_, c_)
        if call.single:
            y = _by_torch(name + "_cell", x_, state, *w)
        else:
            has_biases = len(w) // (call.layers * call.directions) >= 4
            order = (x_, state) if call.batch_sizes is None else (x_, call.batch_sizes, state)
            last = (call.batch_first,) if call.batch_sizes is None else ()
            y = _by_torch(name, *order, w, has_biases, call.layers, 0.0, True, call.directions == 2, *last)
        pairs = [(out, g) for out, g in zip(y if isinstance(y, tuple) else (y,), gradients) if g is not None]
        wanted = [t for t, need in zip(given, needs) if need and t is not None]
        found = iter(torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], create_graph=create, allow_unused=True))
    return [next(found) if need and t is not None else None for t, need in zip(given, needs)]


def _tidy(t: Any, *, rows: bool = False) -> Any:
    """A tensor as the kernels read it: contiguous, or with `rows` in its last axis."""
    if type(t) is not Tensor and type(t) is not nn.Parameter:
        return t
    if t.is_neg():
        t = t.resolve_neg()
    if t.numel() == 0:  # contiguous to torch, whatever its strides
        return t.clone(memory_format=torch.contiguous_format)
    if rows and t.dim() and t.stride(-1) == 1:
        return t
    return t.contiguous()


_HALVES = (torch.bfloat16, torch.float16)


def _half(x: Any, h: Any, c: Any, weights: Sequence[Any]) -> torch.dtype | None:
    """The half that a call is of: autocast's, or that of all its tensors."""
    tensors = [t for t in (x, h, c, *weights) if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors):
        return None
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled("cpu"):
        return None if torch.float64 in dtypes else torch.get_autocast_dtype("cpu")
    return x.dtype if len(dtypes) == 1 and x.dtype in _HALVES else None


def _is_torchs(cell: int, x: Tensor, batch_sizes: Any, weights: Sequence[Any], batch_first: bool, half: torch.dtype) -> bool:
    """Whether one step would widen so many weights, for one use of them, that torch is done before."""
    steps = len(batch_sizes) if batch_sizes is not None else x.shape[batch_first] if x.dim() > 2 else 1
    numbers = sum(w.numel() for w in weights[:2] if isinstance(w, Tensor))
    if steps != 1 or numbers < (1 << 20 if torch.is_autocast_enabled("cpu") else 1 << 18):
        return False
    return x.shape[:-1].numel() < 4 if half is torch.float16 else cell != _LSTM or x.dim() == 2


def _is_torchs_step(cell: int, x: Any, w_ih: Any) -> bool:
    """Whether a step is torch's: of a single row on one thread, over weights of an RNN that the third-level cache just holds. torch reads them as fast as
    they come, while we transpose squares of them; gates' weights are more than that cache holds, and two threads share the work.
    """
    if cell in (_LSTM, _GRU) or not isinstance(w_ih, Tensor) or not 1 << 20 <= w_ih.numel() < 1 << 22 or not isinstance(x, Tensor) or x.dim() == 0:
        return False
    return x.numel() == x.shape[-1] and torch.get_num_threads() == 1


def _in_float32(run: Callable[..., _Result], x: Any, h: Any, c: Any, weights: Sequence[Any], half: torch.dtype, out: torch.dtype) -> _Result:
    """For halves: sums and states in float32, results rounded once at the end, to the dtype that torch gives. `run` is told whether its products may
    be in bfloat16."""
    x, h, c, *weights = (None if t is None else t.float() for t in (x, h, c, *weights))
    result = run(x, h, c, weights, half is torch.bfloat16)
    return None if result is None else tuple(t.to(out) for t in result)


def _stack(
    cell: int, x: Any, batch_sizes: Any, h: Any, c: Any, weights: Sequence[Any], layers: int, bidirectional: bool, batch_first: bool,
    low: bool = False,
) -> _Result:  # fmt: skip
    """(y, h_T[, c_T]), for one step (h[, c]), or None where torch itself must compute or complain. low: products in bfloat16."""
    D, weights = 2 if bidirectional else 1, tuple(weights)  # a module's list may change while the kernels let other threads run
    grad, threads = _grads(), _threads()
    is_half = isinstance(x, Tensor) and x.dtype in _HALVES  # which the kernels do not take
    out = None if is_half else _core.stack_forward(cell, layers, D, batch_first, low, threads, grad, x, batch_sizes, h, c, weights)
    if out is None:
        if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.layout is not torch.strided:
            return None
        half = _half(x, h, c, weights)
        if half is not None and not _is_torchs(cell, x, batch_sizes, weights, batch_first, half):
            again = partial(_stack, layers=layers, bidirectional=bidirectional, batch_first=batch_first)
            return _in_float32(lambda x, h, c, w, low: again(cell, x, batch_sizes, h, c, w, low=low), x, h, c, weights, half, half)
        if is_half:
            return None
        tidy = _tidy(x, rows=True), _tidy(h), _tidy(c), [_tidy(w) for w in weights]
        if tidy[0] is x and tidy[1] is h and tidy[2] is c and all(a is b for a, b in zip(tidy[3], weights)):
            return None
        x, h, c, weights = tidy
        out = _core.stack_forward(cell, layers, D, batch_first, low, threads, grad, x, batch_sizes, h, c, weights)
        if out is None:
            return None
    y, h_T, c_T, tape = out
    if tape is not None:
        try:
            result = _into_graph(_Call(cell, layers, D, batch_first, low, batch_sizes, h_T is None), out, x, h, c, *weights)
        except RuntimeError:  # of what may not be kept for a backward, as inference mode's tensors: torch's own way may keep others
            return None
        return result if type(result) is tuple else (result,)
    if h_T is None:
        return (y,) if c_T is None else (y, c_T)
    return (y, h_T) if c_T is None else (y, h_T, c_T)


def _layers(
    cell: int, x: Any, batch_sizes: Any, h: Any, c: Any, weights: Sequence[Any], has_biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, low: bool = False,
) -> _Result:  # fmt: skip
    """torch._VF.lstm and its like; None as in `_stack`."""
    if not _is_plain() or (len(weights) // layers // (2 if bidirectional else 1) >= 4) != has_biases:
        return None
    if _autocast() and torch.is_autocast_enabled("cpu"):
        half = _half(x, h, c, weights)
        if half is None or _is_torchs(cell, x, batch_sizes, weights, batch_first, half):
            return None
        with torch.autocast("cpu", enabled=False):
            return _in_float32(
                lambda x, h, c, w, low: _layers(cell, x, batch_sizes, h, c, w, has_biases, layers, dropout, train, bidirectional, batch_first, low),
                x, h, c, weights, half, h.dtype if cell == _GRU else half,
            )  # fmt: skip
    if batch_sizes is None and weights and _is_torchs_step(cell, x, weights[0]):
        return None
    if isinstance(x, Tensor) and x.dtype in _HALVES and _is_torchs(cell, x, batch_sizes, weights, batch_first, x.dtype):
        return None
    if dropout == 0 or not train or layers == 1:
        return _stack(cell, x, batch_sizes, h, c, weights, layers, bidirectional, batch_first, low)
    D = 2 if bidirectional else 1
    each = len(weights) // layers
    states = (h,) if c is None else (h, c)
    if type(x) not in (Tensor, nn.Parameter) or x.dim() != (3 if batch_sizes is None else 2):
        return None
    if any(not isinstance(s, Tensor) or s.dim() != 3 or s.shape[0] != layers * D for s in states):
        return None
    y = x.transpose(0, 1) if batch_first else x  # masks are drawn in the order of time
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        if layer > 0:
            y = torch.dropout(y, dropout, True)
        h_l, c_l = (None if s is None else s[layer * D : layer * D + D] for s in (h, c))
        w = list(weights[layer * each : layer * each + each])
        out = _stack(cell, y, batch_sizes, h_l, c_l, w, 1, bidirectional, False, low)
        if out is None:
            if layer == 0:
                return None
            state = h_l if c is None else (h_l, c_l)
            order, last = ((y, state), (False,)) if batch_sizes is None else ((y, batch_sizes, state), ())
            out = _by_torch(_NAMES[cell], *order, w, has_biases, 1, 0.0, True, bidirectional, *last)
        y = out[0]
        ends.append(out[1:])
    return (y.transpose(0, 1) if batch_first else y, *(torch.cat(parts) for parts in zip(*ends)))


def _cell(cell: int, x: Any, h: Any, c: Any, weights: Sequence[Any], low: bool = False) -> _Result:
    """torch._VF.lstm_cell and its like: (h[, c]), or None as in `_stack`."""
    if not _is_plain():
        return None
    if _autocast() and torch.is_autocast_enabled("cpu"):
        half = _half(x, h, c, weights)
        if half is None or _is_torchs(cell, x, None, weights, False, half):
            return None
        with torch.autocast("cpu", enabled=False):
            return _in_float32(partial(_cell, cell), x, h, c, weights, half, h.dtype if cell in (_LSTM, _GRU) else half)
    if _is_torchs_step(cell, x, weights[0]):
        if low or _library is not None:
            return None
        result = _TORCHS_STEPS[cell](x, h if c is None else (h, c), *weights)
        return result if c is not None else (result,)
    if not isinstance(x, Tensor) or x.dim() != 2 or not isinstance(h, Tensor):
        return None
    if not low:
        out = _core.stack_forward(cell, 1, 1, False, False, _threads(), _grads(), x, None, h, c, weights)
        if out is not None:
            if out[3] is None:
                return (out[0],) if c is None else (out[0], out[2])
            try:
                result = _into_graph(_STEPS[cell], out, x, h, c, *weights)
            except RuntimeError:  # as in `_stack`
                return None
            return result if c is not None else (result,)
    return _stack(cell, x, None, h, c, weights, 1, False, False, low)


# ---- the operations of ATen, for those who call them past torch._VF ----------------------------------------------------------------------

_library: Any = None  # torch.library.Library while `install(aten=True)` holds


def _by_torch(name: str, *args: Any, **named: Any) -> Any:
    """torch's own function: under install(aten=True), where nobody watches, straight the kernel behind the operation that we have taken over."""
    if _library is None or named or not _is_plain():
        return _ATEN[name](*args, **named)
    try:
        return _composite(name, *args)
    except RuntimeError as error:
        if not str(error).startswith(f"aten::{name}("):
            raise
    return _ATEN[name](*args)  # arguments of no such kind: the words for it are to be torch._VF's


def _composite(name: str, *args: Any) -> Any:
    operation = getattr(torch.ops.aten, name)
    packed = not name.endswith("_cell") and isinstance(args[1 if name == "lstm" else 2], Tensor)
    overload = operation.default if name.endswith("_cell") else operation.data if packed else operation.input
    return overload._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args)


def _taken(name: str) -> Callable[..., Any]:
    """What the operation runs then: tracing and transforms have had their turn before it."""
    ours = _OURS[name]

    def kernel(*args: Any) -> Any:
        return ours(*args) if _is_plain() else _composite(name, *args)

    return kernel


def _take_aten() -> None:
    global _library
    if _library is not None:
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is the purpose
        for name in _OURS:
            for overload in ("",) if name.endswith("_cell") else (".input", ".data"):
                for key in ("CPU", "AutogradCPU"):
                    library.impl(name + overload, _taken(name), key)
    _library = library


def _leave_aten() -> None:
    global _library
    if _library is not None:
        library, _library = _library, None
        library._destroy()


# ---- the functions of torch._VF ----------------------------------------------------------------------------------------------------------


def _last(args: tuple[Any, ...]) -> Any:
    """params, has_biases, num_layers, dropout, train, bidirectional, batch_first: packed calls leave out the last."""
    return args if len(args) == 7 else (*args, False)


def _is_pair(hx: Any) -> bool:
    return isinstance(hx, (tuple, list)) and len(hx) == 2


def _declined(name: str, *args: Any, **named: Any) -> Any:
    """torch's own function; where it lacks a transform, as vmap of an LSTM, the equations."""
    try:
        return _by_torch(name, *args, **named)
    except RuntimeError as error:
        if named or (_transforms() is None and forward_ad._current_level < 0):
            raise
        try:
            return _transformed(name, *args)
        except Exception:
            raise error from None


def _transformed(name: str, *args: Any) -> Any:
    cell, batch_sizes, layers, dropout, D, batch_first = name.removesuffix("_cell"), None, 1, 0.0, 1, False
    state: Any
    if name.endswith("_cell"):
        x, hx, *weights = args
        x, state = x[None], [s[None] for s in (hx if name == "lstm_cell" else (hx,))]
        weights = [w for w in weights if w is not None]
    else:
        packed = isinstance(args[1 if name == "lstm" else 2], Tensor)
        x, batch_sizes, hx, weights, _, layers, dropout, train, bidirectional, batch_first = (*args, False) if packed else (args[0], None, *args[1:])
        state, D, dropout = hx if name == "lstm" else (hx,), 1 + bidirectional, dropout if train else 0.0
    each = len(weights) // (layers * D)
    names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if each >= 4 else ()), *(("weight_hr",) if each % 2 else ())]
    ends = [f"_l{layer}" + "_reverse" * d for layer in range(layers) for d in range(D)]
    w = dict(zip((name + end for end in ends for name in names), weights))
    h, c = (*state, None)[:2]
    y, h_T, c_T, _ = _by_operations(cell, x.transpose(0, 1) if batch_first else x, h, c, w, layers, D, batch_sizes, None, None, (), dropout)
    if name.endswith("_cell"):
        return h_T[0] if c is None else (h_T[0], c_T[0])
    y = y.transpose(0, 1) if batch_first else y
    return (y, h_T) if c is None else (y, h_T, c_T)


@_eager
def _lstm(*args: Any, **named: Any) -> Any:
    if len(args) == 9 and not named:
        x, a, b = args[:3]
        out = None
        if isinstance(a, Tensor):
            if _is_pair(b):
                out = _layers(_LSTM, x, a, b[0], b[1], *_last(args[3:]))
        elif _is_pair(a):
            out = _layers(_LSTM, x, None, a[0], a[1], *_last(args[2:]))
        if out is not None:
            return out
    return _declined("lstm", *args, **named)


def _layer_function(name: str) -> Callable[..., Any]:
    cell = _LAYERS[name]

    @_eager
    def layer(*args: Any, **named: Any) -> Any:
        if len(args) == 9 and not named:
            x, a, b = args[:3]
            packed = isinstance(b, Tensor)
            out = _layers(cell, x, a, b, None, *_last(args[3:])) if packed else _layers(cell, x, None, a, None, *_last(args[2:]))
            if out is not None:
                return out
        return _declined(name, *args, **named)

    layer.__name__ = layer.__qualname__ = name
    return layer


@_eager
def _lstm_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        out = _cell(_LSTM, input, hx[0], hx[1], (w_ih, w_hh, b_ih, b_hh))
        if out is not None:
            return out
    return _declined("lstm_cell", input, hx, w_ih, w_hh, b_ih, b_hh)


def _cell_function(name: str) -> Callable[..., Any]:
    cell = _LAYERS[name]

    @_eager
    def step(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        out = _cell(cell, input, hx, None, (w_ih, w_hh, b_ih, b_hh))
        return _declined(name + "_cell", input, hx, w_ih, w_hh, b_ih, b_hh) if out is None else out[0]

    step.__name__ = step.__qualname__ = name + "_cell"
    return step


_OURS: dict[str, Callable[..., Any]] = {"lstm": _lstm, "lstm_cell": _lstm_cell}
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _OURS[_name], _OURS[_name + "_cell"] = _layer_function(_name), _cell_function(_name)


_weights_have_changed: Any = nn.RNNBase._weights_have_changed


def _quick_weights_have_changed(module: Any) -> bool:
    """torch's own answer, a third of nn.LSTM's time at T = 1, without asking a module for each weight by name twice."""
    parameters = module._parameters
    for ref, name in zip(module._flat_weight_refs, module._flat_weights_names):
        weight = parameters.get(name)
        if weight is None:
            return bool(_weights_have_changed(module))
        if ref is not None and ref() is not weight:
            return True
    return False


def install(aten: bool = False) -> None:
    """Every torch.nn.LSTM, GRU, RNN and cell of this process runs on our kernels from here on, old models included.

    With `aten` so do the operations below, for those who call torch.ops.aten.lstm, and scripted modules.

    >>> import torch
    >>> layer = torch.nn.LSTM(4, 8)
    >>> with installed():
    ...     y, (h, c) = layer(torch.zeros(5, 2, 4))
    >>> y.shape
    torch.Size([5, 2, 8])
    """
    for name, function in _OURS.items():
        torch.jit._builtins._register_builtin(function, f"aten::{name}")  # scripting reads the name, not the function
        setattr(torch._VF, name, function)
    nn.RNNBase._weights_have_changed = _quick_weights_have_changed  # type: ignore[method-assign]
    if aten:
        _take_aten()


def uninstall() -> None:
    """Back to torch's own functions."""
    _leave_aten()
    for name in _OURS:
        setattr(torch._VF, name, _ATEN[name])
    nn.RNNBase._weights_have_changed = _weights_have_changed  # type: ignore[method-assign]


@contextlib.contextmanager
def installed(aten: bool = False) -> Iterator[None]:
    """`install` for the length of a with block."""
    before, library = torch._VF.lstm is _lstm, _library
    install(aten)
    try:
        yield
    finally:
        if not before:
            uninstall()
        elif library is None:
            _leave_aten()


# ---- what torch's layers lack, over rnnfast.functional -------------------------------------------------------------------------------------


def _next_state(cell: str, x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """h_t and c_t, where x (B, G*H) is W_ih x + b_ih already; c is an LSTM's."""
    b_hh = w.get("bias_hh")
    if cell == "gru_reset_before":
        H = h.shape[1]
        b, b_n = (None, None) if b_hh is None else (b_hh[: 2 * H], b_hh[2 * H :])
        r, z = torch.sigmoid(x[:, : 2 * H] + linear(h, w["weight_hh"][: 2 * H], b)).chunk(2, 1)
        n = torch.tanh(x[:, 2 * H :] + linear(r * h, w["weight_hh"][2 * H :], b_n))
        return (1 - z) * n + z * h, c
    u = linear(h, w["weight_hh"], b_hh)
    if cell == "gru":
        (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, 1), u.chunk(3, 1)
        z = torch.sigmoid(x_z + u_z)
        return (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n) + z * h, c
    if cell.startswith("rnn"):
        return (torch.tanh if cell == "rnn_tanh" else torch.relu)(x + u), c
    i, f, g, o = (x + u).chunk(4, 1)
    p = w.get("weight_peep")
    if p is not None:
        i, f = i + p[0] * c, f + p[1] * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o if p is None else o + p[2] * c) * torch.tanh(c)
    return h if "weight_hr" not in w else linear(h, w["weight_hr"]), c


def _by_operations(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, w: dict[str, Tensor], layers: int, directions: int, batch_sizes: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, masks: Sequence[Tensor], dropout: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, h_T, c_T (of LSTMs) and every step's c, as rnnfast.functional has them, from torch's operations, for second derivatives and for what is not
    plain memory. x, y, masks and c are (T, B, ...), with batch_sizes packed.
    """
    if batch_sizes is not None:
        (x, lengths), *more = (torch._VF._pad_packed_sequence(t, batch_sizes, False, 0.0, len(batch_sizes)) for t in (x, *masks))
        y, h_T, c_T, every_c = _by_operations(cell, x, h, c, w, layers, directions, None, lengths, reset, [mask for mask, _ in more], dropout)
        y, every_c = (torch._VF._pack_padded_sequence(t, lengths, False)[0] for t in (y, every_c))
        return y, h_T, c_T, every_c
    (T, B), K = x.shape[:2], layers * directions
    alive = None if lengths is None else (torch.arange(T)[:, None] < lengths)[..., None].to(x.device)  # (T, B, 1)
    cut = None if reset is None else reset[..., None] if alive is None else reset[..., None] & alive
    widths = w["weight_hh_l0"].shape[1], w["weight_peep_l0" if "weight_peep_l0" in w else "weight_hr_l0" if "weight_hr_l0" in w else "weight_hh_l0"].shape[1]
    fresh_h, fresh_c = (w[name] if name in w else x.new_zeros(K, 1, n) for name, n in zip(("h_0", "c_0"), widths))
    h, c = (fresh.expand(K, B, -1) if s is None else s for s, fresh in ((h, fresh_h), (c, fresh_c)))
    y, every_c, ends = x, x, []
    for layer in range(layers):
        if layer > 0:
            y = y * masks[layer - 1] if masks else torch.dropout(y, dropout, True)
        sides = []
        for d in range(directions):
            k, suffix = layer * directions + d, f"_l{layer}" + "_reverse" * d
            own = {name.removesuffix(suffix): t for name, t in w.items() if name.endswith(suffix)}
            given, h_t, c_t = linear(y, own["weight_ih"], own.get("bias_ih")), h[k], c[k]
            steps = []
            for t in range(T)[:: 1 - 2 * d]:
                if cut is not None and t + d < T:
                    h_t, c_t = torch.where(cut[t + d], fresh_h[k], h_t), torch.where(cut[t + d], fresh_c[k], c_t)
                h_new, c_new = _next_state(cell, given[t], h_t, c_t, own)
                if alive is None:
                    h_t, c_t = h_new, c_new
                    steps.append((h_t, c_t))
                else:
                    h_t, c_t = torch.where(alive[t], h_new, h_t), torch.where(alive[t], c_new, c_t)
                    steps.append((h_t * alive[t], c_t * alive[t]))
            ends.append((h_t, c_t))
            sides.append([torch.stack(part) for part in zip(*steps[:: 1 - 2 * d])])
        y, every_c = (torch.cat(part, -1) for part in zip(*sides))
    h_T, c_T = (torch.stack(part) for part in zip(*ends))
    return y, h_T, c_T, every_c


class _Frozen:
    """A copy of a module's weights, and of them in the kernels' order; copies and pickles of it are None."""

    def __init__(self, module: Any) -> None:
        self.arrays: dict[str, Any] = {}
        self.snapshot: dict[str, _core.Packs] = {}
        copies: dict[str, Tensor] = {}
        for name, weight in _Standin(module).weights():
            if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64, *_HALVES):
                raise ValueError(f"freeze: {name} must be of a float dtype on the CPU, got {weight.dtype} on {weight.device}")
            self.dtype, wide = weight.dtype, torch.float32 if weight.dtype in _HALVES else weight.dtype
            one = weight.detach().to(wide, memory_format=torch.contiguous_format, copy=True)
            self.arrays[name] = one.numpy()
            copies[name.removesuffix("_l0") if isinstance(module, nn.RNNCellBase) else name] = one.to(self.dtype)
        self.quick: tuple[int, _core.Stream | None] = 0, None  # B of the latest short call, and what runs calls of so many rows
        ends = [name.removeprefix("weight_ih") for name in self.arrays if name.startswith("weight_ih")]
        self.layers = None if any(end.endswith("_reverse") for end in ends) else [functional._weights(self.arrays, end, "freeze") for end in ends]
        self.cell: str = module._cell_name
        self.size = sum(array.size for array in self.arrays.values())
        self.twin = _twin(module, copies)
        self.is_plain = not module._is_own and self.dtype not in _HALVES
        self.is_small = self.is_plain and self.size < 1 << 15

    def is_for_twin(self, x: Any) -> bool:
        """Whether a call that is not short takes longer by rnnfast.functional than it takes to bring the weights in order once."""
        return self.is_plain and (self.size < 1 << 19 or not isinstance(x, Tensor) or x.numel() > 32 * self.twin.input_size)

    def short(self, x: Tensor, states: tuple[Tensor, ...], single: bool) -> tuple[Tensor, ...] | None:
        """(y, h_T[, c_T]) of a call whose overhead would be most of it, over x (T, B, I) or `single` steps (B, I); or None: the general way has
        also the better words.
        """
        if any(type(t) is not Tensor or t.dtype != self.dtype or t.dim() != (2 if single else 3) for t in (x, *states)) or not _is_plain() or _autocast():
            return None
        tokens, rows = (1, x.shape[0]) if single else (x.shape[0], x.shape[1])
        if self.layers is None or tokens * rows < 1 or (tokens * rows > 32 and tokens * rows * self.size >= 1 << 23):
            return None
        if _grads() and (x.requires_grad or any(s.requires_grad for s in states)):
            return None
        before, stream = self.quick
        if rows != before:  # not yet: the next call may be of another size
            self.quick = rows, None
            return None
        try:
            arrays = [t.numpy()[None] if single else t.numpy() for t in (x, *states)]
            if stream is None:
                stream = _core.Stream(
                    self.cell, self.layers, arrays[0].dtype.name, rows, 1, False, self.arrays.get("h_0"), self.arrays.get("c_0")
                )  # fmt: skip
                self.quick = rows, stream
            state = None if len(arrays) == 1 else tuple(arrays[1:]) if len(arrays) == 3 else arrays[1]
            out = stream.sequence(arrays[0], state, torch.get_num_threads())
        except (TypeError, ValueError, RuntimeError):
            return None
        if out is None:
            return None
        y, state = out
        return tuple(torch.from_numpy(a[0] if single else a) for a in ((y, *state) if isinstance(state, tuple) else (y, state)))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _twin(module: Any, weights: dict[str, Tensor]) -> Any:
    """A module of our class like this one over constants, without hooks."""
    twin = object.__new__(_TWINS[module._base])
    nn.Module.__init__(twin)
    own = vars(twin)
    own.update({name: value for name, value in vars(module).items() if name not in own and name not in weights and name != "_frozen"})
    twin.training = False
    for name, weight in weights.items():
        twin.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    if isinstance(module, nn.RNNBase):
        twin._init_flat_weights()  # type: ignore[operator]
    return twin


class _Standin:
    """Stands for a module in torch's own forward, which checks, sorts and squeezes, and then hands it to `_VF` in place of the weights."""

    def __init__(self, module: Any, hx: Any = None, reset: Any = None, cells: bool = False) -> None:
        self.module, self.given, self.reset, self.wants_cells = module, hx is not None, reset, cells
        self.is_cell = isinstance(module, nn.RNNCellBase)
        self.frozen: _Frozen | None = module._frozen
        self.cells: Any = None
        self._flat_weights = self.weight_ih = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def _update_flat_weights(self) -> None:
        """Weights are read by name."""

    def weights(self) -> list[tuple[str, Tensor]]:
        """By their names in rnnfast.functional."""
        m = self.module
        if self.is_cell:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if m.bias else ("weight_ih", "weight_hh")
            return [(name + "_l0", getattr(m, name)) for name in (*names, *m._extras)]
        return [(name, getattr(m, name)) for name in (*m._flat_weights_names, *m._extras)]

    def step(self, x: Tensor, hx: Any) -> Any:
        """One step of a cell: h or (h, c)."""
        paired = isinstance(hx, (tuple, list))
        _, *state = self.run(x[None], None, tuple(s[None] for s in hx) if paired else hx[None])
        return tuple(state) if paired else state[0]

    def run(self, x: Tensor, batch_sizes: Tensor | None, hx: Any) -> tuple[Tensor, ...]:
        """(y, h_T[, c_T]), as the functions of torch._VF."""
        m = self.module
        paired = isinstance(hx, (tuple, list))
        h, c = (hx if paired else (hx, None)) if self.given else (None, None)
        tensors = [t for t in (x, h, c) if t is not None]
        if self.frozen is not None and (not _is_plain() or (_grads() and any(t.requires_grad for t in tensors))):
            self.module, self.frozen = self.frozen.twin, None
        pairs = [] if self.frozen else self.weights()
        self.names, weights = [name for name, _ in pairs], [weight for _, weight in pairs]
        tensors += weights
        if len({t.device for t in tensors}) > 1:
            found = ", ".join(sorted({str(t.device) for t in tensors}))
            raise RuntimeError(f"{type(m).__name__}: input, state and weights must be on the same device, got {found}")
        if not _is_plain() or any(type(t) not in (Tensor, nn.Parameter) or t.device.type != "cpu" or t.layout is not torch.strided for t in tensors):
            return self._run(batch_sizes, paired, x, h, c, weights, False, plain=False)
        half = _half(x, h, c, weights)
        if self.frozen is not None and half is not None and not torch.is_autocast_enabled("cpu") and self.frozen.dtype != half:
            half = None
        if half is not None:
            out = hx[0].dtype if paired and self.is_cell else hx.dtype if m._cell_name.startswith("gru") else half  # as torch's
            with torch.autocast("cpu", enabled=False):
                result = _in_float32(partial(self._run, batch_sizes, paired), x, h, c, weights, half, out)
            assert result is not None
            self.cells = None if self.cells is None else self.cells.to(out)
            return result
        dtypes = {t.dtype for t in tensors} | ({self.frozen.dtype} if self.frozen else set())
        if len(dtypes) > 1:
            raise RuntimeError(f"{type(m).__name__}: input, state and weights must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        return self._run(batch_sizes, paired, x, h, c, weights, False)

    def _run(
        self, batch_sizes: Tensor | None, paired: bool, x: Tensor, h: Any, c: Any, weights: list[Any], low: bool, plain: bool = True
    ) -> tuple[Tensor, ...]:
        m, reset = self.module, self.reset
        padded = None
        y: Any
        out: Any
        if reset is not None and batch_sizes is not None:  # resets go by (T, B)
            x, padded = torch._VF._pad_packed_sequence(x, batch_sizes, False, 0.0, len(batch_sizes))
            batch_sizes = None
        flip = not self.is_cell and m.batch_first and batch_sizes is None and padded is None
        x = x.transpose(0, 1) if flip else x
        if batch_sizes is None and len(x) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
            raise ValueError(f"{self.mode}: reset must be bool of shape (T, B) = {tuple(x.shape[:2])}, got {reset.dtype} of {tuple(reset.shape)}")
        if self.wants_cells and not paired:
            raise ValueError(f"{self.mode}: has no cell states")
        L, D = (1, 1) if self.is_cell else (m.num_layers, 2 if m.bidirectional else 1)
        dropout = m.dropout if not self.is_cell and m.training and L > 1 else 0.0
        if not plain:
            y, h_T, c_T, cells = _by_operations(
                m._cell_name, x, h, c, dict(zip(self.names, weights)), L, D, batch_sizes, padded, reset, (), dropout,
            )  # fmt: skip
            out = (y, *((h_T, c_T) if paired else (h_T,)), *((cells.detach(),) if self.wants_cells else ()))
            out = tuple(t[0] for t in out) if self.is_cell else out
        else:
            x, h, c, weights = _tidy(x, rows=True), _tidy(h), _tidy(c), [_tidy(w) for w in weights]
            masks = None
            if dropout > 0:
                ones = x.new_ones((*x.shape[:-1], D * (m.proj_size or m.hidden_size)))
                masks = [torch.dropout(ones, dropout, True) for _ in range(L - 1)]
            self.shape = L, D, batch_sizes, padded, reset, masks or ()
            self.options: dict[str, Any] = {
                "num_layers": L, "bidirectional": D == 2, "lengths": None if padded is None else padded.numpy(),
                "batch_sizes": None if batch_sizes is None else batch_sizes.numpy(), "reset": None if reset is None else reset.numpy(),
                "dropout_masks": None if masks is None else [mask.numpy() for mask in masks], "cells": self.wants_cells,
                "threads": torch.get_num_threads(), "compute_dtype": "bfloat16" if low and "bf16" in _core.target() else None,
            }  # fmt: skip
            given = [x, h, c, *weights]
            if _grads() and any(t is not None and t.requires_grad for t in given):
                out = _Extended.apply(self, paired, *given)  # type: ignore[no-untyped-call]
            else:
                out = self.tensors(self.forward(paired, given, tape=False)[0])
        y, *rest = out
        if self.wants_cells:
            self.cells = rest.pop()
        if padded is not None:
            y, self.cells = (None if t is None else torch._VF._pack_padded_sequence(t, padded, False)[0] for t in (y, self.cells))
        elif flip:
            y, self.cells = (None if t is None else t.transpose(0, 1) for t in (y, self.cells))
        return (y, *rest)

    def forward(self, paired: bool, given: Sequence[Any], *, tape: bool) -> tuple[list[Any], functional.Tape | None]:
        """The arrays y, h_T[, c_T][, cells], and the tape."""
        x, h, c, *weights = (None if t is None else t.detach().numpy() for t in given)
        params: dict[str, Any] = self.frozen.arrays if self.frozen else dict(zip(self.names, weights))
        state = None if h is None else (h, c) if paired else h
        snapshot = self.frozen.snapshot if self.frozen else None
        y, state, kept, *cells = functional.forward(self.module._cell_name, x, state, params, tape=tape, snapshot=snapshot, **self.options)
        if tape:
            y = y.copy()  # the tape's own is read only
        return [y, *(state if paired else (state,)), *cells], kept

    def tensors(self, arrays: Sequence[Any]) -> tuple[Tensor, ...]:
        """The arrays of one step without time, and as no views: those cannot be detached in place."""
        return tuple(torch.from_numpy(a[0] if self.is_cell else a) for a in arrays)

    def differentiable_backward(self, paired: bool, saved: Sequence[Any], gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Any]:
        """The gradients by torch's operations, run again from the start."""
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            given = [None if t is None else t.view_as(t) for t in saved]  # apart, where h is c
            x, h, c, *weights = given
            y, *state = _by_operations(self.module._cell_name, x, h, c, dict(zip(self.names, weights)), *self.shape)  # type: ignore[arg-type]
            pairs = [(out, d) for out, d in zip((y, *state[: 1 + paired]), gradients) if d is not None]
            wanted = [t for t, need in zip(given, needs) if need and t is not None]
            outs, ds = zip(*pairs)
            found = iter(torch.autograd.grad(outs, wanted, ds, create_graph=True, allow_unused=True))
        return [next(found) if need and t is not None else None for t, need in zip(given, needs)]


class _Extended(torch.autograd.Function):
    """A forward and backward of rnnfast.functional in torch's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Standin, paired: bool, *given: Any) -> tuple[Tensor, ...]:
        arrays, ctx.tape = call.forward(paired, given, tape=True)
        ctx.call, ctx.paired = call, paired
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        out = call.tensors(arrays)
        if call.wants_cells:
            ctx.mark_non_differentiable(out[-1])
        ctx.shapes = [(a.shape, t.dtype) for a, t in zip(arrays, out)]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # raises where one was written to since
        states = 2 if ctx.paired else 1
        if all(d is None for d in gradients[: 1 + states]):
            return (None,) * (2 + len(saved))
        if ctx.call.is_cell:
            gradients = tuple(None if d is None else d[None] for d in gradients)
        if _grads() or not _is_plain():
            return (None, None, *ctx.call.differentiable_backward(ctx.paired, saved, gradients, ctx.needs_input_grad[2:]))
        dy, *dstate = (
            torch.zeros(shape, dtype=dtype).numpy() if d is None else _tidy(d, rows=True).numpy()
            for d, (shape, dtype) in list(zip(gradients, ctx.shapes))[: 1 + states]
        )
        needs = ctx.needs_input_grad[2:]
        dh_T: Any = tuple(dstate) if ctx.paired else dstate[0]
        dx, dh, found = functional.backward(ctx.tape, dy, dh_T, need_dx=needs[0], threads=torch.get_num_threads())
        dh_0, dc_0 = dh if isinstance(dh, tuple) else (dh, None)
        parts = [dx, *((None, None) if saved[1] is None else (dh_0, dc_0)), *(found[name] for name in ctx.call.names)]
        return (None, None, *(torch.from_numpy(d) if need and d is not None else None for d, need in zip(parts, needs)))


def _by_standin(*args: Any) -> Any:
    """The functions of torch._VF, given (x, hx, standin, ...) or packed (x, batch_sizes, hx, standin, ...)."""
    packed = isinstance(args[3], _Standin)
    return args[3].run(*args[:3]) if packed else args[2].run(args[0], None, args[1])


def _cell_by_standin(x: Any, hx: Any, standin: _Standin, *_: Any) -> Any:
    return standin.step(x, hx)


# ---- the modules: torch's own code, calling our functions --------------------------------------------------------------------------------


def _forwards_over(functions: dict[str, Any]) -> dict[type[nn.Module], Callable[..., Any]]:
    names = {**vars(torch_rnn), "_VF": types.SimpleNamespace(**functions)}

    def over(base: Any) -> Callable[..., Any]:
        theirs = base.forward
        return types.FunctionType(theirs.__code__, names, "forward", theirs.__defaults__, theirs.__closure__)

    return {base: over(base) for base in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)}


_forwards = _forwards_over(_OURS)
_forwards_by_standin = _forwards_over({name: _cell_by_standin if name.endswith("_cell") else _by_standin for name in _OURS})


class _Ours(nn.Module):
    """What all six add to torch's modules: a snapshot that `freeze` takes, and that ends where the weights change by rule; options that change nothing
    where they are not given.
    """

    _frozen: _Frozen | None = None
    _base: type[nn.Module]
    hidden_size: int
    bias: bool
    _extras: tuple[str, ...] = ()  # names of parameters that torch's module has not
    _is_own = False  # whether it computes what no module of torch does
    learn_initial_state = False
    forget_bias = 0.0

    @property
    def _cell_name(self) -> str:
        """Among rnnfast.functional's."""
        raise NotImplementedError

    def _as_torch(self, input: Any, hx: Any, **own: Any) -> Any:
        """torch's own forward over our functions; a leaf for torch.fx, and a part of Dynamo's graph, as torch's modules are."""
        if isinstance(input, torch.fx.Proxy):
            given = (input,) if hx is None else (input, hx)
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), given, own)
        return _forwards[self._base](self, input, hx)

    def _extend(self, shapes: dict[str, tuple[int, ...]], forget_bias: float = 0.0) -> None:
        """Adds parameters that torch's module has not."""
        if forget_bias and not self.bias:
            raise ValueError(f"{type(self).__name__}: forget_bias needs bias=True")
        self.forget_bias = float(forget_bias)
        w: Any = next(self.parameters())
        for name, shape in shapes.items():
            bound = self.hidden_size**-0.5
            self.register_parameter(name, nn.Parameter(w.new_empty(shape).uniform_(-bound, bound) if name.startswith("weight") else w.new_zeros(shape)))
        self._extras = tuple(shapes)
        self._is_own = self._is_own or bool(shapes)
        self._start()

    def _start(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if name in ("h_0", "c_0") and parameter is not None:
                    parameter.zero_()
                if self.forget_bias and name.startswith("bias_ih") and parameter is not None:
                    parameter[self.hidden_size : 2 * self.hidden_size] += self.forget_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self._start()

    def extra_repr(self) -> str:
        options = {"peephole": False, "reset_after": True, "learn_initial_state": False, "forget_bias": 0.0}
        given = {name: getattr(self, name, default) for name, default in options.items()}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in given.items() if value != options[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._frozen = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._frozen = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._frozen = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._frozen = None
        super()._load_from_state_dict(*args)

    def __prepare_scriptable__(self) -> nn.Module:
        return to_torch(copy.copy(self))


class _Layer(_Ours, nn.RNNBase):
    """What LSTM, GRU and RNN share beyond torch: forward's keywords."""

    @_eager
    def forward(self, input: Any, hx: Any = None, **own: Any) -> Any:  # what exports a model passes everything else by place
        """(y, state) as torch; with `cells` (LSTM) (y, state, c).

        reset: bool (T, B), with batch_first (B, T), unbatched (T,), for packed input as of the padded: True starts a row afresh before that step,
            from zeros or the learned initial state, as if the sequence began there (in both directions).
        cells: also return c, every step's cell state of the last layer, laid out as y, D*H wide. No gradient flows through it.
        """
        reset = cells = None
        if own:
            reset, cells = own.pop("reset", None), own.pop("cells", False)
            for name in own:
                raise TypeError(f"{self._base.__name__}.forward() got an unexpected keyword argument '{name}'")
        is_torchs = not self._is_own and self._frozen is None and reset is None and not cells
        if _compiles():
            if is_torchs:
                return self._base.forward(self, input, hx)
            torch._dynamo.graph_break()
        if is_torchs:
            paired = self.mode == "LSTM"
            if hx is not None and not _autocast() and type(input) is Tensor and input.dim() == 3 and (not paired or _is_pair(hx)):
                self._update_flat_weights()
                h, c = hx if paired else (hx, None)
                out = _layers(
                    _LAYERS[self.mode.lower()], input, None, h, c, self._flat_weights, self.bias, self.num_layers, self.dropout, self.training,
                    self.bidirectional, self.batch_first,
                )  # fmt: skip
                if out is not None:
                    return out[0], out[1:] if paired else out[1]
            return self._as_torch(input, hx)
        if isinstance(input, torch.fx.Proxy):
            return self._as_torch(input, hx, **({} if reset is None else {"reset": reset}), **({"cells": cells} if cells else {}))
        frozen = self._frozen
        if frozen is not None and reset is None and not cells:
            if frozen.is_small:
                return frozen.twin.forward(input, hx)
            if type(input) is Tensor and input.dim() == 3:
                x = input.transpose(0, 1) if self.batch_first else input
                out = frozen.short(x, () if hx is None else tuple(hx) if self.mode == "LSTM" else (hx,), False)
                if out is not None:
                    return out[0].transpose(0, 1) if self.batch_first else out[0], out[1:] if self.mode == "LSTM" else out[1]
            if frozen.is_for_twin(input):
                return frozen.twin.forward(input, hx)
        if reset is not None:
            reset = torch.as_tensor(reset)
            if isinstance(input, PackedSequence):
                reset = reset.transpose(0, 1) if self.batch_first else reset
                reset = reset if input.sorted_indices is None else reset[:, input.sorted_indices]
            elif reset.dim() == 1:
                reset = reset[:, None]
            elif self.batch_first:
                reset = reset.transpose(0, 1)
        call = _Standin(self, hx, reset, bool(cells))
        out = _forwards_by_standin[self._base](call, input, hx)
        if not cells:
            return out
        c = call.cells
        if isinstance(input, PackedSequence):
            c = PackedSequence(c, *input[1:])
        elif input.dim() == 2:
            c = c.squeeze(0 if self.batch_first else 1)
        return (*out, c)

    _weights_have_changed = _quick_weights_have_changed

    @property
    def _cell_name(self) -> str:
        return self.mode.lower()

    def _more(self, learn_initial_state: bool, peephole: bool = False) -> dict[str, tuple[int, ...]]:
        """weight_peep_l{k}[_reverse] (3, H), h_0 (L*D, 1, R), c_0 (L*D, 1, H)."""
        self.learn_initial_state = bool(learn_initial_state)
        ends = [name.removeprefix("weight_hh") for name in self._flat_weights_names if name.startswith("weight_hh")]
        shapes: dict[str, tuple[int, ...]] = {"weight_peep" + end: (3, self.hidden_size) for end in ends} if peephole else {}
        if learn_initial_state:
            shapes["h_0"] = len(ends), 1, self.proj_size or self.hidden_size
            shapes |= {"c_0": (len(ends), 1, self.hidden_size)} if self.mode == "LSTM" else {}
        return shapes


class LSTM(_Layer, nn.LSTM):
    """torch.nn.LSTM on our kernels; what torch has not is by keyword, in the constructor and in `forward`.

    peephole: diagonal weight_peep_l{k} (3, H), rows i f o: i and f see c_{t-1}, o sees c_t.
    learn_initial_state: parameters h_0 (L*D, 1, R) and c_0 (L*D, 1, H) are the state of a call that is given none, and what a reset puts.
    forget_bias: added to bias_ih's forget gate at the start.

    >>> y, (h, c) = LSTM(4, 8, batch_first=True)(torch.zeros(2, 5, 4))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]))
    >>> starts = torch.tensor([[True, False, False, True, False]])  # episodes of 3 and 2 steps, in one call
    >>> y, state = LSTM(4, 8, batch_first=True, peephole=True, forget_bias=1.0)(torch.zeros(1, 5, 4), reset=starts)
    >>> torch.equal(y[:, 0], y[:, 3])
    True
    """

    _base = nn.LSTM
    peephole = False

    def __init__(
        self, *args: Any, peephole: bool = False, learn_initial_state: bool = False, forget_bias: float = 0.0, **named: Any
    ) -> None:  # as torch's, whose errors count arguments
        super().__init__(*args, **named)
        self.peephole = bool(peephole)
        self._extend(self._more(learn_initial_state, peephole), forget_bias)

    @property
    def _cell_name(self) -> str:
        return "lstm_peephole" if self.peephole else "lstm"


class GRU(_Layer, nn.GRU):
    """torch.nn.GRU on our kernels; `learn_initial_state` as of `LSTM`, and

    reset_after: False computes n = tanh(W_n x + b_in + b_hn + U_n (r h')), as Cho et al. 2014 and ONNX's default.
    """

    _base = nn.GRU
    reset_after = True

    def __init__(self, *args: Any, reset_after: bool = True, learn_initial_state: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self.reset_after = bool(reset_after)
        self._is_own = not reset_after
        self._extend(self._more(learn_initial_state))

    @property
    def _cell_name(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"


class RNN(_Layer, nn.RNN):
    """torch.nn.RNN on our kernels; `learn_initial_state` as of `LSTM`."""

    _base = nn.RNN

    def __init__(self, *args: Any, learn_initial_state: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self._extend(self._more(learn_initial_state))


_CELL_WEIGHTS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}


class _Step(_Ours, nn.RNNCellBase):
    """What the three cells share beyond torch."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        is_torchs = not self._is_own and self._frozen is None
        if _compiles():
            return self._base.forward(self, input, hx) if is_torchs else self._between_graphs(input, hx)
        if is_torchs:
            name: Any = self._cell_name
            p, cell = self._parameters, _LAYERS.get(name)
            if hx is not None and cell is not None and p.keys() == _CELL_WEIGHTS and not _autocast() and (cell != _LSTM or _is_pair(hx)):
                h, c = hx if cell == _LSTM else (hx, None)
                out = _cell(cell, input, h, c, (p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]))
                if out is not None:
                    return out if cell == _LSTM else out[0]
            return self._as_torch(input, hx)
        if isinstance(input, torch.fx.Proxy):
            return self._as_torch(input, hx)
        frozen = self._frozen
        if frozen is not None:
            if frozen.is_small:
                return frozen.twin.forward(input, hx)
            if type(input) is Tensor:
                out = frozen.short(input, () if hx is None else tuple(hx) if self._base is nn.LSTMCell else (hx,), True)
                if out is not None:
                    return out[1:] if self._base is nn.LSTMCell else out[1]
            if frozen.is_for_twin(input):
                return frozen.twin.forward(input, hx)
        return _forwards_by_standin[self._base](_Standin(self, ()), input, hx)

    @_eager
    def _between_graphs(self, input: Any, hx: Any) -> Any:
        if _compiles():
            torch._dynamo.graph_break()
        return self.forward(input, hx)


class LSTMCell(_Step, nn.LSTMCell):
    """torch.nn.LSTMCell on our kernels; peephole (weight_peep (3, H)) and forget_bias as of `LSTM`.

    >>> h, c = LSTMCell(4, 8, peephole=True)(torch.zeros(2, 4))
    >>> h.shape
    torch.Size([2, 8])
    """

    _base = nn.LSTMCell
    peephole = False

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, peephole: bool = False,
        forget_bias: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.peephole = bool(peephole)
        self._extend({"weight_peep": (3, self.hidden_size)} if peephole else {}, forget_bias)

    @property
    def _cell_name(self) -> str:
        return "lstm_peephole" if self.peephole else "lstm"


class GRUCell(_Step, nn.GRUCell):
    """torch.nn.GRUCell on our kernels; reset_after as of `GRU`."""

    _base = nn.GRUCell
    reset_after = True

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, reset_after: bool = True) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = bool(reset_after)
        self._is_own = not reset_after

    @property
    def _cell_name(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"


class RNNCell(_Step, nn.RNNCell):
    """torch.nn.RNNCell on our kernels."""

    _base = nn.RNNCell

    @property
    def _cell_name(self) -> str:
        return f"rnn_{self.nonlinearity}"


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN, nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell, nn.RNNCell: RNNCell,
}  # fmt: skip
_Model = TypeVar("_Model", bound=nn.Module)


def _give_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """To every module of a model that of its class; the class that a parametrization made of one becomes the same of the other."""
    for module in model.modules():
        own = type(module)
        if parametrize.is_parametrized(module) and own.__base__ in classes:
            module.__class__ = type(own.__name__, (classes[own.__base__],), dict(vars(own)))
        else:
            module.__class__ = classes.get(own, own)


def convert(model: _Model) -> _Model:
    """Gives every torch.nn recurrent module of a model, the model itself too, our class: in place, parameters and hooks untouched.

    What goes by a module's exact class passes over ours: quantize `to_torch(model)`, and pickle it where rnnfast will not be. Users' subclasses of
    torch's classes are left as they are; `install` covers them.

    >>> type(convert(nn.Sequential(nn.GRU(3, 4)))[0]) is GRU
    True
    """
    _give_classes(model, _TWINS)
    return model


def to_torch(model: _Model) -> _Model:
    """`convert` undone, and `freeze`. Raises ValueError for a layer that computes what torch's cannot.

    >>> type(to_torch(nn.Sequential(GRU(3, 4)))[0]) is nn.GRU
    True
    """
    for module in model.modules():
        if isinstance(module, _Ours) and module._is_own:
            raise ValueError(f"to_torch: torch has no {module}")
    _give_classes(unfreeze(model), {twin: base for base, twin in _TWINS.items()})
    return model


def freeze(model: _Model) -> _Model:
    """Takes a snapshot of every recurrent module's weights, in the kernels' order, for faster inference: in place, in eval mode, after `convert`.

    Calls read the snapshot: what is written to the weights later is not seen until `freeze` is called again. `unfreeze`, `train()`, `load_state_dict`,
    and moves to another dtype or device end it; copies, pickles and state_dicts have none of it. The weights are constants: gradients go to the input
    and the state alone.

    >>> layer = freeze(nn.LSTM(4, 8))
    >>> with torch.no_grad():
    ...     y, state = layer(torch.zeros(1, 1, 4))
    """
    for module in convert(model).eval().modules():
        if isinstance(module, _Ours):
            module._frozen = None
            module._frozen = _Frozen(module)
    return model


def unfreeze(model: _Model) -> _Model:
    """`freeze` undone: calls read the weights again."""
    for module in model.modules():
        if isinstance(module, _Ours):
            module._frozen = None
    return model


# ---- torch.compile: one operation a call, with a fake kernel and its gradient ----------------------------------------------------------------

_SIZES = "int cell, int layers, int directions, bool batch_first, bool low"
_TENSORS = "Tensor x, Tensor? batch_sizes, Tensor h, Tensor? c, Tensor[] weights"


def _stack_op(
    x: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor | None, weights: list[Tensor], cell: int, layers: int, directions: int,
    batch_first: bool, low: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_T, c_T, tape; what there is not is empty: h_T of one step, c_T of what has none, the tape in inference."""
    x, h, c, weights = _tidy(x.detach(), rows=True), _tidy(h.detach()), None if c is None else _tidy(c.detach()), [_tidy(w.detach()) for w in weights]
    grad = bool(train)
    if grad:
        h = h.detach().requires_grad_()
    out = _core.stack_forward(cell, layers, directions, batch_first, low, torch.get_num_threads(), grad, x, batch_sizes, h, c, weights)
    if out is None:
        raise RuntimeError("rnnfast::stack takes CPU tensors of one float dtype, shaped as torch.nn's layers have them")
    y, h_T, c_T, tape = (x.new_empty(0) if t is None else t for t in out)
    if grad:
        end = 0
        for size in _tape_sizes(x, h, weights, layers, directions, cell):
            tape[end + size : end + _rounded(size)] = 0  # nobody writes there: equal calls give equal results
            end += _rounded(size)
    return y, h_T, c_T, tape


def _stack_fake(
    x: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor | None, weights: list[Tensor], cell: int, layers: int, directions: int,
    batch_first: bool, low: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    single = batch_sizes is None and x.dim() == 2
    swapped = batch_first and not single and batch_sizes is None
    y = x.new_empty((*(x.shape[1::-1] if swapped else x.shape[:-1]), directions * h.shape[-1]))
    y = y.transpose(0, 1) if swapped else y  # as torch's
    h_T = x.new_empty(0) if single else h.new_empty(h.shape)
    c_T = x.new_empty(0) if c is None else c.new_empty(c.shape)
    size = sum(_rounded(n) for n in _tape_sizes(x, h, weights, layers, directions, cell)) if train else 0
    return y, h_T, c_T, x.new_empty((size,))


def _tape_sizes(x: Tensor, h: Tensor, weights: list[Tensor], layers: int, directions: int, cell: int) -> list[Any]:
    """Of the tape's parts: every layer's y, then what each direction of each layer keeps."""
    tokens = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    each = len(weights) // (layers * directions)
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    sizes = [tokens * directions * h.shape[-1]] * layers
    for k in range(layers * directions):
        shapes = [tuple(int(n) for n in w.shape) for w in weights[k * each : k * each + each]]
        arrays = [np.empty(shape, dtype) for shape in shapes]
        biases, hr = (arrays[2:4] if each >= 4 else [None, None]), arrays[-1] if each % 2 else None
        one = _core.tape_size(CELLS[cell], _core.Layout(1, 1), [*arrays[:2], *biases, None, hr, None])
        sizes.append(tokens * one)
    return sizes


def _rounded(n: Any) -> Any:
    return (n + 15) // 16 * 16


def _stack_backward_op(
    x: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor | None, weights: list[Tensor], tape: Tensor, dy: Tensor | None, dh_T: Tensor | None,
    dc_T: Tensor | None, cell: int, layers: int, directions: int, batch_first: bool, low: bool,
) -> list[Tensor]:  # fmt: skip
    """dx, dh_0, dc_0 (empty where there is none), then one gradient a weight."""
    tensors = (x, h, c, tape, dy, dh_T, dc_T)
    x, h, c, tape, dy, dh_T, dc_T = (None if t is None else _tidy(t.detach()) for t in tensors)  # type: ignore[assignment]
    weights = [_tidy(w.detach()) for w in weights]
    out = _core.stack_backward(
        cell, layers, directions, batch_first, low, torch.get_num_threads(), False, x, batch_sizes, h, c, weights, tape, dy, dh_T, dc_T,
        (True,) * (3 + len(weights)),
    )  # fmt: skip
    if out is None:
        raise RuntimeError("rnnfast::stack_backward: the gradients do not fit the tape")
    return [x.new_empty(0) if t is None else t for t in out]


def _stack_backward_fake(x: Tensor, batch_sizes: Any, h: Tensor, c: Tensor | None, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) if t is not None else x.new_empty(0) for t in (x, h, c, *weights)]


def _stack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, batch_sizes, h, c, weights, *sizes, _ = inputs
    ctx.sizes, ctx.single, ctx.presence = sizes, batch_sizes is None and x.dim() == 2, (batch_sizes is not None, c is not None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, batch_sizes, h, c, output[3], *weights)


def _stack_gradient(ctx: Any, dy: Any, dh_T: Any, dc_T: Any, dtape: Any) -> tuple[Any, ...]:
    x, batch_sizes, h, c, tape, *weights = ctx.saved_tensors
    if ctx.single:
        dh_T = None
    dx, dh, dc, *dw = torch.ops.rnnfast.stack_backward(x, batch_sizes, h, c, weights, tape, dy, dh_T, dc_T if c is not None else None, *ctx.sizes)
    return dx, None, dh, dc if c is not None else None, dw, *[None] * (len(ctx.sizes) + 1)


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, batch_sizes, h, c, weights, _, dy, dh_T, dc_T, *sizes = inputs
    ctx.sizes, ctx.single = sizes, batch_sizes is None and x.dim() == 2
    ctx.save_for_backward(batch_sizes, x, h, c, *weights, dy, dh_T, dc_T)


def _second_gradient(ctx: Any, given: list[Tensor | None]) -> tuple[Any, ...]:
    """By torch's own operations, run again from the start."""
    batch_sizes, *saved = ctx.saved_tensors
    cell, layers, directions, batch_first, low = ctx.sizes
    call = _Call(cell, layers, directions, batch_first, low, batch_sizes, ctx.single)
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.view_as(t) if create and t.requires_grad else t.detach().requires_grad_() for t in saved]
        x, h, c, *weights = leaves[:-3]
        gradients = [leaves[-3], *([] if ctx.single else [leaves[-2]]), *([] if c is None else [leaves[-1]])]
        first = _differentiable_backward(call, x, h, c, weights, gradients, [t is not None for t in leaves[:-3]])
        pairs = [(out, g) for out, g in zip(first, given) if out is not None and g is not None and out.requires_grad]
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], create_graph=create, allow_unused=True))
    dx, dh, dc, *dw, ddy, ddh, ddc = [None if t is None else next(found) for t in leaves]
    return dx, None, dh, dc, dw, None, ddy, ddh, ddc, *[None] * len(ctx.sizes)


_op = torch.library.custom_op("rnnfast::stack", _stack_op, mutates_args=(), schema=f"({_TENSORS}, {_SIZES}, bool train) -> (Tensor, Tensor, Tensor, Tensor)")
_op.register_fake(_stack_fake)
_op.register_autograd(_stack_gradient, setup_context=_stack_setup)
_backward_op = torch.library.custom_op(
    "rnnfast::stack_backward", _stack_backward_op, mutates_args=(),
    schema=f"({_TENSORS}, Tensor tape, Tensor? dy, Tensor? dh_T, Tensor? dc_T, {_SIZES}) -> Tensor[]",
)  # fmt: skip
_backward_op.register_fake(_stack_backward_fake)
_backward_op.register_autograd(_second_gradient, setup_context=_second_setup)


class Compilable(nn.Module):
    """A recurrent layer or cell of torch.nn as one node of a compiled graph (one a layer under dropout); `compilable` makes them.

    Parameters, their names, hooks and attributes are the original's, and so is what it takes.
    """

    mode = ""
    hidden_size: int
    _flat_weights_names: list[str]
    num_layers, bidirectional, batch_first, dropout, proj_size = 1, False, False, 0.0, 0  # as a cell has them

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        own = ("_flat_weights", "_flat_weight_refs", "_frozen")
        vars(self).update({name: value for name, value in vars(module).items() if name not in own})
        self.is_cell = isinstance(module, nn.RNNCellBase)
        kind = self.mode or ("LSTM" if isinstance(module, nn.LSTMCell) else "GRU" if isinstance(module, nn.GRUCell) else f"rnn_{self.nonlinearity}")
        self.cell = _LAYERS[kind.lower()]
        self.paired, self.output_size, self.directions = self.cell == _LSTM, self.proj_size or self.hidden_size, 1 + self.bidirectional
        cell_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        self.names = list(cell_names if self.is_cell else self._flat_weights_names)

    reset_parameters, all_weights = nn.RNNBase.reset_parameters, nn.RNNBase.all_weights

    def flatten_parameters(self) -> None:
        """As torch's layers have it, nothing here."""

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"

    def forward(self, input: Any, hx: Any = None) -> Any:
        """(y, h_T) or (y, (h_T, c_T)) as the original; cells give h or (h, c)."""
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            if hx is not None and order is not None:
                hx = tuple(s.index_select(1, order) for s in hx) if self.paired else hx.index_select(1, order)
            y, h_T, c_T = self._run(data, batch_sizes, hx, int(batch_sizes[0]) if order is None else order.shape[0])
            if back is not None:
                h_T, c_T = h_T.index_select(1, back), c_T.index_select(1, back) if self.paired else c_T
            return PackedSequence(y, batch_sizes, order, back), (h_T, c_T) if self.paired else h_T
        full = 2 if self.is_cell else 3
        if input.dim() not in (full - 1, full) or input.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {full - 1} or {full} dimensions, the last {self.input_size} wide; got {tuple(input.shape)}")
        batched = input.dim() == full
        at = 0 if self.is_cell or self.batch_first else 1
        x = input if batched else input.unsqueeze(at)
        if hx is not None and not batched:
            hx = tuple(s.unsqueeze(-2) for s in hx) if self.paired else hx.unsqueeze(-2)
        y, h_T, c_T = self._run(x, None, hx, x.shape[at])
        if self.is_cell:
            h_T = y
        if not batched:
            y, h_T, c_T = y.squeeze(at), h_T.squeeze(-2), c_T.squeeze(-2) if self.paired else c_T
        state = (h_T, c_T) if self.paired else h_T
        return state if self.is_cell else (y, state)

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: Any, rows: int) -> tuple[Tensor, ...]:
        """y, h_T and c_T of batched or packed input."""
        weights = [getattr(self, name) for name in self.names]
        lead = (rows,) if self.is_cell else (self.num_layers * self.directions, rows)
        if hx is None:
            h, c = x.new_zeros((*lead, self.output_size)), x.new_zeros((*lead, self.hidden_size)) if self.paired else None
        else:
            h, c = hx if self.paired else (hx, None)
        half, run = _half(x, h, c, weights), partial(self._stack, batch_sizes)
        if half is None:
            return run(x, h, c, weights, False)
        out = h.dtype if self.cell == _GRU or (self.is_cell and self.paired) else half  # as torch's
        result = _in_float32(run, x, h, c, weights, half, out)
        assert result is not None
        return result

    def _stack(self, batch_sizes: Tensor | None, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], low: bool) -> tuple[Tensor, ...]:
        op, D, batch_first, train = torch.ops.rnnfast.stack, self.directions, self.batch_first and batch_sizes is None, torch.is_grad_enabled()
        if not _compiles() and (_transforms() is not None or _trace() is not None or forward_ad._current_level >= 0):
            name, state = _NAMES[self.cell], h if c is None else (h, c)
            if self.is_cell:
                step = _declined(name + "_cell", x, state, *weights)
                return (step[0], *step) if c is not None else (step, step, step)
            given = (x, state) if batch_sizes is None else (x, batch_sizes, state)
            last = (batch_first,) if batch_sizes is None else ()
            y, *ends = _declined(name, *given, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, *last)
            return y, ends[0], ends[-1]
        if self.dropout == 0 or not self.training or self.num_layers == 1:
            y, h_T, c_T, _ = op(x, batch_sizes, h, c, weights, self.cell, self.num_layers, D, batch_first, low, train)
            return y, h_T, c_T
        each, ends = len(weights) // self.num_layers, []
        y = x.transpose(0, 1) if batch_first else x
        for layer in range(self.num_layers):
            y = torch.dropout(y, self.dropout, True) if layer > 0 else y
            h_l, c_l = (None if s is None else s[layer * D : layer * D + D] for s in (h, c))
            y, *end = op(y, batch_sizes, h_l, c_l, weights[layer * each : layer * each + each], self.cell, 1, D, False, low, train)
            ends.append(end)
        return y.transpose(0, 1) if batch_first else y, torch.cat([e[0] for e in ends]), torch.cat([e[1] for e in ends])


def compilable(model: nn.Module) -> nn.Module:
    """A model whose recurrent layers are one node each under torch.compile(fullgraph=True); parameters are shared with the old one.

    Layers below the top are replaced in place; use what is returned. Without this torch.compile ends a graph before each layer, runs it on our kernels
    and begins another.
    """
    done: dict[nn.Module, nn.Module] = {}  # a module may have several names
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_replaceable(child):
                setattr(parent, name, done.setdefault(child, Compilable(child)))
    return Compilable(model) if _is_replaceable(model) else model


def _is_replaceable(module: nn.Module) -> bool:
    if isinstance(module, _Ours) and module._is_own:
        raise ValueError(f"compilable: torch has no {module}")
    return type(module) in _TWINS or type(module) in _TWINS.values()


# ---- rnnfast's own models in many processes ----------------------------------------------------------------------------------------------


class Replicas:
    """The processes of torch.distributed, as `rnnfast.training.fit(replicas=...)` wants them; made in each process that torchrun starts.

    A context manager: on leaving, the process group that it made is gone.

    >>> with Replicas(f"file://{__import__('tempfile').mkdtemp()}/group", rank=0, size=1) as replicas:
    ...     sums = np.ones(3)
    ...     replicas.total(sums)
    >>> sums.tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, address: str = "env://", rank: int = -1, size: int = -1) -> None:
        self._began = not dist.is_initialized()
        if self._began:
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._held: Any = None  # the latest tensors: were gloo's threads the last to let go of one, they would need Python, which may be about to end

    def total(self, array: NDArray[Any]) -> None:
        """Puts the sum over all processes in the array's place."""
        own = self._held = torch.tensor(array)
        dist.all_reduce(own)
        array[...] = own.numpy()

    def joined(self, array: NDArray[Any]) -> NDArray[Any]:
        """All processes' arrays side by side along axis 1, in order of rank; the same in each."""
        own = torch.tensor(array)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._held = own, parts
        dist.all_gather(parts, own)
        return np.concatenate([part.numpy() for part in parts], axis=1)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        if self._began:
            dist.destroy_process_group()
