"""parallel=fsdp: processes that hold shares of a model give the single process's numbers and write the same files."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.run_processes import SMALL, complete, final_state, words
from spikingformer.training.checkpoint import load_model
from spikingformer.training.parallel import ELEMENTWISE, check_parallel
from spikingformer.training.recipe import load_recipe

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

# uneven in every way: batches of 255 and 163 over 2 or 4 processes in 2 parts, 359 test samples in batches of 90 (with
# 4 processes three have one batch, one has fewer samples; with 2 one has two batches, the other two of another size),
# widths and 10 classes that 4 processes do not share evenly
EXACT = (
    *SMALL,
    "precision=fp64",
    "epochs=2",
    "batch_size=255",
    "drop_last=false",
    "ema.decay=0.5",
    "sync_batchnorm=true",
    "optimizer.learning_rate=0.01",
    "optimizer.clip_norm=0.05",
    "evaluation_batch_size=179",
)
# SGD is linear in the gradients: sums of n = 255 * 64 float64 terms in another order differ by about n * 2**-53 = 2e-12
# and the steps amplify that (measured: 2e-15 after six steps, 1e-13 after twelve)
SGD = (*EXACT, "optimizer.name=sgd", "optimizer.learning_rate=0.05")
TOLERANCE = 1e-9
SHARED = "parallel=fsdp"


def epochs(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "epoch"]


def assert_same_run(first: Path, second: Path, tolerance: float = TOLERANCE) -> None:
    """Weights, buffers, averages, optimiser, and every epoch's loss and evaluation."""
    a, b = final_state(first), final_state(second)
    assert set(a) == set(b)
    assert any("running_var" in name for name in a)
    assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}
    assert max(float((a[name].double() - b[name].double()).abs().max()) for name in a) < tolerance
    for one, two in zip(epochs(first), epochs(second), strict=True):
        assert (two["top1"], two["top5"]) == (one["top1"], one["top5"])
        assert [two["loss"], two["train_loss"]] == pytest.approx([one["loss"], one["train_loss"]], rel=tolerance)


def run(folder: Path, *overrides: str, ranks: int = 1, resume: bool = False) -> Path:
    codes = complete(folder, overrides, ranks=ranks, resume=resume)
    assert codes == [0] * ranks, words(folder, 0 if ranks > 1 else None)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> str:
    """An override: weights that fire in evaluation; random ones would not, and comparing them would say nothing."""
    learning = ("epochs=10", "batch_size=32", "optimizer.learning_rate=0.01", "schedule.name=constant")
    folder = run(tmp_path_factory.mktemp("begun") / "run", *SMALL, *learning)
    assert epochs(folder)[-1]["top1"] > 15
    return f"model.initial_checkpoint={folder / 'last.safetensors'}"


@pytest.fixture(scope="module")
def single(tmp_path_factory, begun):
    folder = run(tmp_path_factory.mktemp("single") / "run", *SGD, begun)
    assert epochs(folder)[-1]["top1"] > 15
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_equal_one_process(single, begun, tmp_path, ranks):
    folder = run(tmp_path / "run", *SGD, begun, SHARED, ranks=ranks)
    assert_same_run(single, folder)
    assert f"{ranks} processes, each with a share of the model (FSDP2" in words(folder, 0)
    model, info = load_model(folder / "best.safetensors")
    assert not any("DTensor" in type(p).__name__ for p in model.parameters())
    assert info.recipe is not None
    assert info.recipe["parallel"] == "fsdp"


def test_the_comparison_can_fail(single, begun, tmp_path):
    folder = run(tmp_path / "run", *SGD, begun, SHARED, "optimizer.clip_norm=0.049", ranks=2)
    with pytest.raises(AssertionError):
        assert_same_run(single, folder)


def test_shares_and_accumulation_equal_ddp_without_synchronised_batchnorm(begun, tmp_path):
    """Each process normalises with its own part: the first process's statistics count, as under DDP."""
    overrides = (*SGD, begun, "sync_batchnorm=false", "accumulation_steps=2")
    whole = run(tmp_path / "ddp", *overrides, ranks=2)
    shares = run(tmp_path / "fsdp", *overrides, SHARED, ranks=2)
    assert_same_run(whole, shares)


@pytest.mark.parametrize(
    ("first", "second"),
    [((SHARED, 2), ("", 1)), (("", 1), (SHARED, 2)), ((SHARED, 2), ("parallel=ddp", 2)), (("", 2), (SHARED, 4))],
    ids=["shares-to-single", "single-to-shares", "shares-to-ddp", "ddp-to-more-shares"],
)
def test_a_run_goes_on_in_another_form(single, begun, tmp_path, first, second):
    """A run stopped in the middle of its first epoch (at its third save) ends as the unbroken single process."""
    folder = tmp_path / "run"
    for (form, ranks), stop in ((first, stop_after_two_saves), (second, None)):
        overrides = (*SGD, begun, "checkpoint.every_steps=2", *([form] if form else []))
        codes = complete(folder, overrides, ranks=ranks, resume=stop is None, prepare=stop)
        assert codes == ([75] * ranks if stop else [0] * ranks), words(folder, 0 if ranks > 1 else None)
    assert_same_run(single, folder)


def stop_after_two_saves() -> None:
    """Plants a SIGTERM of this process after step 3."""
    import os
    import signal

    from spikingformer.training.loop import Trainer

    step = Trainer.train_step

    def call(self, part):
        if self.progress.global_step == 3 and self.world.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, part)

    Trainer.train_step = call


def test_validation_part_and_resume_with_the_same_shares_are_bit_equal(begun, tmp_path):
    overrides = (*SGD, begun, SHARED, "data.validation_fraction=0.1")
    whole = run(tmp_path / "whole", *overrides, ranks=2)
    folder = tmp_path / "run"
    assert complete(folder, overrides, ranks=2, prepare=stop_after_two_saves) == [75, 75], words(folder, 0)
    run(folder, *overrides, ranks=2, resume=True)
    a, b = final_state(whole), final_state(folder)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((folder / "result.json").read_text())["test_top1"] > 0


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimisers_offered_with_shares(begun, tmp_path, name):
    """Most divide by the gradients' size: for weights whose gradient is zero but for rounding (a bias before BatchNorm)
    they make steps of rounding / eps, 1e-16 / 1e-8 and more. RMSprop differs most (measured: 3e-6 after six steps)."""
    overrides = (*EXACT, begun, "epochs=1", "ema.decay=0", f"optimizer.name={name}")
    one, two = run(tmp_path / "one", *overrides), run(tmp_path / "two", *overrides, SHARED, ranks=2)
    assert_same_run(one, two, 1e-5)


def test_one_process_has_nothing_to_share(tmp_path):
    folder = run(tmp_path / "run", *SMALL, SHARED, "epochs=1", "batch_size=256")
    assert "one process: nothing to share" in words(folder)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("compile=true", "set compile=false"),
        ("channels_last=true", "set channels_last=false"),
        ("sparsity=0.1", "set sparsity=0"),
        ("precision=fp16", "set precision=bf16 or fp32"),
        ("optimizer.name=lamb", "use one of adam, adamw"),
    ],
)
def test_what_shares_do_not_go_with_is_refused(override, advice):
    recipe = load_recipe("recipes/digits/spikingformer_cml.yaml", (SHARED, override))
    with pytest.raises(ValueError, match=f"(?s)parallel: got fsdp, but.*{advice}.*or use parallel=ddp"):
        check_parallel(recipe)
    check_parallel(recipe.model_copy(update={"parallel": "ddp"}))
