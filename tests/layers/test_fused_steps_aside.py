"""A layer changed by hand or used in an unusual way: the fused forms give what its modules give, or refuse."""

import pytest
import torch
from torch import nn

from spikingformer.layers.conv import ConvBN, ConvBNLIF
from spikingformer.neurons import use_backend

KINDS = pytest.mark.parametrize("channels", [3, 32], ids=["stem", "spikes"])


def spikes(channels: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.rand(1, batch, channels, 6, 6) < 0.4).float()


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
    module, x = layer(channels, 8, 3), spikes(channels)
    out = module.eval()(x)
    module.train()(x)
    out.sum().backward()
    assert module.conv.weight.grad is not None


@KINDS
def test_an_empty_batch_in_training(channels):
    assert ConvBN(channels, 8, 3)(spikes(channels)[:, :0]).shape == (1, 0, 8, 6, 6)


@KINDS
def test_the_output_may_be_written_to(channels):
    module, x = ConvBN(channels, 8, 3), spikes(channels)
    out = module(x)
    out += 1
    out.sum().backward()
    assert module.conv.weight.grad is not None


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
