"""Our Spikformer weights in SpikingJelly's Spikformer, and back: equal spikes in float64."""

import copy
import warnings

import pytest
import torch

from spikingformer.export import observed_spikes
from spikingformer.export.spikingjelly import from_spikingjelly, to_spikingjelly
from spikingformer.neurons import use_backend

from .conftest import small_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based.model.spikformer import Spikformer as TheirSpikformer


def theirs_for(model):
    c = model.config
    return (
        TheirSpikformer(
            T=c.time_steps,
            img_size_h=32,
            img_size_w=32,
            patch_size=c.patch_size,
            num_classes=c.num_classes,
            embed_dims=c.embed_dim,
            num_heads=c.num_heads,
            depths=c.depth,
        )
        .double()
        .eval()
    )


def our_names(their_name):
    """Our neuron layers whose spikes, joined over channels, are those of SpikingJelly's layer."""
    name = their_name.replace("patch_embed.positional_encoding.neuron", "stem.rpe.lif")
    name = name.replace("patch_embed", "stem").replace(".neuron1", ".fc1.lif").replace(".neuron2", ".fc2.lif")
    name = name.replace(".neuron", ".lif").replace("proj_lif", "proj.lif")
    return [name.replace("qkv_lif", f"{n}.lif") for n in "qkv"] if "qkv_lif" in name else [name]


@pytest.mark.parametrize("pooled", [(2, 3), (0, 1, 2, 3)], ids=["patch4", "patch16"])
def test_spikingjelly_fires_our_spikes(pooled):
    model = small_model("spikformer_cml_4_384", depth=2, pooled_stages=pooled).double()
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.conv.bias, 0, 0.2)  # a bias that SpikingJelly must absorb
    torch.nn.init.normal_(model.blocks[1].attn.k.conv.bias, 0, 0.2)
    theirs = theirs_for(model)
    theirs.load_state_dict(to_spikingjelly(model), strict=True)
    fired = {}
    for name, module in theirs.named_modules():
        if isinstance(module, neuron.LIFNode):
            module.register_forward_hook(lambda m, i, o, name=name: fired.__setitem__(name, o))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"), observed_spikes(model) as spikes:
        logits = model(x)
        their_logits = theirs(x).mean(0)
    assert len(fired) == 5 + 5 * 2
    for name, got in fired.items():
        expected = torch.cat([spikes[n] for n in our_names(name)], 2)
        assert torch.equal(got.reshape(expected.shape), expected), name
    assert sum(0 < s.mean() < 1 for s in fired.values()) >= 13
    # spikes are equal, so features are; the head's 32 products in float64 may sum in another order
    torch.testing.assert_close(their_logits, logits, rtol=0, atol=1e-12)


def test_there_and_back_is_the_same_function():
    model = small_model("spikformer_cml_4_384").double()
    torch.nn.init.normal_(model.blocks[0].attn.proj.conv.bias, 0, 0.2)
    again = copy.deepcopy(model)
    again.load_state_dict(from_spikingjelly(to_spikingjelly(model), model), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-12)
    assert again.blocks[0].attn.proj.conv.bias.abs().max() == 0


def test_weights_made_there_load_here():
    model = small_model("spikformer_cml_4_384").double()
    theirs = theirs_for(model)
    model.load_state_dict(from_spikingjelly(theirs.state_dict(), model), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(theirs(x).mean(0), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spikingformer_4_384", "has Spikformer only, got Spikingformer"),
        ("spikformer_4_384", "has pool 'cml', this model 'sps': the spikes would differ"),
    ],
)
def test_models_it_cannot_hold_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        to_spikingjelly(small_model(name))


def test_wrong_state_dicts_name_the_key():
    model = small_model("spikformer_cml_4_384")
    good = to_spikingjelly(model)
    with pytest.raises(ValueError, match=r"head.bias is missing"):
        from_spikingjelly({k: v for k, v in good.items() if k != "head.bias"}, model)
    with pytest.raises(ValueError, match=r"1 keys do not belong .* first blocks.7.x"):
        from_spikingjelly({**good, "blocks.7.x": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"head.weight: SpikingJelly's weights have \(5, 32\), the model \(7, 32\)"):
        from_spikingjelly(good, small_model("spikformer_cml_4_384", num_classes=7))
