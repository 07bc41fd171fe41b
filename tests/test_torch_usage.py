"""What users do with recurrent modules, done to ours and under install(): the same results as torch's own, to the very error."""

import contextlib
import copy
import io
import pickle
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import rnnfast.torch as fast
import torch
from test_torch import flat
from torch import Tensor, nn
from torch.autograd import forward_ad, graph
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence, unpack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Make = Callable[[nn.Module], Any]
USES: dict[str, Callable[[Make], Any]] = {}


def use(function: Callable[[Make], Any]) -> Callable[[Make], Any]:
    USES[function.__name__] = function
    return function


def lstm(**options: Any) -> nn.Module:
    return nn.LSTM(3, 5, 2, **options)


def ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def gradients(m: nn.Module, x: Tensor | None = None) -> list[Any]:
    """y, then every parameter's gradient."""
    y = flat(m(ramp(4, 2, 3) if x is None else x))[0]
    (y * y).sum().backward()
    return [y, *(p.grad for p in m.parameters())]


class Padded(nn.Module):
    """A layer over packed rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = lstm()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return pad_packed_sequence(self.layer(pack_padded_sequence(x, lengths))[0])[0]


class Both(nn.Module):
    """A layer and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cell = lstm(), nn.GRUCell(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cell(self.layer(x)[0][-1])
        return y


@use
def traced(make: Make) -> Any:
    return torch.jit.trace(make(Both()), torch.ones(4, 2, 3))(ramp(6, 3, 3))


@use
def traced_packed(make: Make) -> Any:
    return torch.jit.trace(make(Padded()), (torch.ones(4, 2, 3), torch.tensor([4, 2])))(ramp(6, 2, 3), torch.tensor([6, 3]))


@use
def scripted_and_frozen(make: Make) -> Any:
    return torch.jit.freeze(torch.jit.script(make(Both().eval())))(ramp(4, 2, 3))


@use
def state_dict_with_assign(make: Make) -> Any:
    m = make(lstm())
    m.load_state_dict({name: 2 * value for name, value in m.state_dict().items()}, assign=True)
    return m(ramp(4, 2, 3))


@use
def state_dict_hooks(make: Make) -> Any:
    m, calls = make(lstm()), list[int]()
    m.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    m.register_load_state_dict_post_hook(lambda *_: calls.append(2))
    m.register_state_dict_pre_hook(lambda *_: calls.append(3))
    m.load_state_dict(m.state_dict())
    return torch.tensor(calls)


@use
def shared_memory(make: Make) -> Any:
    m = make(lstm()).share_memory()
    assert all(p.is_shared() for p in m.parameters())
    return gradients(m)


@use
def a_copy_after_a_call(make: Make) -> Any:
    m = make(lstm())
    gradients(m)
    twin = copy.deepcopy(m)
    twin.zero_grad()
    return gradients(twin)


@use
def module_hooks(make: Make) -> Any:
    m, seen = make(lstm()), list[Tensor]()
    m.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    m.register_forward_hook(lambda *args: (3 * args[-1][0], args[-1][1]))
    m.register_full_backward_hook(lambda _, given, come: seen.extend(t.clone() for t in (*given, *come) if t is not None))
    return [*gradients(m, ramp(4, 2, 3).requires_grad_()), *seen]


@use
def tensor_hooks(make: Make) -> Any:
    def triple(p: Tensor) -> None:
        p.grad.mul_(3)

    m = make(lstm())
    for p in m.parameters():
        p.register_hook(lambda d: 2 * d)
        p.register_post_accumulate_grad_hook(triple)
    return gradients(m)


@use
def orthogonal_weights(make: Make) -> Any:
    m = make(lstm())
    parametrizations.orthogonal(m, "weight_hh_l0")
    return gradients(m)


@use
def normed_weights_inside_cached(make: Make) -> Any:
    m = make(nn.GRUCell(3, 5))
    parametrizations.spectral_norm(m, "weight_hh")
    with parametrize.cached():
        h = m(ramp(2, 3))
        return gradients(m, ramp(2, 3) + h[:, :3])


@use
def parametrization_removed(make: Make) -> Any:
    m = make(lstm())
    parametrizations.weight_norm(m, "weight_hh_l0")
    gradients(m)
    parametrize.remove_parametrizations(m, "weight_hh_l0")
    m.zero_grad()
    return gradients(m)


@use
def odd_strides(make: Make) -> Any:
    m = make(lstm())
    wide = ramp(2, 3, 8)
    inputs = wide.permute(2, 0, 1)[::2], wide[..., ::3], ramp(4, 2, 6)[..., ::2], ramp(4, 2, 3).flip(0), ramp(3).expand(4, 2, 3)
    return [m(x) for x in (*inputs, ramp(24).as_strided((4, 2, 3), (1, 2, 3)))]


@use
def some_parameters_fixed(make: Make) -> Any:
    m = make(lstm())
    for name, p in m.named_parameters():
        p.requires_grad_("bias" in name)
    return gradients(m)


@use
def only_the_state_needs_gradients(make: Make) -> Any:
    m, h = make(lstm()).requires_grad_(False), ramp(2, 2, 5).requires_grad_()
    return torch.autograd.grad(m(ramp(4, 2, 3), (h, h.detach()))[1][1].sum(), h)


@use
def backward_twice(make: Make) -> Any:
    m = make(lstm())
    y = m(ramp(4, 2, 3))[0].sum()
    y.backward(retain_graph=True)
    y.backward()
    return [p.grad for p in m.parameters()]


@use
def backward_twice_without_the_graph(make: Make) -> Any:
    y = make(lstm())(ramp(4, 2, 3))[0].sum()
    y.backward()
    y.backward()


@use
def no_gradient_of_some_results(make: Make) -> Any:
    m = make(lstm(bidirectional=True))
    y, (h, c) = m(ramp(4, 2, 3))
    return [torch.autograd.grad(part.sum(), list(m.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True) for part in (y[-1], h, c)]


@use
def gradient_penalty(make: Make) -> Any:
    m, x = make(lstm()), ramp(4, 2, 3).requires_grad_()
    (dx,) = torch.autograd.grad(m(x)[0].sum(), x, create_graph=True)
    (dx.norm() - 1).square().backward()
    return [p.grad for p in m.parameters()]


@use
def one_tensor_for_both_states_differentiated_twice(make: Make) -> Any:
    m, cell, h, found = make(lstm()), make(nn.LSTMCell(3, 5)), ramp(2, 2, 5).requires_grad_(), list[Any]()
    for y in (m(ramp(4, 2, 3), (h, h))[0], cell(ramp(2, 3), (h[0], h[0]))[0]):
        (dh,) = torch.autograd.grad((y * y).sum(), h, create_graph=True)
        found += [dh, *torch.autograd.grad((dh * dh).sum(), [h, *(m if y.dim() == 3 else cell).parameters()])]
    return found


@use
def saved_tensors_elsewhere(make: Make) -> Any:
    m = make(lstm())
    with graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = m(ramp(4, 2, 3))[0].sum()
    y.backward()
    return [p.grad for p in m.parameters()]


@use
def reentrant_checkpoints(make: Make) -> Any:
    m, x = make(lstm(dropout=0.5)), ramp(4, 2, 3).requires_grad_()
    y = checkpoint(lambda x: m(x)[0], x, use_reentrant=True)
    y.sum().backward()
    return [y, x.grad, *(p.grad for p in m.parameters())]


@use
def anomalies_detected(make: Make) -> Any:
    with torch.autograd.detect_anomaly():
        return gradients(make(lstm()))


@use
def compiled_autograd(make: Make) -> Any:
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(torch.compile(backend="eager")):
        return gradients(make(nn.GRU(3, 5)))


@use
def function_modes(make: Make) -> Any:
    seen = list[str]()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), named: Any = None) -> Any:
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(named or {}))

    m, cell = make(lstm()), make(nn.GRUCell(3, 5))
    with Watch():
        m(ramp(4, 2, 3))
        cell(ramp(2, 3))
    assert {"lstm", "gru_cell"} <= set(seen)
    return torch.ones(1)


