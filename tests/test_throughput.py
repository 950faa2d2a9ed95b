"""`spikingformer bench`: what it reports (never how fast)."""

import pytest
import timm
import torch

from spikingformer.benchmarks import firing_rate, measure, sweep
from spikingformer.cli import main
from spikingformer.training.checkpoint import load_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("spikingformer_cml_4_384", embed_dim=32, depth=1, num_heads=4, img_size=16)


def test_a_look_at_the_rate_moves_nothing(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rate = firing_rate(model, torch.randn(4, 3, 16, 16))
    assert 0 < rate < 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_fields(model, mode):
    r = measure(model, 2, mode, repeats=2)
    assert (r.batch, r.mode, r.device, r.dtype) == (2, mode, "cpu", "float32")
    assert r.samples_per_second == pytest.approx(2e3 / r.milliseconds)
    assert r.peak_memory_mb > 10
    assert not r.cuda_graph


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_training_is_timed_as_train_runs_it(model, mode):
    r = measure(model, 2, mode, "cuda", torch.bfloat16, repeats=2)
    assert r.cuda_graph == (mode == "training")
    assert r.samples_per_second > 0


def test_sweep_takes_the_batches_asked_for(model):
    rows = list(sweep(model, [1, 3], "inference", "cpu", torch.float32, 1))
    assert [r.batch for r in rows] == [1, 3]


def test_unknown_mode(model):
    with pytest.raises(ValueError, match="mode must be one of inference, training, got 'test'"):
        measure(model, 1, "test")


def test_command_times_the_weights_that_a_name_stands_for(monkeypatch, capsys):
    timed = []
    monkeypatch.setattr("spikingformer.benchmarks.sweep", lambda model, *_: timed.append(model) or [])
    assert main(["bench", "spikingformer_cml_4_384.digits", "--json"]) == 0
    expected = load_model("spikingformer_cml_4_384.digits")[0].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in timed[0].state_dict().items())
    assert main(["bench", "resnet18"]) == 2
    assert "'resnet18' is not a model of this package" in capsys.readouterr().err
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "1", "3", "--precision", "bf16"], ([1, 3], torch.bfloat16)),
        (["--batch", "2", "--dtype", "float16"], ([2], torch.float16)),
        ([], (None, torch.float32)),
    ],
    ids=["as other commands", "as before", "default"],
)
def test_command_takes_the_names_of_the_other_commands(monkeypatch, words, expected):
    seen = []
    monkeypatch.setattr(
        "spikingformer.benchmarks.sweep", lambda _, batches, mode, place, dtype, n: seen.append((batches, dtype)) or []
    )
    assert main(["bench", "spikingformer_cml_4_384.digits", "--json", *words]) == 0
    assert seen == [expected]
