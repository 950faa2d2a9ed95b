"""Plain calls go past torch's dispatcher; whoever has to see a call still does."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spikingformer import native
from spikingformer.native import ops
from spikingformer.native.eager import is_plain_call
from spikingformer.neurons import LIFConfig

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def stage(y):
    c = y.shape[2]
    weight = torch.linspace(0.5, 2.0, c).requires_grad_()
    mean, rstd = ops.bn_statistics(y)
    return ops.bn_pool_lif(y, mean, rstd, weight, torch.zeros(c), LIFConfig(), pool="cml", batch_statistics=True)[0]


def norm(y):
    c = y.shape[2]
    return ops.batch_norm(y, *ops.bn_statistics(y), torch.ones(c).requires_grad_(), torch.zeros(c), True)


CALLS = {
    "lif": (lambda y: ops.lif(y, LIFConfig(), want_membrane=False)[0], "lif"),
    "stage": (stage, "bn_pool_lif"),
    "norm": (norm, "batch_norm"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_what_a_plain_call_computes(name):
    call, op = CALLS[name]
    y = (torch.randn(2, 3, 4, 6, 6) * 2).requires_grad_()
    grad = torch.randn_like(call(y))
    plain = call(y)
    plain_gradient = torch.autograd.grad(plain, y, grad)[0]
    with Seen() as seen:
        result = call(y)
        gradient = torch.autograd.grad(result, y, grad)[0]
    assert {f"spikingformer::{op}", f"spikingformer::{op}_backward"} <= set(seen.names)
    assert torch.equal(plain, result)
    assert torch.equal(plain_gradient, gradient)
    assert plain_gradient.abs().sum() > 0


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "under a mode"])
@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name, watched):
    y = (torch.randn(2, 3, 4, 6, 6) * 2).requires_grad_()
    with Seen() if watched else contextlib.nullcontext():
        result = CALLS[name][0](y).sum()
    gradient = torch.autograd.grad(result, y, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "under a mode"])
def test_a_negated_view_is_what_it_stands_for(watched):
    y = torch.tensor([[-3.0, 3.0], [-4.0, 0.5]])
    with Seen() if watched else contextlib.nullcontext():
        spikes = ops.lif(torch._neg_view(y), LIFConfig())[0]
    assert torch.equal(spikes, ops.lif(-y, LIFConfig())[0])
    assert spikes.any()


@pytest.mark.parametrize("name", CALLS)
def test_without_gradients_no_graph_is_kept(name):
    y = (torch.randn(2, 3, 4, 6, 6) * 2).requires_grad_()
    with torch.no_grad():
        assert not CALLS[name][0](y).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_is_not_plain():
    x = torch.randn(2, 3)

    class Own(torch.Tensor):
        pass

    assert is_plain_call(x, None, torch.nn.Parameter(x))
    assert not is_plain_call(x.as_subclass(Own))
    assert not is_plain_call(x.to("meta"))
    assert not is_plain_call(torch._neg_view(x))
    assert not is_plain_call(torch._efficientzerotensor(2, 3))
    seen: list[bool] = []
    torch.func.grad(lambda a: (seen.append(is_plain_call(a)), a.sum())[1])(x)
    torch.jit.trace(lambda a: (seen.append(is_plain_call(a)), a + 1)[1], x, check_trace=False)
    with Seen():
        seen.append(is_plain_call(x))
    assert seen
    assert not any(seen)
