"""The oracle against what it was not written from: central differences, torch, onnxruntime, and laws of its own."""

from collections.abc import Mapping
from itertools import pairwise as neighbours
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from problems import Arrays, Problem, arrays, inaccurate, map_floats, named, oracle, pairwise, results
from rnnfast import reference

# ---- Central differences ---------------------------------------------------------------------------------------------

SMALL = pairwise(
    cell=reference.CELLS,
    shape=("unit tail", "one unit", "one step", "one of each"),
    layers=(1, 2, 3),
    directions=(1, 2),
    skip=(False, True),
    bias=(True, False),
    projection=("none", "plain", "biased"),
    taps=(1, 2, 6),
    lengths=("full", "ragged"),
    reset=(False, True),
    dropout=(False, True),
    state=("zero", "given", "learned", "given and learned"),
)


def inputs(a: Arrays) -> dict[str, Any]:
    """Everything that has a gradient, by its gradient's name."""
    state = {} if a.state is None else named(a.state, "d")
    return {"dx": a.x, **state, **{"d" + name: value for name, value in a.params.items()}}


def with_inputs(a: Arrays, values: Mapping[str, Any]) -> Arrays:
    state = (values["dh"], values["dc"]) if isinstance(a.state, tuple) else values.get("dh")
    return a._replace(x=values["dx"], state=state, params={name: values["d" + name] for name in a.params})


def terms(cell: str, a: Arrays) -> Any:
    """The numbers whose sum is a loss that has the gradients a.dy and a.dstate."""
    y, state, *_ = reference.forward(cell, a.x, a.state, a.params, **a.options)
    parts = zip(named(state).values(), named(a.dstate).values(), strict=True)
    return np.concatenate([(y * a.dy).ravel(), *((part * dpart).ravel() for part, dpart in parts)])


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_backward_is_the_derivative_of_forward(problem: Problem) -> None:
    """Along a random direction in each input. The truncation error of a central difference grows as step², so that the
    difference of two steps, 1 and 2, is three times the smaller one's; every term of the loss has a few roundings.
    """
    rng = np.random.default_rng(0)
    a = arrays(problem, "float64")
    gradients = results(reference, problem.cell, a)
    eps = np.finfo(np.float64).eps
    step = eps ** (1 / 3)
    rounding = 8 * eps * np.abs(terms(problem.cell, a)).sum() / step

    for name, value in inputs(a).items():
        direction = rng.normal(size=value.shape)

        def loss(distance: float, name: str = name, value: Any = value, direction: Any = direction) -> Any:
            moved = with_inputs(a, inputs(a) | {name: value + distance * direction})
            return terms(problem.cell, moved).sum()

        once, twice = ((loss(e) - loss(-e)) / (2 * e) for e in (step, 2 * step))
        assert abs((gradients[name] * direction).sum() - once) <= abs(once - twice) + rounding, name


# ---- torch -----------------------------------------------------------------------------------------------------------

TORCH = pairwise(
    cell=("rnn_tanh", "rnn_relu", "gru", "lstm"),
    shape=("one of each", "one step", "one row", "unit tail", "16 lanes + 1", "prime batch", "long"),
    layers=(1, 2, 3),
    directions=(1, 2),
    bias=(True, False),
    lengths=("full", "ragged from 1"),
    state=("zero", "given"),
) + pairwise(
    cell=("lstm",),
    shape=("unit tail", "prime batch", "long"),
    layers=(1, 2),
    directions=(1, 2),
    bias=(True, False),
    projection=("plain",),
    lengths=("full", "ragged from 1"),
    state=("zero", "given"),
)


