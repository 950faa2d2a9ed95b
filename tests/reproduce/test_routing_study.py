"""The study trains as `train` does; measuring in between changes nothing."""

import pytest
import torch

from spikingformer.reproduce.routing_study import measuring_points, routing_over_training
from spikingformer.training.recipe import load_recipe
from spikingformer.training.run import train

TINY = ["epochs=2", "schedule.warmup_epochs=1", "model.embed_dim=16", "model.depth=1", "model.num_heads=2",
        "model.time_steps=2", "batch_size=256", "device=cpu", "log.tensorboard=false"]  # fmt: skip


def test_points_are_closer_together_early_on():
    assert measuring_points(100, 5) == [0, 6, 25, 56, 100]
    assert measuring_points(2, 5) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least two points"):
        measuring_points(10, 1)


def test_the_study_trains_the_run_of_its_recipe(tmp_path):
    recipe = load_recipe("digits/spikingformer_cml", TINY)
    said: list[str] = []
    study = routing_over_training(recipe, points=3, pictures=32, say=said.append)
    assert (study["pool"], study["steps"], study["measured_on"]) == ("cml", 10, 32)
    assert [m["step"] for m in study["measurements"]] == [0, 2, 10]
    assert len(said) == 3
    stages = study["measurements"][-1]["stages"]
    assert [s["stage"] for s in stages] == ["stem.stages.2", "stem.stages.3"]
    for s in stages:
        assert s["silent"] + s["single"] + s["several"] == pytest.approx(1)
        assert s["elsewhere_silent"] + s["elsewhere_single"] + s["elsewhere_several"] == pytest.approx(s["elsewhere"])
    assert study["test_top1"] == train(recipe, tmp_path / "run").last_top1


def test_a_study_can_stop_early():
    recipe = load_recipe("digits/spikformer", [*TINY, "threads=1"])
    threads = torch.get_num_threads()
    study = routing_over_training(recipe, points=2, max_steps=2, pictures=8, say=lambda _: None)
    torch.set_num_threads(threads)
    assert (study["pool"], study["steps"], len(study["measurements"])) == ("sps", 2, 2)
