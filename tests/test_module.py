"""Module: one flat array behind many names, modes, state_dict, tapes, copies; and the dense layers that build on it."""

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import rnnfast
import torch
from rnnfast.dense import Dropout, Embedding, Linear
from rnnfast.module import Module

FLOATS = ("float32", "float64")


def ones(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


# ---- Storage and modes -----------------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_of_the_flat_arrays() -> None:
    layer = Linear(3, 2, seed=0)
    layer.flat[:], layer.flat_gradient[:] = 5, 7
    assert {name: p.shape for name, p in layer.parameters().items()} == {"weight": (2, 3), "bias": (2,)}
    assert all((p == 5).all() and p.base is not None for p in layer.parameters().values())
    assert all((g == 7).all() for g in layer.gradients().values())
    layer.parameters()["bias"][1] = 9
    assert layer.flat[-1] == 9


def test_eval_mode_parameters_are_read_only_even_where_held_before() -> None:
    layer = Linear(3, 2)
    held = layer.parameters()["weight"]
    assert layer.eval() is layer
    for array in (held, layer.flat, layer.parameters()["bias"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert layer.train() is layer
    held[...] = 0
    assert (layer.flat[:6] == 0).all()


def test_a_dtype_that_is_no_float_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="float32 or float64, got float16"):
        Linear(3, 2, dtype="float16")


def test_a_state_dict_is_a_copy() -> None:
    layer = Linear(3, 2)
    state = layer.state_dict()
    layer.flat[:] = 0
    assert state["weight"].any()


@pytest.mark.parametrize("training", (True, False))
def test_load_state_dict_takes_arrays_tensors_and_lists(training: bool) -> None:
    layer = Linear(2, 1).train(training)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": [3]})
    assert layer.flat.tolist() == [1, 2, 3]
    assert layer.training == training and layer.flat.flags.writeable == training


@pytest.mark.parametrize(
    ("state", "error", "message"),
    (
        ({"weight": ones(2, 3)}, KeyError, r"lacks 'bias'"),
        ({"weight": ones(2, 3), "bias": ones(2), "b": 1}, KeyError, r"unexpected 'b'"),
        ({"weight": ones(3, 2), "bias": ones(2)}, ValueError, r"weight must have shape \(2, 3\), got \(3, 2\)"),
        ({"weight": ones(2, 3), "bias": ones(2) * 1j}, TypeError, r"bias must hold real numbers, got dtype complex"),
        ({"weight": ones(2, 3), "bias": ["a", "b"]}, TypeError, r"bias must hold real numbers"),
    ),
    ids=("missing", "unexpected", "shape", "complex", "text"),
)
def test_a_wrong_state_dict_names_its_key_and_changes_nothing(state: Any, error: Any, message: str) -> None:
    layer = Linear(3, 2)
    before = layer.flat.copy()
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert (layer.flat == before).all()


@pytest.mark.parametrize("training", (True, False))
def test_copies_keep_their_views_and_share_nothing(training: bool) -> None:
    layer = Linear(3, 2, seed=0)
    layer(ones(1, 3))
    layer.backward(ones(1, 2))
    layer.train(training)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.flat == layer.flat).all() and (other.flat_gradient == layer.flat_gradient).all()
        assert other.training == training and other.parameters()["weight"].flags.writeable == training
        other.train().parameters()["weight"][...] = 8
        other.gradients()["bias"][...] = 8
        assert (other.flat[:6] == 8).all() and (other.flat_gradient[6:] == 8).all()
        assert not (layer.flat == 8).any() and not (layer.flat_gradient == 8).any()


# ---- Tapes -----------------------------------------------------------------------------------------------------------


def test_k_forwards_are_undone_by_k_backwards_latest_first() -> None:
    layer = Linear(1, 1, bias=False)
    for x in (1, 2, 3):
        layer(x * ones(1, 1))
    met = []
    for _ in range(3):
        layer.flat_gradient[:] = 0
        layer.backward(ones(1, 1))
        met.append(layer.flat_gradient[0])
    assert met == [3, 2, 1]
    with pytest.raises(RuntimeError, match="Linear: backward without a forward"):
        layer.backward(ones(1, 1))


@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 3)])
def test_a_layers_backward_makes_what_is_asked_for(shape: tuple[int, ...]) -> None:
    gradients = []
    for options in ({}, {"need_dx": False}, {"need_dstate": False}):
        layer = rnnfast.GRU(3, 5, seed=0)
        y, _ = layer(ones(*shape))
        dx, dstate = layer.backward(y, **options)
        assert (dx is None, dstate is None) == ("need_dx" in options, "need_dstate" in options)
        gradients.append(layer.flat_gradient.tobytes())
    assert len(set(gradients)) == 1