def torch_results(torch: ModuleType, problem: Problem, a: Arrays) -> dict[str, Any]:
    """What torch.nn makes of a problem, under the names of `results`."""
    H = problem.dims.H
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(problem.cell, torch.nn.RNN)
    module = kind(
        problem.dims.I,
        H,
        problem.layers,
        bias=problem.bias,
        bidirectional=problem.directions == 2,
        **({"proj_size": problem.R} if problem.projection == "plain" else {}),
        **({"nonlinearity": problem.cell[4:]} if kind is torch.nn.RNN else {}),
    ).to(torch.from_numpy(a.x).dtype)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in a.params.items()})

    def leaf(array: Any) -> Any:
        return torch.from_numpy(array).requires_grad_()

    def parts(state: Any) -> list[Any]:
        return list(state) if isinstance(state, tuple) else [state]

    x = leaf(a.x)
    state = None if a.state is None else tuple(map(leaf, parts(a.state)))
    hx = state if problem.paired or state is None else state[0]
    if "lengths" in a.options:
        lengths = torch.from_numpy(a.options["lengths"])
        packed, last = module(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=problem.dims.T)
    else:
        y, last = module(x, hx)
    leaves = {"x": x, **dict(zip("hc", state or (), strict=False)), **dict(module.named_parameters())}
    douts = [torch.from_numpy(array) for array in (a.dy, *parts(a.dstate))]
    gradients = torch.autograd.grad([y, *parts(last)], list(leaves.values()), douts)
    return {
        "y": y.detach().numpy(),
        **{name: part.detach().numpy() for name, part in zip("hc", parts(last), strict=False)},
        **{"d" + name: gradient.numpy() for name, gradient in zip(leaves, gradients, strict=True)},
    }


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch says that it takes its slower path
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("problem", TORCH, ids=str)
def test_torch_has_the_same_outputs_and_gradients(problem: Problem, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    found = torch_results(torch, problem, arrays(problem, dtype))
    unknown_to_torch = {"every c"} | ({"dh", "dc"} if problem.state == "zero" else set())
    assert found.keys() >= oracle(problem, dtype).exact.keys() - unknown_to_torch
    assert inaccurate(found, problem, dtype) == {}


# ---- onnxruntime -----------------------------------------------------------------------------------------------------

ONNX = pairwise(
    cell=("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_peephole", "gru", "gru_reset_before"),
    shape=("one of each", "one row", "unit tail", "16 lanes + 1", "prime batch"),
    directions=(1, 2),
    bias=(True, False),
    lengths=("full", "ragged from 1"),
    state=("zero", "given"),
)
ONNX_GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}  # i o f c of i f g o; z r h of r z n


def onnx_results(onnx: ModuleType, onnxruntime: ModuleType, problem: Problem, a: Arrays) -> dict[str, Any]:
    """What onnxruntime's operator makes of a single layer's forward pass, under the names of `results`."""
    operator = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}[problem.cell.split("_")[0]]
    T, B, _, H, _ = problem.dims
    gates, suffixes = ONNX_GATES[operator], ["_l0", "_l0_reverse"][: problem.directions]

    def stacked(name: str) -> Any:
        """(D, G*H, ...) in ONNX's order of gates."""
        blocks = [a.params[name + suffix].reshape(len(gates), H, -1)[gates] for suffix in suffixes]
        return np.stack(blocks).reshape(len(suffixes), len(gates) * H, -1)

    feeds = {"X": a.x, "W": stacked("weight_ih"), "R": stacked("weight_hh")}
    if problem.bias:
        feeds["B"] = np.concatenate((stacked("bias_ih"), stacked("bias_hh")), axis=1)[..., 0]
    if "lengths" in a.options:
        feeds["sequence_lens"] = a.options["lengths"].astype(np.int32)
    if a.state is not None:
        feeds |= named(a.state, "initial_")
    if problem.cell == "lstm_peephole":
        peepholes = [a.params["weight_peep" + suffix][[0, 2, 1]].ravel() for suffix in suffixes]  # i o f
        feeds["P"] = np.stack(peepholes)

    arguments = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    wanted = ["Y", "Y_h", "Y_c"][: 2 + problem.paired]
    activations = {"RNN": [problem.cell[4:].capitalize()]}.get(operator, [])
    node = onnx.helper.make_node(
        operator,
        [name if name in feeds else "" for name in arguments[: 8 if operator == "LSTM" else 6]],
        wanted,
        hidden_size=H,
        direction=["forward", "bidirectional"][problem.directions - 1],
        **({"linear_before_reset": int(problem.cell == "gru")} if operator == "GRU" else {}),
        **({"activations": activations * problem.directions} if activations else {}),
    )
    types = {np.dtype("float32"): onnx.TensorProto.FLOAT, np.dtype("int32"): onnx.TensorProto.INT32}
    values = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        problem.cell,
        [values(name, types[array.dtype], array.shape) for name, array in feeds.items()],
        [values(name, onnx.TensorProto.FLOAT, None) for name in wanted],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, *state = session.run(wanted, feeds)
    return {"y": y.swapaxes(1, 2).reshape(T, B, -1), **dict(zip("hc", state, strict=False))}


