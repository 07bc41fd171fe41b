"""What rnnfast.torch has and torch has not: snapshots for inference, peepholes, reset-before, resets, learned and per-step states."""

import copy
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rnnfast.reference
import rnnfast.torch as fast
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

SIX = {"LSTM": fast.LSTM, "GRU": fast.GRU, "RNN": fast.RNN, "LSTMCell": fast.LSTMCell, "GRUCell": fast.GRUCell, "RNNCell": fast.RNNCell}
F64 = torch.float64


def flat(out: Any) -> list[Tensor]:
    """Every tensor of a module's results, in order."""
    if isinstance(out, Tensor):
        return [out]
    return [out.data] if isinstance(out, PackedSequence) else [t for part in out for t in flat(part)]


def sample(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*((2, 3) if name.endswith("Cell") else (4, 2, 3)), dtype=dtype)


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- freeze ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIX)
def test_a_frozen_module_computes_the_same_bits_from_a_snapshot(name: str) -> None:
    model, x = nn.Sequential(getattr(nn, name)(3, 5)), sample(name)
    with torch.no_grad():
        before = flat(fast.convert(model)(x))
        assert fast.freeze(model) is model and not model.training
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(before, flat(model(x)), strict=True))
        for p in model.parameters():
            p.data += 1  # not seen
        assert all(torch.equal(a, b) for a, b in zip(before, flat(model(x)), strict=True))
        fast.unfreeze(model)
        after = flat(model(x))
        assert not torch.equal(before[0], after[0])
        assert all(torch.equal(a, b) for a, b in zip(after, flat(fast.freeze(model)(x)), strict=True))


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("H", [5, 300])  # what order the weights lie in hardly counts for few of them
def test_short_frozen_calls_equal_the_others(name: str, H: int) -> None:
    """Decoding: one step with a state, again and again, from one of two batches; and what such calls must refuse is refused as ever."""
    layer = SIX[name](3, H) if name.endswith("Cell") else SIX[name](3, H, 2, batch_first=True)
    frozen = fast.freeze(copy.deepcopy(layer))
    calls = []
    for x in (torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 3)) * 3:
        given = x if name.endswith("Cell") else x[:, None]
        state: Any = [torch.randn(*(() if name.endswith("Cell") else (2,)), len(x), H) for _ in range(2)]
        state = tuple(state) if name.startswith("LSTM") else state[0]
        calls += [(given, state)] * 3 + [(given, None)]
    assert layer(*calls[0]) is not None
    with torch.no_grad():
        for given, state in calls:
            for a, b in zip(flat(layer(given, state)), flat(frozen(given, state)), strict=True):
                assert torch.equal(a, b) and a.shape == b.shape
    given, state = calls[0]
    for bad, says in ((given[..., :2], r"input|\(.\*H, I\)"), (given.double(), "dtype"), (torch.zeros(0, *given.shape), "dim|D")):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=says):
            frozen(bad, state)
    assert frozen._frozen.is_small == (H == 5) and (frozen._frozen.quick[1] is None) == (H == 5)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("H", [5, 300])
def test_a_frozen_modules_weights_are_constants_of_the_graph(name: str, H: int) -> None:
    layer = SIX[name](3, H)
    frozen = fast.freeze(copy.deepcopy(layer))
    x = sample(name)
    assert not any(t.requires_grad for t in flat(frozen(x)))
    found = []
    for m in (layer, frozen):
        v = x.clone().requires_grad_()
        out = flat(m(v))
        found.append([*out, *torch.autograd.grad(sum(t.sum() for t in out), v)])  # type: ignore[arg-type]
    close(*found, 1e-6)
    assert all(p.grad is None for p in frozen.parameters())
    close(*(torch.func.grad(lambda v, m=m: flat(m(v))[0].sum())(x) for m in (layer.requires_grad_(False), frozen)), 1e-6)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("end", ["train", "load_state_dict", "double", "to_torch"])