def test_gradients_accumulate_until_zeroed() -> None:
    layer = Linear(1, 1)
    for _ in range(2):
        layer(ones(1, 1))
        layer.backward(ones(1, 1))
    assert layer.flat_gradient.tolist() == [2, 2]
    layer.zero_gradients()
    assert layer.flat_gradient.tolist() == [0, 0]


def test_zero_gradients_drops_waiting_tapes() -> None:
    layer = Linear(1, 1)
    layer(ones(1, 1))
    layer.zero_gradients()
    with pytest.raises(RuntimeError, match="without a forward"):
        layer.backward(ones(1, 1))


def test_a_runaway_pile_of_tapes_raises() -> None:
    layer = Linear(1, 1)
    layer.max_tapes = 3
    for _ in range(3):
        layer(ones(1, 1))
    with pytest.raises(RuntimeError, match=r"3 forwards wait for their backward; call eval\(\)"):
        layer(ones(1, 1))


def test_eval_mode_calls_leave_no_trace() -> None:
    layer = Linear(1, 1).eval()
    layer.max_tapes = 0
    layer(ones(1, 1))
    with pytest.raises(RuntimeError, match="without a forward"):
        layer.backward(ones(1, 1))


def test_a_wrong_dy_costs_nothing() -> None:
    layer = Linear(3, 2)
    layer(ones(4, 3))
    with pytest.raises(ValueError, match=r"dy must have shape \(4, 2\), got \(4, 3\)"):
        layer.backward(ones(4, 3))
    with pytest.raises(TypeError, match="dy must have dtype float32, got float64"):
        layer.backward(ones(4, 2, dtype="float64"))
    assert layer.backward(ones(4, 2)) is not None


def test_a_second_training_call_at_once_raises() -> None:
    class Slow(Linear):
        def _forward(self, x: Any) -> Any:
            inside.set()
            assert go_on.wait(10)
            return super()._forward(x)

    inside, go_on, layer = threading.Event(), threading.Event(), Slow(1, 1)
    thread = threading.Thread(target=layer, args=(ones(1, 1),))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError, match="concurrent training calls"):
        layer(ones(1, 1))
    go_on.set()
    thread.join()


# ---- Linear ----------------------------------------------------------------------------------------------------------


def linear_error(dtype: str, count: int) -> float:
    """What a dot product of `count` numbers of size about 1 may be off by, twice over for the other side's."""
    return float(4 * np.finfo(dtype).eps * count)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((7, 5, 3), (4, 3), (3,), (0, 5, 3), (7, 0, 3)), ids=str)