@pytest.mark.parametrize("problem", ONNX, ids=str)
def test_onnxruntime_has_the_same_outputs(problem: Problem) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    found = onnx_results(onnx, onnxruntime, problem, arrays(problem, "float32"))
    assert inaccurate(found, problem, "float32") == {}


# ---- Laws ------------------------------------------------------------------------------------------------------------


def close(found: Any, expected: Any) -> bool:
    """Computed in double precision, equal in single: 2²⁹ roundings apart."""
    return bool(np.abs(found - expected).max(initial=0) <= np.finfo(np.float32).eps * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("length", [0, 5, 7])
@pytest.mark.parametrize(
    "problem",
    pairwise(
        cell=reference.CELLS,
        shape=("one row",),
        layers=(1, 2),
        directions=(1, 2),
        skip=(False, True),
        projection=("none", "biased"),
        taps=(1, 2),
        state=("given", "given and learned"),
    ),
    ids=str,
)
def test_reset_equals_separate_calls(problem: Problem, length: int) -> None:
    """The forward direction enters the first piece with the given state, the reverse direction the last one; into every
    other piece they go afresh. The returned state is that of the last piece and of the first one.
    """
    a = arrays(problem, "float64")
    D = problem.directions
    forwards = (np.arange(problem.layers * D) % D == 0)[:, None, None]
    fresh = {"h": a.params.get("h_0", 0), "c": a.params.get("c_0", 0)}

    reset = np.zeros((problem.dims.T, 1), np.bool_)
    reset[[2, 3, 6]] = True
    options = a.options | {"reset": reset, "lengths": np.array([length])}
    whole = results(reference, problem.cell, a._replace(options=options))

    gradients = {name: np.zeros_like(value) for name, value in a.params.items()}
    state = {name: 0 for name in named(a.state)}
    dstate = {name: 0 for name in named(a.state)}
    for start, end in neighbours([0, *(t for t in (2, 3, 6) if t < length), length]):
        enters = np.where(forwards, start == 0, end == length)
        leaves = np.where(forwards, end == length, start == 0)
        parts = tuple(np.where(enters, part, fresh[name]) for name, part in named(a.state).items())
        given = parts if problem.paired else parts[0]
        y, last, tape, *_ = reference.forward(problem.cell, a.x[start:end], given, a.params, **a.options)
        dlast = map_floats(lambda part, leaves=leaves: part * leaves, a.dstate)
        dx, dgiven, _ = reference.backward(tape, a.dy[start:end], dlast, gradients)

        assert close(y, whole["y"][start:end])
        assert close(dx, whole["dx"][start:end])
        for name, part in named(last).items():
            state[name] += part * leaves
        for name, dpart in named(dgiven).items():
            dstate[name] += dpart * enters
            if name + "_0" in gradients:
                gradients[name + "_0"] += dpart * ~enters

    for name in state:
        assert close(state[name], whole[name])
        assert close(dstate[name], whole["d" + name])
    for name, gradient in gradients.items():
        assert close(gradient, whole["d" + name]), name


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_stack_is_its_layers_one_after_another(cell: str, skip: bool) -> None:
    """And its reverse direction a forward one on the reversed sequence."""
    problem = Problem(cell, layers=3, directions=2, skip=skip, dropout=True, state="given")
    a = arrays(problem, "float64")
    y, state, *_ = reference.forward(cell, a.x, a.state, a.params, **a.options)

    below, ys = a.x, []
    for layer in range(3):
        both = []
        for d, backwards in enumerate([np.s_[:], np.s_[::-1]]):
            suffix = f"_l{layer}" + "_reverse" * d
            params = {name[: -len(suffix)] + "_l0": p for name, p in a.params.items() if name.endswith(suffix)}
            k = np.s_[2 * layer + d : 2 * layer + d + 1]
            y_d, state_d, _ = reference.forward(cell, below[backwards], map_floats(lambda s, k=k: s[k], a.state), params)
            both.append(y_d[backwards])
            for name, part in named(state_d).items():
                assert close(part, named(state)[name][k])
        ys.append(np.concatenate(both, axis=2))
        if layer < 2:
            below = ys[-1] * a.options["dropout_masks"][layer]
            below = np.concatenate((a.x, below), axis=2) if skip else below
    assert close(np.concatenate(ys, axis=2) if skip else ys[-1], y)


def test_cell_states_lead_to_the_last() -> None:
    """Every step's cell state, whose last one is the state; the reverse direction's last step is at t = 0."""
    a = arrays(Problem("lstm", layers=2, directions=2, skip=True), "float64")
    _, (_, c), _, every_c = reference.forward("lstm", a.x, a.state, a.params, **a.options)
    H = c.shape[2]
    assert (every_c[-1, :, 0:H] == c[0]).all()
    assert (every_c[0, :, H : 2 * H] == c[1]).all()
    assert (every_c[-1, :, 2 * H : 3 * H] == c[2]).all()
    assert (every_c[0, :, 3 * H : 4 * H] == c[3]).all()


def test_output_taps_are_a_narx_network() -> None:
    """y_t = V s(W x_t + A_1 y_{t-1} + ... + A_K y_{t-K} + b) + b_y, one number after another."""
    T, inputs, H, R, K = 9, 2, 5, 3, 4
    rng = np.random.default_rng(0)
    W, A, V = rng.normal(size=(H, inputs)), rng.normal(size=(K, H, R)), rng.normal(size=(R, H))
    b, b_y, x = rng.normal(size=H), rng.normal(size=R), rng.normal(size=(T, 1, inputs))
    past = rng.normal(size=(K, R))  # y_{-1}, ..., y_{-K}

    ys = list(past[::-1])
    for x_t in x[:, 0]:
        a = W @ x_t + b
        for k in range(1, K + 1):
            a = a + A[k - 1] @ ys[-k]
        ys.append(V @ (1 / (1 + np.exp(-a))) + b_y)

    params = {
        "weight_ih_l0": W,
        "weight_hh_l0": np.concatenate(list(A), axis=1),  # (H, K*R), newest first
        "bias_ih_l0": b,
        "bias_hh_l0": np.zeros(H),
        "weight_hr_l0": V,
        "bias_hr_l0": b_y,
    }
    y, h, _ = reference.forward("rnn_sigmoid", x, past.reshape(1, 1, K * R), params, output_taps=K)
    assert close(y[:, 0], np.array(ys[K:]))
    assert close(h[0, 0].reshape(K, R), np.array(ys[: -K - 1 : -1]))


def test_options_that_do_not_go_together() -> None:
    a = arrays(Problem("gru", projection="plain"), "float64")
    with pytest.raises(ValueError, match="gru_reset_before"):
        reference.forward("gru_reset_before", a.x, None, a.params)
    with pytest.raises(ValueError, match="output_taps"):
        reference.forward("gru", a.x, None, a.params, output_taps=2, bidirectional=True)
    with pytest.raises(ValueError, match="no cell state"):
        reference.forward("gru", a.x, None, a.params, cells=True)
    with pytest.raises(ValueError, match=r"cell must be one of rnn_tanh, .*, got 'mlp'"):
        reference.forward("mlp", a.x, None, a.params)
