"""Each library behind one interface: a shape in, the sides that can run it out. Only this file knows libraries.

Every side gets the same weights and inputs, in its own favourite layout. A library's fastest mode counts, ours as any:
training on weights that change between calls; inference also with the weights as constants, as onnxruntime always has
them (rnnfast in eval mode); one step at a time with each library's way of doing that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import language
import numpy as np
import rnnfast
import rnnfast.functional as F
from limits import cores
from rnnfast import reference
from shapes import Shape
from timing import INPUTS, Array, Side

TORCH_CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


class Problem:
    """The weights, inputs and output gradients of a shape, from a fixed seed."""

    def __init__(self, shape: Shape) -> None:
        draw = np.random.default_rng(20260101)
        dtype = np.dtype(shape.dtype)
        bound = 1 / np.sqrt(shape.H)

        def uniform(*size: int) -> Array:
            return draw.uniform(-bound, bound, size).astype(dtype)

        self.shape = shape
        self.params: dict[str, Array] = {}
        for layer in range(shape.num_layers):
            for suffix in ("", "_reverse")[: shape.D]:
                s = f"_l{layer}{suffix}"
                self.params["weight_ih" + s] = uniform(shape.G * shape.H, shape.layer_input(layer))
                self.params["weight_hh" + s] = uniform(shape.G * shape.H, shape.R)
                self.params["bias_ih" + s] = uniform(shape.G * shape.H)
                self.params["bias_hh" + s] = uniform(shape.G * shape.H)
                if shape.proj_size:
                    self.params["weight_hr" + s] = uniform(shape.R, shape.H)
                if shape.cell == "lstm_peephole":
                    self.params["weight_peep" + s] = uniform(3, shape.H)
        width = shape.D * shape.R * (shape.num_layers if shape.skip else 1)
        if shape.vocabulary:  # tokens in, the tokens wanted out; one model of all layers
            self.params = {f"rnn.{name}": value for name, value in self.params.items()}
            self.params["embedding.weight"] = draw.standard_normal((shape.vocabulary, shape.I)).astype(dtype)
            self.params["logits.weight"], self.params["logits.bias"] = uniform(shape.vocabulary, width), uniform(shape.vocabulary)
            self.x, self.dy = ([draw.integers(0, shape.vocabulary, (shape.T, shape.B)) for _ in range(INPUTS)] for _ in range(2))
            self.lengths = None
            return
        self.x = [draw.standard_normal((shape.T, shape.B, shape.I)).astype(dtype) for _ in range(INPUTS)]
        self.dy = [draw.standard_normal((shape.T, shape.B, width)).astype(dtype) for _ in range(INPUTS)]
        self.lengths = None if shape.lengths is None else np.array(shape.lengths, dtype=np.int64)
        if self.lengths is not None:
            for k in range(INPUTS):
                past = np.arange(shape.T)[:, None] >= self.lengths
                self.x[k][past] = 0
                self.dy[k][past] = 0

    @property
    def tolerance(self) -> float:
        """Rounding of one long sum, generously: 32 eps sqrt(terms)."""
        s = self.shape
        return 32 * float(np.finfo(s.dtype).eps) * float(np.sqrt(max(1, s.T * s.B) * (s.I + s.H)))


def _nudge(weights: Array, k: int) -> None:
    weights[k % weights.shape[0], 0] *= 1.0001 if k % 2 else 0.9999


def truth(problem: Problem) -> dict[str, Array]:
    """The results on input 0 in float64, by NumPy: what errors of other precisions are measured against."""
    return _truth(dataclasses.replace(problem.shape, threads=1))


@functools.lru_cache(maxsize=1)  # lists have a shape's thread counts side by side
def _truth(shape: Shape) -> dict[str, Array]:
    problem = Problem(shape)
    params = {name: value.astype(np.float64) for name, value in problem.params.items()}
    y, _, tape = reference.forward(shape.cell, problem.x[0].astype(np.float64), None, params, tape=shape.mode == "training")
    if shape.mode != "training":
        return {"y": y}
    dx, _, gradients = reference.backward(tape, problem.dy[0].astype(np.float64))
    return {"y": y, "dx": dx} | gradients


def ours(problem: Problem, threads: int, compute: str | None = None) -> list[Side]:
    """rnnfast's sides: `functional`, whose weights may change between calls, and where nothing is trained a layer in eval mode, whose
    weights are constants, and for one step the streaming handle. `compute` is what products multiply."""
    shape = problem.shape
    library = f"rnnfast {compute}" if compute else "rnnfast"
    if shape.vocabulary:
        return [language.ours(problem, threads)]
    params = {name: value.copy() for name, value in problem.params.items()}
    options: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "bidirectional": shape.bidirectional,
        "skip": shape.skip,
        "lengths": problem.lengths,
        "compute_dtype": compute,
    }
    gradients = {name: np.zeros_like(value) for name, value in params.items()}
    x, dy = problem.x, problem.dy
    first = params["weight_hh_l0"]

    def infer(k: int) -> Any:
        return F.forward(shape.cell, x[k], None, params, tape=False, **options)

    def train(k: int) -> Any:
        y, _, tape = F.forward(shape.cell, x[k], None, params, **options)
        dx, _, _ = F.backward(tape, dy[k], None, gradients, accumulate=False, need_dstate=False)  # peers make none either
        return y, dx

    def results(k: int) -> dict[str, Array]:
        if shape.mode == "training":
            y, dx = train(k)
            return {"y": y, "dx": dx} | {name: value.copy() for name, value in gradients.items()}
        return {"y": infer(k)[0]}

    def enter() -> None:
        rnnfast.set_num_threads(threads)

    def touch(k: int) -> None:
        _nudge(first, k)

    if shape.mode == "training":
        return [Side(library, "training", threads, train, results, touch, enter)]
    layer = layer_of(shape, compute).eval()
    layer.load_state_dict(problem.params)

    def constant(k: int) -> Any:
        return layer(x[k], lengths=problem.lengths)

    sides = [Side(library, "eval mode", threads, constant, lambda k: {"y": constant(k)[0]}, enter=enter)]
    if shape.mode == "inference":
        sides.append(Side(library, "functional", threads, infer, results, touch, enter))
    if shape.T == 1 and not shape.bidirectional and problem.lengths is None:
        stream = layer.stream(batch=shape.B)
        out = np.empty((shape.B, layer.output_size), dtype=shape.dtype)
        frames = [value[0] for value in x]

        def stream_results(k: int) -> dict[str, Array]:
            stream.reset()
            return {"y": np.array(stream(frames[k], out))[None]}

        sides.append(Side(library, "stream", threads, lambda k: stream(frames[k], out), stream_results, enter=enter))
    return sides


def layer_of(shape: Shape, compute: str | None = None) -> Any:
    """The layer of a shape's cell and sizes."""
    kind, _, form = shape.cell.partition("_")
    special = {"peephole": {"peephole": True}, "reset_before": {"reset_after": False}}
    options = {"nonlinearity": form} if kind == "rnn" else special.get(form, {})
    return getattr(rnnfast, kind.upper())(
        shape.I, shape.H, shape.num_layers, bidirectional=shape.bidirectional, proj_size=shape.proj_size, skip=shape.skip,
        dtype=shape.dtype, compute_dtype=compute, **options,
    )  # fmt: skip