@use
def samples_gradients(make: Make) -> Any:
    m = make(nn.GRU(3, 5))
    p = dict(m.named_parameters())
    one = torch.func.grad(lambda p, x: torch.func.functional_call(m, p, (x,))[0].sum())
    return [torch.stack([one(p, x)[name] for x in ramp(3, 4, 2, 3)]) for name in p]


@use
def ensembles(make: Make) -> Any:
    modules = [make(nn.GRUCell(3, 5)) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    return torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))(params, buffers, ramp(2, 3))


@use
def weights_replaced(make: Make) -> Any:
    m = make(lstm())
    del m.weight_hh_l0
    m.weight_hh_l0 = ramp(20, 5)
    m.weight_ih_l1 = nn.Parameter(ramp(20, 5))
    return gradients(m)


@use
def weights_tied(make: Make) -> Any:
    m = make(nn.LSTM(5, 5, 2))
    m.weight_hh_l1, m.weight_ih_l1 = m.weight_hh_l0, m.weight_ih_l0
    return gradients(m, ramp(4, 2, 5))


@use
def a_bias_taken_away(make: Make) -> Any:
    m = make(nn.GRUCell(3, 5))
    m.bias_hh = None
    return m(ramp(2, 3), ramp(2, 5))


@use
def a_subclass(make: Make) -> Any:
    class Tagger(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return self.out(super().forward(input=x, hx=hx)[0])

    return gradients(make(Tagger()))


@use
def nothing_is_kept_alive(make: Make) -> Any:
    m, x = make(lstm()), ramp(4, 2, 3).requires_grad_()
    refs = [weakref.ref(x)]
    y = m(x)[0]
    y.sum().backward()
    refs.append(weakref.ref(y))
    del x, y
    return torch.tensor([ref() is None for ref in refs])


@use
def not_numbers(make: Make) -> Any:
    x = ramp(4, 3, 3)
    x[1, 0, 0], x[2, 1, 1] = torch.nan, torch.inf
    return [gradients(make(m), x) for m in (nn.LSTM(3, 5), nn.GRU(3, 5), nn.RNN(3, 5))]


@use
def huge_numbers(make: Make) -> Any:
    return [gradients(make(m), 1e30 * ramp(4, 3, 3)) for m in (nn.LSTM(3, 5), nn.GRU(3, 5), nn.RNN(3, 5))]


@use
def made_on_the_meta_device(make: Make) -> Any:
    with torch.device("meta"):
        m = make(lstm())
    m.to_empty(device="cpu")
    for p in m.parameters():
        nn.init.constant_(p, 0.1)
    return gradients(m)


@use
def inference_tensors_in_training(make: Make) -> Any:
    m = make(lstm())
    with torch.inference_mode():
        x = ramp(4, 2, 3)
    return gradients(m, x)


@use
def default_dtype(make: Make) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return gradients(make(lstm()))
    finally:
        torch.set_default_dtype(torch.float32)


@use
def rows_without_steps(make: Make) -> Any:
    return make(lstm())(pack_padded_sequence(ramp(4, 2, 3), torch.tensor([4, 0]), enforce_sorted=False))


@use
def packed_rows_and_a_state_of_others(make: Make) -> Any:
    return make(lstm())(pack_padded_sequence(ramp(4, 2, 3), torch.tensor([4, 2])), (ramp(2, 3, 5), ramp(2, 3, 5)))


@use
def whole_numbers(make: Make) -> Any:
    return make(nn.GRU(3, 5))(torch.ones(4, 2, 3, dtype=torch.int64))


@use
def complex_weights(make: Make) -> Any:
    return make(nn.RNN(3, 5).to(torch.complex64))(torch.ones(4, 2, 3, dtype=torch.complex64))


@use
def sparse_input(make: Make) -> Any:
    return make(nn.GRU(3, 5))(torch.ones(4, 2, 3).to_sparse())


@use
def nested_input(make: Make) -> Any:
    return make(nn.GRU(3, 5))(torch.nested.nested_tensor([torch.ones(4, 3), torch.ones(2, 3)]))


@use
def deterministic_algorithms(make: Make) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return gradients(make(lstm()))
    finally:
        torch.use_deterministic_algorithms(False)


@use
def as_an_older_torch_pickled_it(make: Make) -> Any:
    m = make(lstm())
    state = m.__getstate__()
    for name in ("_flat_weights", "_flat_weight_refs", "proj_size"):
        state.pop(name, None)
    state["_all_weights"] = m.all_weights  # once the tensors, now their names
    twin = type(m).__new__(type(m))
    twin.__setstate__(state)
    return gradients(twin)


@use
def pickled_after_a_call(make: Make) -> Any:
    m = make(lstm())
    gradients(m)
    twin = pickle.loads(pickle.dumps(m))
    twin.zero_grad()
    return gradients(twin)


@use
def shallow_copies(make: Make) -> Any:
    m = make(lstm())
    twin, other = copy.copy(m), copy.copy(m)
    other.weight_hh_l0 = nn.Parameter(3 * m.weight_hh_l0.detach())
    with torch.no_grad():
        m.weight_hh_l1.mul_(2)
    return [gradients(n) for n in (m, twin, other)]


@use
def weights_in_lists(make: Make) -> Any:
    m = make(nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2))
    m.flatten_parameters()
    assert all(a is b for a, b in zip(m._flat_weights, (w for each in m.all_weights for w in each), strict=True))
    for each in m.all_weights:
        nn.init.orthogonal_(each[1])
    return m(ramp(4, 2, 3))


