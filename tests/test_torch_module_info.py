"""torch's own samples of its six recurrent modules (torch.testing._internal, in the wheel), run over our classes as torch runs them over its own."""

import copy
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import rnnfast.torch as fast
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


@pytest.fixture(scope="module")
def infos() -> dict[str, Any]:
    pytest.importorskip("expecttest")  # what torch's tests are built on
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls.__name__: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"}


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in what a module takes or gives, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def rebuilt(value: Any, given: Iterator[Tensor]) -> Any:
    """The same structure over other tensors."""
    if isinstance(value, Tensor):
        return next(given)
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return nn.utils.rnn.PackedSequence(next(given), *value[1:])
    return type(value)(rebuilt(part, given) for part in value) if isinstance(value, (tuple, list)) else value


def samples(info: Any, dtype: torch.dtype = torch.float64, training: bool = True) -> Iterator[tuple[Any, nn.Module, nn.Module, tuple[Any, ...]]]:
    """sample, torch's module, ours with the same weights, the arguments of forward."""
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        made = sample.constructor_input
        theirs = info.module_cls(*made.args, **{**made.kwargs, "dtype": dtype}).train(training)
        ours = getattr(fast, info.module_cls.__name__)(*made.args, **{**made.kwargs, "dtype": dtype}).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert not sample.forward_input.kwargs
        yield sample, theirs, ours, sample.forward_input.args


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_equals_torch_and_the_samples_reference(infos: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    rtol = 1e-4 if dtype == torch.float32 else 1e-11
    for training in (True, False):
        count = 0
        for sample, theirs, ours, args in samples(infos[name], dtype, training):
            out = ours(*args)
            for a, b in zip(tensors(theirs(*args)), tensors(out), strict=True):
                torch.testing.assert_close(b, a, rtol=rtol, atol=rtol)
            if sample.reference_fn is not None:
                for a, b in zip(tensors(sample.reference_fn(ours, *args)), tensors(out), strict=True):
                    torch.testing.assert_close(b, a, rtol=rtol, atol=rtol)
            count += 1
        assert count > 1


EIGHTH = pytest.param(gradgradcheck, 8, id="gradgrad, every eighth")
ALL = pytest.param(gradgradcheck, 1, id="gradgrad", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("check", "step"), [pytest.param(gradcheck, 1, id="grad"), EIGHTH, ALL])
def test_gradients_pass_gradcheck(infos: dict[str, Any], name: str, check: Any, step: int) -> None:
    for _, _, ours, args in islice(samples(infos[name]), 0, None, step):
        given = [t.detach().requires_grad_() for t in tensors(args)]

        def run(*given: Tensor, m: nn.Module = ours, args: Any = args) -> tuple[Tensor, ...]:
            return tuple(tensors(m(*rebuilt(args, iter(given)))))

        assert check(run, (*given, *ours.parameters()), nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_copies_compute_the_same(infos: dict[str, Any], name: str) -> None:
    for _, _, ours, args in samples(infos[name]):
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert type(twin) is type(ours)
            assert all(torch.equal(a, b) for a, b in zip(tensors(ours(*args)), tensors(twin(*args)), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_that_torch_expects(infos: dict[str, Any], name: str) -> None:
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info, count = infos[name], 0
    for error in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        ours = getattr(fast, name)
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(*made.args, **made.kwargs)
        else:
            module = ours(*made.args, **made.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.args, **given.kwargs)
        count += 1
    assert count > 3


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_and_gradients_change_nothing(infos: dict[str, Any], name: str) -> None:
    from torch.testing._internal.common_utils import noncontiguous_like

    for _, _, ours, args in samples(infos[name]):
        found = []
        for strided in (False, True):
            given = [t.detach().clone() for t in tensors(args)]
            given = [(noncontiguous_like(t) if strided else t).requires_grad_() for t in given]
            ours.zero_grad()
            parts = tensors(ours(*rebuilt(args, iter(given))))
            gradients = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in parts]
            torch.autograd.backward(parts, [noncontiguous_like(g) if strided else g for g in gradients])
            found.append([*parts, *(t.grad for t in given), *(p.grad.clone() for p in ours.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
