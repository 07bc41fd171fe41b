"""The drop-in for torch: against ATen, value by value and gradient by gradient, and around it all that torch's modules promise."""

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rnnfast.torch as fast
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

LAYERS = {"LSTM": (nn.LSTM, fast.LSTM), "GRU": (nn.GRU, fast.GRU), "RNN": (nn.RNN, fast.RNN)}
CELLS = {"LSTMCell": (nn.LSTMCell, fast.LSTMCell), "GRUCell": (nn.GRUCell, fast.GRUCell), "RNNCell": (nn.RNNCell, fast.RNNCell)}
EPS = {torch.float32: 2e-5, torch.float64: 1e-12}  # of sums over at most some hundred terms of size one


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


def flat(out: Any) -> list[Tensor]:
    """Every tensor of a module's results, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, nn.utils.rnn.PackedSequence):
        return [out.data]
    return [t for part in out for t in flat(part)]


def twins(name: str, *args: Any, **named: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = {**LAYERS, **CELLS}[name]
    a, b = theirs(*args, **named), ours(*args, **named)
    b.load_state_dict(a.state_dict())
    return a, b


def is_ours(out: Any) -> bool:
    """Whether our kernels made these results, and not torch's."""
    nodes, seen = [t.grad_fn for t in flat(out)], set()
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "_NodeBackward":
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    return False


def same(a: nn.Module, b: nn.Module, run: Callable[[nn.Module, list[Tensor]], Any], inputs: list[Tensor], tolerance: float) -> None:
    """Both modules give the same results and the same gradients of inputs and parameters."""
    found = []
    for module in (a, b):
        given = [t.detach().clone().requires_grad_() for t in inputs]
        out = run(module, given)
        assert is_ours(out) == (module is b)
        parts = flat(out)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in parts]
        sum((t * w).sum() for t, w in zip(parts, weights)).backward()  # type: ignore[union-attr]
        found.append([*parts, *(t.grad for t in given), *(p.grad for p in module.parameters())])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional", "bias"), [(1, False, True), (2, True, True), (3, False, False)])
