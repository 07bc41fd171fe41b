"""Convolutions, pooling and activations: against torch forwards and backwards, and against central differences of a sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rnnfast import Graph, Linear
from rnnfast.conv import Activation, CausalConv1d, Conv2d, Flatten, MaxPool2d


def _both(layer, theirs, x, before=lambda x: x):
    """y, dx and parameter gradients of both sides, for one random dy, in float64."""
    y = layer(x)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dx = layer.backward(dy)
    leaf = torch.tensor(x, requires_grad=True)
    ours = [y, dx]
    out = theirs(leaf)
    out.backward(torch.tensor(dy))
    reference = [out.detach().numpy(), leaf.grad.numpy()]
    return ours, reference


@pytest.mark.parametrize(
    ("T", "K", "dilation"), [(7, 3, 1), (9, 3, 2), (2, 5, 1), (1, 1, 1), (0, 3, 1)], ids=["plain", "dilated", "short", "one tap", "no time"]
)
def test_causal_convolution_is_torchs_with_zeros_before(T, K, dilation):
    layer = CausalConv1d(3, 4, K, dilation, dtype="float64", seed=0)
    theirs = torch.nn.Conv1d(3, 4, K, dilation=dilation, dtype=torch.float64)
    theirs.load_state_dict({name: torch.tensor(p) for name, p in layer.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((T, 2, 3))
    if T == 0:
        assert layer(x).shape == (0, 2, 4) and layer.backward(np.zeros((0, 2, 4))).shape == (0, 2, 3)
        return

    def run(leaf):
        past = torch.zeros(((K - 1) * dilation, 2, 3), dtype=torch.float64)
        return theirs(torch.cat((past, leaf)).permute(1, 2, 0)).permute(2, 0, 1)

    for ours, reference in zip(*_both(layer, run, x), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-12)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(layer.gradients()[name], p.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_causal_convolution_reads_no_future():
    layer = CausalConv1d(2, 3, 4, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((10, 1, 2)).astype(np.float32)
    later = x.copy()
    later[6:] += 1
    assert np.array_equal(layer(x)[:6], layer(later)[:6])


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), ((2, 3), 0), (5, 2)])
def test_convolution_is_torchs(kernel, padding):
    layer = Conv2d(3, 4, kernel, padding, dtype="float64", seed=0)
    theirs = torch.nn.Conv2d(3, 4, kernel, padding=padding, dtype=torch.float64)
    theirs.load_state_dict({name: torch.tensor(p) for name, p in layer.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 7))
    for ours, reference in zip(*_both(layer, theirs, x), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-12)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(layer.gradients()[name], p.grad.numpy(), rtol=1e-12, atol=1e-11)


def test_pooling_is_torchs_and_leaves_the_rest_out():
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 5))
    for ours, reference in zip(*_both(MaxPool2d((2, 3)), torch.nn.MaxPool2d((2, 3)), x), strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_of_equal_numbers_the_first_takes_the_gradient():
    pool = MaxPool2d(2)
    pool(np.array([[[2.0, 2.0], [2.0, 1.0]], [[0.0, 3.0], [3.0, 3.0]]]))
    assert pool.backward(np.ones((2, 1, 1))).tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]


@pytest.mark.parametrize("kind", ["relu", "elu", "sigmoid", "tanh", "glu"])
def test_activations_are_torchs(kind):
    functions = {"relu": torch.relu, "elu": torch.nn.functional.elu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "glu": torch.nn.functional.glu}
    theirs = functions[kind]
    x = np.concatenate((np.random.default_rng(0).standard_normal(50) * 3, [-800.0, 800.0]))
    for ours, reference in zip(*_both(Activation(kind), theirs, x), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-13, atol=1e-15)


def test_time_axes_before_a_picture_are_rows():
    layer = Conv2d(1, 2, 3, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((4, 3, 1, 6, 6)).astype(np.float32)
    assert np.array_equal(layer(x)[2, 1], layer(x[2, 1][None])[0])


def test_a_net_of_them_is_a_graph():
    net = Graph(
        {
            "c": (Conv2d(1, 2, 3, seed=0), "x"),
            "r": (Activation("relu"), "c"),
            "p": (MaxPool2d(2), "r"),
            "f": (Flatten(), "p"),
            "y": (Linear(8, 3, seed=0), "f"),
        }
    )
    x = np.ones((5, 2, 1, 6, 6), np.float32)
    y, _ = net(x)
    assert y.shape == (5, 2, 3)
    assert net.backward(np.ones_like(y))[0].shape == x.shape


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"x must have shape \(T, B, I\)"):
        CausalConv1d(2, 3, 2)(np.ones((4, 2), np.float32))
    with pytest.raises(TypeError, match="float32"):
        CausalConv1d(2, 3, 2)(np.ones((4, 1, 2)))
    with pytest.raises(ValueError, match="at least"):
        Conv2d(1, 1, 5)(np.ones((1, 1, 3, 3), np.float32))
    with pytest.raises(ValueError, match="2H"):
        Activation("glu")(np.ones((4, 3)))
    with pytest.raises(ValueError, match="relu, elu"):
        Activation("swish")
    with pytest.raises(ValueError, match="kernel_size"):
        MaxPool2d(0)