def torch_sides(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """torch: grad, no_grad and inference_mode; packed sequences for ragged shapes, cell modules for streaming."""
    shape = problem.shape
    if not _torch_has(shape):
        return
    if shape.vocabulary:
        yield from language.torch_sides(problem, threads)
        return
    import torch

    modes = {"training": contextlib.nullcontext} if shape.mode == "training" else {}
    if not modes:
        modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}
    yield from _torch_calls(problem, "torch", _torch_module(problem), getattr(torch, shape.dtype), modes, threads)
    if shape.T == 1 and shape.num_layers == 1 and not shape.bidirectional and problem.lengths is None and not shape.proj_size and shape.mode != "training":
        yield from _torch_cell(problem, threads)


def torch_reduced(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """torch's own bfloat16, the module converted or under autocast, and for inference its dynamically quantised int8 module."""
    if not _torch_has(problem.shape):
        return
    import torch

    training = problem.shape.mode == "training"
    module, half = _torch_module(problem), torch.bfloat16
    no_gradients = contextlib.nullcontext if training else torch.inference_mode

    @contextlib.contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast("cpu", half), no_gradients():
            yield

    yield from _torch_calls(problem, "torch bfloat16", _torch_module(problem).to(half), half, {"converted": no_gradients}, threads)
    yield from _torch_calls(problem, "torch bfloat16", module, torch.float32, {"autocast": autocast}, threads)
    kinds = {torch.nn.LSTM, torch.nn.GRU}
    if type(module) in kinds and not training:
        with warnings.catch_warnings():  # torch.ao is deprecated, and has no successor for recurrent layers
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), kinds, dtype=torch.qint8)[0]
        yield from _torch_calls(problem, "torch int8", quantized, torch.float32, {"quantize_dynamic": no_gradients}, threads)