@use
def a_weight_deleted(make: Make) -> Any:
    m = make(nn.GRUCell(3, 5))
    m(ramp(2, 3))
    del m.weight_hh
    m(ramp(2, 3))


@use
def a_weight_deleted_and_given_again(make: Make) -> Any:
    m = make(lstm())
    before = m(ramp(4, 2, 3))
    weight = m.weight_ih_l0
    del m.weight_ih_l0
    m.weight_ih_l0 = nn.Parameter(2 * weight.detach())
    return [before, gradients(m), gradients(m, 2 * ramp(4, 2, 3))]


@use
def weights_dropped_out(make: Make) -> Any:
    """As in AWD-LSTM."""
    m = make(lstm())
    raw = nn.Parameter(m._parameters.pop("weight_hh_l0").detach())
    m.register_parameter("raw", raw)
    out = []
    for _ in range(3):
        m.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
        out.append(m(ramp(4, 2, 3)))
    out[-1][0].sum().backward()
    return [*out, raw.grad]


@use
def weights_that_are_views_of_one(make: Make) -> Any:
    m = make(lstm())
    one = nn.Parameter(torch.cat([p.detach().flatten() for p in m.parameters()]))
    at = 0
    for name, p in list(m.named_parameters()):
        delattr(m, name)
        setattr(m, name, one[at : at + p.numel()].view_as(p))
        at += p.numel()
    m(ramp(4, 2, 3))[0].sum().backward()
    return one.grad


