"""Losses that are not finite, memory that runs out, readers that die, pictures that cannot be read."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.run_processes import SMALL
from spikingformer.data.folder import UnreadablePicture, part_root
from spikingformer.data.loading import Batch, SampleEvaluation, Step, collate
from spikingformer.training import run as run_module
from spikingformer.training.distributed import World
from spikingformer.training.loop import NonFiniteLoss
from spikingformer.training.out_of_memory import OutOfMemory, largest_fitting, out_of_memory
from spikingformer.training.recipe import load_recipe
from spikingformer.training.run import train
from spikingformer.training.state import load_state

SHORT = (*SMALL, "epochs=1", "batch_size=256", "log.every_steps=1")


def recipe(*overrides: str):
    return load_recipe("recipes/digits/spikingformer_cml.yaml", (*SHORT, *overrides))


@pytest.fixture
def plant(monkeypatch):
    """plant(hook): the run's model gets `hook(module, inputs, output)` as a forward hook."""
    build = run_module.build_model

    def planted(hook):
        def build_with_hook(*args):
            model = build(*args)
            model.register_forward_hook(hook)
            return model

        monkeypatch.setattr(run_module, "build_model", build_with_hook)

    return planted


class NaNAt:
    """The logits of these training calls become NaN (counted over the whole test)."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, module, inputs, output):
        if not module.training:
            return None
        self.count += 1
        return output * float("nan") if self.count - 1 in self.calls else None


def test_nonfinite_stop_says_where_and_what_to_try(plant, tmp_path):
    plant(NaNAt(3))
    with pytest.raises(
        NonFiniteLoss, match=r"the loss is nan in epoch 1, step 3, learning rate .* --resume continues"
    ) as caught:
        train(recipe("checkpoint.every_steps=2"), tmp_path / "run", world=World())
    for advice in ("optimizer.clip_norm=1", "nonfinite=skip", "nonfinite=step_back"):
        assert advice in str(caught.value)
    state, _ = load_state(tmp_path / "run")
    assert state is not None
    assert state.progress.step == 2
    assert all(bool(torch.isfinite(t).all()) for t in state.tensors.values() if t.is_floating_point())


def test_nonfinite_skip_counts(plant, tmp_path):
    plant(NaNAt(1, 3))
    result = train(recipe("nonfinite=skip"), tmp_path / "run", world=World())
    assert result.skipped_steps == 2
    state, _ = load_state(tmp_path / "run")
    assert state is not None
    assert state.progress.updates == 3
    assert all(bool(torch.isfinite(state.tensors[name]).all()) for name in state.tensors if name.endswith("weight"))


def test_nonfinite_step_back_halves_the_learning_rate(plant, tmp_path):
    plant(NaNAt(3))
    train(recipe("nonfinite=step_back", "checkpoint.every_steps=2"), tmp_path / "run", world=World())
    state, _ = load_state(tmp_path / "run")
    assert state is not None
    assert (state.progress.step_backs, state.progress.learning_rate_factor) == (1, 0.5)
    assert state.progress.finished


def test_nonfinite_step_back_gives_up(plant, tmp_path):
    plant(NaNAt(*range(3, 100)))
    with pytest.raises(
        NonFiniteLoss, match="the loss is nan in epoch 1, step 2, .* after going back 5 times"
    ) as caught:
        train(recipe("nonfinite=step_back", "checkpoint.every_steps=2"), tmp_path / "run", world=World())
    assert "nonfinite=step_back" not in str(caught.value), "what was done already is no advice"


def full_above(samples: int):
    def hook(module, inputs, output):
        if len(inputs[0]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return hook


def test_out_of_memory_names_the_batch_that_fits(plant, tmp_path):
    plant(full_above(40))
    with pytest.raises(OutOfMemory) as caught:
        train(recipe(), tmp_path / "run", world=World())
    text = str(caught.value)
    assert "out of memory with a micro-batch of 256 samples (CUDA out of memory. Tried to allocate 2.00 GiB)" in text
    assert "A micro-batch of 32 samples fits (tried just now): accumulation_steps=8 keeps batch_size=256" in text
    assert "precision=bf16 also needs less. A run with another micro-batch, batch or precision is another run" in text
    assert "--resume" not in text, "on the CPU nothing that helps goes on from the checkpoint"
    plant(full_above(40))
    train(recipe("accumulation_steps=8", "evaluation_batch_size=32"), tmp_path / "fits", world=World())


def on_a_gpu(settings, graphs: bool):
    """A gradient step's stand-in whose four samples do fit when they are tried again."""
    model = torch.nn.Linear(2, 2)
    return SimpleNamespace(
        recipe=settings,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        world=World(),
        device=torch.device("cuda"),
        dtype=torch.float32,
        autocast=nullcontext,
        drop_graphs=lambda: graphs,
    )


FOUR = Step([Batch(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))], 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_out_of_memory_on_a_gpu_names_what_goes_on_with_resume(recompute):
    settings = recipe(f"grad_checkpointing={recompute}".lower())
    text = str(out_of_memory(on_a_gpu(settings, graphs=False), FOUR, "full"))
    resumes = "grad_checkpointing=true keeps no spikes and gives the same numbers: add it and continue with --resume."
    assert (resumes in text) != recompute


