"""Kills a small run 25 times and damages its files; every end is compared bit for bit with the unbroken run.

python -m benchmarks.faults --output benchmarks/results/faults.json
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.planted_kills import RUN, kill_at_disk_call, kill_at_step
from benchmarks.run_processes import complete, differing, final_state, finish, start, words
from spikingformer.training.state import STATE_FILE, load_state
from spikingformer.training.tensor_file import read_tensors


def kill_runs(folder: Path, kills: int, draw: random.Random) -> dict:
    """One run a kill: killed, resumed to its end, compared."""
    whole = folder / "whole"
    assert complete(whole, RUN) == [0], words(whole)
    began = time.monotonic()
    assert complete(folder / "again", RUN) == [0]  # the first one also started the process that imports
    duration = time.monotonic() - began
    expected, steps = final_state(whole), 15
    counts = {"while_saving": 0, "inside_an_epoch": 0, "at_a_random_time": 0}
    survived, lost_steps, differing_bytes, failures = 0, [], 0, []
    for number in range(3 * kills):
        if sum(counts.values()) == kills:
            break
        run = folder / f"run{number}"
        kind = ("while_saving", "inside_an_epoch", "at_a_random_time")[number % 3]
        if kind == "at_a_random_time":
            (process,) = start(run, RUN)
            process.join(draw.uniform(0, duration))
            process.kill()
            codes = finish([process])
        else:
            plant = kill_at_disk_call if kind == "while_saving" else kill_at_step
            codes = complete(
                run, RUN, prepare=partial(plant, draw.randint(1, 40 if kind == "while_saving" else steps - 1))
            )
        if codes == [0]:  # the run was over before the kill
            continue
        counts[kind] += 1
        tried = 0
        if (run / "metrics.jsonl").exists():
            lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
            tried = max((json.loads(line)["global_step"] for line in lines), default=0)
        state, _ = load_state(run) if run.exists() else (None, None)
        lost_steps.append(tried - (state.progress.global_step if state is not None else 0))
        resumed = complete(run, RUN, resume=True)
        names = differing(final_state(run), expected) if resumed == [0] else ["did not end"]
        survived += not names
        if names:
            failures.append({"kind": kind, "names": names[:3], "words": words(run)[-500:]})
            differing_bytes += sum(expected[n].nbytes for n in names if n in expected)
        shutil.rmtree(run, ignore_errors=True)
    return {
        "injected": sum(counts.values()),
        **counts,
        "survived_bit_equal": survived,
        "bytes_of_the_result_lost": differing_bytes,
        "steps_repeated_most": max(lost_steps, default=0),
        "bytes_compared_each": sum(t.nbytes for t in expected.values()),
        "failures": failures,
        "seconds_of_an_unbroken_run": round(duration, 2),
    }


def damage_files(whole: Path, folder: Path, each: int, draw: random.Random) -> dict:
    """Truncated and bit-flipped copies of a state: noticed, and the previous state takes over."""
    content = (whole / STATE_FILE).read_bytes()
    good, text = read_tensors(whole / STATE_FILE)
    refused = harmless = wrong = taken_over = 0
    for kind in ("truncated", "flipped"):
        for _ in range(each):
            damaged = bytearray(content)
            if kind == "truncated":
                del damaged[draw.randrange(len(content)) :]
            else:
                damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(whole / "state.previous.safetensors", folder)
            (folder / STATE_FILE).write_bytes(damaged)
            try:
                tensors, metadata = read_tensors(folder / STATE_FILE)
            except ValueError:
                refused += 1
                state, warning = load_state(folder)
                taken_over += state is not None and bool(warning)
            else:
                same = not differing(tensors, good) and metadata == text
                harmless, wrong = harmless + same, wrong + (not same)
    return {
        "injected": 2 * each,
        "refused": refused,
        "previous_took_over": taken_over,
        "unchanged_content": harmless,
        "accepted_wrong_content": wrong,
    }


def fill_disk(folder: Path) -> dict:
    """A run on a small file system of its own until nothing fits; needs the right to mount."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        return {"tried": False, "why": mounted.stderr.decode().strip()[:200]}
    try:
        run = folder / "run"
        first = complete(run, RUN)
        state, _ = load_state(run)
        message = next((line for line in words(run).splitlines() if "No space" in line), words(run)[-300:])
        whole_state = state is not None
        step = state.progress.global_step if state is not None else None
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        second = complete(run, RUN, resume=True)
        equal = second == [0] and not differing(final_state(run), final_state(folder.parent / "whole"))
        return {
            "tried": True,
            "exit": first,
            "message": message.replace(str(folder.parent), "..."),
            "checkpoint_whole": whole_state,
            "stopped_at_step": step,
            "resumed_after_room_was_made": second,
            "bit_equal": equal,
        }
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--damages", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    draw, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kills = kill_runs(folder, args.kills, draw)
        damages = damage_files(folder / "whole", folder / "damaged", args.damages, draw)
        try:
            disk = fill_disk(folder / "full")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            disk = {"tried": True, "failed": str(error)[:300]}
    result = {
        "machine": describe_machine(),
        "seed": args.seed,
        "run": list(RUN),
        "kills": kills,
        "damaged_files": damages,
        "full_disk": disk,
        "seconds": round(time.monotonic() - began, 1),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    good = kills["survived_bit_equal"] == kills["injected"] and damages["accepted_wrong_content"] == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
