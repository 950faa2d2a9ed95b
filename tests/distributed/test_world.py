"""Who this process is among all, and which samples are its own."""

import numpy as np
import pytest

from spikingformer.data.sampling import StepPlan, evaluation_batches
from spikingformer.training.distributed import World, read_world


def test_torchrun_variables():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_world(env) == World(5, 8, 1, 2)


def test_slurm_variables():
    env = {
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "node1",
    }
    assert read_world(env) == World(9, 16, 1, 0)
    assert read_world({**env, "SLURM_RESTART_COUNT": "1"}).restarts == 1, "a requeued job resumes"


def test_slurm_without_address_says_what_to_export():
    env = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set: export MASTER_ADDR=\$\(scontrol"):
        read_world(env)


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}], ids=["nothing", "slurm-batch-script"])
def test_single_process(env):
    assert read_world(env) == World()


def test_torchrun_inside_slurm_wins():
    env = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}
    assert read_world(env).size == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 3, 50, 359])
def test_evaluation_counts_every_sample_once(samples, ranks):
    seen = [rows for rank in range(ranks) for rows in evaluation_batches(samples, 16, rank, ranks)]
    assert sorted(np.concatenate(seen)) == list(range(samples))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 4), (8, 2)])
def test_training_deals_every_sample_at_most_once_and_keeps_the_global_batch(ranks, parts, drop_last):
    plans = [StepPlan(359, 64, 0, drop_last, parts, rank, ranks) for rank in range(ranks)]
    order = plans[0].order(3)
    seen = []
    for step in range(plans[0].steps_per_epoch):
        dealt = [plan.parts(order, step) for plan in plans]
        assert len({len(mine) for mine, _ in dealt}) == 1, "every process meets the others equally often"
        assert all(len(part) for mine, _ in dealt for part in mine)
        rows = np.concatenate([part for mine, _ in dealt for part in mine])
        assert {samples for _, samples in dealt} == {len(rows)}
        assert sorted(rows) == sorted(order[step * 64 : step * 64 + len(rows)]), (
            "the published batch, whatever the world"
        )
        seen.append(rows)
    left_out = 359 - len(np.concatenate(seen))
    assert left_out == (359 % 64 if drop_last or ranks > 359 % 64 else 0)