def test_out_of_memory_where_only_the_graphs_do_not_fit():
    text = str(out_of_memory(on_a_gpu(recipe(), graphs=True), FOUR, "full"))
    assert "All 4 samples fit without the memory that CUDA graphs keep (tried just now): add cuda_graph=false" in text
    assert "accumulation_steps" not in text
    assert "another run" not in text, "cuda_graph may change within a run"


def test_out_of_memory_that_has_passed():
    text = str(out_of_memory(on_a_gpu(recipe(), graphs=False), FOUR, "full"))
    assert "All 4 samples fit when tried again just now" in text
    assert "accumulation_steps=2 keeps batch_size=256" in text


def test_out_of_memory_beside_other_processes_takes_no_more_memory():
    gradient = on_a_gpu(recipe(), graphs=False)
    gradient.world = World(size=2)
    uploaded = SimpleNamespace()  # no `to`: it may not be copied to another type
    text = str(out_of_memory(gradient, Step([Batch(uploaded, FOUR.parts[0].labels)], 8), "full"))
    assert "A micro-batch of 2 samples may fit (not tried: other processes wait)" in text


def test_out_of_memory_with_a_single_sample():
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(full_above(0))
    assert largest_fitting(model, torch.zeros(4, 2), nullcontext) == 0


class Numbers:
    """`count` one-pixel samples; number `bad` cannot be read, or ends the process that reads it."""

    def __init__(self, count: int, bad: int, deadly: bool = False) -> None:
        self.count, self.bad, self.deadly = count, bad, deadly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index == self.bad:
            if self.deadly:
                os._exit(9)
            return UnreadablePicture(f"{index:06}.jpg", "image file is truncated"), 0
        return torch.zeros(1, 1, 1), 0


CPU = torch.device("cpu")


def test_one_corrupt_picture_in_100_000_is_skipped_and_counted(monkeypatch):
    monkeypatch.setattr("spikingformer.data.loading.seeded_generators", lambda seed: nullcontext())  # 70 s of seeding
    loader = SampleEvaluation(Numbers(100_000, 77_777), None, 10_000, 0, CPU, "skip")
    batches = list(loader.batches())
    assert sum(len(batch.labels) for batch in batches) == 99_999
    assert sum(batch.unreadable for batch in batches) == 1


def test_a_corrupt_picture_stops_and_is_named():
    loader = SampleEvaluation(Numbers(100, 77), None, 10, 0, CPU, "stop")
    with pytest.raises(ValueError, match=r"000077\.jpg: not a readable picture \(image file is truncated\)") as caught:
        list(loader.batches())
    assert "data.unreadable=skip" in str(caught.value)


def test_a_batch_of_nothing_readable_stops_even_under_skip():
    loader = SampleEvaluation(Numbers(1, 0), None, 10, 0, CPU, "skip")
    with pytest.raises(ValueError, match=r"would skip all 1 of a batch: is the data complete\?"):
        list(loader.batches())


def test_collate_counts():
    inputs, labels, unreadable = collate([(torch.zeros(1), 4), (UnreadablePicture("a", "b"), 5)])
    assert inputs is not None
    assert (inputs.shape, labels.tolist(), len(unreadable)) == ((1, 1), [4], 1)


def test_a_reader_that_dies():
    loader = SampleEvaluation(Numbers(20, 7, deadly=True), None, 5, 1, CPU, "stop")
    with pytest.raises(ValueError, match=r"a process that reads pictures has died .*workers=N .*--resume"):
        list(loader.batches())


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Two classes of 10 + 2 generated JPEG files; one training file is cut off."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    cut = tmp_path / "pictures" / "train" / "dog" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    return tmp_path / "pictures"


def picture_recipe(root: Path, *overrides: str):
    return recipe(
        "data.name=folder",
        f"data.root={root}",
        "data.channels=3",
        "data.image_size=16",
        "augment.engine=per_sample",
        "batch_size=5",
        "epochs=2",
        "augment.crop_padding=0",
        *overrides,
    )


def test_a_run_skips_and_counts_corrupt_pictures(photographs, tmp_path):
    result = train(picture_recipe(photographs, "data.unreadable=skip"), tmp_path / "run", world=World())
    assert result.unreadable == 2, "once an epoch"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["unreadable"] == 2


def test_a_run_stops_on_a_corrupt_picture(photographs, tmp_path):
    with pytest.raises(ValueError, match=r"dog/3\.jpg: not a readable picture"):
        train(picture_recipe(photographs), tmp_path / "run", world=World())


def test_augmentation_at_its_largest_magnitude():
    """timm's RandAugment asks Pillow for 0 bits at magnitude 10, which Pillow 13 refuses: a run would end there."""
    from spikingformer.data.per_sample import posterize, training_transform

    settings = recipe("data.channels=3", "augment.rand_augment=rand-m10-n8-inc1", "augment.engine=per_sample")
    transform = training_transform(settings.data, settings.augment, (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    for _ in range(40):
        assert bool(torch.isfinite(transform(Image.new("RGB", (16, 16), (200, 100, 50)))).all())
    assert posterize(Image.new("RGB", (1, 1), (255, 17, 3)), 4).getpixel((0, 0)) == (240, 16, 0)
    assert posterize(Image.new("RGB", (1, 1), (255, 17, 3)), 0).getpixel((0, 0)) == (0, 0, 0)


def test_a_missing_archive_says_what_is_there(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no val\.tar or .* in it \(it holds: train\.tar\)"):
        part_root(tmp_path, "test", archive=True)
