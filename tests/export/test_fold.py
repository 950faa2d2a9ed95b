"""Folding BatchNorm: exact in float64, harmless to the original, clear where there is nothing to fold."""

import pytest
import torch
from torch import nn

from spikingformer.export import check_fold, fold_batch_norm, is_folded, observed_spikes

from .conftest import small_model

FAMILIES = ["spikingformer_4_384", "spikingformer_cml_4_384", "spikformer_4_384", "spikformer_cml_4_384"]


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_model_fires_the_same_spikes_in_float64(name):
    model = small_model(name)
    check = check_fold(model, torch.randn(2, 3, 32, 32))
    assert check.exact
    assert check.spikes > 100_000


def test_every_layer_of_the_small_model_fires():
    model = small_model("spikingformer_cml_4_384")
    with torch.no_grad(), observed_spikes(model) as spikes:
        model(torch.randn(2, 3, 32, 32))
    assert len(spikes) == len(model.neurons())
    assert all(0 < s.mean() < 1 for s in spikes.values())


def test_check_sees_a_wrong_fold(monkeypatch):
    from spikingformer.export import fold

    right = fold.folded_convolution
    monkeypatch.setattr(fold, "folded_convolution", lambda conv, bn: (right(conv, bn)[0], right(conv, bn)[1] * 1.01))
    check = check_fold(small_model("spikformer_4_384"), torch.randn(1, 3, 32, 32))
    assert check.spikes_different > 0
    assert not check.exact


def test_the_copy_keeps_its_structure_and_the_original_its_batch_norm():
    model = small_model("spikingformer_4_384")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert is_folded(folded)
    assert not is_folded(model)
    assert folded.blocks[0].attn.q.conv.bias is not None
    assert isinstance(folded.blocks[0].attn.q.bn, nn.Identity)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not folded.training


def test_folding_twice_is_refused():
    with pytest.raises(ValueError, match="folded already: export it as it is"):
        fold_batch_norm(fold_batch_norm(small_model("spikformer_4_384")))


def test_a_model_without_products_is_refused():
    with pytest.raises(ValueError, match="Linear has no convolution with BatchNorm to fold"):
        fold_batch_norm(nn.Linear(2, 2))
