"""A model as a static graph of named layers, run forwards and backwards. Not an autograd engine.

node      a name, a layer and where its x comes from; nodes run in the order they are written
source    the name of an earlier node, of its final state ("enc.state"), or, if neither, of an input of the graph
A list of sources is joined along the last axis; a source read twice gets the sum of both gradients.
It does not know the layers: recurrent ones take and give a state, the others map x to y.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .module import Array, Module

if TYPE_CHECKING:
    from typing_extensions import Self


class _Node(NamedTuple):
    name: str
    layer: Any  # a Module that can be called and has backward
    sources: tuple[str, ...]
    state: str | None  # the source of its initial state


def _sum(a: Any, b: Any) -> Any:
    """a + b for gradients of any structure: arrays, the (h, c) of an LSTM, the dict of a graph, None for 0."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Mapping):
        return {name: _sum(a.get(name), b.get(name)) for name in {**a, **b}}
    if isinstance(a, tuple):
        return tuple(_sum(x, y) for x, y in zip(a, b, strict=True))
    return a + b


def _kinds(state: Any) -> list[tuple[Any, Any]]:
    """Shape and dtype of a layer's state: of h, or of h and c."""
    parts = [np.asarray(part) for part in (state if isinstance(state, (tuple, list)) else (state,))]
    return [(part.shape, part.dtype) for part in parts]