@use
def dropout_set_later(make: Make) -> Any:
    m = make(lstm())
    m.dropout = 0.5
    return gradients(m)


@use
def dtypes_there_and_back(make: Make) -> Any:
    m = make(lstm())
    return [m.double()(ramp(4, 2, 3).double()), gradients(m.to(torch.float32))]


@use
def padding_and_packing(make: Make) -> Any:
    m, rows = make(nn.GRU(3, 5, bidirectional=True)), [ramp(n, 3) for n in (4, 2, 3)]
    packed = pack_sequence(rows, enforce_sorted=False)
    y, h = m(packed)
    return [unpack_sequence(y), pad_packed_sequence(y), h, m(packed, h), m(packed.to(torch.float32)), m(pad_sequence(rows))]


@use
def an_unknown_keyword(make: Make) -> Any:
    make(nn.RNN(3, 5))(ramp(4, 2, 3), state=None)


@use
def unbatched_with_a_list(make: Make) -> Any:
    return make(lstm())(ramp(4, 3), [ramp(2, 5), ramp(2, 5)])


@use
def one_state_for_every_row(make: Make) -> Any:
    h = ramp(2, 1, 5).requires_grad_()
    return torch.autograd.grad(make(nn.GRU(3, 5, 2))(ramp(4, 7, 3), h.expand(2, 7, 5))[0].square().sum(), h)


@use
def a_subclass_that_is_abstract_elsewhere(make: Make) -> Any:
    """As pytorch-forecasting's."""

    class Handles(ABC, nn.RNNBase):
        @abstractmethod
        def initial(self) -> Any: ...

    class Layer(Handles, nn.LSTM):
        def initial(self) -> Any:
            return ramp(2, 2, 5), ramp(2, 2, 5)

        def forward(self, x: Tensor) -> Any:
            return super().forward(x, hx=self.initial())

    return gradients(make(Layer(3, 5, 2)))


@use
def a_cells_subclass(make: Make) -> Any:
    class Scaled(nn.LSTMCell):
        def __init__(self, size: int) -> None:
            super().__init__(size, 5)
            self.scale = nn.Parameter(ramp(5))

        def forward(self, x: Tensor, hx: Any = None) -> Any:
            h, c = super().forward(x, hx)
            return self.scale * h, c

    return gradients(make(Scaled(3)), ramp(2, 3))


