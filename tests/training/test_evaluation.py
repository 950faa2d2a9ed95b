"""Evaluation leaves a model in the mode that it found, and its data has the model's classes."""

import pytest
import torch

from spikingformer.data.loading import Batch, EvaluationLoader
from spikingformer.data.settings import DataSettings
from spikingformer.export import compare_int8
from spikingformer.export.anytime import step_logits
from spikingformer.native import status
from spikingformer.training.checkpoint import create_model
from spikingformer.training.distributed import World
from spikingformer.training.evaluation import evaluate
from spikingformer.training.inputs import create_test_loader

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 8, "in_chans": 1, "num_classes": 10, "time_steps": 2}


class Loader(EvaluationLoader):
    """One batch, then, if asked, a file that cannot be read."""

    def __init__(self, broken: bool) -> None:
        self.samples, self.broken = 4, broken

    def batches(self):
        yield Batch(torch.zeros(4, 1, 8, 8), torch.arange(4))
        if self.broken:
            raise ValueError("unreadable")


def pairs(loader):
    return ((batch.inputs, batch.labels) for batch in loader.batches())


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, loader: evaluate(model, loader, 10),
        lambda model, loader: step_logits(model, pairs(loader)),
        pytest.param(
            lambda model, loader: compare_int8(model, pairs(loader)),
            marks=pytest.mark.skipif(not status().available, reason="no compiled kernels"),
        ),
    ],
    ids=["evaluate", "anytime", "int8"],
)
def test_every_modules_mode_is_put_back(run, broken):
    model = create_model("spikingformer_cml_4_256", SMALL).train()
    model.stem.eval()  # as of somebody who keeps BatchNorm's statistics
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    if broken:
        with pytest.raises(ValueError, match="unreadable"):
            run(model, Loader(broken))
    else:
        run(model, Loader(broken))
    assert [module.training for module in model.modules()] == before


def test_data_of_another_number_of_classes_are_refused_before_they_are_read():
    data = DataSettings(name="digits", image_size=8, channels=1)
    with pytest.raises(ValueError, match="digits has 10 classes, but the model has 9: choose the data"):
        create_test_loader(data, 8, 0, torch.device("cpu"), World(), classes=9)