def test_a_snapshot_ends_where_the_weights_change_by_rule(name: str, end: str) -> None:
    model, x = fast.freeze(nn.Sequential(getattr(nn, name)(3, 5))), sample(name)
    model.eval()  # again: nothing ends
    with torch.no_grad():
        before = flat(model(x))[0]
        for p in model.parameters():
            p.data += 1
        assert torch.equal(before, flat(model(x))[0])
        actions: dict[str, Callable[[], Any]] = {
            "train": model.train, "load_state_dict": lambda: model.load_state_dict(model.state_dict()), "double": model.double,
            "to_torch": lambda: fast.to_torch(model),
        }  # fmt: skip
        actions[end]()
        after = flat(model(x.double() if end == "double" else x))[0]
    assert not torch.allclose(before.double(), after.double(), atol=1e-3)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_copies_pickles_and_state_dicts_hold_nothing_of_a_snapshot(name: str) -> None:
    model, x = SIX[name](3, 50).eval(), sample(name)
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    fast.freeze(model)
    assert list(model.state_dict()) == keys and len(pickle.dumps(model)) < size + 100  # the attribute's name and None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copy.copy(model)._frozen is None and model._frozen is not None
        with torch.no_grad():
            assert twin._frozen is None and not twin.training
            for p in twin.parameters():
                p.mul_(2)
            assert not torch.equal(flat(twin(x))[0], flat(model(x))[0])


