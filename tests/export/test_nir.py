"""NIR: parts that it can say run to the same spikes; for the rest, the first layer that it cannot say is named."""

import nir
import pytest
import torch

from spikingformer.export import NotInNIR, export_nir
from spikingformer.export.nir_file import exportable_parts, run_nir

from .conftest import dyadic, exact_model, small_model


@pytest.mark.parametrize(
    ("name", "part", "channels", "size"),
    [
        ("spikingformer_cml_4_384", "blocks.0.mlp", 32, 8),
        ("spikformer_4_384", "blocks.0.mlp", 32, 8),
        ("spikingformer_4_384", "stem.stages.1", 4, 32),
        ("spikingformer_4_384", "blocks.0.attn.q", 32, 8),
    ],
)
def test_part_fires_the_same_spikes_after_a_round_trip(tmp_path, name, part, channels, size):
    model = exact_model(name)
    path = export_nir(model, tmp_path / "part.nir", part=part).path
    x = dyadic(torch.rand(4, 2, channels, size, size) * 4)
    module = dict(model.named_modules())[part]
    with torch.no_grad():
        expected = module(x)
    got = run_nir(nir.read(str(path)), x)
    assert torch.equal(got, expected)  # dyadic weights: every sum is exact
    assert 0 < expected.count_nonzero() < expected.numel()


def test_threshold_itself_fires():
    model = exact_model("spikformer_4_384")
    for module in (model.blocks[0].attn.q,):
        module.conv.weight.data.zero_()
        module.conv.bias.data.fill_(2.0)  # h = 0 + 2 / tau = 1.0 = v_threshold
    from spikingformer.export.nir_file import to_nir

    x = torch.zeros(1, 1, 32, 8, 8)
    assert run_nir(to_nir(model, "blocks.0.attn.q"), x).mean() == 1


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("spikingformer_cml_4_384", "stem.stages.2", "max-pool"),
        ("spikformer_8_384", "stem.stages.0", "max-pool"),
    ],
)
def test_whole_model_is_refused_by_its_first_layer_that_cannot_be_written(tmp_path, name, layer, why):
    model = small_model(name, img_size=32)
    with pytest.raises(NotInNIR, match=f"^{layer} cannot be written to NIR: it {why}") as caught:
        export_nir(model, tmp_path / "m.nir")
    assert caught.value.layer == layer
    assert "blocks.0.mlp" in str(caught.value)
    assert not (tmp_path / "m.nir").exists()


def test_without_pools_attention_is_what_cannot_be_said(tmp_path):
    model = small_model("spikformer_4_384", pooled_stages=(), img_size=8)
    with pytest.raises(NotInNIR, match=r"^blocks.0.attn cannot be written to NIR: it multiplies activations"):
        export_nir(model, tmp_path / "m.nir")


def test_all_offered_parts_can_be_written(tmp_path):
    model = exact_model("spikingformer_4_384")
    parts = exportable_parts(model)
    assert "stem.last" in parts
    for part in parts:
        export_nir(model, tmp_path / "part.nir", part=part)


def test_unknown_part_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no module 'blocks.9': use one of stem.stages.0"):
        export_nir(exact_model("spikingformer_4_384"), tmp_path / "m.nir", part="blocks.9")