def _torch_has(shape: Shape) -> bool:
    has = shape.cell in TORCH_CELLS and not shape.skip and (not shape.proj_size or shape.cell == "lstm")
    return has and importlib.util.find_spec("torch") is not None


def _torch_module(problem: Problem) -> Any:
    import torch

    shape = problem.shape
    options: dict[str, Any] = {"dtype": getattr(torch, shape.dtype)}
    if shape.cell.startswith("rnn"):
        options["nonlinearity"] = shape.cell[4:]
    if shape.proj_size:
        options["proj_size"] = shape.proj_size
    module = getattr(torch.nn, TORCH_CELLS[shape.cell])(shape.I, shape.H, shape.num_layers, bidirectional=shape.bidirectional, **options)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in problem.params.items()})
    return module


def _torch_calls(problem: Problem, library: str, module: Any, dtype: Any, modes: dict[str, Any], threads: list[int]) -> Iterator[Side]:
    """A module's sides on inputs of a dtype, one a mode and number of threads; a mode is a context that calls run in."""
    import torch

    shape = problem.shape
    x = [torch.from_numpy(value.copy()).to(dtype) for value in problem.x]
    dy = {kind: [torch.from_numpy(value.copy()).to(kind) for value in problem.dy] for kind in {dtype, torch.bfloat16}}
    lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)

    def run(inputs: Any) -> Any:
        if lengths is None:
            return module(inputs)[0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], total_length=shape.T)[0]

    def infer(k: int, mode: Any) -> Any:
        with mode():
            return run(x[k])

    def train(k: int, mode: Any) -> Any:
        module.zero_grad(set_to_none=True)
        inputs = x[k].detach().requires_grad_()
        with mode():
            y = run(inputs)
        y.backward(dy[y.dtype][k])
        return y, inputs.grad

    def results(k: int, mode: Any) -> dict[str, Array]:
        if shape.mode == "training":
            y, dx = train(k, mode)
            found = {"y": y, "dx": dx} | {name: p.grad for name, p in module.named_parameters()}
        else:
            found = {"y": infer(k, mode)}
        return {name: value.detach().to(getattr(torch, shape.dtype)).numpy() for name, value in found.items()}

    weight = dict(module.named_parameters()).get("weight_hh_l0")  # a quantised module's weights are constants

    def touch(k: int) -> None:
        if weight is not None:
            with torch.no_grad():
                weight[k % weight.shape[0], 0].mul_(1.0001 if k % 2 else 0.9999)

    call = train if shape.mode == "training" else infer
    for n in threads:
        for name, mode in modes.items():
            bound = functools.partial(call, mode=mode)
            yield Side(library, name, n, bound, functools.partial(results, mode=mode), touch, functools.partial(torch.set_num_threads, n))


def _torch_cell(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """torch's cell module, which hands its state from call to call; as a side's results count a first step's."""
    import torch

    shape = problem.shape
    kind = {"nonlinearity": shape.cell[4:]} if shape.cell.startswith("rnn") else {}
    cell = getattr(torch.nn, TORCH_CELLS[shape.cell] + "Cell")(shape.I, shape.H, dtype=getattr(torch, shape.dtype), **kind)
    cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(value) for name, value in problem.params.items()})
    frames = [torch.from_numpy(value[0].copy()) for value in problem.x]
    state: list[Any] = [None]

    def call(k: int) -> Any:
        with torch.inference_mode():
            state[0] = cell(frames[k], state[0])
        return state[0]

    def results(k: int) -> dict[str, Array]:
        state[0] = None
        y = call(k)
        return {"y": (y[0] if isinstance(y, tuple) else y).numpy()[None]}

    for n in threads:
        yield Side("torch", "cell", n, call, results, enter=functools.partial(torch.set_num_threads, n))