def test_a_frozen_layer_takes_what_a_layer_takes() -> None:
    layer = fast.LSTM(3, 5, 2, bidirectional=True, proj_size=2, batch_first=True, dropout=0.5, dtype=F64).eval()
    frozen = fast.freeze(copy.deepcopy(layer))
    x = torch.randn(4, 6, 3, dtype=F64)
    state = torch.randn(4, 4, 2, dtype=F64), torch.randn(4, 4, 5, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([3, 6, 1, 6]), batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        for given in ((x,), (x, state), (x[0],), (x[0], tuple(s[:, 0] for s in state)), (packed,), (packed, state)):
            assert all(torch.equal(a, b) for a, b in zip(flat(layer(*given)), flat(frozen(*given)), strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast.freeze(nn.GRU(3, 5))(torch.zeros(4, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="Expected 3, got 4"):
            frozen(torch.zeros(4, 6, 4, dtype=F64))
    with pytest.raises(ValueError, match="must be of a float dtype on the CPU"):
        fast.freeze(nn.GRU(3, 5, device="meta"))


@pytest.mark.parametrize("layer", [fast.LSTM, fast.GRU, fast.RNN])
def test_frozen_layers_keep_their_learned_state_from_call_to_call(layer: Callable[..., Any]) -> None:
    m, x = layer(3, 5, 2, learn_initial_state=True).eval(), sample("GRU")
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name in ("h_0", "c_0"):
                p.uniform_(-1, 1)
        frozen, want = fast.freeze(copy.deepcopy(m)), flat(m(x))
        for _ in range(3):  # the second call is the first one of a batch that has been seen
            assert all(torch.equal(a, b) for a, b in zip(want, flat(frozen(x)), strict=True))
        assert frozen._frozen.quick[1] is not None


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_frozen_halves_refuse_other_dtypes_at_every_call(name: str) -> None:
    frozen = fast.freeze(SIX[name](3, 5).bfloat16())
    for _ in range(3):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="dtype"):
            frozen(sample(name))


# ---- against the oracle ------------------------------------------------------------------------------------------------------------------

OWN: dict[str, Callable[..., nn.Module]] = {
    "peephole": lambda **o: fast.LSTM(3, 5, peephole=True, **o),
    "peephole, projected": lambda **o: fast.LSTM(3, 5, proj_size=2, peephole=True, learn_initial_state=True, **o),
    "reset before": lambda **o: fast.GRU(3, 5, reset_after=False, **o),
    "reset before, learned": lambda **o: fast.GRU(3, 5, reset_after=False, learn_initial_state=True, **o),
    "LSTM, learned": lambda **o: fast.LSTM(3, 5, learn_initial_state=True, **o),
    "RNN, learned": lambda **o: fast.RNN(3, 5, nonlinearity="relu", learn_initial_state=True, **o),
}


def filled(module: nn.Module) -> Any:
    """Learned states away from their zeros."""
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-0.7, 0.7)
    return module


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_own_layers_equal_the_oracle_padded_packed_and_unbatched(kind: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    m = filled(OWN[kind](num_layers=2, bidirectional=bidirectional, dtype=F64))
    x, lengths = torch.randn(6, 4, 3, dtype=F64), np.array([3, 6, 1, 6])
    reset = np.zeros((6, 4), bool)
    reset[[0, 2, 3], [1, 0, 3]] = True
    params = {k: v.detach().numpy() for k, v in m.named_parameters()}
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": bidirectional}

    def oracle(**more: Any) -> list[Any]:
        y, state, _ = rnnfast.reference.forward(m._cell_name, x.numpy(), None, params, **options, **more)
        return [torch.from_numpy(a) for a in (y, *(state if isinstance(state, tuple) else (state,)))]

    close(m(x), oracle())
    close(m(x, reset=torch.from_numpy(reset)), oracle(reset=reset))
    for more in ({}, {"reset": reset}):
        y, state = m(pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False), **more)
        close([pad_packed_sequence(y)[0], state], oracle(lengths=lengths, **more))
    close(m(x[:, 0]), [t.squeeze(1) for t in flat(m(x[:, :1]))])
    expected = [oracle(reset=reset), oracle(reset=reset, lengths=lengths)]
    m.batch_first, cut = True, torch.from_numpy(reset.T.copy())
    y, state = m(x.transpose(0, 1), reset=cut)
    close([y.transpose(0, 1), state], expected[0])
    y, state = m(pack_padded_sequence(x.transpose(0, 1), torch.from_numpy(lengths), batch_first=True, enforce_sorted=False), reset=cut)
    close([pad_packed_sequence(y)[0], state], expected[1])


@pytest.mark.parametrize("kind", OWN)
def test_own_layers_pass_gradcheck(kind: str) -> None:
    torch.manual_seed(0)
    m = filled(OWN[kind](bidirectional=True, batch_first=True, dtype=F64))
    x = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    reset = torch.tensor([[False, True, False], [False, False, True]])
    packed = torch.tensor([3, 2])

    def padded(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(m(x, reset=reset)))

    def ragged(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(m(pack_padded_sequence(x, packed, batch_first=True), reset=reset)))

    for run in (padded, ragged):
        assert torch.autograd.gradcheck(run, (x, *m.parameters()), nondet_tol=0.0, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (x, *m.parameters()), nondet_tol=0.0, fast_mode=True)
    m.zero_grad()
    flat(m(x))[0].sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", OWN)
def test_own_layers_by_torchs_operations_are_the_same(kind: str) -> None:
    """Where tensors are not plain memory: here they are, of a batch of one that vmap makes; and the gradients, which are made again for create_graph."""
    torch.manual_seed(0)
    m = filled(OWN[kind](num_layers=2, bidirectional=True, dropout=0.5, batch_first=True, dtype=F64))
    x, reset = torch.randn(4, 6, 3, dtype=F64), torch.rand(4, 6) < 0.3
    state: Any = [torch.randn(4, 4, 2 if "projected" in kind else 5, dtype=F64), torch.randn(4, 4, 5, dtype=F64)]
    state = tuple(state) if isinstance(m, nn.LSTM) else state[0]
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 3, 3]), batch_first=True)
    cells: dict[str, Any] = {"cells": True} if isinstance(m, nn.LSTM) else {}
    runs: list[tuple[Callable[[Tensor], Any], Tensor]] = [
        (m, x), (lambda v: m(v, state), x), (lambda v: m(v, state, reset=reset), x), (lambda v: m(v[1], reset=reset[1], **cells), x),
        (lambda v: m(packed._replace(data=v), **cells), packed.data), (lambda v: m(packed._replace(data=v), state, reset=reset, **cells), packed.data),
    ]  # fmt: skip
    for run, given in runs:
        m.train()
        found = []
        for again in (False, True):
            torch.manual_seed(3)
            v = given.clone().requires_grad_()
            out = flat(run(v))[: 3 if isinstance(m, nn.LSTM) else 2]
            total: Any = sum((t * torch.arange(t.numel(), dtype=F64).reshape(t.shape).sin()).sum() for t in out)
            found.append(torch.autograd.grad(total, (v, *m.parameters()), create_graph=again, allow_unused=True, materialize_grads=True))
        close(*found)
        m.eval()
        close([t[0] for t in flat(torch.func.vmap(lambda v, run=run: tuple(flat(run(v))))(given[None]))], run(given))


