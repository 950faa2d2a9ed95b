"""Small models that fire, two kinds: with ordinary weights, and with weights whose every sum is exact in float32."""

import pytest
import timm
import torch
from torch import nn

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.export import fold_batch_norm
from spikingformer.models import SpikingTransformer

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}


def small_model(name: str, seed: int = 0, **overrides: object) -> SpikingTransformer:
    """A small variant with BatchNorm statistics that let every layer fire."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **overrides})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.5, 0.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    return model.eval()


def exact_model(name: str, seed: int = 0, **overrides: object) -> SpikingTransformer:
    """Folded, with weights and biases that are multiples of 2^-8: with dyadic inputs and tau = 2, every sum before a
    neuron is exact in float32 whatever its order, so any right runtime fires the very same spikes."""
    model = fold_batch_norm(small_model(name, seed, **overrides))
    for parameter in model.parameters():
        parameter.data = (parameter.data * 256).round() / 256
    return model


def dyadic(x: torch.Tensor) -> torch.Tensor:
    """x rounded to multiples of 2^-5."""
    return (x * 32).round() / 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
