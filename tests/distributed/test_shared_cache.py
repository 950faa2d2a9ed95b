"""Several processes of a machine build one frame cache once."""

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.run_processes import SMALL, complete, words
from spikingformer.data.events import write_aedat20
from spikingformer.data.events.catalogue import CATALOGUE
from tests.data.events.event_recordings import random_events

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

RECIPE = "recipes/cifar10dvs/spikingformer_cml_t10.yaml"
SHORT = (*SMALL, "data.image_size=16", "data.frames=2", "epochs=1", "schedule.cooldown_epochs=0", "batch_size=40")


def write_recordings(root: Path) -> Path:
    """CIFAR10-DVS's layout: ten recordings a class."""
    for label, name in enumerate(CATALOGUE["cifar10dvs"].class_names):
        (root / name).mkdir(parents=True)
        for i in range(10):
            write_aedat20(root / name / f"cifar10_{name}_{i}.aedat", random_events(50, seed=10 * label + i))
    return root


def note_builds() -> None:
    """Notes each call in builds.txt: process, workers, whether the cache was whole; the first process is slow."""
    from spikingformer.data.events import event_set

    build = event_set.build_frame_cache

    def noted(folder, samples, frame_format, root, workers, progress):
        if os.environ["RANK"] == "0":
            time.sleep(1)
        whole = any(folder.glob("*/cache.json"))
        with (folder.parent / "builds.txt").open("a") as file:
            file.write(f"{os.environ['RANK']} {workers} {whole}\n")
        return build(folder, samples, frame_format, root, workers, progress)

    event_set.build_frame_cache = noted


def test_the_first_process_builds_the_frame_cache_and_the_others_open_it(tmp_path):
    folder, root = tmp_path / "run", write_recordings(tmp_path / "data")
    codes = complete(folder, (*SHORT, f"data.root={root}", "workers=2"), ranks=2, recipe=RECIPE, prepare=note_builds)
    assert codes == [0, 0], words(folder, 0) + words(folder, 1)
    assert (root / "builds.txt").read_text().splitlines() == ["0 2 False", "1 0 True"]


def test_all_processes_hear_why_there_is_no_cache(tmp_path):
    folder, root = tmp_path / "run", write_recordings(tmp_path / "data")
    (root / "cat" / "cifar10_cat_3.aedat").write_bytes(b"no recording")
    assert complete(folder, (*SHORT, f"data.root={root}", "workers=2"), ranks=2, recipe=RECIPE) == [2, 2]
    for rank in (0, 1):
        assert "cifar10_cat_3.aedat" in words(folder, rank)
