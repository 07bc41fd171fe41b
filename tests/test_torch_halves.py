"""bfloat16 and float16 in the drop-in, by autocast or as the modules' own dtype: torch's dtypes, and no error larger than torch's."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import rnnfast
import rnnfast.torch as fast
import torch
from test_torch import CELLS, LAYERS, flat, is_ours
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Under autocast torch's LSTM has no primitive for these: it raises, or gives now float32, now the half.
LACKING = {torch.float16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float16, torch.bfloat16}


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def autocast(on: bool, dtype: torch.dtype) -> Any:
    return torch.autocast("cpu", dtype=dtype) if on else nullcontext()


def results(m: nn.Module, run: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Tensor]:
    """Outputs, the gradient of x and those of the parameters."""
    x = x.detach().requires_grad_()
    m.zero_grad()
    out = flat(run(m, x))
    gradients = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype) for t in out]
    torch.autograd.backward(out, gradients)
    return [*(t.detach() for t in out), *(t.grad for t in (x, *m.parameters()) if t.grad is not None)]


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("under", [True, False], ids=["autocast", "module"])
def test_dtypes_are_torchs_and_errors_no_larger(name: str, half: str, under: bool) -> None:
    dtype, is_layer = HALVES[half], name in LAYERS
    theirs = {**LAYERS, **CELLS}[name][0](24, 40, **({"num_layers": 2} if is_layer else {}))
    x, h = torch.randn(*((20, 16, 24) if is_layer else (64, 24))), torch.rand(*((2, 16, 40) if is_layer else (64, 40)))
    if not under:
        theirs, x, h = theirs.to(dtype), x.to(dtype), h.to(dtype)

    def run(m: nn.Module, x: Tensor) -> Any:
        state = h.to(x.dtype)
        with autocast(under and x.dtype != torch.float64, dtype):
            return m(x, (state, state) if name.startswith("LSTM") else state)

    exact = results(copy.deepcopy(theirs).double(), run, x.double())
    ours = fast.convert(copy.deepcopy(theirs))
    b = results(ours, run, x)
    assert is_ours(run(ours, x))
    if name == "LSTM" and under and dtype in LACKING:
        assert all(t.dtype == dtype for t in b[:3]) and max(distances(b, exact)) < (2e-3 if dtype == torch.float16 else 1.6e-2)
        return
    a = results(theirs, run, x)
    assert [t.dtype for t in b] == [t.dtype for t in a]
    rounded = distances([e.to(t.dtype) for t, e in zip(b, exact)], exact)
    for mine, others, one in zip(distances(b, exact), distances(a, exact), rounded, strict=True):
        assert 0 < mine <= max(others, 2 * one)  # once rounded is as good as a half can be
    if rnnfast.target().endswith("bf16") and dtype == torch.bfloat16:
        assert min(distances(b, exact)) > 1e-4  # products are in bfloat16


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_what_torch_refuses_is_refused_and_what_it_takes_is_taken(name: str, dtype: torch.dtype) -> None:
    """Halves and float32 mixed without autocast; under it, whatever mixture of them; float64 is beyond it."""
    theirs = {**LAYERS, **CELLS}[name][0](3, 5)
    ours = fast.convert(copy.deepcopy(theirs))
    shape = (4, 2, 3) if name in LAYERS else (2, 3)
    h = torch.zeros(*((1, 2, 5) if name in LAYERS else (2, 5)))
    for x, state, on in (
        (torch.ones(shape, dtype=dtype), h, False), (torch.ones(shape), h.to(dtype), False), (torch.ones(shape, dtype=dtype), h, True),
        (torch.ones(shape), h.to(dtype), True), (torch.ones(shape, dtype=torch.float64), h, True), (torch.ones(shape), h.double(), True),
    ):  # fmt: skip
        if name == "LSTM" and on and (dtype == torch.bfloat16 or torch.float16 in (x.dtype, state.dtype)) and dtype in LACKING:
            continue
        hx: Any = (state, state) if name.startswith("LSTM") else state
        found: list[Any] = []
        for m in (theirs, ours):
            try:
                with autocast(on, dtype):
                    found.append(flat(m(x, hx)))
            except (RuntimeError, ValueError) as error:
                found.append(str(error))
        if isinstance(found[0], str):
            assert found[1] == found[0]
        else:
            assert [(t.dtype, t.shape) for t in found[0]] == [(t.dtype, t.shape) for t in found[1]]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_packed_unbatched_projected_and_dropped_out(name: str) -> None:
    options = {"proj_size": 3} if name == "LSTM" else {}
    m = LAYERS[name][1](7, 10, 2, dropout=0.5, bidirectional=True, batch_first=True, **options)
    packed = pack_padded_sequence(torch.randn(4, 6, 7), torch.tensor([3, 6, 1, 6]), batch_first=True, enforce_sorted=False)
    for x in (torch.randn(4, 6, 7), torch.randn(6, 7), packed):
        torch.manual_seed(5)
        exact = flat(m(x))
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flat(m(x))
        torch.manual_seed(5)
        low = flat(copy.deepcopy(m).bfloat16()(x.to(torch.bfloat16)))
        for a, b, c in zip(exact, out, low, strict=True):
            torch.testing.assert_close(b.float(), a, rtol=5e-2, atol=2e-2)
            torch.testing.assert_close(c.float(), a, rtol=5e-2, atol=4e-2)


def test_one_step_over_big_weights_is_torchs() -> None:
    """Which reads them as they lie; but its LSTM layer is slower than rewriting them."""
    for name, (theirs, _) in {**LAYERS, **CELLS}.items():
        m, x = fast.convert(theirs(800, 800)), torch.ones(2, 800)
        x = x[None] if name in LAYERS else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert is_ours(m(x)) == (name == "LSTM")
        assert is_ours(m.bfloat16()(x.bfloat16())) == (name == "LSTM")


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_second_derivatives_under_autocast(name: str) -> None:
    m = {**LAYERS, **CELLS}[name][1](3, 5)
    x, h = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3))), torch.rand(*((1, 2, 5) if name in LAYERS else (2, 5)))
    found = []
    for on in (False, True):
        v = x.clone().requires_grad_()
        with autocast(on, torch.bfloat16):
            y = flat(m(v, (h, h) if name.startswith("LSTM") else h))[0].float()
            (dx,) = torch.autograd.grad((y * y).sum(), v, create_graph=True)
            found.append(torch.autograd.grad((dx * dx).sum(), [v, *m.parameters()]))
    for a, b in zip(*found):
        assert b.dtype == torch.float32 and float((a - b).norm() / a.norm()) < 0.05


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_own_layers_and_snapshots(dtype: torch.dtype) -> None:
    x, resets = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.3
    for m in (fast.LSTM(3, 5, 2, peephole=True, learn_initial_state=True), fast.GRU(3, 5, reset_after=False), fast.LSTM(3, 5), fast.GRU(3, 5)):
        is_lstm = isinstance(m, nn.LSTM)
        exact = flat(m(x, reset=resets))
        with torch.autocast("cpu", dtype=dtype):
            found = [m(x, reset=resets)]
            with torch.no_grad():
                found.append(fast.freeze(copy.deepcopy(m))(x, reset=resets))
        low = copy.deepcopy(m).to(dtype)
        found.append(low(x.to(dtype), reset=resets))
        flat(found[2])[0].sum().backward()
        assert all(p.grad.dtype == dtype for p in low.parameters())
        if is_lstm:
            found.append(low(x.to(dtype), reset=resets, cells=True)[:2])
            assert low(x.to(dtype), cells=True)[2].dtype == dtype
        with torch.no_grad():
            found.append(fast.freeze(low)(x.to(dtype), reset=resets))
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"must have one dtype, got torch\..*16, torch\.float32"):
            low(x.to(dtype), (torch.zeros(m.num_layers, 2, 5),) * 2 if is_lstm else torch.zeros(1, 2, 5), reset=resets)
        for i, out in enumerate(found):
            assert all(t.dtype == (dtype if i >= 2 or is_lstm else torch.float32) for t in flat(out))
            for a, b in zip(exact, flat(out), strict=True):
                torch.testing.assert_close(b.float(), a, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_compilable_modules(name: str) -> None:
    theirs = {**LAYERS, **CELLS}[name][0](3, 5)
    x = torch.randn(*((4, 2, 3) if name in LAYERS else (2, 3)))

    def plain(m: nn.Module, x: Tensor) -> Any:
        return m(x)

    def under(m: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(x)

    for run, dtype in ((plain, torch.bfloat16), (under, torch.bfloat16), (under, torch.float32)):
        module = copy.deepcopy(theirs).to(dtype if run is plain else torch.float32)
        a = results(fast.convert(copy.deepcopy(module)), run, x.to(dtype))
        torch.compiler.reset()
        one = fast.compilable(copy.deepcopy(module))
        for m in (one, torch.compile(one, fullgraph=True, backend="aot_eager")):
            b = results(m, run, x.to(dtype))
            assert [t.dtype for t in b] == [t.dtype for t in a]
            for t, u in zip(a, b):
                torch.testing.assert_close(u, t, rtol=1e-2, atol=1e-2)
