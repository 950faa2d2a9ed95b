"""A layer changed by hand or used in an unusual way: the fused forms give what its modules give, or refuse."""

import copy

import pytest
import torch
from torch import nn

from spikingformer.layers.conv import ConvBN, ConvBNLIF
from spikingformer.neurons import use_backend

KINDS = pytest.mark.parametrize("channels", [3, 32], ids=["stem", "spikes"])


def spikes(channels: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.rand(1, batch, channels, 6, 6) < 0.4).float()


def made(layer: type[nn.Module], channels: int) -> nn.Module:
    """A layer whose neurons fire now and then."""
    torch.manual_seed(1)
    module = layer(channels, 8, 3)
    nn.init.normal_(module.bn.weight, 1.0, 0.2)
    nn.init.normal_(module.bn.bias, 0.7, 0.3)
    return module


def gradients(module: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter, from an output that is weighted unevenly."""
    (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: p.grad.double() for name, p in module.named_parameters()}


def assert_gradients(module: nn.Module, out: torch.Tensor, plain: nn.Module, plain_out: torch.Tensor) -> None:
    """Those of `module` are those of the plain form in float64, to float32's rounding: a BatchNorm's
    sums cancel, torch's own float32 is off by 4e-6 here; a statistic taken at the wrong time is by 5e-2."""
    found, expected = gradients(module, out), gradients(plain, plain_out)
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-5 * value.abs().max().item())


@KINDS
@pytest.mark.parametrize("layer", [ConvBN, ConvBNLIF])
def test_a_padding_changed_by_hand(layer, channels):
    module = layer(channels, 8, 3)
    module.conv.padding = (0, 0)
    assert module(spikes(channels)).shape == (1, 2, 8, 4, 4)


@KINDS
@pytest.mark.parametrize("layer", [ConvBN, ConvBNLIF])
def test_a_batch_norm_without_bias(layer, channels):
    module = layer(channels, 8, 3)
    module.bn = nn.BatchNorm2d(8)
    module.bn.bias = None
    with use_backend("reference"):
        module.eval()
        expected = module(spikes(channels))
    torch.testing.assert_close(module(spikes(channels)), expected)


@KINDS
@pytest.mark.parametrize("layer", [ConvBN, ConvBNLIF])
def test_a_training_step_between_an_evaluation_and_its_backward(layer, channels):
    module, x = made(layer, channels).eval(), spikes(channels)
    plain = copy.deepcopy(module).double()
    out = module(x)
    module.train()(x)
    with use_backend("reference"):  # without the step: torch's own BatchNorm takes the statistics that it left behind
        plain_out = plain(x.double())
    assert_gradients(module, out, plain, plain_out)


@KINDS
def test_an_empty_batch_in_training(channels):
    assert ConvBN(channels, 8, 3)(spikes(channels)[:, :0]).shape == (1, 0, 8, 6, 6)


@KINDS
def test_the_output_may_be_written_to(channels):
    module, x = made(ConvBN, channels), spikes(channels)
    plain = copy.deepcopy(module).double()
    out = module(x)
    out += 1
    with use_backend("reference"):
        plain_out = plain(x.double()) + 1
    torch.testing.assert_close(out.double(), plain_out, rtol=0, atol=1e-5)
    assert_gradients(module, out, plain, plain_out)


@KINDS
@pytest.mark.parametrize("layer", [ConvBN, ConvBNLIF])
def test_a_second_derivative_is_refused_not_zero(layer, channels):
    module = layer(channels, 8, 3)
    (gradient,) = torch.autograd.grad(module(spikes(channels)).pow(3).sum(), module.bn.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.pow(2).sum(), module.bn.weight)


def test_a_default_device_elsewhere():
    module, x = ConvBN(3, 8, 3).eval(), spikes(3)
    expected = module(x)
    with torch.device("meta"), torch.no_grad():
        torch.testing.assert_close(module(x), expected)