@use
def a_layer_that_calls_vf(make: Make) -> Any:
    class Layer(nn.RNNBase):
        def __init__(self) -> None:
            super().__init__("GRU", 3, 5)

        def forward(self, x: Tensor) -> Any:
            return torch._VF.gru(x, ramp(1, 2, 5), self._flat_weights, True, 1, 0.0, self.training, False, self.batch_first)

    return gradients(make(Layer()))


@use
def subclasses_of_tensor(make: Make) -> Any:
    class Marked(Tensor):
        pass

    m, cell = make(lstm()), make(nn.GRUCell(3, 5))
    found = [m(ramp(4, 2, 3).as_subclass(Marked))[0], cell(ramp(2, 3), ramp(2, 5).as_subclass(Marked))]
    cell.weight_hh = nn.Parameter(cell.weight_hh.detach().as_subclass(Marked))
    found.append(cell(ramp(2, 3), ramp(2, 5)))
    assert all(type(t) is Marked for t in found)
    return [t.as_subclass(Tensor) for t in found]


@use
def a_later_layers_weight_of_another_class_under_dropout(make: Make) -> Any:
    class Marked(Tensor):
        pass

    m = make(nn.GRU(3, 5, 2, dropout=0.5))
    m.weight_hh_l1 = nn.Parameter(m.weight_hh_l1.detach().as_subclass(Marked))
    y, h = m(ramp(4, 2, 3))
    return [y.as_subclass(Tensor), h.as_subclass(Tensor), torch.rand(1)]


@use
def truncated_backpropagation(make: Make) -> Any:
    m, state = make(nn.LSTMCell(3, 5)), None
    for part in ramp(4, 3, 2, 3):
        state = None if state is None else [t.detach_() for t in state]
        for x in part:
            state = m(x, state)
        state[0].sum().backward()
    return [p.grad for p in m.parameters()]


@use
def gradients_of_some(make: Make) -> Any:
    m, x, h, c = make(lstm()), *(t.requires_grad_() for t in (ramp(4, 2, 3), ramp(2, 2, 5), ramp(2, 2, 5)))
    y = m(x, (h, c))[0].sum()
    found = [torch.autograd.grad(y, some, retain_graph=True) for some in ([x], [h], [c, x], [m.weight_hh_l1], [m.bias_ih_l0, c])]
    y.backward(inputs=[m.weight_ih_l0])
    return [found, [p.grad for p in m.parameters()]]


@use
def results_hooked(make: Make) -> Any:
    m = make(lstm())
    y, (h, _) = m(ramp(4, 2, 3))
    y.retain_grad()
    h.register_hook(lambda d: 3 * d)
    (y.sum() + h.sum()).backward()
    return [y.grad, *(p.grad for p in m.parameters())]


@use
def a_broadcast_gradient(make: Make) -> Any:
    m = make(lstm(batch_first=True))
    m(ramp(2, 4, 3))[0].backward(torch.ones(()).expand(2, 4, 5))
    return [p.grad for p in m.parameters()]


@use
def an_input_written_to_before_backward(make: Make) -> Any:
    x = ramp(4, 2, 3)
    y = make(lstm())(x)[0]
    x.add_(1)
    y.sum().backward()


@use
def a_cells_state_written_to_before_backward(make: Make) -> Any:
    h = ramp(2, 5)
    y = make(nn.GRUCell(3, 5))(ramp(2, 3), h)
    h.add_(1)
    y.sum().backward()


@use
def a_weight_written_to_before_backward(make: Make) -> Any:
    m = make(lstm())
    y = m(ramp(4, 2, 3))[0]
    with torch.no_grad():
        m.weight_hh_l0.mul_(2)
    y.sum().backward()


@use
def inference_tensors_that_no_gradient_needs(make: Make) -> Any:
    with torch.inference_mode():
        x = ramp(4, 2, 3)
    found = list[Any]()
    for m, given in ((make(nn.GRU(3, 5)), x), (make(nn.LSTMCell(3, 5)), x[0]), (make(nn.GRUCell(3, 5)), x[0])):
        h = (ramp(2, 5) if given.dim() == 2 else ramp(1, 2, 5)).requires_grad_()
        m.requires_grad_(False)
        found.append(torch.autograd.grad(flat(m(given, (h, h) if isinstance(m, nn.LSTMCell) else h))[0].sum(), h))
    return found


@use
def results_of_inference_in_training(make: Make) -> Any:
    """A view of them is copied first by torch's LSTM, which then may keep the copy."""
    m = make(lstm())
    with torch.inference_mode():
        y = m(ramp(4, 2, 3))[0]
    return gradients(m, y[..., :3])


