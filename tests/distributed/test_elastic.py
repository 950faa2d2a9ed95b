"""torchrun restarts after a killed rank; training goes on by itself and ends as an unbroken run of as many ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.run_processes import RECIPE, SMALL, complete, differing, final_state, words

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def ranks_below(process: int) -> dict[int, int]:
    """Rank -> process number of torchrun's children, from /proc."""
    found = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank[5:])] = int(child)
    return found


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([json.loads(line)["global_step"] for line in lines if line.endswith("}")], default=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_torchrun_restarts_and_the_run_ends_as_if_unbroken(tmp_path):
    overrides = (*SMALL, "epochs=10", "batch_size=128", "checkpoint.every_steps=5", "ema.decay=0.9")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "--monitor-interval=0.1",
        "-m",
        "spikingformer",
        "train",
        RECIPE,
        *overrides,
        "--output",
        str(folder),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("SLURM_")}
    log = open(tmp_path / "log", "w")  # noqa: SIM115 (closed below)
    launcher = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 120
        while steps(folder) < 8 and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
        os.kill(ranks_below(launcher.pid)[1], signal.SIGKILL)
        assert launcher.wait(150) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if launcher.poll() is None:
            launcher.kill()
        log.close()
    assert "continuing from epoch" in (tmp_path / "log").read_text()
    assert complete(whole, overrides, ranks=2) == [0, 0], words(whole, 0)
    assert differing(final_state(folder), final_state(whole)) == []
