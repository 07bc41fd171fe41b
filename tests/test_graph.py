"""Graph: the same numbers as its layers by hand and as torch's autograd; fan-out, joins, shared weights, fed states."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from rnnfast.dense import Dropout, Embedding, Linear
from rnnfast.graph import Graph
from rnnfast.layers import GRU, LSTM, RNN
from rnnfast.module import Module

EPS = float(np.finfo(np.float64).eps)
ATOL = 4000 * EPS  # a few hundred roundings of numbers of size 1, on both sides


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def twin(layer: Any) -> Any:
    """The torch layer with the same weights."""
    if isinstance(layer, Linear):
        theirs: Any = torch.nn.Linear(layer.in_features, layer.out_features).double()
    else:
        kind = {LSTM: torch.nn.LSTM, GRU: torch.nn.GRU, RNN: torch.nn.RNN}[type(layer)]
        theirs = kind(layer.input_size, layer.hidden_size).double()
    theirs.load_state_dict({name: torch.from_numpy(p) for name, p in layer.state_dict().items()})
    return theirs


def same_gradients(net: Graph, **twins: Any) -> None:
    for name, theirs in twins.items():
        for key, p in theirs.named_parameters():
            np.testing.assert_allclose(net.gradients()[f"{name}.{key}"], p.grad, rtol=0, atol=ATOL, err_msg=name + key)


def leaf(x: Any) -> torch.Tensor:
    return torch.tensor(x, requires_grad=True)


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs.detach() if isinstance(theirs, torch.Tensor) else theirs, rtol=0, atol=ATOL)


# ---- Against torch's autograd ----------------------------------------------------------------------------------------


def test_skips_and_fan_out() -> None:
    """The lecture's net: deeper layers read x too, the output reads every hidden layer."""
    h1, h2, out = (
        LSTM(3, 5, dtype="float64", seed=1),
        GRU(8, 4, dtype="float64", seed=2),
        Linear(9, 2, dtype="float64", seed=3),
    )
    net = Graph({"h1": (h1, "x"), "h2": (h2, ["x", "h1"]), "y": (out, ["h1", "h2"])})
    x, dy = draw(6, 2, 3), draw(6, 2, 2, seed=1)
    t1, t2, t3, tx = twin(h1), twin(h2), twin(out), leaf(x)
    a, (hn, cn) = t1(tx)
    b, gn = t2(torch.cat([tx, a], -1))
    y = t3(torch.cat([a, b], -1))
    dh, dc, dg = draw(1, 2, 5, seed=2), draw(1, 2, 5, seed=3), draw(1, 2, 4, seed=4)
    (
        (y * torch.from_numpy(dy)).sum() + (hn * torch.from_numpy(dh)).sum() + (cn * torch.from_numpy(dc)).sum() + (gn * torch.from_numpy(dg)).sum()
    ).backward()

    ours, state = net(x)
    close(ours, y)
    close(state["h1"][1], cn)
    close(state["h2"], gn)
    dx, dstate = net.backward(dy, {"h1": (dh, dc), "h2": dg})
    close(dx, tx.grad)
    assert sorted(dstate) == ["h1", "h2"]
    same_gradients(net, h1=t1, h2=t2, y=t3)


def test_an_encoder_feeds_a_decoder_its_state() -> None:
    enc, dec, out = (
        LSTM(3, 5, dtype="float64", seed=1),
        LSTM(2, 5, dtype="float64", seed=2),
        Linear(5, 4, dtype="float64", seed=3),
    )
    net = Graph({"enc": (enc, "x"), "dec": (dec, "z"), "dec.state": "enc.state", "y": (out, "dec")})
    assert net.inputs == ("x", "z")
    x, z, dy = draw(7, 3, 3), draw(4, 3, 2, seed=1), draw(4, 3, 4, seed=2)
    h0, c0 = draw(1, 3, 5, seed=3), draw(1, 3, 5, seed=4)
    t1, t2, t3, tx, tz, th, tc = twin(enc), twin(dec), twin(out), leaf(x), leaf(z), leaf(h0), leaf(c0)
    b, _ = t2(tz, t1(tx, (th, tc))[1])
    t3(b).backward(torch.from_numpy(dy))

    y, state = net({"x": x, "z": z}, {"enc": (h0, c0)})
    close(y, t3(b))
    assert sorted(state) == ["dec", "enc"]
    dx, dstate = net.backward(dy)
    close(dx["x"], tx.grad)
    close(dx["z"], tz.grad)
    assert sorted(dstate) == ["enc"]
    close(dstate["enc"][0], th.grad)
    close(dstate["enc"][1], tc.grad)
    same_gradients(net, enc=t1, dec=t2, y=t3)