def onnxruntime_sides(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """onnxruntime: inference of one graph per layer stack; weights are constants, its best mode."""
    shape = problem.shape
    if shape.mode == "training" or shape.dtype != "float32" or shape.skip or shape.proj_size or shape.num_layers < 1:
        return
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return
    import onnxruntime

    model = onnx_model(problem)
    feeds = [{"x": value} for value in problem.x]
    if problem.lengths is not None:
        if min(problem.lengths) < 1:
            return
        for feed in feeds:
            feed["lengths"] = problem.lengths.astype(np.int32)
    for n in threads:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def call(k: int, session: Any = session) -> Any:
            return session.run(["y"], feeds[k])

        yield Side("onnxruntime", "inference", n, call, lambda k, call=call: {"y": call(k)[0]})


def onnx_model(problem: Problem) -> bytes:
    """The shape as an ONNX graph: one recurrent node a layer, directions folded side by side between layers."""
    from onnx import TensorProto, checker, helper, numpy_helper

    shape = problem.shape
    H, G = shape.H, shape.G
    operator = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}[shape.cell.split("_")[0]]
    order = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}[operator]  # i f g o -> i o f c;  r z n -> z r h
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if shape.bidirectional else "forward"}
    if operator == "GRU":
        attributes["linear_before_reset"] = int(shape.cell == "gru")
    if operator == "RNN":
        name = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid", "identity": "Affine"}[shape.cell[4:]]
        attributes["activations"] = [name] * shape.D

    def reorder(array: Array) -> Array:
        blocks = array.reshape(G, H, *array.shape[1:])
        return np.concatenate([blocks[g] for g in order])

    nodes, constants = [], []

    def constant(name: str, array: Array) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    width = shape.D * H
    constant("side_by_side", np.array([0, 0, width], dtype=np.int64))
    current = "x"
    for layer in range(shape.num_layers):
        suffixes = [f"_l{layer}{direction}" for direction in ("", "_reverse")[: shape.D]]
        p = problem.params
        w = np.stack([reorder(p["weight_ih" + s]) for s in suffixes])
        r = np.stack([reorder(p["weight_hh" + s]) for s in suffixes])
        b = np.stack([np.concatenate([reorder(p["bias_ih" + s]), reorder(p["bias_hh" + s])]) for s in suffixes])
        inputs = [current, constant(f"w{layer}", w), constant(f"r{layer}", r), constant(f"b{layer}", b)]
        inputs.append("lengths" if problem.lengths is not None else "")
        if shape.cell == "lstm_peephole":
            peep = np.stack([p["weight_peep" + s][[0, 2, 1]].reshape(-1) for s in suffixes])  # i f o -> i o f
            inputs += ["", "", constant(f"p{layer}", peep)]
        nodes.append(helper.make_node(operator, inputs, [f"y{layer}"], **attributes))  # (T, D, B, H)
        nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        current = "y" if layer == shape.num_layers - 1 else f"out{layer}"
        nodes.append(helper.make_node("Reshape", [f"t{layer}", "side_by_side"], [current]))
    inputs_ = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.T, shape.B, shape.I])]
    if problem.lengths is not None:
        inputs_.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [shape.B]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape.T, shape.B, width])]
    graph = helper.make_graph(nodes, "rnn", inputs_, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _jax_has(problem: Problem, package: str) -> bool:
    shape = problem.shape
    plain = shape.cell in ("lstm", "gru", "rnn_tanh") and shape.D == 1 and not (shape.proj_size or shape.skip or shape.vocabulary)
    return plain and problem.lengths is None and shape.dtype == "float32" and importlib.util.find_spec(package) is not None


def jax_sides(problem: Problem) -> Iterator[Side]:
    """JAX: lax.scan over the step, the input product hoisted out of the loop, all under jit. Its threads are its own."""
    if not _jax_has(problem, "jax"):
        return
    import jax
    import jax.numpy as jnp

    shape = problem.shape

    def step(p: Any, s: str, carry: Any, ax: Any) -> Any:
        h, c = carry
        ah = h @ p["weight_hh" + s].T + p["bias_hh" + s]
        if shape.cell == "rnn_tanh":
            h = jnp.tanh(ax + ah)
        elif shape.cell == "lstm":
            i, f, g, o = jnp.split(ax + ah, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        else:
            xr, xz, xn = jnp.split(ax, 3, axis=-1)
            hr, hz, hn = jnp.split(ah, 3, axis=-1)
            n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            z = jax.nn.sigmoid(xz + hz)
            h = (1 - z) * n + z * h
        return (h, c), h

    def forward(p: Any, x: Any) -> Any:
        for layer in range(shape.num_layers):
            s = f"_l{layer}"
            ax = x @ p["weight_ih" + s].T + p["bias_ih" + s]
            zero = jnp.zeros((shape.B, shape.H), x.dtype)
            _, x = jax.lax.scan(lambda carry, a, s=s: step(p, s, carry, a), (zero, zero), ax)
        return x

    yield _jitted(problem, "jax", "scan", forward, problem.params, lambda gradients: gradients)


def flax_sides(problem: Problem) -> Iterator[Side]:
    """flax: linen.RNN over OptimizedLSTMCell, GRUCell or SimpleCell, under jit. These keep one bias where torch keeps a sum of two."""
    if not _jax_has(problem, "flax"):
        return
    from flax import linen

    shape = problem.shape
    gates = {"lstm": "ifgo", "gru": "rzn", "rnn_tanh": [""]}[shape.cell]
    kind = {"lstm": linen.OptimizedLSTMCell, "gru": linen.GRUCell, "rnn_tanh": linen.SimpleCell}[shape.cell]
    layers = [linen.RNN(kind(shape.H), time_major=True) for _ in range(shape.num_layers)]

    def split(layer: int) -> Any:
        """torch's parameters of a layer as flax has them: a kernel (in, H) for every gate, a bias beside h (LSTM) or x (others), for n both."""
        found: dict[str, Any] = {}
        for g, gate in enumerate(gates):
            rows = slice(g * shape.H, (g + 1) * shape.H)
            biases = [problem.params[f"bias_{side}_l{layer}"][rows] for side in ("ih", "hh")]
            for side, bias in zip("ih", biases, strict=True):
                found[side + gate] = {"kernel": problem.params[f"weight_{side}h_l{layer}"][rows].T}
                if gate == "n":
                    found[side + gate]["bias"] = bias
            if gate != "n":
                found[("h" if shape.cell == "lstm" else "i") + gate]["bias"] = biases[0] + biases[1]
        return found

    def joined(gradients: Any) -> dict[str, Array]:
        found = {}
        for layer, of in enumerate(gradients):
            for side, other in ("ih", "hi"):
                parts = [of[side + gate] for gate in gates]
                found[f"weight_{side}h_l{layer}"] = np.concatenate([part["kernel"].T for part in parts])
                found[f"bias_{side}h_l{layer}"] = np.concatenate(
                    [part["bias"] if "bias" in part else of[other + gate]["bias"] for gate, part in zip(gates, parts, strict=True)]
                )
        return found

    def forward(p: Any, x: Any) -> Any:
        for layer, weights in zip(layers, p, strict=True):
            x = layer.apply({"params": {"cell": weights}}, x)
        return x

    yield _jitted(problem, "flax", kind.__name__, forward, [split(layer) for layer in range(shape.num_layers)], joined)


def _jitted(problem: Problem, library: str, mode: str, forward: Any, params: Any, named: Any) -> Side:
    """A pure function of parameters and x as a side; `named` gives its parameters' gradients torch's names."""
    import jax
    import jax.numpy as jnp

    training = problem.shape.mode == "training"

    def train(p: Any, x: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(forward, p, x)
        return y, *pullback(dy)

    params = jax.tree.map(jnp.asarray, params)
    x = [jnp.asarray(value) for value in problem.x]
    dy = [jnp.asarray(value) for value in problem.dy]
    run = jax.jit(train if training else forward)

    def call(k: int) -> Any:
        return jax.block_until_ready(run(params, x[k], dy[k]) if training else run(params, x[k]))

    def results(k: int) -> dict[str, Array]:
        if not training:
            return {"y": np.asarray(call(k))}
        y, dp, dx = jax.tree.map(np.asarray, call(k))
        return {"y": y, "dx": dx} | named(dp)

    return Side(library, mode, 0, call, results)


def sides(problem: Problem, libraries: tuple[str, ...]) -> list[Side]:
    """Every peer side that can run the problem; on all threads a peer may also choose to use one. JAX's threads cannot be held to fewer."""
    threads = sorted({1, problem.shape.threads or cores()})
    if max(threads) < cores():
        libraries = tuple(name for name in libraries if name not in ("jax", "flax"))
    found: list[Side] = []
    if "torch" in libraries:
        found += torch_sides(problem, threads)
    if "onnxruntime" in libraries:
        found += onnxruntime_sides(problem, threads)
    if "jax" in libraries:
        found += jax_sides(problem)
    if "flax" in libraries:
        found += flax_sides(problem)
    return found


def reduced(problem: Problem, libraries: tuple[str, ...]) -> list[Side]:
    """The sides of less precision, rnnfast's and torch's."""
    everyone = problem.shape.threads or cores()
    found = ours(problem, everyone, "bfloat16")
    if problem.shape.mode != "training":
        found += [side for side in ours(problem, everyone, "int8") if side.mode == "eval mode"]
    if "torch" in libraries:
        found += torch_reduced(problem, sorted({1, everyone}))
    return found