CELLS_OF: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "peephole": (lambda: fast.LSTMCell(3, 5, peephole=True, forget_bias=1.0, dtype=F64), lambda: fast.LSTM(3, 5, peephole=True, dtype=F64)),
    "reset before": (lambda: fast.GRUCell(3, 5, reset_after=False, dtype=F64), lambda: fast.GRU(3, 5, reset_after=False, dtype=F64)),
}


@pytest.mark.parametrize("kind", CELLS_OF)
def test_own_cells_are_single_steps_of_own_layers(kind: str) -> None:
    torch.manual_seed(0)
    cell, layer = CELLS_OF[kind][0](), CELLS_OF[kind][1]()
    layer.load_state_dict({name + "_l0": p for name, p in cell.state_dict().items()})
    x, state = torch.randn(4, 2, 3, dtype=F64), None
    steps = []
    for step in x:
        state = cell(step, state)
        steps.append(state[0] if kind == "peephole" else state)
    y, end = layer(x)
    close([torch.stack(steps), state], [y, [s[0] for s in flat(end)]])
    close(cell(x[0, 0]), [s[0] for s in flat(cell(x[0]))])
    given = tuple(torch.randn(2, 5, dtype=F64, requires_grad=True) for _ in range(2 if kind == "peephole" else 1))

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(cell(x, rest[:2] if kind == "peephole" else rest[0])))

    assert torch.autograd.gradcheck(run, (x[0].clone().requires_grad_(), *given, *cell.parameters()), nondet_tol=0.0)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), fast.freeze(copy.deepcopy(cell))):
        with torch.no_grad():
            for _ in range(3):
                close(twin(x[0], given if kind == "peephole" else given[0]), cell(x[0], given if kind == "peephole" else given[0]), 0)
    if kind == "peephole":
        close(cell(x[0], list(given)), cell(x[0], given), 0)
    with pytest.raises(ValueError, match="torch has no"):
        fast.to_torch(cell)


def test_one_tensor_may_be_both_states_of_own_layers_differentiated_twice() -> None:
    torch.manual_seed(0)
    layer, cell, given = fast.LSTM(3, 5, peephole=True, dtype=F64), fast.LSTMCell(3, 5, peephole=True, dtype=F64), torch.randn(1, 2, 5, dtype=F64)
    x, found = torch.randn(4, 2, 3, dtype=F64), []
    for run in (lambda h, c: layer(x, (h, c))[0], lambda h, c: cell(x[0], (h[0], c[0]))[0]):
        for apart in (False, True):
            h = given.clone().requires_grad_()
            y = run(h, h.clone() if apart else h)
            (dh,) = torch.autograd.grad((y * y).sum(), h, create_graph=True)
            found.append([dh, *torch.autograd.grad((dh * dh).sum(), h)])
    close(found[0], found[1])
    close(found[2], found[3])


@pytest.mark.parametrize("kind", CELLS_OF)
def test_own_cells_states_can_be_detached_in_place(kind: str) -> None:
    """As truncated backpropagation does."""
    found = []
    for detach in (Tensor.detach, Tensor.detach_):
        torch.manual_seed(0)
        cell, state = CELLS_OF[kind][0](), None
        for x in torch.ones(3, 2, 3, dtype=F64):
            state = cell(x, state)
            sum(t.square().sum() for t in flat(state)).backward()  # type: ignore[union-attr]
            state = tuple(map(detach, state)) if isinstance(state, tuple) else detach(state)
        found.append([*flat(state), *(p.grad for p in cell.parameters())])
    close(*found, 0)