class Graph(Module):
    """A network of layers: {name: (layer, source or [sources])}, and {"name.state": source} for initial states.

    y, state = graph(x, state=None, lengths=None, reset=None)      dx, dstate = graph.backward(dy, dstate=None)

    x is an array if the graph has one input, else (or as well) a dict of arrays by input name. y is the last node's
    output, or what `outputs` names: one name gives an array, a list of names a dict. state and dstate are dicts by
    the names of recurrent nodes; nodes left out start afresh. lengths (B,) and reset (T, B) go to every recurrent
    node, or to those that a dict names. dx and dy follow x and y. So a graph can itself be a node of a graph.

    Parameters and state_dict keys carry the node's name: "h1.weight_ih_l0". A layer under two names is one layer:
    its weights are shared and its gradients add up under the first name.

    Raises ValueError for a source that is written before its node, a state fed to a layer without one, unknown
    names in x, state, lengths or reset, and RuntimeError for a backward without a forward in training mode.

    >>> from rnnfast.dense import Linear
    >>> net = Graph({"a": (Linear(3, 4, seed=1), "x"), "y": (Linear(7, 2, seed=2), ["x", "a"])})
    >>> y, state = net(np.ones((5, 1, 3), np.float32))
    >>> y.shape, state
    ((5, 1, 2), {})
    >>> dx, dstate = net.backward(np.ones_like(y))
    >>> dx.shape, sorted(net.gradients())
    ((5, 1, 3), ['a.bias', 'a.weight', 'y.bias', 'y.weight'])
    """

    recurrent = True

    def __init__(self, nodes: Mapping[str, Any], outputs: str | Sequence[str] | None = None) -> None:
        super().__init__()
        layers = {name: value for name, value in nodes.items() if not name.endswith(".state")}
        fed = {name[: -len(".state")]: value for name, value in nodes.items() if name.endswith(".state")}
        self._nodes: list[_Node] = []
        for name, value in layers.items():
            if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Module)):
                raise ValueError(f"Graph: {name!r} must be (layer, source or [sources]), got {value!r}")
            sources = (value[1],) if isinstance(value[1], str) else tuple(value[1])
            self._nodes.append(_Node(name, value[0], sources, fed.pop(name, None)))
        if fed or not self._nodes:
            raise ValueError(f"Graph: states fed to no node: {sorted(fed)}" if fed else "Graph: no nodes")
        known: set[str] = set()
        inputs: dict[str, None] = {}
        for node in self._nodes:
            if node.state is not None and not node.layer.recurrent:
                raise ValueError(f"Graph: {node.name!r} has no state that {node.state!r} could feed")
            for source in (*node.sources, *([] if node.state is None else [node.state])):
                owner = source.removesuffix(".state")
                if owner in layers and source not in known:
                    raise ValueError(f"Graph: {node.name!r} reads {source!r}, which comes later or does not exist")
                if source not in known:
                    inputs[source] = None
            known |= {node.name, node.name + ".state"} if node.layer.recurrent else {node.name}
        self.inputs = tuple(inputs)
        outputs = self._nodes[-1].name if outputs is None else outputs
        self._one_output = isinstance(outputs, str)
        self.outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        self._expect("outputs", self.outputs, layers)
        modes = {leaf.training for leaf in self.leaves()}
        self.training = modes != {False}

    @staticmethod
    def _expect(what: str, names: Any, known: Any) -> None:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"Graph: {what} names {unknown}, known are {sorted(known)}")

    # ---- the layers as one module

    def __getitem__(self, name: str) -> Any:
        """The layer of a node."""
        return {node.name: node.layer for node in self._nodes}[name]

    def _layers(self) -> dict[str, Any]:
        """name -> layer, each layer once, under its first name."""
        first: dict[int, _Node] = {}
        for node in self._nodes:
            first.setdefault(id(node.layer), node)
        return {node.name: node.layer for node in first.values()}

    def leaves(self) -> list[Module]:
        """The modules of the graph that hold parameters and random streams themselves, each once."""
        return list({id(leaf): leaf for layer in self._layers().values() for leaf in layer.leaves()}.values())

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the first layer that has parameters."""
        return next((leaf.flat.dtype for leaf in self.leaves() if leaf.flat.size), self.flat.dtype)

    def parameters(self) -> dict[str, Array]:
        """ "node.name" -> live view of the parameter; read-only in eval mode."""
        return {f"{name}.{key}": p for name, layer in self._layers().items() for key, p in layer.parameters().items()}

    def gradients(self) -> dict[str, Array]:
        """ "node.name" -> live view of the gradient."""
        return {f"{name}.{key}": g for name, layer in self._layers().items() for key, g in layer.gradients().items()}

    def zero_gradients(self) -> None:
        """Sets every gradient to 0 and drops the tapes that no backward took."""
        self._tapes.clear()
        for layer in self._layers().values():
            layer.zero_gradients()

    def train(self, mode: bool = True) -> Self:
        """Training or inference mode for every layer. Returns the graph."""
        self.training = bool(mode)
        for layer in self._layers().values():
            layer.train(mode)
        return self

    # ---- forwards and backwards

    def __call__(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> tuple[Any, dict[str, Any]]:
        if not self.training:
            return self._forward(x, state, lengths, reset)[:2]
        with self._alone():
            y, states, tape = self._forward(x, state, lengths, reset)
            self._push(tape)
            return y, states

    def _forward(self, x: Any, state: Any, lengths: Any, reset: Any) -> tuple[Any, dict[str, Any], Any]:
        if not isinstance(x, Mapping) and len(self.inputs) != 1:
            raise ValueError(f"Graph: x must be a dict of the inputs {list(self.inputs)}")
        values: dict[str, Any] = dict(x) if isinstance(x, Mapping) else {self.inputs[0]: np.asarray(x)}
        self._expect("x", values, self.inputs)
        self._expect("the graph", self.inputs, values)
        states = dict(state or {})
        self._expect("state", states, [n.name for n in self._nodes if n.layer.recurrent and n.state is None])
        recurrent = [node.name for node in self._nodes if node.layer.recurrent]
        self._expect("lengths", lengths if isinstance(lengths, Mapping) else (), recurrent)
        self._expect("reset", reset if isinstance(reset, Mapping) else (), recurrent)
        final = {}
        for name, layer, sources, fed in self._nodes:
            parts = [values[source] for source in sources]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            if layer.recurrent:
                start = states.get(name) if fed is None else values[fed]
                ends, fresh = (of.get(name) if isinstance(of, Mapping) else of for of in (lengths, reset))
                values[name], final[name] = layer(joined, start, ends, fresh)
                values[name + ".state"] = final[name]
            else:
                values[name] = layer(joined)
        shapes = {key: (v.shape, v.dtype) for key, v in values.items() if isinstance(v, np.ndarray)}
        ends = {name: _kinds(s) for name, s in final.items() if not isinstance(s, Mapping)}  # a graph's own are its own to check
        y = values[self.outputs[0]] if self._one_output else {name: values[name] for name in self.outputs}
        return y, final, (shapes, ends, isinstance(x, Mapping))

    def backward(self, dy: Any, dstate: Any = None) -> tuple[Any, dict[str, Any]]:
        """Undoes the latest forward: dx and dstate from dy; parameter gradients accumulate in the layers."""
        with self._alone():
            tape = shapes, kinds, by_name = self._pop()
            try:
                d: dict[str, Any] = {name: np.asarray(g) for name, g in ({self.outputs[0]: dy} if self._one_output else dict(dy)).items()}
                ends = {f"{name}.state": g for name, g in (dstate or {}).items()}
                self._expect("dy", d, self.outputs)
                self._expect("dstate", ends, [f"{node.name}.state" for node in self._nodes if node.layer.recurrent])
                for name, g in d.items():
                    shape, dtype = shapes[name]
                    if g.shape != shape:
                        raise ValueError(f"Graph: dy of {name!r} must have shape {shape}, got {g.shape}")
                    if g.dtype != dtype:
                        raise TypeError(f"Graph: dy of {name!r} must have dtype {dtype}, got {g.dtype}")
                for name, g in (dstate or {}).items():
                    if g is not None and name in kinds and _kinds(g) != kinds[name]:
                        raise ValueError(f"Graph: dstate of {name!r} must have shapes and dtypes {kinds[name]}, got {_kinds(g)}")
            except (AttributeError, TypeError, ValueError):
                self._push(tape)  # a wrong dy or dstate costs nothing
                raise
            d.update(ends)
            starts = {}
            for name, layer, sources, fed in reversed(self._nodes):
                g = d.pop(name, None)
                g = np.zeros(*shapes[name]) if g is None else g
                if layer.recurrent:
                    dx, dstart = layer.backward(g, d.pop(name + ".state", None))
                    if fed is None:
                        starts[name] = dstart
                    else:
                        d[fed] = _sum(d.get(fed), dstart)
                else:
                    dx = layer.backward(g)
                if dx is None:  # integers have no gradient
                    continue
                stop = 0
                for source in sources:
                    start, stop = stop, stop + shapes[source][0][-1] if len(sources) > 1 else dx.shape[-1]
                    d[source] = _sum(d.get(source), dx[..., start:stop])
            dxs = {name: d.get(name) for name in self.inputs}
            return dxs if by_name else dxs[self.inputs[0]], starts