def test_linear_is_torchs(dtype: str, bias: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = Linear(3, 4, bias, dtype=dtype, seed=1), torch.nn.Linear(3, 4, bias, dtype=getattr(torch, dtype))
    theirs.load_state_dict({name: torch.from_numpy(p) for name, p in ours.state_dict().items()})
    x, dy = rng.standard_normal(shape).astype(dtype), rng.standard_normal((*shape[:-1], 4)).astype(dtype)
    x_torch = torch.tensor(x, requires_grad=True)
    y_torch = theirs(x_torch)
    y_torch.backward(torch.from_numpy(dy))
    atol = linear_error(dtype, 40)
    np.testing.assert_allclose(ours(x), y_torch.detach(), rtol=0, atol=atol)
    assert x_torch.grad is not None
    np.testing.assert_allclose(ours.backward(dy), x_torch.grad, rtol=0, atol=atol)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(ours.gradients()[name], p.grad, rtol=0, atol=atol)


def test_linear_reads_strided_arrays() -> None:
    layer = Linear(3, 2, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)
    batch_first = x[:, :, ::2].transpose(1, 0, 2)
    np.testing.assert_array_equal(layer(batch_first), layer(np.ascontiguousarray(batch_first)))


@pytest.mark.parametrize(("sizes", "message"), (((0, 2), "in_features"), ((3, -1), "out_features"), ((3, 1.5), "1.5")))
def test_a_size_that_is_no_count_is_refused(sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(*sizes)


def test_linear_names_what_is_wrong_with_x() -> None:
    layer = Linear(3, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(5, 3\), got \(5, 4\)"):
        layer(ones(5, 4))
    with pytest.raises(TypeError, match="x must have dtype float32, got float64"):
        layer(ones(5, 3, dtype="float64"))


# ---- Embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("kind", ("uint8", "int64"))
@pytest.mark.parametrize("count", (11, 70_000), ids=("bytes", "words"))
def test_embedding_is_torchs(sparse: bool, kind: str, count: int) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = Embedding(count, 4, sparse=sparse, dtype="float64", seed=1), torch.nn.Embedding(count, 4)
    theirs = theirs.double()
    theirs.load_state_dict({name: torch.from_numpy(p) for name, p in ours.state_dict().items()})
    for _ in range(2):  # gradients accumulate
        tokens, dy = rng.integers(0, 11, (30, 3)).astype(kind), rng.standard_normal((30, 3, 4))
        y = theirs(torch.from_numpy(tokens.astype(np.int64)))
        y.backward(torch.from_numpy(dy))
        np.testing.assert_array_equal(ours(tokens), y.detach())
        assert ours.backward(dy) is None
    atol = 200 * np.finfo(np.float64).eps
    np.testing.assert_allclose(ours.gradients()["weight"], theirs.weight.grad, rtol=0, atol=atol)
    ours.zero_gradients()
    assert not ours.flat_gradient.any()


def test_a_sparse_embedding_knows_the_rows_it_met() -> None:
    layer = Embedding(10, 2, sparse=True)
    for tokens in ([[5, 1]], [[1, 7]]):
        layer(tokens)
        layer.backward(ones(1, 2, 2))
    width, rows = layer.rows() or (0, np.zeros(0))
    assert (width, rows.tolist()) == (2, [1, 5, 7])
    layer.zero_gradients()
    assert [len(part) for part in (layer.rows() or ())[1:]] == [0]


def test_a_sparse_embedding_that_met_no_row_has_nothing_to_zero() -> None:
    layer = Embedding(10, 2, sparse=True)
    assert layer.rows() is not None
    layer.zero_gradients()
    assert layer._flat_gradient is None  # nor is one made


@pytest.mark.parametrize("shape", ((0, 3), (3, 0), (0,)), ids=str)
def test_no_tokens_no_gradient(shape: tuple[int, ...]) -> None:
    layer = Embedding(4, 2)
    assert layer(np.zeros(shape, np.int64)).shape == (*shape, 2)
    layer.backward(np.zeros((*shape, 2), np.float32))
    assert not layer.flat_gradient.any()


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    (
        ([[4]], IndexError, r"must lie in \[0, 4\), got 4 to 4"),
        ([[0, -1]], IndexError, "got -1 to 0"),
        ([[0.0]], TypeError, "must be integers, got dtype float64"),
    ),
    ids=("beyond", "negative", "float"),
)
def test_embedding_names_what_is_wrong_with_its_tokens(tokens: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Embedding(4, 2)(tokens)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    layer, n = Dropout(p, seed=0), 100_000
    y = layer(ones(n, dtype="float64"))
    kept = np.count_nonzero(y)
    assert abs(kept - n * (1 - p)) < 5 * np.sqrt(n * p * (1 - p))
    assert np.unique(y).size == 2 and abs(y.max() * (1 - p) - 1) < 2**-12
    np.testing.assert_array_equal(layer.backward(ones(n, dtype="float64")), y)


def test_dropouts_own_stream_decides() -> None:
    draws = [Dropout(0.5, seed=3)(ones(50)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    layer = Dropout(0.5, seed=3)
    layer(ones(50))
    assert (layer(ones(50)) != draws[0]).any()


def test_dropout_is_nothing_in_eval_mode_and_at_0() -> None:
    x = ones(5)
    assert Dropout(0.5).eval()(x) is x
    layer = Dropout(0)
    np.testing.assert_array_equal(layer(x), x)
    assert layer.backward(x) is x


@pytest.mark.parametrize("p", (-0.1, 1, 2, float("nan")))
def test_a_share_outside_0_and_1_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\)"):
        Dropout(p)


def test_dropout_names_what_is_wrong() -> None:
    layer = Dropout(0.5)
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        layer(np.ones(3, np.int64))
    layer(ones(3))
    with pytest.raises(ValueError, match=r"dy must be float32 of shape \(3,\)"):
        layer.backward(ones(4))


def test_a_module_without_parameters_is_a_module() -> None:
    layer = Module()
    assert layer.parameters() == layer.gradients() == layer.state_dict() == {}
    layer.load_state_dict({})
    layer.zero_gradients()
