"""Diagnostics: single steps undo what the whole backward does, Jacobians are the differences', nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
from rnnfast import GRU, LSTM, RNN, Graph, Linear
from rnnfast.diagnostics import activities, lag_norms, log_singular_values, neuron_gradients, state_gradients

LAYERS = {
    "rnn": lambda: RNN(2, 5, dtype="float64", seed=0),
    "two layers": lambda: RNN(2, 5, 2, dtype="float64", seed=0),
    "lstm": lambda: LSTM(2, 5, 2, dtype="float64", seed=0),
    "projected": lambda: LSTM(2, 5, proj_size=3, dtype="float64", seed=0),
    "gru": lambda: GRU(2, 5, dtype="float64", seed=0),
    "learned start": lambda: LSTM(2, 5, learn_initial_state=True, dtype="float64", seed=0),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_steps_undo_what_the_whole_backward_does(make):
    layer, rng = make(), np.random.default_rng(0)
    x = rng.standard_normal((7, 3, 2))
    y, _ = layer(x)
    dy = rng.standard_normal(y.shape)
    _, start = layer.backward(dy)
    layer.zero_gradients()
    found = state_gradients(layer, x, dy)
    parts = start if isinstance(start, tuple) else (start,)
    joined = np.concatenate([np.moveaxis(part, 1, 0).reshape(3, -1) for part in parts], axis=1)
    np.testing.assert_allclose(found[0], joined, rtol=1e-12, atol=1e-14)
    assert not found[-1].any() and not layer.flat_gradient.any()
    assert lag_norms(found).shape == (7,)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_singular_values_are_those_of_differences(make):
    layer, rng = make().eval(), np.random.default_rng(0)
    x = rng.standard_normal((6, 2))
    found = log_singular_values(layer, x)
    L, R, H, eps = layer.num_layers, layer.proj_size or 5, 5, 1e-6
    S = L * R + (L * H if layer.paired else 0)
    p = layer.parameters()
    middle = np.concatenate([p[k].ravel() for k in ("h_0", "c_0")]) if "h_0" in p else np.zeros(S)

    def end(flat):
        h = flat[: L * R].reshape(L, R)
        _, state = layer(x, (h, flat[L * R :].reshape(L, H)) if layer.paired else h)
        return np.concatenate([part.ravel() for part in state]) if layer.paired else state.ravel()

    jacobian = np.array([(end(middle + eps * row) - end(middle - eps * row)) / (2 * eps) for row in np.eye(S)]).T
    largest = np.linalg.svd(jacobian, compute_uv=False)
    np.testing.assert_allclose(10 ** found[-1][:3], largest[:3], rtol=1e-4, atol=1e-8)


def test_a_linear_net_explodes_as_its_spectrum_says():
    layer = RNN(1, 8, nonlinearity="identity", dtype="float64", seed=0)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    layer.parameters()["weight_hh_l0"][...] = 2.0 * q
    values = log_singular_values(layer, np.zeros((2000, 1)))
    np.testing.assert_allclose(values[:, 0], np.arange(1, 2001) * np.log10(2.0), rtol=1e-10)  # past the largest double


def test_bidirectional_layers_have_no_lag():
    with pytest.raises(ValueError, match="bidirectional"):
        state_gradients(RNN(2, 5, bidirectional=True), np.ones((2, 1, 2), np.float32), np.ones((2, 1, 10), np.float32))


def test_norms_of_neurons_by_name():
    net = Graph({"h": (Linear(3, 4, seed=0), "x"), "y": (Linear(4, 2, seed=1), "h")})
    net.backward(np.ones_like(net(np.ones((5, 3), np.float32))[0]))
    norms = neuron_gradients(net)
    assert {name: n.shape for name, n in norms.items()} == {"h.weight": (4,), "y.weight": (2,)}
    np.testing.assert_allclose(norms["h.weight"], np.linalg.norm(net.gradients()["h.weight"], axis=1), rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", ["zeros", "given", "learned"])
@pytest.mark.parametrize(("make", "options"), [(LSTM, {}), (LSTM, {"peephole": True}), (GRU, {}), (GRU, {"reset_after": False}), (RNN, {})])
def test_gates_and_cells_fulfil_the_equations(make, options, start, bias):
    layer = make(2, 5, bias=bias, learn_initial_state=start == "learned", dtype="float64", seed=0, **options)
    layer.flat *= 2
    rng = np.random.default_rng(0)
    x, given = rng.standard_normal((7, 3, 2)), rng.standard_normal((2, 1, 3, 5))
    state = None if start != "given" else tuple(given) if layer.paired else given[0]
    a = activities(layer, x, state)
    y = layer.eval()(x, state)[0]
    np.testing.assert_array_equal(a["h"], y)
    own = [layer.parameters()[name] for name in ("h_0", "c_0") if start == "learned" and name in layer.parameters()]
    first = given if start == "given" else own or np.zeros((2, 1, 3, 5))
    if make is LSTM:
        before = np.concatenate((np.broadcast_to(first[1], (1, 3, 5)), a["c"][:-1]))
        np.testing.assert_allclose(a["c"], a["f"] * before + a["i"] * a["g"], atol=1e-13)
        np.testing.assert_allclose(y, a["o"] * np.tanh(a["c"]), atol=1e-13)
    elif make is GRU:
        before = np.concatenate((np.broadcast_to(first[0], (1, 3, 5)), y[:-1]))
        np.testing.assert_allclose(y, (1 - a["z"]) * a["n"] + a["z"] * before, atol=1e-13)


def test_activities_are_of_one_layer():
    with pytest.raises(ValueError, match="one layer of one direction"):
        activities(LSTM(2, 3, 2), np.zeros((4, 1, 2), np.float32))
