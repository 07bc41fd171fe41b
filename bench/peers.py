"""Each library behind one interface: a shape in, the sides that can run it out. Only this file knows libraries.

Every side gets the same weights and inputs, in its own favourite layout. A library's fastest mode counts, ours as any:
training on weights that change between calls; inference also with the weights as constants, as onnxruntime always has
them (rnnfast in eval mode); one step at a time with each library's way of doing that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import rnnfast
import rnnfast.functional as F
from limits import cores
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


def ours(problem: Problem, threads: int) -> list[Side]:
    """rnnfast's sides: `functional`, whose weights may change between calls, and where nothing is trained a layer in eval mode, whose
    weights are constants, and for one step the streaming handle."""
    shape = problem.shape
    params = {name: value.copy() for name, value in problem.params.items()}
    options: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "bidirectional": shape.bidirectional,
        "skip": shape.skip,
        "lengths": problem.lengths,
    }
    gradients = {name: np.zeros_like(value) for name, value in params.items()}
    x, dy = problem.x, problem.dy
    first = params["weight_hh_l0"]

    def infer(k: int) -> Any:
        return F.forward(shape.cell, x[k], None, params, tape=False, **options)

    def train(k: int) -> Any:
        for gradient in gradients.values():
            gradient.fill(0)
        y, _, tape = F.forward(shape.cell, x[k], None, params, **options)
        dx, _, _ = F.backward(tape, dy[k], None, gradients)
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
        return [Side("rnnfast", "training", threads, train, results, touch, enter)]
    layer = layer_of(shape).eval()
    layer.load_state_dict(problem.params)

    def constant(k: int) -> Any:
        return layer(x[k], lengths=problem.lengths)

    sides = [Side("rnnfast", "eval mode", threads, constant, lambda k: {"y": constant(k)[0]}, enter=enter)]
    if shape.mode == "inference":
        sides.append(Side("rnnfast", "functional", threads, infer, results, touch, enter))
    if shape.T == 1 and not shape.bidirectional and problem.lengths is None:
        stream = layer.stream(batch=shape.B)
        out = np.empty((shape.B, layer.output_size), dtype=shape.dtype)
        frames = [value[0] for value in x]

        def stream_results(k: int) -> dict[str, Array]:
            stream.reset()
            return {"y": np.array(stream(frames[k], out))[None]}

        sides.append(Side("rnnfast", "stream", threads, lambda k: stream(frames[k], out), stream_results, enter=enter))
    return sides


def layer_of(shape: Shape) -> Any:
    """The layer of a shape's cell and sizes."""
    kind, _, form = shape.cell.partition("_")
    special = {"peephole": {"peephole": True}, "reset_before": {"reset_after": False}}
    options = {"nonlinearity": form} if kind == "rnn" else special.get(form, {})
    return getattr(rnnfast, kind.upper())(
        shape.I, shape.H, shape.num_layers, bidirectional=shape.bidirectional, proj_size=shape.proj_size, skip=shape.skip,
        dtype=shape.dtype, **options,
    )  # fmt: skip


