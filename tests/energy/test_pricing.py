"""Presets against the published logs, a hand computation, and NeuroBench."""

import warnings

import pytest
import torch
from torch import nn

from spikingformer.energy import count_operations, static_counts, with_rates
from spikingformer.energy.memory import (
    MEMORY_MODELS,
    add_memory,
    ann_memory_mj,
    interpolated_access,
    smallest_access,
)
from spikingformer.energy.pricing import PRESETS, get_preset, price_exact
from spikingformer.energy.rates import Rates

from .reference import our_name, read
from .test_counting import small


def log_facts(log: str, model: str) -> object:
    data = read("official_energy_logs.json")[log]
    inputs = {our_name(r["name"]): r["ac"] / r["dense"] for r in data["rows"] if "Conv" in r["type"] and r["ac"]}
    qkv = {f"blocks.{i}.attn": tuple(rates) for i, rates in enumerate(data["qkv_rates"])}
    return with_rates(static_counts(model), Rates(inputs, qkv))


@pytest.mark.parametrize(
    ("log", "model", "as_logged", "real_heads"),
    [
        ("s512", "spikingformer_8_512", 7.463502602, 7.463502602),
        ("s768", "spikingformer_8_768", 13.658864952, 13.6747),
        ("cml768", "spikingformer_cml_8_768", 16.306188155, 16.3216),
    ],
)
def test_published_logs_from_their_rates(log: str, model: str, as_logged: float, real_heads: float) -> None:
    facts = log_facts(log, model)
    assert get_preset("spikingformer-log").price(facts).energy_mj == pytest.approx(as_logged, abs=1e-9)
    paper = get_preset("spikingformer-paper").price(facts)
    assert paper.energy_mj == pytest.approx(real_heads, abs=5e-5)
    assert paper.macs / 1e6 == pytest.approx({"s512": 347.3295}.get(log, 520.9938), abs=1e-4)


def test_ssa_of_the_768_log_with_both_head_counts() -> None:
    facts = log_facts("s768", "spikingformer_8_768")
    for preset, expected in (("spikingformer-log", 35.095423), ("spikingformer-paper", 52.643)):
        bill = get_preset(preset).price(facts)
        acs = sum(line.acs for line in bill.lines if line.component == "attention")
        assert acs / 1e6 == pytest.approx(expected, abs=1e-3)


def test_exact_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False))
    model[0].weight.data.fill_(1)
    x = torch.tensor([[[[0.5, 0.0], [0.25, 2.0]]]])
    bill = price_exact(count_operations(model.eval(), [x]))
    lines = {(line.name, line.component): (line.macs, line.acs, line.energy_pj) for line in bill.lines}
    assert lines[("0", "synapses")] == (6, 0, pytest.approx(6 * 4.6))  # three pixels, two channels
    assert lines[("0", "bias")] == (0, 8, pytest.approx(8 * 0.9))


def test_integer_inputs_are_a_named_choice() -> None:
    facts = count_operations(small("spikformer_4_256"), [torch.rand(2, 3, 16, 16)])
    lenient, strict = (get_preset(f"spikformer-{k}").price(facts) for k in ("lenient", "strict"))
    assert any(p.kind.label == "integer" for p in facts.products)
    assert strict.macs > lenient.macs
    assert strict.acs < lenient.acs
    assert strict.energy_mj > lenient.energy_mj


def test_still_picture_first_convolution_is_priced_once_or_at_every_step() -> None:
    facts = count_operations(small(time_steps=4), [torch.rand(2, 3, 16, 16) + 0.1])
    stem = facts.products[0]
    exact = price_exact(facts).lines[0]
    paper = get_preset("spikingformer-paper").price(facts).lines[0]
    assert exact.macs == stem.valid / 2
    assert paper.macs == 4 * stem.dense / 2


def test_every_preset_prices_every_family() -> None:
    for name in ("spikingformer_4_256", "spikformer_cml_4_256"):
        facts = count_operations(small(name), [torch.rand(2, 3, 16, 16)])
        for preset in PRESETS.values():
            bill = preset.price(facts)
            assert bill.energy_mj > 0
            assert sum(bill.by_component().values()) == pytest.approx(bill.energy_mj)


def test_memory_models_add_and_grow_with_size() -> None:
    facts = count_operations(small(), [torch.rand(2, 3, 16, 16)])
    plain = price_exact(facts).energy_mj
    for name in MEMORY_MODELS:
        bill = add_memory(price_exact(facts), facts, name)
        assert bill.energy_mj == pytest.approx(plain) if name == "none" else bill.energy_mj > plain
    assert ann_memory_mj(facts, "none") == 0
    assert ann_memory_mj(facts, "sram64") > 0
    assert [interpolated_access(b) for b in (1, 8192, 32768, 1048576, 1e12)] == [10, 10, 20, 100, 1300]
    assert [smallest_access(b) for b in (1, 8193, 32769, 1048577)] == [10, 20, 100, 1300]
    with pytest.raises(ValueError, match="lemaire2022"):
        add_memory(price_exact(facts), facts, "lemaire")


def test_unknown_preset_lists_the_names() -> None:
    with pytest.raises(ValueError, match="spikingformer-paper"):
        get_preset("paper")


def test_neurobench_preset_equals_the_neurobench_package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs_of = pytest.importorskip("neurobench.metrics.utils.layers").single_layer_MACs
    model = small("spikingformer_4_256")
    model.blocks[0].mlp.fc1.conv.weight.data[::2] = 0
    inputs: list[tuple[nn.Module, torch.Tensor]] = []
    handles = [m.register_forward_hook(lambda m, args, out: inputs.append((m, args[0].clone())))
               for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]  # fmt: skip
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    macs = acs = dense = 0.0
    for layer, values in inputs:
        with torch.no_grad():
            operations, spiking = macs_of(values, layer)
            total, _ = macs_of(values, layer, total=True)
        acs += float(operations) if spiking else 0
        macs += 0 if spiking else float(operations)
        dense += float(total)
    facts = count_operations(model, [x])
    bill = get_preset("neurobench").price(facts)
    assert (bill.macs * 3, bill.acs * 3) == pytest.approx((macs, acs), rel=1e-12)
    assert sum(p.valid for p in facts.products if p.weighted) == dense


def test_an_unknown_memory_model_has_no_price() -> None:
    facts = with_rates(static_counts("spikingformer_cml_2_256"), Rates(default=0.1))
    for price in (ann_memory_mj, lambda f, name: add_memory(price_exact(f), f, name)):
        with pytest.raises(ValueError, match="unknown memory model 'sram65': use one of none, lemaire2022, sram64"):
            price(facts, "sram65")