def test_options_of_cells_change_nothing_unless_given() -> None:
    for theirs, ours in ((nn.LSTMCell, fast.LSTMCell), (nn.GRUCell, fast.GRUCell)):
        torch.manual_seed(3)
        a, after = theirs(3, 5), torch.rand(1)
        torch.manual_seed(3)
        b = ours(3, 5)
        assert torch.equal(after, torch.rand(1)) and repr(b) == repr(a)
        close(list(b.parameters()), list(a.parameters()), 0)
    m = fast.LSTMCell(3, 5, peephole=True, forget_bias=2)
    assert repr(m) == "LSTMCell(3, 5, peephole=True, forget_bias=2.0)" and repr(fast.GRUCell(3, 5, reset_after=False)) == "GRUCell(3, 5, reset_after=False)"
    for _ in range(2):
        assert m.bias_ih[5:10].min() > 1.5 and m.bias_hh.max() < 0.5 and m.weight_peep.any()
        m.reset_parameters()
    with pytest.raises(ValueError, match="forget_bias needs bias=True"):
        fast.LSTMCell(3, 5, False, forget_bias=1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks at it
def test_own_layers_run_beside_compiled_graphs() -> None:
    for m in (fast.LSTM(3, 3, peephole=True), fast.LSTMCell(3, 3, peephole=True)):
        model = nn.Sequential(nn.Linear(3, 3), m)
        torch.compiler.reset()
        for x in (sample("LSTM" if isinstance(m, nn.LSTM) else "LSTMCell"),) * 2:
            close(torch.compile(model, backend="eager")(x), model(x), 1e-6)


# ---- resets: the loop of RecurrentPPO in one call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_resets_equal_a_loop_of_single_steps(name: str) -> None:
    """As sb3-contrib processes a sequence: before each step the states of rows whose episode starts are multiplied by zero."""
    torch.manual_seed(0)
    m: Any = SIX[name](3, 5, 2, dtype=F64)
    starts = torch.rand(7, 4) < 0.3
    found = []
    for whole in (True, False):
        x = torch.linspace(-1, 1, 84, dtype=F64).reshape(7, 4, 3).requires_grad_()
        states = [torch.linspace(-1, 1, 40, dtype=F64).reshape(2, 4, 5).clone().requires_grad_() for _ in range(2 if name == "LSTM" else 1)]
        state = tuple(states) if name == "LSTM" else states[0]
        if whole:
            y, state = m(x, state, reset=starts)
        else:
            steps = []
            for t in range(7):
                keep = (~starts[t]).to(F64)[None, :, None]
                y, state = m(x[t : t + 1], tuple(s * keep for s in state) if name == "LSTM" else state * keep)
                steps.append(y)
            y = torch.cat(steps)
        m.zero_grad()
        parts = flat((y, state))
        sum((t * torch.arange(t.numel(), dtype=F64).reshape(t.shape).sin()).sum() for t in parts).backward()  # type: ignore[union-attr]
        found.append([*parts, x.grad, *(s.grad for s in states), *(p.grad.clone() for p in m.parameters())])
    close(*found)


def test_a_reset_puts_the_learned_state() -> None:
    m = filled(fast.GRU(3, 5, learn_initial_state=True, dtype=F64))
    x = torch.randn(4, 2, 3, dtype=F64)
    y, h = m(x, torch.randn(1, 2, 5, dtype=F64), reset=torch.tensor([[False, False]] * 2 + [[True, True]] + [[False, False]]))
    close(m(x[2:]), (y[2:], h))


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_of_an_own_call_draws_torchs_masks(p: float) -> None:
    m = fast.LSTM(3, 5, 3, dropout=p, bidirectional=True, batch_first=True, dtype=F64)
    x = torch.randn(4, 6, 3, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 3, 3]), batch_first=True)
    for given, named in ((x, {"reset": torch.zeros(4, 6, dtype=torch.bool)}), (packed, {"cells": True})):
        torch.manual_seed(2)
        theirs = fast.to_torch(copy.deepcopy(m))(given)
        torch.manual_seed(2)
        close(m(given, **named)[:2], theirs)


