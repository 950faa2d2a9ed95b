"""Full-size recipes of our own that wait for a GPU: they parse, say that they were not run, and train."""

import timm
import torch
from PIL import Image

from spikingformer.data import sources
from spikingformer.data.pictures import PictureSet
from spikingformer.training.checkpoint import load_model
from spikingformer.training.recipe import find_recipe, load_recipe
from spikingformer.training.run import train

OURS, PUBLISHED = (f"recipes/cifar10/spikingformer_cml_4_384_{name}.yaml" for name in ("ours", "400e"))


def few_pictures(name, root, part):
    """Noise in the shape of CIFAR-10: 20 pictures to train, 10 to test."""
    generator = torch.Generator().manual_seed(0)
    count = 20 if part == "train" else 10
    pictures = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    return PictureSet(pictures, labels, tuple(f"class{i}" for i in range(10)), (0.5,) * 3, (0.25,) * 3)


def test_it_takes_the_published_passes_and_model_and_claims_nothing():
    ours, published = load_recipe(OURS), load_recipe(PUBLISHED)
    assert ours.total_epochs == published.total_epochs
    assert ours.model.model_copy(update={"drop_path_rate": 0.0}) == published.model
    assert ours.data == published.data
    assert "not run: needs a GPU" in find_recipe(OURS).read_text()


def test_two_steps_with_one_time_step_and_two_with_more_at_a_small_size(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "load_cifar", few_pictures)
    small = [
        "model.embed_dim=16", "model.depth=1",
        "model.num_heads=2", "model.time_steps=2", "epochs=2", "schedule.warmup_epochs=0", "schedule.early_epochs=1",
        "batch_size=10",
        "evaluation_batch_size=10", "device=cpu", "threads=1", "log.tensorboard=false", "log.every_steps=1",
    ]  # fmt: skip
    before = torch.get_num_threads()
    try:
        result = train(load_recipe(OURS, small), tmp_path / "run")
    finally:
        torch.set_num_threads(before)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "step"' in line for line in lines) == 4
    assert 0 <= result.best_top1 <= 100


def test_the_recipe_for_pictures_of_ones_own_fine_tunes_what_ships(tmp_path, capsys):
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog", "elk"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(tmp_path / "pictures" / part / name / f"{i}.png")
    overrides = [
        f"data.root={tmp_path}/pictures", "epochs=1", "schedule.warmup_epochs=0", "batch_size=6", "workers=0",
        "model.time_steps=1", "device=cpu", "log.tensorboard=false",
    ]  # fmt: skip
    train(load_recipe("recipes/folder/spikingformer_cml.yaml", overrides), tmp_path / "run")
    model, info = load_model(tmp_path / "run")
    assert info.class_names == ("cat", "dog", "elk")
    assert "except its head of 10 classes: the new head has 3" in capsys.readouterr().err
    shipped = timm.create_model("spikingformer_cml_4_384.cifar10_minutes", pretrained=True)
    assert model.config.num_heads == shipped.config.num_heads
    tuned, before = (m.get_parameter("blocks.0.attn.q.conv.weight").detach() for m in (model, shipped))
    assert 0 < (tuned - before).abs().max() < 0.1
