"""Rates while training, and training towards fewer operations."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spikingformer.energy import count_operations, get_preset
from spikingformer.energy.monitor import RateMonitor
from spikingformer.energy.sparsity import SparsityTerm
from spikingformer.training.recipe import load_recipe
from spikingformer.training.run import train

from .test_counting import small


def test_a_look_names_dead_layers_and_saturated_channels() -> None:
    model = small().train()
    nn.init.constant_(model.blocks[0].attn.q.bn.weight, 0)
    nn.init.constant_(model.blocks[0].attn.q.bn.bias, -100)
    model.blocks[0].mlp.fc1.bn.bias.data[3] = 1e6
    x = torch.rand(6, 3, 16, 16)
    report = RateMonitor(model, samples=4).look([x[:3], x[3:]])
    assert report.samples == 4
    assert report.dead_layers == ["blocks.0.attn.q.lif", "blocks.0.attn.attn_lif"]  # no query, no attention
    assert 3 in report.saturated["blocks.0.mlp.fc1.lif"]
    assert any("blocks.0.attn.q.lif never fired on 4 samples" in p for p in report.problems())
    facts = count_operations(model, [x[:4]])
    assert report.energy_mj == pytest.approx(get_preset("exact").price(facts).energy_mj)
    assert set(report.metrics()) == {"firing_rate", "energy_mj", "sops", "silent_channels", "saturated_channels"}
    assert model.training


def test_term_is_the_weighted_rate_that_was_counted() -> None:
    model = small(time_steps=3)
    x = torch.rand(4, 3, 16, 16)
    with SparsityTerm(model) as term:
        model(x)
        value = term.value().item()
    assert not any(m._forward_pre_hooks for m in model.modules())
    spiking = [p for p in count_operations(model, [x]).products if p.weighted and p.kind.label == "binary"]
    expected = sum(p.input.mean * p.valid for p in spiking) / sum(p.valid for p in spiking)
    assert value == pytest.approx(expected, rel=1e-5)


def trained(weight: float) -> float:
    """Energy after a few steps of training with the term."""
    torch.manual_seed(3)
    model, x, y = small(), torch.rand(16, 3, 16, 16), torch.randint(0, 3, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with SparsityTerm(model) as term:
        for _ in range(12):
            model.train()
            loss = nn.functional.cross_entropy(model(x), y) + weight * term.value()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return get_preset("exact").price(count_operations(model, [x])).energy_mj


def test_training_with_the_term_lowers_energy() -> None:
    plain, sparse = trained(0.0), trained(10.0)
    assert sparse < 0.95 * plain


def test_value_without_a_forward_pass_is_an_error() -> None:
    with SparsityTerm(small()) as term, pytest.raises(RuntimeError, match="before value"):
        term.value()
    with pytest.raises(ValueError, match="nothing to make sparse"):
        SparsityTerm(nn.Conv2d(3, 2, 1), (3, 4, 4))


def run_digits(folder: Path, *overrides: str) -> list[dict]:
    """Epoch records of a tiny run."""
    small_run = ["epochs=2", "schedule.warmup_epochs=0", "model.embed_dim=32", "model.depth=1", "model.num_heads=2",
                 "threads=1", "log.tensorboard=false", "log.rate_samples=32", "device=cpu"]  # fmt: skip
    train(load_recipe("recipes/digits/spikingformer_cml.yaml", [*small_run, *overrides]), folder)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "epoch"]


def test_a_run_logs_rates_and_a_recipe_can_ask_for_fewer_operations(tmp_path: Path) -> None:
    plain, sparse = run_digits(tmp_path / "plain"), run_digits(tmp_path / "sparse", "sparsity=5")
    for record in (*plain, *sparse):
        assert 0 <= record["firing_rate"] <= 1
        assert record["energy_mj"] > 0
    assert sparse[-1]["sops"] < plain[-1]["sops"]
    assert plain[-1]["train_loss"] != sparse[-1]["train_loss"]
    without = run_digits(tmp_path / "without", "log.rate_samples=0")
    assert "firing_rate" not in without[-1]
    assert [r["train_loss"] for r in without] == [r["train_loss"] for r in plain]  # looking changes nothing


def test_sparsity_and_compile_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsity > 0"):
        run_digits(tmp_path, "sparsity=1", "compile=true")
