"""Models whose BatchNorm is folded into the convolution before it: the same function, without a pass of its own."""

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF, folded_convolution
from spikingformer.models import SpikingTransformer
from spikingformer.neurons import use_backend
from spikingformer.neurons.observe import observed_spikes

Model = TypeVar("Model", bound=nn.Module)


def is_folded(model: nn.Module) -> bool:
    """Whether no BatchNorm is left in any product of the model."""
    return not any(isinstance(m.bn, nn.modules.batchnorm._BatchNorm) for m in _products(model))


def fold_batch_norm(model: Model) -> Model:
    """A copy of `model` in eval mode whose products carry their BatchNorm: `conv` with a bias, `bn` an Identity.

    The original is left as it is. A copy that is trained further would learn without normalisation: fold last.
    Raises ValueError for a model without a product of ours, and for one whose BatchNorms are folded already.
    """
    if not _products(model):
        raise ValueError(f"{type(model).__name__} has no convolution with BatchNorm to fold: expected a model of ours")
    if is_folded(model):
        raise ValueError("the BatchNorms of this model are folded already: export it as it is")
    folded = copy.deepcopy(model).eval()
    for product in _products(folded):
        if isinstance(product.bn, nn.Identity):
            continue
        weight, bias = (t.to(product.conv.weight.dtype) for t in folded_convolution(product.conv, product.bn))
        product.conv.weight = nn.Parameter(weight, requires_grad=False)
        product.conv.bias = nn.Parameter(bias, requires_grad=False)
        product.bn = nn.Identity()  # type: ignore[assignment]
    return folded.eval()


def without_batch_norm(model: Model) -> Model:
    """Makes `model` (changed in place, and returned) take a folded state dict: biases added, BatchNorms removed."""
    for product in _products(model):
        conv = product.conv
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
        product.bn = nn.Identity()  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class FoldCheck:
    """What folding changed on one input, in float64."""

    logit_difference: float  # largest |folded - original| of a logit
    spikes: int  # neuron updates compared
    spikes_different: int  # neuron updates that differ

    @property
    def exact(self) -> bool:
        """All spikes equal, and logits equal up to the rounding of float64 (sums of some thousand terms: 1e-9)."""
        return self.spikes_different == 0 and self.logit_difference < 1e-9


def check_fold(model: SpikingTransformer, example: Tensor) -> FoldCheck:
    """Folds a float64 copy of `model` and compares it with the original on `example` (the model's input)."""
    original = copy.deepcopy(model).double().eval()
    folded = fold_batch_norm(original)
    x = example.double()
    with torch.no_grad(), use_backend("reference"):
        with observed_spikes(original) as before:
            expected = original(x)
        with observed_spikes(folded) as after:
            got = folded(x)
    different = sum(int((before[name] != after[name]).sum()) for name in before)
    return FoldCheck(float((got - expected).abs().max()), sum(s.numel() for s in before.values()), different)


def _products(model: nn.Module) -> list[ConvBN | ConvBNLIF]:
    return [m for m in model.modules() if isinstance(m, ConvBN | ConvBNLIF)]