@use
def states_of_inference_in_training(make: Make) -> Any:
    m = make(nn.LSTMCell(3, 5))
    with torch.inference_mode():
        state = m(ramp(2, 3))
    return m(ramp(2, 3), state)


@use
def made_in_inference_mode(make: Make) -> Any:
    with torch.inference_mode():
        m = make(lstm())
    with torch.no_grad():
        return m(ramp(4, 2, 3))


@use
def made_in_inference_mode_for_training(make: Make) -> Any:
    with torch.inference_mode():
        m = make(lstm())
    m(ramp(4, 2, 3))


@use
def a_data_parallel_module(make: Make) -> Any:
    m = make(lstm())
    replica = m._replicate_for_data_parallel()
    for name, p in m.named_parameters():
        setattr(replica, name, 2 * p)
    replica(ramp(4, 2, 3))[0].sum().backward()
    found = [p.grad.clone() for p in m.parameters()]
    return [found, gradients(nn.DataParallel(m))]


@use
def trained_in_four_threads(make: Make) -> Any:
    m = make(nn.GRU(3, 5, 2))
    found = list[Any]()

    def run() -> None:
        for _ in range(10):
            found.append(torch.autograd.grad(m(ramp(4, 2, 3))[0].square().sum(), list(m.parameters())))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


@use
def exported(make: Make) -> Any:
    program = torch.export.export(make(lstm(batch_first=True)), (ramp(4, 2, 3),))
    assert [node.name for node in program.graph.nodes if "lstm" in str(node.target)]  # one operation
    return [program.module()(ramp(4, 2, 3)), program.run_decompositions().module()(ramp(4, 2, 3))[0]]  # torch 2.12's end states have an axis too many


@use
def compiled_cells(make: Make) -> Any:
    torch.compiler.reset()
    cells = [make(cell(3, 5)) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)]
    return [torch.compile(cell, backend="eager", fullgraph=True)(ramp(2, 3)) for cell in cells]


def negated(*shape: int) -> Tensor:
    """A view that only says that its numbers have the other sign."""
    t = torch.complex(ramp(*shape), ramp(*shape)).conj().imag
    assert t.is_neg()
    return t


@use
def negated_views(make: Make) -> Any:
    m, cell = make(lstm()), make(nn.LSTMCell(3, 5))
    m.weight_ih_l1 = nn.Parameter(negated(20, 5))
    y, (h, c) = m(negated(4, 2, 3), (negated(2, 2, 5), negated(2, 2, 5)))
    torch.autograd.backward([y, h, c], [negated(4, 2, 5), negated(2, 2, 5), negated(2, 2, 5)], retain_graph=True)
    step = cell(negated(2, 3), (negated(2, 5), negated(2, 5)))
    torch.autograd.backward(step, [negated(2, 5), negated(2, 5)])
    packed = m(nn.utils.rnn.PackedSequence(negated(6, 3), torch.tensor([2, 2, 1, 1])))
    return [y, step, packed, [p.grad for p in (*m.parameters(), *cell.parameters())]]


@use
def functions_called_by_name(make: Make) -> Any:
    make(lstm())
    w, h = [ramp(20, 3), ramp(20, 5), ramp(20), ramp(20)], ramp(2, 5)
    sizes = dict(params=w, has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False)
    found = [f.lstm_cell(ramp(2, 3), hx=(h, h), w_ih=w[0], w_hh=w[1]) for f in (torch._VF, torch)]
    found += [f.gru_cell(ramp(2, 3), h, ramp(15, 3), w_hh=ramp(15, 5), b_hh=ramp(15), b_ih=ramp(15)) for f in (torch._VF, torch)]
    found += [f.lstm(input=ramp(4, 2, 3), hx=(h[None], h[None]), batch_first=False, **sizes) for f in (torch._VF, torch)]
    return [*found, [f.lstm(ramp(3, 3), torch.tensor([2, 1]), (h[None], h[None]), **sizes) for f in (torch._VF, torch)]]


@use
def biases_that_are_not_spoken_of(make: Make) -> Any:
    make(lstm())
    torch._VF.gru(ramp(4, 2, 3), ramp(1, 2, 5), [ramp(15, 3), ramp(15, 5), ramp(15), ramp(15)], False, 1, 0.0, False, False, False)