# ---- cell states, start values, and around ------------------------------------------------------------------------------------------------


def test_cell_states_are_those_of_every_step() -> None:
    m = filled(fast.LSTM(3, 5, bidirectional=True, peephole=True, batch_first=True, dtype=F64))
    x = torch.randn(2, 4, 3, dtype=F64)
    y, (_, c_T), c = m(x, cells=True)
    assert c.shape == (2, 4, 10) and y.requires_grad and not c.requires_grad
    close([c[:, -1, :5], c[:, 0, 5:]], [c_T[0], c_T[1]])
    for t in range(1, 4):
        close(c[:, t - 1, :5], m(x[:, :t])[1][1][0])
    close(m(x[0], cells=True)[2], c[0])
    _, _, inside = m(pack_padded_sequence(x, torch.tensor([4, 4]), batch_first=True), cells=True)
    close(pad_packed_sequence(inside, batch_first=True)[0], c)
    with pytest.raises(ValueError, match="has no cell states"):
        fast.GRU(3, 5)(torch.zeros(4, 2, 3), cells=True)


def test_options_start_as_torch_does_and_change_nothing_unless_given() -> None:
    for name in ("LSTM", "GRU", "RNN"):
        torch.manual_seed(3)
        theirs, after = getattr(nn, name)(3, 5, 2), torch.rand(1)
        torch.manual_seed(3)
        ours = SIX[name](3, 5, 2)
        assert torch.equal(after, torch.rand(1)) and repr(ours) == repr(theirs)
        close(list(ours.parameters()), list(theirs.parameters()), 0)
    torch.manual_seed(3)
    plain = nn.LSTM(3, 5)
    torch.manual_seed(3)
    m = fast.LSTM(3, 5, forget_bias=1.5, peephole=True, learn_initial_state=True, dtype=F64)
    assert list(m.state_dict()) == [*plain.state_dict(), "weight_peep_l0", "h_0", "c_0"]
    assert repr(m) == "LSTM(3, 5, peephole=True, learn_initial_state=True, forget_bias=1.5)"
    for _ in range(2):
        assert m.bias_ih_l0[5:10].min() >= 1.5 - 5**-0.5 and m.bias_ih_l0[:5].max() <= 5**-0.5 and m.bias_hh_l0.max() <= 5**-0.5
        assert not m.h_0.any() and not m.c_0.any() and m.weight_peep_l0.any()
        m.reset_parameters()
    with pytest.raises(ValueError, match="forget_bias needs bias=True"):
        fast.LSTM(3, 5, bias=False, forget_bias=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'peep'"):
        fast.LSTM(3, 5, peep=True)


@pytest.mark.parametrize("kind", OWN)
def test_own_layers_are_modules(kind: str) -> None:
    m = filled(OWN[kind](num_layers=2))
    x = torch.randn(4, 2, 3)
    before = flat(m(x))
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert all(torch.equal(a, b) for a, b in zip(before, flat(twin(x)), strict=True))
    other = OWN[kind](num_layers=2)
    other.load_state_dict(m.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, flat(other(x)), strict=True))
    new = {k: v.detach() * 0.5 for k, v in m.named_parameters()}
    close(torch.func.functional_call(m, new, x), torch.func.functional_call(other, new, x), 0)
    assert not torch.equal(torch.func.functional_call(m, new, x)[0], before[0])
    with torch.no_grad():
        frozen = fast.freeze(copy.deepcopy(m))
        assert all(torch.equal(a, b) for a, b in zip(before, flat(frozen(x)), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x)[0]
    assert y.dtype == (torch.float32 if isinstance(m, nn.GRU) else torch.bfloat16)  # as of torch's
    torch.testing.assert_close(y.float(), before[0], rtol=2e-2, atol=2e-2)
    close(m(x[:, :0]), [t[:, :0] for t in before])


def test_calls_follow_torchs_threads(set_num_threads: Callable[[int], None]) -> None:
    """By the processor time that anybody but the caller has used."""
    set_num_threads(2)
    m, frozen = fast.LSTM(64, 64, 2, peephole=True), fast.freeze(fast.GRU(64, 64))
    others = fast.LSTM(64, 64), fast.compilable(nn.GRU(64, 64)), fast.LSTM(64, 64).bfloat16()
    x, h = torch.randn(40, 32, 64), torch.zeros(1, 32, 64)

    def run() -> None:
        m(x, reset=torch.zeros(40, 32, dtype=torch.bool))[0].sum().backward()
        for other in others:
            other(x.to(next(other.parameters()).dtype))[0].sum().backward()
        with torch.no_grad():
            for steps in (1, 12, 12, 12):
                frozen(x[:steps], h)

    before, used = torch.get_num_threads(), {}
    try:
        for n in (2, 1):
            torch.set_num_threads(n)
            run()
            times = []
            for _ in range(7):
                start = time.process_time() - time.thread_time()
                run()
                times.append(time.process_time() - time.thread_time() - start)
            used[n] = max(times) if n == 2 else min(times)  # another program on the cores delays helpers, or keeps calls from asking for them
    finally:
        torch.set_num_threads(before)
    assert used[1] < 0.1 * used[2]


@pytest.mark.skipif(not Path("/proc/self/task").exists() or len(os.sched_getaffinity(0)) < 2, reason="counts a process's threads, on Linux")
@pytest.mark.parametrize("kind", ["", "peephole=True"])
def test_torchs_number_of_threads_outranks_its_environments(kind: str) -> None:
    """torchrun sets OMP_NUM_THREADS to 1; scripts then ask for more."""
    script = f"""
import os, torch, rnnfast.torch as fast
m, x, counts = fast.LSTM(64, 64, {kind}).requires_grad_(False), torch.ones(8, 32, 64), []
for n in (1, 2):
    torch.set_num_threads(n)
    for _ in range(20):
        m(x)
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0])
"""
    for own, more in ((None, "1"), ("1", "0")):  # RNNFAST_NUM_THREADS bounds all
        environment = {key: value for key, value in os.environ.items() if key != "RNNFAST_NUM_THREADS"} | {"OMP_NUM_THREADS": "1"}
        environment |= {} if own is None else {"RNNFAST_NUM_THREADS": own}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, env=environment)
        assert done.stdout.split() == [more]


def test_what_own_layers_cannot_do_is_said() -> None:
    m = fast.LSTM(3, 5, peephole=True)
    with pytest.raises(ValueError, match=r"torch has no LSTM\(3, 5, peephole=True\)"):
        fast.to_torch(nn.Sequential(m))
    with pytest.raises(ValueError, match=r"compilable: torch has no LSTM\(3, 5, peephole=True\)"):
        fast.compilable(nn.Sequential(m))
    with pytest.raises(RuntimeError, match="device"):
        fast.LSTM(3, 5, peephole=True, device="meta")(torch.zeros(4, 2, 3))
    with pytest.raises(RuntimeError, match="LSTM: input, state and weights must be on the same device, got cpu, meta"):
        torch.func.functional_call(m, {"weight_hh_l0": m.weight_hh_l0.to("meta")}, torch.zeros(4, 2, 3))
    with pytest.raises(RuntimeError, match="larger than 0"):
        m(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match=r"reset must be bool of shape \(T, B\) = \(4, 2\)"):
        m(torch.zeros(4, 2, 3), reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\)"):
        m(torch.zeros(4, 2, 3), (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))
    y, _ = m(torch.randn(4, 2, 3))
    with torch.no_grad():
        m.weight_peep_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