def test_a_gradient_into_the_encoders_end_adds_to_the_decoders() -> None:
    enc, dec = GRU(3, 5, dtype="float64", seed=1), GRU(2, 5, dtype="float64", seed=2)
    net = Graph({"enc": (enc, "x"), "dec": (dec, "z"), "dec.state": "enc.state"})
    x, z, dy, dend = draw(7, 3, 3), draw(4, 3, 2, seed=1), draw(4, 3, 5, seed=2), draw(1, 3, 5, seed=3)
    t1, t2, tx = twin(enc), twin(dec), leaf(x)
    end = t1(tx)[1]
    ((t2(torch.from_numpy(z), end)[0] * torch.from_numpy(dy)).sum() + (end * torch.from_numpy(dend)).sum()).backward()
    net({"x": x, "z": z})
    close(net.backward(dy, {"enc": dend})[0]["x"], tx.grad)
    same_gradients(net, enc=t1, dec=t2)


def test_a_layer_under_two_names_shares_its_weights() -> None:
    shared, out = RNN(3, 3, dtype="float64", seed=1), Linear(6, 2, dtype="float64", seed=2)
    net = Graph({"a": (shared, "x"), "b": (shared, "a"), "y": (out, ["a", "b"])})
    assert sorted({name.split(".")[0] for name in net.parameters()}) == ["a", "y"] and len(net.leaves()) == 2
    x, dy = draw(6, 2, 3), draw(6, 2, 2, seed=1)
    t1, t2, tx = twin(shared), twin(out), leaf(x)
    a = t1(tx)[0]
    y = t2(torch.cat([a, t1(a)[0]], -1))
    y.backward(torch.from_numpy(dy))
    ours, state = net(x)
    close(ours, y)
    assert sorted(state) == ["a", "b"]
    close(net.backward(dy)[0], tx.grad)
    same_gradients(net, a=t1, y=t2)


def test_k_forwards_are_undone_by_k_backwards() -> None:
    layer, out = LSTM(3, 4, dtype="float64", seed=1), Linear(4, 2, dtype="float64", seed=2)
    net = Graph({"h": (layer, "x"), "y": (out, "h")})
    xs, dys = draw(3, 5, 2, 3), draw(3, 5, 2, 2, seed=1)
    apart = []
    for x, dy in zip(xs, dys, strict=True):
        net(x)
        apart.append(net.backward(dy)[0])
    one_by_one = {name: g.copy() for name, g in net.gradients().items()}
    net.zero_gradients()
    for x in xs:
        net(x)
    together = [net.backward(dy)[0] for dy in dys[::-1]][::-1]
    np.testing.assert_array_equal(together, apart)
    for name, g in net.gradients().items():
        close(g, one_by_one[name])


# ---- What goes through -----------------------------------------------------------------------------------------------


def test_lengths_and_reset_reach_every_recurrent_node_or_the_named_one() -> None:
    a, b = GRU(3, 4, dtype="float64", seed=1), RNN(4, 4, dtype="float64", seed=2)
    net = Graph({"a": (a, "x"), "b": (b, "a")}).eval()
    x, lengths = draw(5, 3, 3), np.array([5, 0, 2])
    reset = np.zeros((5, 3), bool)
    reset[3, 0] = True
    for given, of_a, of_b in (
        ({"lengths": lengths, "reset": reset}, (lengths, reset), (lengths, reset)),
        ({"lengths": {"a": lengths}, "reset": {"b": reset}}, (lengths, None), (None, reset)),
    ):
        y, state = net(x, **given)
        expected_a, state_a = a(x, None, *of_a)
        expected_b, state_b = b(expected_a, None, *of_b)
        np.testing.assert_array_equal(y, expected_b)
        np.testing.assert_array_equal(state["a"], state_a)
        np.testing.assert_array_equal(state["b"], state_b)