@use
def norms_of_old(make: Make) -> Any:
    m, cell, out = make(lstm()), make(nn.LSTMCell(3, 5)), list[Any]()
    nn.utils.weight_norm(m, "weight_hh_l0")
    nn.utils.spectral_norm(cell, "weight_hh")
    for _ in range(2):
        out += [gradients(m), gradients(cell, ramp(2, 3))]
        with torch.no_grad():
            m.weight_hh_l0_g.mul_(2)
    nn.utils.remove_weight_norm(m, "weight_hh_l0")
    return [*out, gradients(m)]


@use
def pruned_by_rows_and_for_good(make: Make) -> Any:
    m = make(lstm())
    prune.ln_structured(m, "weight_ih_l0", 0.5, 2, 0)
    prune.global_unstructured([(m, "weight_hh_l0"), (m, "weight_hh_l1")], prune.L1Unstructured, amount=0.3)
    before = gradients(m)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.remove(m, name)
    return [*before, *gradients(m)]


@use
def parameters_from_a_vector(make: Make) -> Any:
    m = make(lstm())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()).detach() / 2, m.parameters())
    return gradients(m)


@use
def backward_in_another_thread(make: Make) -> Any:
    m = make(lstm())
    thread = threading.Thread(target=m(ramp(4, 2, 3))[0].sum().backward)
    thread.start()
    thread.join()
    return [p.grad for p in m.parameters()]


@use
def mutations_allowed(make: Make) -> Any:
    m, x = make(lstm()), ramp(4, 2, 3)
    with graph.allow_mutation_on_saved_tensors():
        y = m(x)[0]
        x.zero_()
        y.sum().backward()
    return [p.grad for p in m.parameters()]


@use
def random_masks_in_a_transform_that_forbids_them(make: Make) -> Any:
    torch.func.vmap(make(lstm(dropout=0.5)))(ramp(3, 4, 2, 3))


@use
def a_weights_forward_derivative(make: Make) -> Any:
    found = list[Any]()
    for m, x in ((make(nn.GRUCell(3, 5)), ramp(2, 3)), (make(nn.GRU(3, 5)), ramp(4, 2, 3))):
        name = "weight_hh" if x.dim() == 2 else "weight_hh_l0"
        weight = getattr(m, name).detach()
        delattr(m, name)
        for p in m.parameters():
            p.requires_grad_(False)
            with forward_ad.dual_level():
                setattr(m, name, forward_ad.make_dual(weight, torch.ones(15, 5)))
                found += forward_ad.unpack_dual(flat(m(x))[0])
    return found


@use
def made_into_operations(make: Make) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    m = make(nn.GRU(3, 5))
    return [make_fx(m)(ramp(4, 2, 3))(ramp(4, 2, 3) / 2), torch.func.functionalize(m)(ramp(4, 2, 3))]


@use
def scripts_and_traces_saved(make: Make) -> Any:
    m, found = make(nn.LSTM(3, 5, 2, bidirectional=True)), list[Any]()
    for script in (torch.jit.script(nn.Sequential(m)), torch.jit.trace(m, torch.ones(4, 2, 3))):
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        found.append(torch.jit.load(file)(ramp(6, 3, 3)))
    return found


@use
def layers_that_dynamo_is_let_into(make: Make) -> Any:
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        return torch.compile(make(nn.Sequential(nn.GRU(3, 5))), backend="eager", fullgraph=True)(ramp(4, 2, 3))


@use
def a_compiled_loop_of_steps(make: Make) -> Any:
    torch.compiler.reset()
    cell = make(nn.LSTMCell(3, 5))

    @torch.compile(backend="eager")
    def loop(x: Tensor) -> Any:
        state = None
        for t in range(3):
            state = cell(x[t], state)
        return state

    return loop(ramp(3, 2, 3))


@use
def states_in_a_named_tuple(make: Make) -> Any:
    class State(NamedTuple):
        h: Tensor
        c: Tensor

    return make(lstm())(ramp(4, 2, 3), State(ramp(2, 2, 5), ramp(2, 2, 5)))


@use
def states_that_are_none(make: Make) -> Any:
    make(lstm())(ramp(4, 2, 3), (None, None))


@use
def a_pair_of_states_for_a_gru(make: Make) -> Any:
    make(nn.GRU(3, 5))(ramp(4, 2, 3), (ramp(1, 2, 5), ramp(1, 2, 5)))


@use
def one_state_for_an_lstm_cell(make: Make) -> Any:
    make(nn.LSTMCell(3, 5))(ramp(2, 3), ramp(2, 5))


