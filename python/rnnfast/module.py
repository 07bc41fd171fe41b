"""A module: named parameters in one flat array, their gradients in another, and a stack of tapes.

flat           (N,) every parameter of the module, one after the other; the named ones are views into it
flat_gradient  (N,) the same for the gradients, made at first use
tape           what one forward keeps for its backward; k forwards are undone by k backwards, latest first

It does not know what a layer computes, nor what an optimizer does with the two flat arrays.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from sys import intern
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]

# A step frees its arrays and the next makes them anew. glibc hands freed memory back to the system, to be faulted in again page by page (a
# tenth of a small step), unless something larger was freed before: this, which is never touched. 32 MiB is the most that it takes as a sign.
np.empty(31 << 20, np.uint8)


class _Alone:
    def __init__(self, module: Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        if not self._module._busy.acquire(blocking=False):
            raise RuntimeError(f"{self._module._name}: concurrent training calls on one module; give each thread its own")

    def __exit__(self, *_: object) -> None:
        self._module._busy.release()


class Module:
    """A holder of parameters with torch's habits: train/eval, state_dict, gradients that accumulate.

    A subclass calls `super().__init__()` and `self._allocate({name: shape}, dtype)`, then fills
    `self.parameters()[name][...]`. In training mode its forward pushes a tape with `self._push(tape)` and its
    backward takes the latest with `self._pop()`; in eval mode a forward leaves no trace, so that calls are
    re-entrant.

    >>> class Scale(Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self._allocate({"weight": (2, 3)}, "float32")
    >>> scale = Scale()
    >>> scale.parameters()["weight"][...] = 1
    >>> float(scale.flat.sum())
    6.0
    >>> scale.eval().parameters()["weight"][0, 0] = 2
    Traceback (most recent call last):
    ...
    ValueError: assignment destination is read-only
    """

    max_tapes = 1024  # forwards that may wait for their backward; more is a forgotten eval(), and raises
    recurrent = False  # True where the interface is y, state = f(x, state, lengths, reset), as in the layers
    generator: np.random.Generator | None = None  # the module's own random stream (dropout), kept in checkpoints
    training: bool
    flat: Array  # (N,)

    def __init__(self) -> None:
        self.training = True
        self._tapes: list[Any] = []
        self._busy = threading.Lock()
        self._allocate({}, "float32")

    # ---- storage

    def _allocate(self, shapes: Mapping[str, Sequence[int]], dtype: DTypeLike) -> None:
        """Lays the named parameters out in one new flat array of zeros."""
        kind = np.dtype(dtype)
        if kind not in (np.dtype("float32"), np.dtype("float64")):
            raise ValueError(f"{self._name}: dtype must be float32 or float64, got {kind}")
        self._shapes = {intern(str(name)): tuple(int(n) for n in shape) for name, shape in shapes.items()}
        self._bind(np.zeros(sum(math.prod(shape) for shape in self._shapes.values()), kind), None)

    def _bind(self, flat: Array, flat_gradient: Array | None) -> None:
        self.flat = flat
        self._parameters = self._views(flat)
        self._flat_gradient = flat_gradient
        self._gradients = {} if flat_gradient is None else self._views(flat_gradient)

    def _views(self, flat: Array) -> dict[str, Array]:
        views, start = {}, 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            views[name] = flat[start:stop].reshape(shape)
            start = stop
        return views

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def dtype(self) -> np.dtype[Any]:
        """The parameters' dtype, float32 or float64."""
        return self.flat.dtype

    @property
    def flat_gradient(self) -> Array:
        """(N,) every gradient of the module, allocated at first use."""
        if self._flat_gradient is None:
            self._flat_gradient = np.zeros_like(self.flat)
            self._gradients = self._views(self._flat_gradient)
        return self._flat_gradient

    def leaves(self) -> list[Module]:
        """The modules that hold parameters and random streams themselves, each once: what an optimizer walks over."""
        return [self]

    def rows(self) -> tuple[int, NDArray[np.int64]] | None:
        """(width, the sorted rows of flat.reshape(-1, width) whose gradient may differ from 0), or None for all."""
        return None

    # ---- parameters and gradients by name

    def parameters(self) -> dict[str, Array]:
        """name -> live view of the parameter; read-only in eval mode."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Array]:
        """name -> live view of the gradient, of the parameter's shape; backward adds to it."""
        _ = self.flat_gradient  # makes the views at first use
        return dict(self._gradients)

    def zero_gradients(self) -> None:
        """Sets every gradient to 0 and drops the tapes that no backward took."""
        self._tapes.clear()
        if self._flat_gradient is not None:
            self._flat_gradient.fill(0)

    def state_dict(self) -> dict[str, Array]:
        """name -> copy of the parameter, under torch's key names."""
        return {name: value.copy() for name, value in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies every parameter from `state`; arrays, torch tensors and nested lists will do.

        Raises KeyError for a missing or unexpected key, ValueError for a wrong shape and TypeError for values that
        are no real numbers, each naming the key; nothing is written then. Works in eval mode too: the module takes
        the new values as its snapshot.
        """
        own = self.parameters()
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        if missing or unexpected:
            said = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
            said += [f"has unexpected {', '.join(map(repr, unexpected))}"] if unexpected else []
            raise KeyError(f"{self._name}: state_dict {' and '.join(said)}")
        new = {name: np.asarray(state[name]) for name in own}
        for name, value in new.items():
            if value.dtype.kind not in "fiu":
                raise TypeError(f"{self._name}: {name} must hold real numbers, got dtype {value.dtype}")
            if value.shape != own[name].shape:
                raise ValueError(f"{self._name}: {name} must have shape {own[name].shape}, got {value.shape}")
        was_training = self.training
        self.train()
        for name, value in new.items():
            own[name][...] = value
        if not was_training:
            self.eval()

    # ---- modes

    def train(self, mode: bool = True) -> Self:
        """Training mode: forwards keep tapes, parameters may be written. Returns the module."""
        self.training = bool(mode)
        for array in (self.flat, *self._parameters.values()):
            array.flags.writeable = self.training
        return self

    def eval(self) -> Self:
        """Inference mode: forwards keep nothing, parameters are read-only. Returns the module."""
        return self.train(False)

    # ---- tapes

    def _push(self, tape: Any) -> None:
        if len(self._tapes) >= self.max_tapes:
            raise RuntimeError(
                f"{self._name}: {len(self._tapes)} forwards wait for their backward; "
                "call eval() for inference, zero_gradients() to drop them, or raise max_tapes"
            )
        self._tapes.append(tape)

    def _pop(self) -> Any:
        if not self._tapes:
            raise RuntimeError(f"{self._name}: backward without a forward in training mode")
        return self._tapes.pop()

    def _alone(self) -> _Alone:
        """Around a forward or backward in training mode: a second thread inside is an error, not a race."""
        return _Alone(self)

    # ---- copying: the named views must go on being views of the one flat array

    def __getstate__(self) -> dict[str, Any]:
        gone = ("_busy", "_parameters", "_gradients", "_tapes")
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._busy, self._tapes = threading.Lock(), []
        self._bind(state["flat"], state["_flat_gradient"])
        self.train(self.training)
