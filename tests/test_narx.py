"""A NARX in its modes: gradients of every mode against central differences, modes against each other, and training without gradients."""

from __future__ import annotations

import numpy as np
import pytest
from rnnfast import NARX, Graph, Linear
from rnnfast.narx import Feedback, evolve, forecast


def model(mode, origin=None, K=3, seed=0):
    return Feedback(NARX(2, 2, 5, input_taps=2, output_taps=K, dtype="float64", seed=seed), mode, origin)


@pytest.mark.parametrize("mode", ["true", "own", "error"])
@pytest.mark.parametrize("origin", [None, 4, 1, 0])
def test_gradient_is_the_difference_quotient(mode, origin):
    net, rng = model(mode, origin), np.random.default_rng(0)
    xd, dy = rng.standard_normal((7, 3, 4)), rng.standard_normal((7, 3, 2))
    net(xd)
    net.backward(dy)
    flat, got = net.layer.flat, net.layer.flat_gradient.copy()
    want = np.empty_like(got)
    net.train(False)
    net.train(True)
    for k in range(len(flat)):
        ends = []
        for step in (1e-6, -1e-6):
            flat[k] += step
            ends.append(float((net(xd)[0] * dy).sum()))
            flat[k] -= step
        want[k] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_own_outputs_are_the_layers():
    net, rng = model("own").eval(), np.random.default_rng(0)
    xd = rng.standard_normal((6, 3, 4))
    y, state = net(xd)
    want, (x_past, y_past) = net.layer(np.ascontiguousarray(xd[..., :2]))
    assert np.array_equal(y, want) and np.array_equal(state[0], x_past) and np.array_equal(state[1], y_past)


def test_fed_with_what_it_says_itself_truth_and_own_outputs_are_one():
    net, rng = model("own").eval(), np.random.default_rng(0)
    xd = rng.standard_normal((6, 3, 4))
    xd[..., 2:] = net(xd)[0]
    net.mode = "true"
    np.testing.assert_allclose(net(xd)[0], xd[..., 2:], rtol=1e-12)
    net.mode = "error"
    zero = np.zeros_like(xd[..., 2:])  # an error of 0 is a feedback of 0
    net.origin = 0
    np.testing.assert_allclose(net(xd)[0][0], net.layer(np.ascontiguousarray(xd[:1, :, :2]))[0][0], rtol=1e-12)
    assert zero.shape == (6, 3, 2)


@pytest.mark.parametrize("mode", ["true", "own", "error"])
def test_a_net_with_its_feedback_is_a_node_of_a_graph(mode):
    alone, inside, rng = model(mode, 4), model(mode, 4), np.random.default_rng(0)
    xd, dy = rng.standard_normal((7, 3, 4)), rng.standard_normal((7, 3, 2))
    net = Graph({"narx": (inside, "xd"), "y": (Linear(2, 2, bias=False, dtype="float64", seed=0), "narx")})
    net["y"].parameters()["weight"][...] = np.eye(2)
    y, state = net(xd)
    net.backward(dy)
    np.testing.assert_array_equal(y, alone(xd)[0])
    alone.backward(dy)
    np.testing.assert_array_equal(inside.layer.flat_gradient, alone.layer.flat_gradient)
    later = rng.standard_normal((2, 3, 4))
    np.testing.assert_array_equal(net(later, state)[0], alone(later, state["narx"])[0])


def test_error_feedback_is_its_definition():
    net, rng = model("error", K=1).eval(), np.random.default_rng(0)
    xd = rng.standard_normal((4, 1, 4))
    y, _ = net(xd)
    p, past, error = net.layer.parameters(), np.zeros(2), np.zeros(2)
    for t in range(4):
        a = p["weight_ih_l0"] @ np.concatenate((xd[t, 0, :2], past)) + p["weight_hh_l0"] @ error + p["bias_ih_l0"] + p["bias_hh_l0"]
        mine = p["weight_hr_l0"] @ (1 / (1 + np.exp(-a))) + p["bias_hr_l0"]
        np.testing.assert_allclose(y[t, 0], mine, rtol=1e-12)
        past, error = xd[t, 0, :2], xd[t, 0, 2:] - mine