@use
def arrays(make: Make) -> Any:
    make(nn.GRUCell(3, 5))(ramp(2, 3).numpy())


@use
def batch_sizes_that_grow(make: Make) -> Any:
    make(nn.GRU(3, 5))(nn.utils.rnn.PackedSequence(ramp(6, 3), torch.tensor([2, 3, 1])))


@use
def batch_sizes_in_32_bits(make: Make) -> Any:
    make(nn.GRU(3, 5))(nn.utils.rnn.PackedSequence(ramp(6, 3), torch.tensor([3, 2, 1], dtype=torch.int32)))


@use
def packed_rows_of_none(make: Make) -> Any:
    make(nn.GRU(3, 5))(nn.utils.rnn.PackedSequence(ramp(0, 3), torch.zeros(0, dtype=torch.int64)))


@use
def packed_rows_too_wide(make: Make) -> Any:
    make(nn.GRU(3, 5))(nn.utils.rnn.PackedSequence(ramp(6, 4), torch.tensor([3, 2, 1])))


@use
def dropout_out_of_range(make: Make) -> Any:
    m = make(lstm())
    m.dropout = 2.0
    m(ramp(4, 2, 3))


RAISE = {
    "backward_twice_without_the_graph", "biases_that_are_not_spoken_of", "inference_tensors_in_training", "rows_without_steps",
    "packed_rows_and_a_state_of_others", "whole_numbers", "sparse_input", "nested_input", "a_weight_deleted", "an_unknown_keyword",
    "an_input_written_to_before_backward", "a_cells_state_written_to_before_backward", "a_weight_written_to_before_backward",
    "states_of_inference_in_training", "made_in_inference_mode_for_training", "states_that_are_none", "a_pair_of_states_for_a_gru",
    "one_state_for_an_lstm_cell", "arrays", "random_masks_in_a_transform_that_forbids_them", "batch_sizes_that_grow", "batch_sizes_in_32_bits",
    "packed_rows_of_none", "packed_rows_too_wide", "dropout_out_of_range",
}  # fmt: skip


def outcome(run: Callable[[Make], Any], make: Make) -> list[Any]:
    """The tensors, or what was raised."""
    torch.manual_seed(0)
    try:
        return [None if t is None else t.detach() for t in flat_with_none(run(make))]
    except Exception as error:
        return [type(error), str(error).split("\n")[0]]


def flat_with_none(value: Any) -> Iterator[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.utils.rnn.PackedSequence):
        yield value.data
    else:
        for part in value:
            yield from flat_with_none(part)


@pytest.mark.filterwarnings("ignore")  # torch's own, which are many
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "compiled_autograd" else name for name in USES])
def test_a_use_of_torchs_modules_has_torchs_outcome(name: str) -> None:
    expected = outcome(USES[name], lambda m: m)
    assert isinstance(expected[0], type) == (name in RAISE), expected
    ways: list[tuple[Make, Any]] = [(fast.convert, contextlib.nullcontext()), (lambda m: m, fast.installed()), (lambda m: m, fast.installed(aten=True))]
    for make, context in ways:
        with context:
            found = outcome(USES[name], make)
        if isinstance(expected[0], type):
            assert found == expected
        else:
            torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_is_exported_to_onnx() -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    m, x = fast.convert(Both().eval()), ramp(4, 2, 3)
    expected = m(x)
    for own in (m, fast.freeze(copy.deepcopy(m))):
        file = io.BytesIO()
        torch.onnx.export(own, (x,), file, dynamo=False)
        session = runtime.InferenceSession(file.getvalue())
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), expected.detach(), rtol=2e-5, atol=2e-5)


def test_dynamic_quantization_takes_what_to_torch_gives() -> None:
    """It goes by exact class, and passes over every other."""
    model, x = nn.Sequential(nn.LSTM(3, 5)), ramp(4, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        plain = quantize_dynamic(copy.deepcopy(model), {nn.LSTM})
        ours = quantize_dynamic(fast.to_torch(fast.convert(copy.deepcopy(model))), {nn.LSTM})
        with fast.installed(aten=True):
            there = quantize_dynamic(model, {nn.LSTM})
            assert all(torch.equal(a, b) for a, b in zip(flat(there(x)), flat(plain(x)), strict=True))
    assert type(ours[0]) is type(plain[0]) is not nn.LSTM
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(x)), flat(plain(x)), strict=True))
