"""Full disks, folders that cannot be written, damaged checkpoints: a clear message, the good checkpoint intact."""

import errno
import os
import random
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.run_processes import SMALL, complete, differing, final_state, words
from spikingformer.files import write_atomic
from spikingformer.training.run_folder import locked
from spikingformer.training.state import PREVIOUS_FILE, STATE_FILE, Progress, RunState, load_state, save_state
from spikingformer.training.tensor_file import read_tensors, write_tensors

RUN = (*SMALL, "epochs=2", "batch_size=256", "checkpoint.every_steps=2")


def limit_file_size(bytes_: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def small_state(step: int) -> RunState:
    tensors = {"model/weight": torch.full((40, 30), float(step)), "model/bias": torch.arange(30.0)}
    return RunState(tensors, {"numbers": {}, "groups": []}, {}, Progress(step=step), {"epochs": 1}, 1, {})


def test_a_save_that_does_not_fit_keeps_the_checkpoint_before_it(tmp_path):
    """The first save (no optimiser state yet) fits under the limit, the next does not."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert complete(whole, RUN) == [0], words(whole)
    assert complete(folder, RUN, prepare=partial(limit_file_size, 60_000)) == [2]
    text = words(folder)
    assert "state.safetensors: the checkpoint could not be written (File too large)" in text
    assert "The checkpoint before it is intact: free some space, then continue with --resume." in text
    assert "Traceback" not in text
    assert not list(folder.glob(".partial*"))
    state, warning = load_state(folder)
    assert state is not None
    assert (warning, state.progress.global_step) == (None, 0)
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert differing(final_state(folder), final_state(whole)) == []


def test_no_space_left(tmp_path, monkeypatch):
    save_state(tmp_path, small_state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"could not be written \(No space left on device\).*before it is intact"):
        save_state(tmp_path, small_state(2))
    monkeypatch.undo()
    state, warning = load_state(tmp_path)
    assert state is not None
    assert (state.progress.step, warning) == (1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREVIOUS_FILE, STATE_FILE]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    with (
        pytest.raises(ValueError, match=r"file/run: cannot write there \(Not a directory\); choose another --output"),
        locked(folder),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="cannot write there"), locked(tmp_path / "run"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_read_only_for_everybody():
    """/proc/self refuses new folders even to root."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    with (
        pytest.raises(ValueError, match=r"cannot write there \(.*\); choose another --output"),
        locked(Path("/proc/self/run")),
    ):
        pass


def test_truncated_checkpoints_are_refused_at_any_length(tmp_path):
    path = tmp_path / "best.safetensors"
    write_tensors(path, small_state(3).tensors, {"a": "b"})
    whole, draw = path.read_bytes(), random.Random(0)
    lengths = [0, 1, 7, 8, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"best\.safetensors: .*(truncated|damaged)"):
            read_tensors(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "best.safetensors"
    write_tensors(path, small_state(3).tensors, {"a": "b"})
    whole, draw = path.read_bytes(), random.Random(1)
    original, text = read_tensors(path)
    noticed = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_tensors(path)
        except ValueError as error:
            noticed += "best.safetensors: " in str(error)
        else:  # only padding may change unseen
            assert differing(tensors, original) == []
            assert metadata == text
    assert noticed > 190


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_the_previous_state_takes_over(tmp_path, damage):
    save_state(tmp_path, small_state(1))
    save_state(tmp_path, small_state(2))
    file = tmp_path / STATE_FILE
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-5] ^= 16
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    state, warning = load_state(tmp_path)
    assert state is not None
    assert state.progress.step == 1
    if damage != "missing":
        assert warning is not None
        assert warning.endswith("Continuing from state.previous.safetensors, one checkpoint earlier.")


def test_two_damaged_states_are_an_error_not_a_new_start(tmp_path):
    for name in (STATE_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes(b"\x08" + bytes(20))
    with pytest.raises(
        ValueError, match=r"(?s)state\.safetensors.*state\.previous\.safetensors.*start again in another folder"
    ):
        load_state(tmp_path)


def test_resume_from_a_damaged_checkpoint_ends_bit_equal(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert complete(whole, RUN) == [0]
    shutil.copytree(whole, folder)
    content = (folder / STATE_FILE).read_bytes()
    (folder / STATE_FILE).unlink()
    (folder / STATE_FILE).write_bytes(content[:-100])
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert "Continuing from state.previous.safetensors" in words(folder)
    assert differing(final_state(folder), final_state(whole)) == []
