"""What users do with recurrent modules, done to ours and under install(): the same results as torch's own, to the very error."""

import contextlib
import copy
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rnnfast.torch as fast
import torch
from test_torch import flat
from torch import Tensor, nn
from torch.autograd import graph
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
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
    m = make(lstm())
    for p in m.parameters():
        p.register_hook(lambda d: 2 * d)
        p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(3))
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

    m = make(lstm())
    with Watch():
        m(ramp(4, 2, 3))
    return torch.tensor("sigmoid" in seen)


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
