"""Writers of whole files: what is left after errors and kills, and that two of them do not meet."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from spikingformer.files import PARTIAL, keep_previous, move_into_place, replacing, write_atomic
from spikingformer.training.run_folder import locked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole_with_the_usual_rights(tmp_path):
    path = tmp_path / "a.bin"
    (tmp_path / "plain").write_bytes(b"")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.suffix == ".bin", "writers look at it"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["a.bin", "plain"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path, kind):
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise kind

    with pytest.raises(kind):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_the_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomic(tmp_path / "no" / "a", b"")
    assert caught.value.filename == str(tmp_path / "no" / "a")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other"), "what somebody else could not read keeps its name"


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as first:
        first.write_bytes(b"first")
        with replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_a_writer_inside_another_keeps_to_its_temporary_file(tmp_path):
    """As an export that checks what it has written, by a function which replaces files itself."""
    path = tmp_path / "a"
    with replacing(path) as outer:
        write_atomic(outer, b"new")
        assert outer.read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def killed_writer(path: Path) -> None:
    """Writes half of a file in a process of its own and is killed."""
    code = f"""
        import os, signal
        from pathlib import Path
        from spikingformer.files import replacing
        with replacing(Path({str(path)!r})) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL


def test_what_a_killed_writer_left_is_removed_once_it_is_surely_abandoned(tmp_path):
    path = tmp_path / "a[1]"  # brackets mean something in patterns
    killed_writer(path)
    (left,) = names(tmp_path)
    assert left.startswith(PARTIAL)
    write_atomic(path, b"whole")
    assert names(tmp_path) == [left, "a[1]"], "its writer might be alive"
    two_hours_ago = time.time() - 7200
    os.utime(tmp_path / left, (two_hours_ago, two_hours_ago))
    write_atomic(tmp_path / "b", b"")
    assert left in names(tmp_path), "another file's"
    write_atomic(path, b"whole")
    assert names(tmp_path) == ["a[1]", "b"]


def test_who_holds_a_runs_folder_removes_what_training_left(tmp_path):
    leftovers = [tmp_path / f"{PARTIAL}0-{name}" for name in ("state.safetensors", "best.safetensors", "result.json")]
    others = [tmp_path / f"{PARTIAL}0-best.onnx", tmp_path / "mine.txt"]
    for path in (*leftovers, *others):
        path.write_bytes(b"half")
    with locked(tmp_path):
        assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others), "an export's may still be written"


def test_keeping_the_previous_file(tmp_path):
    path, previous = tmp_path / "a", tmp_path / "a.previous"
    keep_previous(path, previous)
    assert names(tmp_path) == []
    write_atomic(path, b"1")
    keep_previous(path, previous)
    write_atomic(path, b"2")
    assert (previous.read_bytes(), path.read_bytes()) == (b"1", b"2")
    assert names(tmp_path) == ["a", "a.previous"]


def test_a_finished_file_moves_into_place(tmp_path):
    (tmp_path / "made").write_bytes(b"x")
    move_into_place(tmp_path / "made", tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_keeping_the_previous_file_again_after_a_kill_leaves_nothing(tmp_path):
    path, previous = tmp_path / "a", tmp_path / "previous"
    write_atomic(path, b"old")
    keep_previous(path, previous)
    keep_previous(path, previous)  # a kill came before `path` was written anew
    write_atomic(path, b"new")
    assert previous.read_bytes() == b"old"
    assert names(tmp_path) == ["a", "previous"]