def torch_sides(problem: Problem, threads: list[int]) -> Iterator[Side]:
    """torch: grad, no_grad and inference_mode; packed sequences for ragged shapes, cell modules for streaming."""
    shape = problem.shape
    if shape.cell not in TORCH_CELLS or shape.skip or (shape.proj_size and shape.cell != "lstm"):
        return
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    options: dict[str, Any] = {"dtype": getattr(torch, shape.dtype)}
    if shape.cell.startswith("rnn"):
        options["nonlinearity"] = shape.cell[4:]
    if shape.proj_size:
        options["proj_size"] = shape.proj_size
    module = getattr(torch.nn, TORCH_CELLS[shape.cell])(
        shape.I, shape.H, shape.num_layers, bidirectional=shape.bidirectional, **options
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(problem.params[name].copy()))
    x = [torch.from_numpy(value.copy()) for value in problem.x]
    dy = [torch.from_numpy(value.copy()) for value in problem.dy]
    lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)

    def run(inputs: Any) -> Any:
        if lengths is None:
            return module(inputs)[0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], total_length=shape.T)[0]

    def train(k: int) -> Any:
        module.zero_grad(set_to_none=True)
        inputs = x[k].detach().requires_grad_()
        y = run(inputs)
        y.backward(dy[k])
        return y, inputs.grad

    def infer(k: int) -> Any:
        with torch.no_grad():
            return run(x[k])

    def infer_grad(k: int) -> Any:
        return run(x[k])

    def infer_inference_mode(k: int) -> Any:
        with torch.inference_mode():
            return run(x[k])

    def results(k: int) -> dict[str, Array]:
        if shape.mode == "training":
            y, dx = train(k)
            found = {"y": y.detach().numpy(), "dx": dx.numpy()}
            return found | {name: p.grad.numpy() for name, p in module.named_parameters()}
        return {"y": infer(k).numpy()}

    weight = module.weight_hh_l0

    def touch(k: int) -> None:
        with torch.no_grad():
            weight[k % weight.shape[0], 0].mul_(1.0001 if k % 2 else 0.9999)

    modes = {"no_grad": infer, "inference_mode": infer_inference_mode, "grad": infer_grad}
    if shape.mode == "training":
        modes = {"training": train}
    if shape.T == 1 and shape.num_layers == 1 and not shape.bidirectional and lengths is None and not shape.proj_size and shape.mode != "training":
        modes |= _torch_cell(torch, shape, problem)
    for n in threads:
        for mode, call in modes.items():
            yield Side("torch", mode, n, call, results, touch, lambda n=n: torch.set_num_threads(n))


def _torch_cell(torch: Any, shape: Shape, problem: Problem) -> dict[str, Any]:
    kind = {"nonlinearity": shape.cell[4:]} if shape.cell.startswith("rnn") else {}
    cell = getattr(torch.nn, TORCH_CELLS[shape.cell] + "Cell")(shape.I, shape.H, dtype=getattr(torch, shape.dtype), **kind)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(torch.from_numpy(problem.params[name + "_l0"].copy()))
    frames = [torch.from_numpy(value[0].copy()) for value in problem.x]
    state: list[Any] = [None]

    def call(k: int) -> Any:
        with torch.inference_mode():
            state[0] = cell(frames[k], state[0])
        return state[0]

    return {"cell": call}


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


def jax_sides(problem: Problem) -> Iterator[Side]:
    """JAX: lax.scan over the step, the input product hoisted out of the loop, all under jit. Its threads are its own."""
    shape = problem.shape
    plain = shape.cell in ("lstm", "gru", "rnn_tanh") and shape.D == 1 and not shape.proj_size and not shape.skip
    if not plain or problem.lengths is not None or shape.dtype != "float32" or importlib.util.find_spec("jax") is None:
        return
    import jax
    import jax.numpy as jnp

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

    def train(p: Any, x: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(forward, p, x)
        return y, *pullback(dy)

    params = {name: jnp.asarray(value) for name, value in problem.params.items()}
    x = [jnp.asarray(value) for value in problem.x]
    dy = [jnp.asarray(value) for value in problem.dy]
    run = jax.jit(train if shape.mode == "training" else forward)

    def call(k: int) -> Any:
        return jax.block_until_ready(run(params, x[k], dy[k]) if shape.mode == "training" else run(params, x[k]))

    def results(k: int) -> dict[str, Array]:
        if shape.mode != "training":
            return {"y": np.asarray(call(k))}
        y, dp, dx = call(k)
        return {"y": np.asarray(y), "dx": np.asarray(dx)} | {name: np.asarray(value) for name, value in dp.items()}

    yield Side("jax", "scan", 0, call, results)


def sides(problem: Problem, libraries: tuple[str, ...]) -> list[Side]:
    """Every peer side that can run the problem; on all threads a peer may also choose to use one."""
    threads = sorted({1, problem.shape.threads or cores()})
    found: list[Side] = []
    if "torch" in libraries:
        found += torch_sides(problem, threads)
    if "onnxruntime" in libraries:
        found += onnxruntime_sides(problem, threads)
    if "jax" in libraries:
        found += jax_sides(problem)
    return found