def test_layers_equal_aten(name: str, dtype: torch.dtype, batch_first: bool, layers: int, bidirectional: bool, bias: bool) -> None:
    a, b = twins(name, 7, 10, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dtype=dtype)
    x, B = torch.randn(5, 4, 7, dtype=dtype), 5 if batch_first else 4
    states = [torch.randn(layers * (1 + bidirectional), B, 10, dtype=dtype) for _ in range(2 if name == "LSTM" else 1)]
    same(a, b, lambda m, v: m(v[0], tuple(v[1:]) if name == "LSTM" else v[1]), [x, *states], EPS[dtype])
    same(a, b, lambda m, v: m(v[0]), [x], EPS[dtype])
    same(a, b, lambda m, v: m(v[0][:, 0])[0], [x], EPS[dtype])  # unbatched
    with torch.no_grad():
        for left, right in zip(flat(a(x)), flat(b(x))):
            torch.testing.assert_close(right, left, rtol=EPS[dtype], atol=EPS[dtype])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projections_equal_aten(bidirectional: bool) -> None:
    a, b = twins("LSTM", 7, 10, 2, proj_size=3, bidirectional=bidirectional, dtype=torch.float64)
    same(a, b, lambda m, v: m(v[0]), [torch.randn(6, 4, 7, dtype=torch.float64)], 1e-12)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_equal_aten(name: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        a, b = twins(name, 7, 10, bias=bias, dtype=dtype)
        states = [torch.randn(4, 10, dtype=dtype) for _ in range(2 if name == "LSTMCell" else 1)]
        same(a, b, lambda m, v: m(v[0], tuple(v[1:]) if len(v) == 3 else v[1]), [torch.randn(4, 7, dtype=dtype), *states], EPS[dtype])
        same(a, b, lambda m, v: m(v[0]), [torch.randn(7, dtype=dtype)], EPS[dtype])


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_one_row_over_big_weights(name: str) -> None:
    """Such weights of an RNN torch reads faster, on one thread."""
    gated = not name.startswith("RNN")
    m = {**LAYERS, **CELLS}[name][1](512 if gated else 1024, 512 if gated else 1024)
    x = torch.ones(*(() if name in CELLS else (1,)), 2, m.input_size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, two = (flat(m(x[..., :rows, :]))[0] for rows in (1, 2))
        with fast.installed(aten=True):  # torch's operation is ours then
            torch.testing.assert_close(flat(m(x[..., :1, :]))[0], one, rtol=2e-5, atol=2e-5)
        torch.set_num_threads(2)
        shared = flat(m(x[..., :1, :]))[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(one, two[..., :1, :], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(shared, one, rtol=2e-5, atol=2e-5)
    assert is_ours(two) and is_ours(shared) and is_ours(one) == gated


def test_a_relu_layer_and_cell_equal_aten() -> None:
    a, b = twins("RNN", 7, 10, 1, "relu")
    same(a, b, lambda m, v: m(v[0]), [torch.randn(3, 4, 7)], 2e-5)
    a, b = twins("RNNCell", 7, 10, True, "relu")
    same(a, b, lambda m, v: m(v[0]), [torch.randn(4, 7)], 2e-5)


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["module", "installed"])
def test_what_is_not_a_number_passes_a_relu_both_ways(name: str, dtype: torch.dtype, way: str) -> None:
    """Its gradient is 1 where the value is NaN, 0 at infinity below and at 0."""
    theirs, ours = (m.to(dtype) for m in twins(name, 7, 10, **({"num_layers": 2} if name == "RNN" else {}), nonlinearity="relu"))
    x = torch.randn(*((5, 3, 7) if name == "RNN" else (3, 7)), dtype=dtype)
    x[..., 0, 1], x[-1, ..., 2] = torch.nan, -torch.inf
    dy = torch.randn(*x.shape[:-1], 10, dtype=dtype)
    found = []
    for module in (theirs, theirs if way == "installed" else ours):
        with fast.installed() if found and way == "installed" else contextlib.nullcontext():
            module.zero_grad()
            given = x.clone().requires_grad_()
            y = flat(module(given))[0]
            assert is_ours(y) == bool(found)
            y.backward(dy)
            found.append([y, given.grad, *(p.grad for p in module.parameters())])
    assert found[0][0].isnan().any() and not found[0][-1].isnan().all()
    torch.testing.assert_close(found[1], found[0], rtol=EPS[dtype], atol=EPS[dtype], equal_nan=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_packed_sequences_equal_aten_and_padded_rows(name: str, enforce_sorted: bool, dropout: float) -> None:
    a, b = twins(name, 3, 5, 2, bidirectional=True, dropout=dropout, dtype=torch.float64)
    lengths = torch.tensor([6, 6, 3, 1] if enforce_sorted else [3, 6, 1, 6])
    states = [torch.randn(4, 4, 5, dtype=torch.float64) for _ in range(2 if name == "LSTM" else 1)]

    def run(m: nn.Module, v: list[Tensor]) -> Any:
        torch.manual_seed(3)
        return m(pack_padded_sequence(v[0], lengths, enforce_sorted=enforce_sorted), tuple(v[1:]) if name == "LSTM" else v[1])

    x = torch.randn(6, 4, 3, dtype=torch.float64)
    same(a, b, run, [x, *states], 1e-12)
    if dropout == 0:
        y, _ = b(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
        padded, _ = pad_packed_sequence(y)
        for row, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(padded[:n, row], b(x[:n, row : row + 1])[0][:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_torchs_masks(name: str, batch_first: bool, p: float) -> None:
    a, b = twins(name, 3, 5, 3, dropout=p, batch_first=batch_first, bidirectional=True, dtype=torch.float64)

    after: list[float] = []

    def run(m: nn.Module, v: list[Tensor]) -> Any:
        torch.manual_seed(5)
        out = m(v[0])
        after.append(torch.rand(1).item())
        return out

    same(a, b, run, [torch.randn(4, 6, 3, dtype=torch.float64)], 1e-12)
    assert after[0] == after[1]
    x = nn.Parameter(torch.ones(4, 6, 3, dtype=torch.float64))  # learned, as a prompt is
    assert is_ours(run(b, [x])) or p == 1
    torch.testing.assert_close(flat(run(b, [x])), flat(run(a, [x])), rtol=1e-12, atol=1e-12)
    b.eval()
    assert torch.equal(b(torch.ones(4, 6, 3, dtype=torch.float64))[0], b(torch.ones(4, 6, 3, dtype=torch.float64))[0])


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_an_empty_batch_goes_through_both_ways(name: str) -> None:
    a, b = twins(name, 3, 5, **({"num_layers": 2, "bidirectional": True} if name in LAYERS else {}))
    same(a, b, lambda m, v: m(v[0]), [torch.randn(*((4, 0, 3) if name in LAYERS else (0, 3)))], 0)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_an_empty_batch_may_have_any_strides(name: str) -> None:
    """No rows of a batch whose features do not lie side by side; the gradients that come back lie so, too."""
    a, b = twins(name, 3, 5)
    x, h = torch.randn(*((4, 2, 7) if name in LAYERS else (2, 7))), torch.randn(*((1, 2, 11) if name in LAYERS else (2, 11)))
    state = [h, h] if name.startswith("LSTM") else [h]

    def run(m: nn.Module, v: list[Tensor]) -> Any:
        rows, *states = (t[..., :0, ::2][..., :n] for t, n in zip(v, (3, 5, 5)))
        out = flat(m(rows, tuple(states) if len(states) == 2 else states[0]))
        return [torch.cat([t, torch.zeros_like(t)], -1)[..., ::2] for t in out]

    same(a, b, run, [x, *state], 0)
    m = fast.compilable(copy.deepcopy(a))
    sum(t.sum() for t in flat(run(m, [t.requires_grad_() for t in (x, *state)]))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and not p.grad.any() for p in m.parameters())


def test_states_may_be_lists_aliases_views_or_strided() -> None:
    a, b = twins("LSTM", 3, 5, 2)
    x, wide = torch.randn(4, 2, 3), torch.randn(2, 2, 10)
    same(a, b, lambda m, v: m(v[0], [v[1], v[1]]), [x, torch.randn(2, 2, 5)], 2e-5)
    same(a, b, lambda m, v: m(v[0], (v[1][..., ::2], v[1][..., 5:])), [x, wide], 2e-5)
    same(a, b, lambda m, v: m(v[0].transpose(0, 2)[..., :3].transpose(0, 1)), [torch.randn(5, 4, 2)], 2e-5)
    same(a, b, lambda m, v: m(v[0].expand(4, 2, 3)), [torch.randn(1, 1, 3)], 2e-5)
    same(a, b, lambda m, v: m(torch.complex(v[0], v[0]).conj().imag), [x], 2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_results_lie_in_memory_as_torchs(name: str) -> None:
    """With batch_first time comes first all the same, so that y.transpose(0, 1).view(...) works."""
    a, b = twins(name, 3, 5, 2, bidirectional=True, batch_first=True)
    x = torch.randn(4, 6, 3)
    for m in (a, b, fast.freeze(copy.deepcopy(a)), fast.compilable(copy.deepcopy(a)), torch.compile(fast.compilable(copy.deepcopy(a)), backend="aot_eager")):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y, *state = flat(m(x))
                assert y.stride() == (10, 40, 1) and all(s.is_contiguous() for s in state)
                y.transpose(0, 1).view(24, 10)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_nothing_given_is_written_to_and_parameters_are_tensors(name: str) -> None:
    for m in (fast.convert({**LAYERS, **CELLS}[name][0](3, 5)), fast.compilable({**LAYERS, **CELLS}[name][0](3, 5))):
        x, h = nn.Parameter(torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))), nn.Parameter(torch.randn(*((1, 2, 5) if name in LAYERS else (2, 5))))
        given = [x, h, *m.parameters()]
        before = [(t.detach().clone(), t._version) for t in given]
        out = flat(m(x, (h, h) if name.startswith("LSTM") else h))
        assert is_ours(out) or isinstance(m, fast.Compilable)
        results = [t.detach().clone() for t in out]
        sum(t.sum() for t in out).backward()  # type: ignore[union-attr]
        assert all(torch.equal(t, old) and t._version == version for t, (old, version) in zip(given, before))
        assert all(torch.equal(a, b) for a, b in zip(out, results))
        with torch.no_grad():
            parts = flat(m(x[:1] if name in LAYERS else x, (h, h) if name.startswith("LSTM") else h))
            for i, part in enumerate(parts):  # each in memory of its own
                part.fill_(i + 7)
            assert all((part == i + 7).all() for i, part in enumerate(parts))
        assert all(torch.equal(t, old) for t, (old, _) in zip(given, before))


def test_results_may_be_written_to_before_backward() -> None:
    a, b = twins("GRU", 3, 5, dtype=torch.float64)

    def run(m: nn.Module, v: list[Tensor]) -> Any:
        y, h = m(v[0])
        y *= 2
        return y, h

    x = torch.randn(4, 2, 3, dtype=torch.float64)
    same(a, b, run, [x], 1e-12)


def test_parameters_changed_between_forward_and_backward_raise() -> None:
    m = fast.LSTM(3, 5)
    y, _ = m(torch.randn(4, 2, 3))
    with torch.no_grad():
        m.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_parameters_and_inputs_get_no_gradient() -> None:
    m = fast.LSTM(3, 5, 2)
    m.weight_ih_l0.requires_grad_(False)
    m(torch.randn(4, 2, 3))[0].sum().backward()
    assert m.weight_ih_l0.grad is None and m.weight_ih_l1.grad is not None


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_gradients_are_repeatable_and_differentiable_twice(name: str) -> None:
    m = {**LAYERS, **CELLS}[name][1](2, 3, dtype=torch.float64)
    x = torch.randn(*((2, 2, 2) if name in LAYERS else (2, 2)), dtype=torch.float64, requires_grad=True)
    parameters = tuple(m.parameters())

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(m(x)))

    assert torch.autograd.gradcheck(run, (x, *parameters), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), nondet_tol=0.0)


def test_batched_gradients_equal_a_loop() -> None:
    m = fast.GRU(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    one = torch.autograd.functional.jacobian(lambda x: m(x)[1], x)
    many = torch.autograd.functional.jacobian(lambda x: m(x)[1], x, vectorize=True)
    torch.testing.assert_close(one, many)


# ---- weights are read anew in every call ------------------------------------------------------------------------------------------------


def test_writes_through_data_and_numpy_are_seen() -> None:
    a, b = twins("LSTM", 3, 5)
    x = torch.randn(4, 2, 3)
    for i in range(3):
        for m in (a, b):
            m.weight_hh_l0.data.mul_(0.5)
            m.weight_ih_l0.detach().numpy()[:] += i
        with torch.no_grad():
            torch.testing.assert_close(b(x)[0], a(x)[0], rtol=2e-5, atol=2e-5)


def test_weight_norm_pruning_and_functional_calls_in_a_loop() -> None:
    a, b = twins("LSTM", 3, 5)
    x = torch.randn(4, 2, 3)
    for m in (a, b):
        prune.l1_unstructured(m, "weight_hh_l0", amount=0.5)
        parametrizations.weight_norm(m, "weight_ih_l0")
    pairs = list(zip(a.parameters(), b.parameters()))
    for _ in range(3):
        with fast.installed():
            y_b = b(x)[0]
        y_a = a(x)[0]
        torch.testing.assert_close(y_b, y_a, rtol=2e-5, atol=2e-5)
        y_a.sum().backward()
        y_b.sum().backward()
        with torch.no_grad():
            for p, q in pairs:
                assert p.grad is not None and q.grad is not None
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
                p.grad = q.grad = None
    a, b = twins("GRU", 3, 5)
    for _ in range(3):
        new = {k: torch.randn_like(v) for k, v in a.state_dict().items()}
        torch.testing.assert_close(torch.func.functional_call(b, new, x)[0], torch.func.functional_call(a, new, x)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_replaced_weights_are_seen_with_a_state_given(name: str) -> None:
    """The way of a call whose state is given is shorter: torch, ours, and torch's class under installed()."""
    a, b = twins(name, 3, 5)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    hx: Any = torch.randn(*((1, 2, 5) if name in LAYERS else (2, 5)))
    hx = (hx, hx * 2) if name.startswith("LSTM") else hx

    def equal(*replaced: dict[str, Tensor]) -> Tensor:
        def run(m: nn.Module) -> list[Tensor]:
            return flat(torch.func.functional_call(m, *replaced, (x, hx)) if replaced else m(x, hx))

        expected = run(a)
        with fast.installed():
            for found in (run(b), run(a)):
                for t, u in zip(found, expected, strict=True):
                    torch.testing.assert_close(t, u, rtol=2e-5, atol=2e-5)
        return expected[0].detach()

    hh, bias = ("weight_hh", "bias_ih") if name in CELLS else ("weight_hh_l0", "bias_ih_l0")
    seen = [equal(), equal({k: torch.randn_like(v) for k, v in a.state_dict().items()}), equal()]
    assert torch.equal(seen[0], seen[2])
    for m in (a, b):
        getattr(m, hh).data.mul_(3)
        m.register_parameter(bias, nn.Parameter(torch.ones_like(getattr(m, bias))))
    seen.append(equal())
    for m in (a, b):
        prune.custom_from_mask(m, bias, torch.arange(len(getattr(m, bias))) % 2)
        parametrizations.weight_norm(m, hh)
        getattr(m.parametrizations, hh).original0.data.mul_(2)
    seen.append(equal())
    assert all(not torch.allclose(s, t) for s, t in pairwise(seen))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_another_thread_replaces_during_a_call_are_not_those_of_its_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels let other threads run; here the replacement comes as they end."""
    m, x, found, stack = LAYERS[name][1](3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64), [], fast._core.stack_forward
    weight = m.weight_hh_l0
    for replaced in (False, True):

        def forward(*args: Any, replaced: bool = replaced) -> Any:
            out = stack(*args)
            if replaced:
                m.weight_hh_l0 = nn.Parameter(2 * weight.detach())
            return out

        monkeypatch.setattr(fast._core, "stack_forward", forward)
        found.append(torch.autograd.grad(m(x)[0].square().sum(), [weight, m.weight_ih_l0]))
    assert m.weight_hh_l0 is not weight
    torch.testing.assert_close(*found, rtol=0, atol=0)


# ---- errors: torch's own -----------------------------------------------------------------------------------------------------------------


ERRORS: dict[str, Callable[[Any], Any]] = {
    "no time": lambda n: n.LSTM(3, 5)(torch.zeros(0, 2, 3)),
    "no time under dropout": lambda n: n.GRU(3, 5, 2, dropout=0.5)(torch.zeros(0, 2, 3)),
    "another device": lambda n: n.GRU(3, 5)(torch.zeros(4, 2, 3, device="meta")),
    "input width": lambda n: n.LSTM(3, 5)(torch.zeros(4, 2, 4)),
    "input dtype": lambda n: n.LSTM(3, 5)(torch.zeros(4, 2, 3, dtype=torch.float64)),
    "input dims": lambda n: n.RNN(3, 5)(torch.zeros(4)),
    "hidden size": lambda n: n.GRU(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 2, 6)),
    "cell state size": lambda n: n.LSTM(3, 5)(torch.zeros(4, 2, 3), (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5))),
    "hidden dims": lambda n: n.LSTM(3, 5)(torch.zeros(4, 2, 3), (torch.zeros(2, 5), torch.zeros(2, 5))),
    "hidden device": lambda n: n.GRU(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 2, 5, device="meta")),
    "a batch's state for one row": lambda n: n.GRU(3, 5)(torch.zeros(4, 3), torch.zeros(1, 1, 5)),
    "one row's state for a batch": lambda n: n.GRU(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 5)),
    "hidden dtype": lambda n: n.GRU(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 2, 5, dtype=torch.float64)),
    "one tensor for two states": lambda n: n.LSTM(3, 5)(torch.zeros(4, 2, 3), torch.zeros(2, 1, 2, 5)),
    "one tensor for a cell's states": lambda n: n.LSTMCell(3, 5)(torch.zeros(2, 3), torch.zeros(2, 2, 5)),
    "three states": lambda n: n.LSTMCell(3, 5)(torch.zeros(2, 3), (torch.zeros(2, 5),) * 3),
    "cell input": lambda n: n.LSTMCell(10, 20)(torch.zeros(3, 11)),
    "cell hidden": lambda n: n.GRUCell(10, 20)(torch.zeros(3, 10), torch.zeros(3, 21)),
    "cell batch": lambda n: n.RNNCell(10, 20)(torch.zeros(3, 10), torch.zeros(5, 20)),
    "cell dims": lambda n: n.GRUCell(10, 20)(torch.zeros(3, 3, 10)),
    "unknown nonlinearity": lambda n: n.RNNCell(10, 20, True, "sine")(torch.zeros(3, 10)),
    "dropout range": lambda n: n.LSTM(3, 5, 2, dropout=2),
    "proj_size of a GRU": lambda n: n.GRU(3, 5, proj_size=2),
    "proj_size too large": lambda n: n.LSTM(3, 5, proj_size=5),
    "no hidden": lambda n: n.LSTM(3, 0),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs(case: str) -> None:
    with pytest.raises(Exception) as theirs:
        ERRORS[case](nn)
    with pytest.raises(type(theirs.value)) as ours:
        ERRORS[case](fast)
    assert str(ours.value) == str(theirs.value)
    for aten in (False, True):
        with fast.installed(aten), pytest.raises(type(theirs.value)) as installed:
            ERRORS[case](nn)
        assert str(installed.value) == str(theirs.value)


PLACES = {"LSTM": (2, False, True, 0.5, True, 4, None, torch.float64), "RNN": (2, "relu", False, True, 0.5, True, 0, None, torch.float64)}
PLACES |= {"GRU": (2, False, True, 0.5, True, 0, None, torch.float64), "RNNCell": (False, "relu", None, torch.float64)}
PLACES |= {"LSTMCell": (False, None, torch.float64), "GRUCell": (False, None, torch.float64)}


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_constructors_take_torchs_places_and_draw_its_numbers(name: str) -> None:
    found = []
    for make in {**LAYERS, **CELLS}[name]:
        torch.manual_seed(2)
        m = make(3, 5, *PLACES[name])
        found.append((repr(m), [(key, p) for key, p in m.named_parameters()], torch.rand(1)))
        if name in CELLS:
            skipped = nn.utils.skip_init(make, 3, 5, dtype=torch.float64)
            assert skipped.weight_hh.dtype == torch.float64 and skipped.weight_hh.device.type == "cpu"
    assert found[0][0] == found[1][0] and torch.equal(found[0][2], found[1][2])
    for (a, p), (b, q) in zip(found[0][1], found[1][1], strict=True):
        assert a == b and torch.equal(p, q) and p.dtype == q.dtype == torch.float64
    assert repr(fast.RNNCell(10, 20, "relu")) == repr(nn.RNNCell(10, 20, "relu"))  # nothing is validated


# ---- as a module -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_modules_survive_copies_pickles_and_state_dicts(name: str) -> None:
    theirs, ours = {**LAYERS, **CELLS}[name]
    m = ours(3, 5)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert type(twin) is ours
        assert all(torch.equal(p, q) for p, q in zip(flat(m(x)), flat(twin(x))))
    plain = theirs(3, 5)
    assert list(plain.state_dict()) == list(m.state_dict()) and repr(plain) == repr(m)
    plain.load_state_dict(m.state_dict())
    m.load_state_dict(plain.state_dict())
    assert isinstance(m, theirs) and not isinstance(plain, ours)


def test_conversion_keeps_parameters_and_hooks_both_ways() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 5), "b": nn.Sequential(nn.GRUCell(3, 4))})
    before = list(model.parameters())
    calls: list[int] = []
    model["a"].register_forward_hook(lambda *_: calls.append(1))
    fast.convert(model)
    assert type(model["a"]) is fast.LSTM and all(p is q for p, q in zip(before, model.parameters()))
    assert is_ours(model["a"](torch.zeros(2, 2, 3))) and calls == [1]
    fast.to_torch(model)
    assert type(model["a"]) is nn.LSTM and not is_ours(model["a"](torch.zeros(2, 2, 3)))


def test_conversion_finds_what_a_parametrization_has_given_a_class() -> None:
    m, x = nn.Sequential(nn.LSTM(3, 5), nn.GRU(5, 5)), torch.randn(4, 2, 3)
    for layer in m:
        parametrizations.weight_norm(layer, "weight_hh_l0")
    expected, twin = m[0](x)[0], copy.deepcopy(nn.utils.parametrizations.weight_norm(nn.LSTM(3, 5), "weight_hh_l0"))
    fast.convert(m)
    fast.convert(twin)
    assert isinstance(m[0], fast.LSTM) and isinstance(m[1], fast.GRU) and isinstance(twin, fast.LSTM)
    y = m[0](x)[0]
    assert is_ours(y) and is_ours(twin(x))
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
    torch.nn.utils.parametrize.remove_parametrizations(m[0], "weight_hh_l0")
    assert type(m[0]) is fast.LSTM
    fast.to_torch(m)
    assert type(m[0]) is nn.LSTM and not isinstance(m[1], fast.GRU) and not is_ours(m[1](y.detach()))
    torch.nn.utils.parametrize.remove_parametrizations(m[1], "weight_hh_l0")
    assert type(m[1]) is nn.GRU


def test_installation_covers_old_models_and_ends() -> None:
    layer, cell, before = nn.LSTM(3, 5, 2, dropout=0.1), nn.GRUCell(3, 5), nn.RNNBase._weights_have_changed
    with fast.installed():
        assert is_ours(layer(torch.zeros(2, 2, 3))) and is_ours(cell(torch.zeros(2, 3)))
        with fast.installed():
            pass
        assert is_ours(cell(torch.zeros(2, 3)))
        assert is_ours(layer(pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)])))
        assert nn.RNNBase._weights_have_changed is not before
    assert not is_ours(layer(torch.zeros(2, 2, 3))) and not is_ours(cell(torch.zeros(2, 3)))
    assert nn.RNNBase._weights_have_changed is before


def test_nested_installations_give_back_what_each_has_taken() -> None:
    cell, x, h = nn.GRUCell(3, 5), torch.zeros(2, 3), torch.zeros(2, 5)

    def taken() -> tuple[bool, bool]:
        return is_ours(cell(x)), is_ours(torch.gru_cell(x, h, *cell.parameters()))

    seen = [taken()]
    for outer in (False, True):
        with fast.installed(outer):
            seen.append(taken())
            with contextlib.suppress(ZeroDivisionError), fast.installed(not outer):
                seen.append(taken())
                raise ZeroDivisionError
            seen.append(taken())
        seen.append(taken())
    fast.install(True)
    fast.install()
    seen.append(taken())
    fast.uninstall()
    fast.uninstall()
    none, modules, everything = (False, False), (True, False), (True, True)
    assert [*seen, taken()] == [none, modules, everything, modules, none, everything, everything, everything, none, everything, none]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_what_is_not_plain_memory_goes_to_torch() -> None:
    with fast.installed():
        m = fast.LSTM(3, 5)
        x = torch.randn(4, 2, 3)
        y = m(x)[0]
        scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 5)))
        assert scripted(x)[0].shape == (4, 2, 5)
        cell = fast.GRUCell(3, 5)
        stacked = torch.func.vmap(cell)(x)
        torch.testing.assert_close(stacked[1], cell(x[1]), rtol=2e-5, atol=2e-5)
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            assert fast.GRU(3, 5)(torch.zeros(4, 2, 3))[0].shape == (4, 2, 5)
        assert fast.GRU(3, 5, device="meta")(torch.zeros(4, 2, 3, device="meta"))[0].shape == (4, 2, 5)
        with torch.device("cpu"):
            assert is_ours(m(x))
        nothing = torch._efficientzerotensor((4, 2, 3))  # zeros without memory, as derivatives may be
        assert m(nothing)[0].shape == (4, 2, 5)  # torch's LSTM makes of them what it finds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about torch
            program = torch.export.export(m, (x,))
        torch.testing.assert_close(program.module()(x)[0], y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_modules_are_leaves_for_fx(name: str) -> None:
    """As torch.nn's are."""
    a, b = twins(name, 3, 5)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    for m in (nn.Sequential(a), nn.Sequential(b)):
        traced = torch.fx.symbolic_trace(m)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        assert is_ours(traced(x)) == (m[0] is b)
        torch.testing.assert_close(flat(traced(x)), flat(a(x)), rtol=2e-5, atol=2e-5)


def test_own_keywords_stay_in_the_graph_of_fx() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fast.LSTM(3, 5)

        def forward(self, x: Tensor, starts: Tensor) -> Any:
            return self.net(x, reset=starts, cells=True), self.net(x, reset=starts), self.net(x)

    m, x, starts = Own(), torch.randn(4, 2, 3), torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    traced = torch.fx.symbolic_trace(m)
    found, expected = traced(x, starts), m(x, starts)
    assert [len(out) for out in found] == [3, 2, 2] and not torch.equal(found[1][0], found[2][0])
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))


def first(out: Any) -> Tensor:
    result: Tensor = out if isinstance(out, Tensor) else first(out[0])
    return result


def total(m: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda v: first(m(v)).sum()


functional = torch.autograd.functional
TRANSFORMS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {  # and the same without torch.func
    "grad": (lambda m, x: torch.func.grad(total(m))(x), lambda m, x: functional.jacobian(total(m), x)),
    "jacrev": (lambda m, x: torch.func.jacrev(lambda v: first(m(v)))(x), lambda m, x: functional.jacobian(lambda v: first(m(v)), x)),
    "jvp": (
        lambda m, x: torch.func.jvp(lambda v: first(m(v)), (x,), (torch.ones_like(x),))[1],
        lambda m, x: functional.jacobian(lambda v: first(m(v)), x).flatten(-x.dim()).sum(-1),
    ),
    "hessian": (lambda m, x: torch.func.hessian(total(m))(x), lambda m, x: functional.hessian(total(m), x)),
    "vmap": (lambda m, x: torch.func.vmap(lambda v: first(m(v)))(torch.stack([x, -x])), lambda m, x: torch.stack([first(m(x)), first(m(-x))])),
    "vmap of grad": (
        lambda m, x: torch.func.vmap(torch.func.grad(total(m)))(torch.stack([x, -x])),
        lambda m, x: torch.stack([functional.jacobian(total(m), v) for v in (x, -x)]),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # torch's forward derivatives script something
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_can_do_what_torchs_can_and_what_they_lack(transform: str, name: str) -> None:
    """torch 2.13 has no vmap of layers and of the LSTM cell, and no forward derivatives of the LSTM layer."""
    a, b = twins(name, 3, 5, **({"num_layers": 2, "bidirectional": True, "batch_first": True} if name in LAYERS else {}))
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    run, plain = TRANSFORMS[transform]
    expected = plain(a, x)
    for m in (b, fast.compilable(copy.deepcopy(a))):
        torch.testing.assert_close(run(m, x), expected, rtol=2e-5, atol=2e-5)
    for aten in (False, True):
        with fast.installed(aten):
            torch.testing.assert_close(run(a, x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_autocast_computes_with_torchs_dtypes(name: str) -> None:
    m = {**LAYERS, **CELLS}[name][1](3, 5)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)), requires_grad=True)
    exact = flat(m(x))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flat(m(x.to(dtype)))
        low = dtype if name in ("GRU", "GRUCell", "LSTMCell") else torch.bfloat16
        assert all(t.dtype == low for t in out) and is_ours(out)
        for a, b in zip(exact, out):
            torch.testing.assert_close(b.float(), a, rtol=2e-2, atol=2e-2)
    out[0].float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of the process as Linux names them")
def test_the_kernels_run_on_torchs_threads() -> None:
    """torch's OpenMP threads spin after each of its regions, on cores that threads of ours beside them would need."""
    script = """
import os, torch, rnnfast.torch as fast
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
before = len(os.listdir("/proc/self/task"))
m = fast.LSTM(64, 64)
m(torch.ones(50, 32, 64))[0].sum().backward()
print(fast._core.lend_threads.__name__, len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["lend_threads", "0"]


def test_inference_mode_checkpoints_and_threads() -> None:
    m = fast.LSTM(3, 5, 2)
    x = torch.randn(4, 2, 3, requires_grad=True)
    y = m(x)[0]
    with torch.inference_mode():
        assert torch.equal(m(x)[0], y) and m(x)[0].is_inference()
    again = torch.utils.checkpoint.checkpoint(lambda v: m(v)[0], x, use_reentrant=False)
    (one,) = torch.autograd.grad(y.sum(), x)
    (two,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(one, two)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(m(x)[0])) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(f, y) for f in found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_aten_operations_can_be_taken_and_given_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = {**LAYERS, **CELLS}[name][0](3, 5, dtype=torch.float64)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)), dtype=torch.float64)
    scripted = torch.jit.script(nn.Sequential(m))  # overloads of forward are for other scripts
    before = flat(scripted(x))
    assert not is_ours(before)
    with fast.installed(aten=True):
        after = flat(scripted(x))
        assert is_ours(after)
        calls, stack = [], fast._core.stack_forward
        with torch.inference_mode(), monkeypatch.context() as patched:
            patched.setattr(fast._core, "stack_forward", lambda *args: calls.append(1) or stack(*args))
            flat(scripted(x))
        assert len(calls) == 1
        y = x.clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda v: flat(m(v))[0], (y,), nondet_tol=0.0)
        if name in LAYERS:
            with pytest.raises(RuntimeError, match="larger than 0"):
                m(x[:0])
    assert not is_ours(scripted(x))
    for a, b in zip(before, after):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


# ---- compiled ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_the_custom_operation_passes_opcheck(name: str) -> None:
    m = fast.compilable({**LAYERS, **CELLS}[name][0](3, 5))
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)), requires_grad=True)
    states = [torch.randn(*((1, 2, 5) if name in LAYERS else (2, 5)), requires_grad=True) for _ in range(2)]
    c = states[1] if m.paired else None
    weights = [getattr(m, n) for n in m.names]
    torch.library.opcheck(torch.ops.rnnfast.stack.default, (x, None, states[0], c, weights, m.cell, 1, 1, False, False, True))
    if name in LAYERS:  # (B, T, I)
        turned = (x.detach().transpose(0, 1).contiguous(), None, states[0], c, weights, m.cell, 1, 1, True, False, True)
        torch.library.opcheck(torch.ops.rnnfast.stack.default, turned, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
    y, h_T, c_T, tape = torch.ops.rnnfast.stack(x, None, states[0], c, weights, m.cell, 1, 1, False, False, True)
    ends = (None if name in CELLS else torch.ones_like(h_T), torch.ones_like(c_T) if m.paired else None)
    backward = (x, None, states[0], c, weights, tape.detach(), torch.ones_like(y), *ends, m.cell, 1, 1, False, False)
    torch.library.opcheck(torch.ops.rnnfast.stack_backward.default, backward, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", LAYERS)
def test_equal_calls_of_the_custom_operation_give_equal_tapes(name: str) -> None:
    """Whatever lay in the memory before."""
    m = fast.compilable(LAYERS[name][0](3, 5, 2, bidirectional=True))
    h, c = torch.randn(4, 3, 5), torch.randn(4, 3, 5) if m.paired else None
    weights = [getattr(m, n) for n in m.names]
    first: list[Tensor] = []
    for _ in range(3):
        tape = torch.ops.rnnfast.stack(torch.ones(7, 3, 3), None, h, c, weights, m.cell, 2, 2, False, False, True)[3].detach()
        first = first or [tape.clone()]
        assert torch.equal(tape, first[0])
        tape.fill_(torch.nan)  # what the next call finds


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_compilable_models_equal_the_plain_ones(name: str) -> None:
    options = dict(num_layers=2, bidirectional=True, batch_first=True) if name in LAYERS else {}
    a = {**LAYERS, **CELLS}[name][0](3, 5, dtype=torch.float64, **options)
    b = fast.compilable(copy.deepcopy(a))
    assert list(a.state_dict()) == list(b.state_dict())
    found = []
    for m in (a, b):
        for shape in ((4, 2, 3), (4, 3)) if name in LAYERS else ((2, 3), (3,)):
            m.zero_grad()
            x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
            parts = flat(m(x))
            sum(t.sum() for t in parts).backward()  # type: ignore[union-attr]
            found.append([*parts, x.grad, *(p.grad for p in m.parameters())])
    for one, two in zip(found[:2], found[2:]):
        for t, u in zip(one, two, strict=True):
            torch.testing.assert_close(u, t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_compilable_modules_are_differentiable_twice(name: str) -> None:
    m = fast.compilable({**LAYERS, **CELLS}[name][0](2, 3, dtype=torch.float64))
    x = torch.randn(*((2, 2, 2) if name in LAYERS else (2, 2)), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(m(x)))

    assert torch.autograd.gradgradcheck(run, (x, *m.parameters()), nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_third_derivatives_equal_torchs(name: str) -> None:
    a, b = twins(name, 2, 3, dtype=torch.float64)
    found = []
    for m in (a, b, fast.compilable(copy.deepcopy(a))):
        x = torch.linspace(-1, 1, 8 if name in LAYERS else 4, dtype=torch.float64).reshape((2, 2, 2) if name in LAYERS else (2, 2)).requires_grad_()
        d = flat(m(x))[0]
        for _ in range(2):
            (d,) = torch.autograd.grad(d.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(d.square().sum(), [x, *m.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # the tracer's own
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_compilable_modules_are_torchs_to_tracers_and_forward_derivatives(name: str) -> None:
    a = {**LAYERS, **CELLS}[name][0](3, 5).requires_grad_(False)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    b = fast.compilable(copy.deepcopy(a))
    traced = torch.jit.trace(b, x)
    assert "rnnfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(flat(traced(x)), flat(a(x)))
    found = []
    for m in (a, b):
        with torch.autograd.forward_ad.dual_level():
            found.append(torch.autograd.forward_ad.unpack_dual(flat(m(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))))[0]))
    torch.testing.assert_close(tuple(found[1]), tuple(found[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_compilable_modules_take_packed_sequences(name: str, enforce_sorted: bool) -> None:
    a = LAYERS[name][0](3, 5, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    b = fast.compilable(copy.deepcopy(a))
    lengths = torch.tensor([6, 6, 3, 1] if enforce_sorted else [3, 6, 1, 6])
    state: Any = [torch.randn(4, 4, 5, dtype=torch.float64) for _ in range(2 if name == "LSTM" else 1)]
    state = tuple(state) if name == "LSTM" else state[0]
    torch.compiler.reset()
    for hx in (None, state):
        found = []
        compiled = torch.compile(b, fullgraph=True, backend="eager")
        for m in (a, b, compiled):
            x = torch.ones(4, 6, 3, dtype=torch.float64, requires_grad=True)
            parts = flat(m(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted), hx))
            found.append([*parts, *torch.autograd.grad(sum((t * t).sum() for t in parts), (x, *m.parameters()))])  # type: ignore[arg-type]
        for other in found[1:]:
            for t, u in zip(found[0], other, strict=True):
                torch.testing.assert_close(u, t, rtol=1e-12, atol=1e-12)


def test_a_compilable_model_is_one_node_a_layer() -> None:
    model = fast.compilable(nn.ModuleDict({"a": nn.LSTM(3, 5, 2), "b": nn.GRU(5, 4)}))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x)[0])[0]

    seen: list[list[str]] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        seen.append([str(n.target) for n in graph.graph.nodes if "rnnfast" in str(n.target)])
        return graph

    both = Both()
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(both, fullgraph=True, backend=count)
    torch.testing.assert_close(compiled(x), both(x))
    assert seen == [["rnnfast.stack"] * 2] or seen == [["rnnfast.stack.default"] * 2]
    trained = torch.compile(both, fullgraph=True, backend="aot_eager")
    (one,) = torch.autograd.grad(trained(x).sum(), both.parts["a"].weight_hh_l0)
    (two,) = torch.autograd.grad(both(x).sum(), both.parts["a"].weight_hh_l0)
    torch.testing.assert_close(one, two)


def test_a_compilable_layer_is_compiled_once_for_all_lengths() -> None:
    m, graphs = fast.compilable(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True)), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=count)
    trained = torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((2, 4), (3, 6), (5, 9)):
        x = torch.randn(B, T, 3)
        torch.testing.assert_close(compiled(x), m(x))
        found = [torch.autograd.grad(run(x)[0].square().sum(), list(m.parameters())) for run in (m, trained)]
        torch.testing.assert_close(*found)
    assert len(graphs) == 1


class Between(nn.Module):
    """A recurrent module between two layers that Dynamo compiles."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.before, self.module, self.after = nn.Linear(3, 3), module, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(first(self.module(torch.relu(self.before(x)))))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("way", ["module", "installed", "aten", "frozen"])
def test_compiled_models_are_whole_and_ours_where_dynamo_stops(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo ends its graph before torch's layers, and takes cells into it."""
    model = Between({**LAYERS, **CELLS}[name][0](3, 5))
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))
    expected, calls = model(x), []
    model = {"module": fast.convert, "frozen": fast.freeze}.get(way, lambda m: m)(model)
    stack, frozen = fast._core.stack_forward, fast.functional.forward
    monkeypatch.setattr(fast._core, "stack_forward", lambda *args: calls.append(1) or stack(*args))
    monkeypatch.setattr(fast.functional, "forward", lambda *args, **named: calls.append(1) or frozen(*args, **named))
    torch.compiler.reset()
    with fast.installed(aten=way == "aten") if way in ("installed", "aten") else contextlib.nullcontext(), torch.set_grad_enabled(way != "frozen"):
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, rtol=2e-5, atol=2e-5)
        assert len(calls) == (name in LAYERS or way in ("aten", "frozen"))
        if way != "frozen":
            found = [torch.autograd.grad(m(x).sum(), list(model.parameters())) for m in (model, torch.compile(model, backend="aot_eager"))]
            torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
        if name in CELLS and way != "frozen":
            whole = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(whole(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_compilable_modules_keep_names_hooks_and_attributes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.weight_norm(nn.LSTM(3, 3, 2), "weight_hh_l0")
            prune.l1_unstructured(self.a, "bias_ih_l1", amount=0.5)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            self.a.flatten_parameters()
            return self.b(self.a(x)[0])[0] * self.a.num_layers

    model, calls = Twice(), []
    handle = model.a.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 2, 3)
    keys, before = list(model.state_dict()), model(x)
    fast.compilable(model)
    assert isinstance(model.a, fast.Compilable) and model.a is model.b and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before, rtol=2e-5, atol=2e-5)
    found = [p for each in model.a.all_weights for p in each]
    assert len(calls) == 4 and all(p is getattr(model.a, name) for name, p in zip(model.a.names, found, strict=True))
    handle.remove()
    with torch.no_grad():
        model.a.weight_hh_l0_g *= 2
    assert not torch.allclose(model(x), before) and len(calls) == 4


class Rows(torch.utils.data.Dataset[Tensor]):
    """Rows that a recurrent net makes, in worker processes."""

    def __init__(self) -> None:
        self.net = fast.GRU(3, 5)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.net(torch.full((64, 16, 3), float(i)))[1][0, 0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataloader_workers_by_fork() -> None:
    rows = Rows()
    rows[0]  # the parent's threads have started
    loader = torch.utils.data.DataLoader(rows, batch_size=1, num_workers=2, multiprocessing_context="fork")
    for i, row in enumerate(loader):
        assert torch.equal(row[0], rows[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("began", [False, True])
def test_a_forks_child_computes_on_threads_of_its_own(began: bool) -> None:
    """torch's OpenMP threads are not in it, and waiting for them would never end."""
    script = f"""
import os, torch, rnnfast.torch as fast
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
m, x = fast.LSTM(64, 64).requires_grad_(False), torch.ones(50, 32, 64)
if {began}:
    m(x)
child = os.fork()
if child == 0:
    for _ in range(10):
        m(x)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "RNNFAST_NUM_THREADS": "2"}
    )
    assert done.stdout.split() == ["0"]