@pytest.mark.parametrize("mode", ["true", "own", "error"])
def test_whole_sequence_equals_its_chunks(mode):
    net, rng = model(mode).eval(), np.random.default_rng(0)
    xd = rng.standard_normal((9, 3, 4))
    whole, end = net(xd)
    first, state = net(xd[:2])
    second, state = net(xd[2:], state)
    np.testing.assert_allclose(np.concatenate((first, second)), whole, rtol=1e-12)
    for a, b in zip(state, end, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("mode", ["true", "own", "error"])
def test_forecast_reads_nothing_beyond_its_origin(mode):
    net, rng = model(mode, origin=3), np.random.default_rng(0)
    xd = rng.standard_normal((9, 3, 4))
    later = xd.copy()
    later[5:, :, 2:] += 1
    net.origin = 5
    assert np.array_equal(net(xd)[0], net(later)[0])
    y = net(xd)[0][5:]
    net.origin = 3
    assert np.array_equal(forecast(net, xd[:5, :, :2], xd[:5, :, 2:], xd[5:, :, :2]), y)
    assert net.origin == 3 and net.training


def test_training_without_gradients():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    net = Feedback(NARX(1, 1, 2, input_taps=1, output_taps=1, dtype="float64", seed=0))
    x = rng.standard_normal((60, 1, 1))
    d = np.zeros_like(x)
    for t in range(1, 60):
        d[t] = 0.5 * d[t - 1] + np.tanh(x[t])
    xd = np.concatenate((x, d), axis=2)
    net.eval()
    before = float(((net(xd)[0] - d) ** 2).mean())
    net.train()

    def score():
        net.training = False
        value = float(((net(xd)[0] - d) ** 2).mean())
        net.training = True
        return value

    for method in ("genetic", "annealing"):
        best = evolve(net, score, method=method, generations=30, seed=0)
        assert best < before / 4 and abs(score() - best) < 1e-12


def test_a_wrong_gradient_costs_nothing():
    net, rng = model("own"), np.random.default_rng(0)
    layer, x = net.layer, rng.standard_normal((4, 3, 2))
    y, state = layer(x)
    for wrong in (state[0][:, :1], state[0].astype(np.float32)):
        with pytest.raises(ValueError, match="dstate x_past must have"):
            layer.backward(y, (wrong, state[1]))
    assert not layer.flat_gradient.any()
    layer.backward(y, state)
    y, _ = net(rng.standard_normal((4, 3, 4)))
    with pytest.raises(ValueError, match="float64 of shape"):
        net.backward(y.astype(np.float32))
    net.backward(y)


def test_a_wrong_argument_leaves_a_stream_where_it_was():
    stream, x = model("own").layer.stream(2), np.ones((2, 2))
    stream(x)
    before = stream.state
    with pytest.raises(ValueError, match="out"):
        stream(2 * x, np.empty((1, 2)))
    with pytest.raises(ValueError, match="mask must be bool"):
        stream.reset([0, 1])
    for now, then in zip(stream.state, before, strict=True):
        np.testing.assert_array_equal(now, then)
    stream.reset([False, True])
    for now, then in zip(stream.state, before, strict=True):
        np.testing.assert_array_equal(now, then * np.array([[1], [0]]))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"lengths must have shape \(B,\) = \(3,\)"):
        model("own").layer(np.ones((4, 3, 2)), None, [4, 4], np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="true, own, error"):
        model("past")
    with pytest.raises(ValueError, match=r"\(T, B, I \+ O\)"):
        model("true")(np.ones((3, 2, 3)))
    with pytest.raises(ValueError, match="genetic or annealing"):
        evolve(model("true"), lambda: 0.0, method="luck")