def test_a_state_carried_over_is_the_whole_sequence() -> None:
    net = Graph({"a": (LSTM(3, 4, dtype="float64", seed=1), "x"), "b": (GRU(4, 4, dtype="float64", seed=2), "a")}).eval()
    x = draw(9, 2, 3)
    whole, end = net(x)
    first, state = net(x[:4])
    second, state = net(x[4:], state)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    np.testing.assert_array_equal(state["b"], end["b"])


def test_a_graph_is_a_node_of_a_graph() -> None:
    rnn, out = LSTM(3, 4, dtype="float64", seed=1), Linear(4, 2, dtype="float64", seed=2)
    flat = Graph({"h": (rnn, "x"), "y": (out, "h")})
    nested = Graph({"net": (copy.deepcopy(flat), "u"), "z": (Linear(2, 2, dtype="float64", seed=3), "net")})
    x = draw(5, 2, 3)
    y, state = nested(x)
    inner, inner_state = flat(x)
    np.testing.assert_array_equal(y, nested["z"](inner))
    np.testing.assert_array_equal(state["net"]["h"][0], inner_state["h"][0])
    nested["z"].zero_gradients()
    nested["net"].zero_gradients()
    nested(x, state)
    dx, dstate = nested.backward(draw(5, 2, 2, seed=1), {"net": {"h": state["net"]["h"]}})
    assert dx.shape == x.shape and dstate["net"]["h"][1].shape == (1, 2, 4)
    assert "net.h.weight_ih_l0" in nested.state_dict()


def test_several_outputs_and_one_that_gets_no_gradient() -> None:
    a, b = Linear(3, 2, dtype="float64", seed=1), GRU(3, 4, dtype="float64", seed=2)
    net = Graph({"a": (a, "x"), "b": (b, "x")}, outputs=["a", "b"])
    x, dy = draw(5, 2, 3), draw(5, 2, 2, seed=1)
    y, _ = net(x)
    assert {name: part.shape for name, part in y.items()} == {"a": (5, 2, 2), "b": (5, 2, 4)}
    net.backward({"a": dy})
    assert not b.flat_gradient.any() and a.flat_gradient.any()
    with pytest.raises(RuntimeError, match="GRU: backward without"):
        b.backward(np.zeros((5, 2, 4)))


def test_integers_go_in_and_have_no_gradient() -> None:
    net = Graph({"e": (Embedding(5, 3, seed=1), "tokens"), "h": (RNN(3, 4, seed=2), "e"), "y": (Linear(4, 2, seed=3), "h")})
    y, _ = net(np.array([[0, 4], [2, 2]]))
    dx, _ = net.backward(np.ones_like(y))
    assert dx is None and net.gradients()["e.weight"][2].any() and not net.gradients()["e.weight"][1].any()


def test_modes_and_dropout() -> None:
    net = Graph({"d": (Dropout(0.5, seed=1), "x"), "y": (Linear(3, 2, dtype="float64", seed=2), "d")})
    x = draw(50, 3)
    assert (net(x)[0] != net(x)[0]).any()
    net.eval()
    assert not net["y"].training and not net["d"].training and not net.parameters()["y.weight"].flags.writeable
    np.testing.assert_array_equal(net(x)[0], net(x)[0])


