"""The layers against torch's: the same keys, shapes and calls, and results as exact as plain NumPy's."""

from typing import Any

import numpy as np
import pytest
import rnnfast
from problems import WIDER, Arrays, Problem, arrays, inaccurate, layer_of, map_floats, named, pairwise

PROBLEMS = pairwise(
    cell=list(rnnfast.functional.CELLS),
    shape=("one step", "one row", "no batch", "16 lanes + 1", "prime batch"),
    layers=(1, 2, 3),
    directions=(1, 2),
    skip=(False, True),
    bias=(True, False),
    projection=("none", "plain"),
    lengths=("full", "ragged"),
    reset=(False, True),
    state=("zero", "given", "learned", "given and learned"),
)


def layer_results(layer: Any, a: Arrays, batch_first: bool) -> dict[str, Any]:
    """What a layer in training mode makes of a problem, under the names of `problems.results`."""

    def turned(array: Any) -> Any:
        return array.swapaxes(0, 1) if batch_first else array

    reset = a.options.get("reset")
    y, state = layer(turned(a.x), a.state, a.options.get("lengths"), None if reset is None else turned(reset))
    dx, dstate = layer.backward(turned(a.dy), a.dstate)
    gradients = {"d" + name: gradient for name, gradient in layer.gradients().items()}
    return {"y": turned(y), **named(state), "dx": turned(dx), **named(dstate, "d"), **gradients}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", list(WIDER))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_layers_are_as_accurate_as_numpy(problem: Problem, dtype: str, batch_first: bool) -> None:
    """With batch_first x is (B, T, I), y and reset alike."""
    a = arrays(problem, dtype)
    layer = layer_of(problem, dtype, a.params, batch_first=batch_first)
    assert inaccurate(layer_results(layer, a, batch_first), problem, dtype) == {}


def torch_layer(torch: Any, problem: Problem) -> Any:
    kind = getattr(torch.nn, problem.cell.split("_")[0].upper())
    return kind(
        problem.dims.I,
        problem.dims.H,
        problem.layers,
        bias=problem.bias,
        bidirectional=problem.directions == 2,
        **({"proj_size": problem.R} if problem.projection != "none" else {}),
    )


@pytest.mark.parametrize(
    "problem",
    pairwise(cell=["rnn_tanh", "gru", "lstm"], layers=[1, 2, 3], directions=[1, 2], bias=[True, False])
    + pairwise(cell=["lstm"], layers=[1, 2], directions=[1, 2], bias=[True, False], projection=["plain"]),
    ids=str,
)
def test_state_dict_moves_both_ways(problem: Problem) -> None:
    """The same keys in the same order, the same shapes, no conversion."""
    torch = pytest.importorskip("torch")
    theirs = torch_layer(torch, problem)
    ours = layer_of(problem, "float32", theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other = torch_layer(torch, problem)
    other.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    for name, value in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("cell", list(rnnfast.functional.CELLS))
def test_sequence_without_a_batch(cell: str) -> None:
    """x (T, I) is a batch of one whose B is gone from every array."""
    problem = Problem(cell, "one row", layers=2, directions=2, state="given")
    a = arrays(problem, "float32")
    batched = layer_results(layer_of(problem, "float32", a.params), a, batch_first=False)
    row = a._replace(x=a.x[:, 0], dy=a.dy[:, 0], **{s: map_floats(lambda p: p[:, 0], getattr(a, s)) for s in ("state", "dstate")})
    alone = layer_results(layer_of(problem, "float32", a.params), row, batch_first=False)
    for name in ("y", "h", "c", "dx", "dh", "dc"):
        if name in batched:
            assert alone[name].tobytes() == batched[name].tobytes()
            assert alone[name].shape == batched[name].shape[:1] + batched[name].shape[2:]
    for name in a.params:
        assert alone["d" + name].tobytes() == batched["d" + name].tobytes()


def test_dropout_and_its_transpose() -> None:
    """Without biases an identity RNN is linear, y = A x, and dx = Aᵀ dy with the same mask: ⟨dy, y⟩ = ⟨dx, x⟩."""
    rng = np.random.default_rng(0)
    layer = rnnfast.RNN(6, 20, 3, bias=False, nonlinearity="identity", dropout=0.5, dtype="float64", seed=0)
    x, dy = rng.normal(size=(5, 4, 6)), rng.normal(size=(5, 4, 20))
    y, _ = layer(x)
    dx, _ = layer.backward(dy)
    whole, _ = layer.eval()(x)
    assert (y != whole).any()
    assert abs((dy * y).sum() - (dx * x).sum()) <= np.finfo(np.float64).eps * np.abs(dy * y).sum() * 5 * 3


def test_dropout_follows_its_seed() -> None:
    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype("float32")
    once, again, other = (rnnfast.LSTM(6, 20, 2, dropout=0.5, seed=seed)(x)[0] for seed in (1, 1, 2))
    assert once.tobytes() == again.tobytes()
    assert once.tobytes() != other.tobytes()


def test_dropout_of_everything() -> None:
    """p = 1: the layer above reads zeros, nothing is divided by 0."""
    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype("float32")
    layer = rnnfast.GRU(6, 20, 2, dropout=1.0, seed=0)
    y, _ = layer(x)
    dx, _ = layer.backward(np.ones_like(y))
    assert np.isfinite(y).all()
    assert (dx == 0).all()


@pytest.mark.parametrize("layer", [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN])
def test_initial_parameters_are_torchs(layer: Any) -> None:
    """U(-1/sqrt(H), 1/sqrt(H)), reproducible by the seed."""
    H = 64
    values = layer(32, H, 2, seed=3).state_dict()
    assert all((values[name] == again).all() for name, again in layer(32, H, 2, seed=3).state_dict().items())
    assert any((values[name] != other).any() for name, other in layer(32, H, 2, seed=4).state_dict().items())
    everything = np.concatenate([value.ravel() for value in values.values()]) * np.sqrt(H)
    assert np.abs(everything).max() <= 1
    assert abs(everything.mean()) <= 5 / np.sqrt(3 * everything.size)  # five standard errors
    assert np.histogram(everything, 10, (-1, 1))[0].min() > 0.09 * everything.size
