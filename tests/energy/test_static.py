"""Shapes alone: the dense counts of the published models, and expectations under given rates."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from spikingformer.energy import Kind, count_operations, static_counts, with_rates
from spikingformer.energy.comparison import ann_twin
from spikingformer.energy.pricing import price_exact
from spikingformer.energy.rates import Rates
from spikingformer.energy.result import energy_document

from .reference import our_name, read

CONFIGURATIONS = [
    *[f"spikingformer{v}_8_{d}_in224_T4" for v in ("", "_cml") for d in (384, 512, 768)],
    *[f"spikingformer{v}_{c}" for v in ("", "_cml") for c in ("4_384_cifar10_T4", "4_384_cifar100_T4")],
    *[f"spikingformer{v}_2_256_{c}_T16" for v in ("", "_cml") for c in ("dvs128", "cifar10dvs")],
    "spikingformer_cml_8_768_in288_T4",
]


@pytest.mark.parametrize("key", CONFIGURATIONS)
def test_dense_counts_equal_the_published_models(key: str) -> None:
    expected = read("dense_macs.json")[key]
    c = expected["config"]
    shape = (c["T"], c["in_ch"], c["img"], c["img"]) if c["in_ch"] == 2 else (c["in_ch"], c["img"], c["img"])
    facts = static_counts(
        f"spikingformer{'_cml' if c['variant'] == 'cml' else ''}_{c['depth']}_{c['embed_dim']}",
        shape, img_size=c["img"], num_classes=c["classes"], num_heads=c["heads"], time_steps=c["T"],
    )  # fmt: skip
    products = {p.name: p for p in facts.products}
    for layer in expected["layers"]:
        p = products.pop(our_name(layer["name"]))
        ours = (facts.per_sample(p, p.dense, True), facts.per_sample(p, p.valid, True), p.parameters)
        assert ours == (layer["macs"], layer["macs_valid_taps"], layer["params"]), layer["name"]
    assert [p.dense for p in products.values()] == [a["macs"] for a in expected["attention"]]
    assert [p.role for p in products.values()][:2] == (["qk", "qk_v"] if c["attn_order"] == "qk" else ["kv", "q_kv"])
    totals = expected["totals"]
    assert sum(facts.per_sample(p, p.dense, True) for p in facts.products) == totals["macs_total"]
    assert sum(n.updates for n in facts.neurons) == totals["lif_neuron_steps"]
    assert sum(e.count for e in facts.elementwise if e.op == "residual add") == totals["residual_adds"]
    assert sum(e.count * e.stands_for for e in facts.elementwise if e.op == "max pool") == totals["pool_compares"]
    assert facts.parameters == totals["params_effective"]
    assert ann_twin(facts, price_exact(facts)).macs == totals["macs_T1"]


@pytest.mark.parametrize(
    ("name", "options", "dense", "valid"),
    [
        ("spikingformer_8_384", {}, 18_872_982_528, 18_371_634_432),
        ("spikingformer_cml_8_512", {}, 33_436_192_768, 32_545_594_368),
        ("spikingformer_8_768", {}, 74_970_937_344, 72_968_636_928),
        ("spikingformer_cml_4_384", {}, 3_736_145_664, 3_540_867_072),
        ("spikingformer_2_256", {"num_classes": 11}, 6_056_577_792, 5_718_022_912),
    ],
)
def test_totals(name: str, options: dict, dense: int, valid: int) -> None:
    facts = static_counts(name, **options)
    assert sum(facts.per_sample(p, p.dense, True) for p in facts.products) == dense
    assert sum(facts.per_sample(p, p.valid, True) for p in facts.products if p.weighted) == valid


def test_the_dense_network_beside_8_768() -> None:
    facts = static_counts("spikingformer_8_768")
    twin = ann_twin(facts, price_exact(facts))
    assert (round(twin.fp32_mj, 1), round(twin.int8_mj, 2)) == (86.2, 4.31)
    assert twin.break_even_int8 is None  # no rates yet


def test_first_convolution_of_8_768_runs_once_and_stands_for_four() -> None:
    stem = static_counts("spikingformer_8_768").products[0]
    assert (stem.dense, stem.dense * stem.stands_for) == (130_056_192, 520_224_768)


def test_any_rate_scales_the_valid_products() -> None:
    facts = with_rates(static_counts("spikingformer_cml_4_256"), Rates(default=0.25))
    for p in facts.products:
        if p.weighted:
            assert p.events == (p.valid if p.kind == Kind.ANALOG else 0.25 * p.valid)
    first = next(p for p in facts.products if p.role == "qk")
    assert first.events == pytest.approx(0.25**2 * first.dense)


def test_break_even_rate_makes_both_cost_the_same() -> None:
    static = static_counts("spikingformer_8_768")
    facts = with_rates(static, Rates(default=0.2))
    bill = price_exact(facts)
    twin = ann_twin(facts, bill)
    assert twin.break_even_fp32 is not None
    by_component = bill.by_component()
    moving = (
        sum(line.energy_pj for line in bill.lines if line.component in ("synapses", "attention") and line.acs) / 1e9
    )
    scaled = bill.energy_mj + moving * (twin.break_even_fp32 / 0.2 - 1)
    assert scaled == pytest.approx(twin.fp32_mj)
    assert sum(by_component.values()) == pytest.approx(bill.energy_mj)


def test_static_counts_equal_measured_ones() -> None:
    import timm

    from spikingformer.energy import count_operations

    model = timm.create_model("spikingformer_4_256", embed_dim=32, depth=1, num_heads=2, img_size=32)
    measured, static = count_operations(model, [torch.rand(1, 3, 32, 32)]), static_counts(model)
    for a, b in zip(measured.products, static.products, strict=True):
        assert (a.name, a.shape, a.dense, a.valid, a.parameters) == (b.name, b.shape, b.dense, b.valid, b.parameters)
    assert measured.elementwise == static.elementwise


@pytest.mark.parametrize("preset", ["spikformer-lenient", "spikformer-strict", "exact"])
def test_what_energy_printed_gives_the_same_energy_again(tmp_path: Path, preset: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("spikformer_4_256", embed_dim=32, depth=2, num_heads=4).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(norm.bias, 1.5)  # so that neurons fire
    measured = count_operations(model, [torch.randn(4, 3, 32, 32)])
    document = energy_document(measured, preset)
    (tmp_path / "rates.json").write_text(json.dumps(document))
    again = energy_document(with_rates(static_counts(model), Rates.read(tmp_path / "rates.json")), preset)
    rows = {r["name"]: r for r in document["layers"] if r["input_kind"] == "integer" and ".attn." in r["name"]}
    assert any(r["input_mean"] > 1.1 * r["input_rate"] > 0 for r in rows.values())
    for row in again["layers"]:
        if row["name"] in rows:
            assert row["energy_pj"] == pytest.approx(rows[row["name"]]["energy_pj"], rel=1e-9), row["name"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'spikingformer_8_768'"):
        static_counts("spikingformer_8_786")
    with pytest.raises(ValueError, match="input_shape"):
        static_counts(nn.Linear(2, 2))
    static = static_counts("spikingformer_cml_4_256")
    with pytest.raises(ValueError, match="no rate for"):
        with_rates(static, Rates({"stem.stages.1.conv": 0.1}))
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"stem": "high"}))
    with pytest.raises(ValueError, match=r"r\.json.*stem"):
        Rates.read(file)
    with pytest.raises(ValueError, match="no rates file"):
        Rates.read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": "spikingformer-energy/1"}, "layers: expected a list, got nothing"),
        ({"schema": "spikingformer-energy/1", "layers": 3}, "layers: expected a list, got 3"),
        ({"schema": "spikingformer-energy/1", "layers": [3]}, "layers[0]: expected an object with a name, got 3"),
        ({"schema": "spikingformer-energy/1", "layers": [{}]}, "layers[0]: expected an object with a name, got {}"),
        (
            {"schema": "spikingformer-energy/1", "layers": [], "attention": [{"name": "a", "q_rate": 0.1}]},
            "attention 'a': expected the rates of q, k and v, three numbers of at least 0, got [0.1, None, None]",
        ),
        ({"inputs": [0.1]}, "inputs: expected an object of layer names and rates, got [0.1]"),
        ({"inputs": {"stem": None}}, "inputs 'stem': expected a rate, a number of at least 0, got None"),
        ({"inputs": {"stem": -1}}, "inputs 'stem': expected a rate, a number of at least 0, got -1"),
        ({"inputs": {"stem": True}}, "inputs 'stem': expected a rate, a number of at least 0, got True"),
        ({"inputs": {"stem": float("nan")}}, "inputs 'stem': expected a rate, a number of at least 0, got nan"),
        ({"stem": "high"}, "'stem': expected a rate, a number of at least 0, got 'high'"),
        ({"attention": 0.1}, "attention: expected an object of attention names and rates, got 0.1"),
        ({"attention": {"a": 0.1}}, "attention 'a': expected the rates of q, k and v, three numbers of at least 0"),
        ({"attention": {"a": "123"}}, "attention 'a': expected the rates of q, k and v, three numbers of at least 0"),
        ({"attention": {"a": [1, 2]}}, "attention 'a': expected the rates of q, k and v, three numbers of at least 0"),
        ({"attention": {"a": ["1", 2, 3]}}, "attention 'a': expected the rates of q, k and v, three numbers"),
        ([0.1], "expected an object of layer names and rates, got [0.1]"),
    ],
    ids=repr,
)
def test_a_malformed_rates_file_is_refused_by_file_and_field(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")):
        Rates.read(file)


def test_a_rates_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"r\.json is not JSON"):
        Rates.read(file)