def test_state_dicts_load_and_copies_are_apart() -> None:
    nodes = lambda seed: {"h": (LSTM(3, 4, seed=seed), "x"), "y": (Linear(4, 2, seed=seed), "h")}  # noqa: E731
    one, two = Graph(nodes(1)), Graph(nodes(2)).eval()
    two.load_state_dict(one.state_dict())
    x = draw(5, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(one.eval()(x)[0], two(x)[0])
    other = copy.deepcopy(one).train()
    other["y"].flat[:] = 0
    assert one.parameters()["y.weight"].any() and not other.parameters()["y.weight"].any()


# ---- What is refused -------------------------------------------------------------------------------------------------


def linear() -> Linear:
    return Linear(3, 3, seed=0)


@pytest.mark.parametrize(
    ("nodes", "message"),
    (
        ({}, "no nodes"),
        ({"a": linear()}, r"'a' must be \(layer, source or \[sources\]\)"),
        ({"a": (np.tanh, "x")}, "'a' must be"),
        ({"a": (linear(), "b"), "b": (linear(), "x")}, "'a' reads 'b', which comes later"),
        ({"a": (linear(), "a")}, "'a' reads 'a', which comes later"),
        (
            {"a": (linear(), "x"), "b": (linear(), "a.state")},
            "'b' reads 'a.state', which comes later or does not exist",
        ),
        ({"a": (linear(), "x"), "a.state": "x"}, "'a' has no state"),
        ({"a": (linear(), "x"), "b.state": "a"}, r"states fed to no node: \['b'\]"),
    ),
)
def test_a_graph_that_makes_no_sense_is_refused(nodes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(nodes)


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outputs names \['z'\]"):
        Graph({"a": (linear(), "x")}, outputs="z")


def test_a_call_with_unknown_names_is_refused() -> None:
    net = Graph({"a": (RNN(3, 3), ["x", "z"]), "b": (RNN(3, 3), "x"), "b.state": "a.state"})
    x = np.ones((2, 1, 3), np.float32)
    both = {"x": x, "z": x}
    for call, message in (
        (lambda: net(x), r"x must be a dict of the inputs \['x', 'z'\]"),
        (lambda: net({"x": x}), r"the graph names \['z'\]"),
        (lambda: net({**both, "w": x}), r"x names \['w'\]"),
        (lambda: net(both, {"c": None}), r"state names \['c'\]"),
        (lambda: net(both, {"b": np.zeros((1, 1, 3))}), r"state names \['b'\]"),
        (lambda: net(both, lengths={"c": [1]}), r"lengths names \['c'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_wrong_dy_costs_nothing() -> None:
    net = Graph({"h": (RNN(3, 4, seed=1), "x"), "y": (Linear(4, 2, seed=2), "h")})
    y, _ = net(np.ones((5, 1, 3), np.float32))
    with pytest.raises(ValueError, match=r"dy of 'y' must have shape \(5, 1, 2\), got \(5, 1, 1\)"):
        net.backward(y[..., :1])
    with pytest.raises(TypeError, match="dy of 'y' must have dtype float32, got float64"):
        net.backward(y.astype(np.float64))
    with pytest.raises(ValueError, match=r"dstate names \['y\.state'\]"):
        net.backward(y, {"y": y})
    net.backward(y)
    with pytest.raises(RuntimeError, match="Graph: backward without a forward"):
        net.backward(y)


@pytest.mark.parametrize("layer", [LSTM(3, 4, seed=1), RNN(3, 4, seed=1)])
def test_a_wrong_dstate_costs_nothing(layer: Any) -> None:
    net = Graph({"h": (layer, "x"), "y": (Linear(4, 2, seed=2), "h")})
    y, state = net(np.ones((5, 1, 3), np.float32))
    right = state["h"]
    for wrong in (right[0][:, :0] if isinstance(right, np.ndarray) else (right[0], right[1][..., :2]), np.zeros((1, 1, 4)), (right,) * 3):
        with pytest.raises(ValueError, match="dstate of 'h' must have shapes"):
            net.backward(y, {"h": wrong})
    net.backward(y, {"h": None})
    y, state = net(np.ones((5, 1, 3), np.float32))
    net.backward(y, state)
    with pytest.raises(RuntimeError, match="Graph: backward without a forward"):
        net.backward(y)


def test_a_wrong_dict_of_gradients_costs_nothing() -> None:
    net = Graph({"a": (linear(), "x"), "b": (linear(), "x")}, outputs=["a", "b"])
    y, _ = net(np.ones((5, 1, 3), np.float32))
    with pytest.raises(TypeError, match="dy of 'b' must have dtype float32, got float64"):
        net.backward({"a": y["a"], "b": y["b"].tolist()})
    with pytest.raises(TypeError):
        net.backward(None)
    net.backward(y)


def test_a_user_layer_is_a_module_with_a_call_and_a_backward() -> None:
    class Last(Module):
        """y = x[-1]: many to one."""

        def __call__(self, x: Any) -> Any:
            self._push(x.shape)
            return x[-1]

        def backward(self, dy: Any) -> Any:
            dx = np.zeros(self._pop(), dy.dtype)
            dx[-1] = dy
            return dx

    net = Graph({"h": (GRU(3, 4, dtype="float64", seed=1), "x"), "last": (Last(), "h")})
    y, state = net(draw(5, 2, 3))
    np.testing.assert_array_equal(y, state["h"][0])
    assert net.backward(y)[0].shape == (5, 2, 3)
