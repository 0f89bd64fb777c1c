"""One run at a time in a folder: who is refused, who is taken over, and what a run does that was taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modstruct.distributed import run_lock
from modstruct.distributed.run_lock import LostLock, RunLock, held


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 1.0)


@pytest.fixture
def locks(tmp_path):
    made: list[RunLock] = []

    def make() -> RunLock:
        made.append(RunLock(tmp_path, "output"))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


def left_by_another(folder: Path, **described: object) -> Path:
    """A lock that no process of this test holds."""
    lock = RunLock(folder, "output")
    lock._described |= described
    lock._create(folder / run_lock.FILE)
    os.close(lock._file)
    return folder / run_lock.FILE


def ended_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_second_run_is_refused_by_name(tmp_path, locks):
    locks().acquire()
    since = json.loads((tmp_path / run_lock.FILE).read_bytes())["since"]
    with pytest.raises(ValueError, match="has been writing there since") as refused:
        locks().acquire()
    assert str(refused.value) == (
        f"output = {str(tmp_path)!r}: process {os.getpid()} on host {os.uname().nodename} has been writing there since "
        f"{since}; stop it, or choose another folder"
    )


def test_it_is_free_again_after_an_orderly_end(tmp_path, locks):
    first = locks()
    first.acquire()
    first.release()
    assert list(tmp_path.iterdir()) == []
    locks().acquire()


def test_parts_of_one_command_hold_it_together(tmp_path):
    with held(tmp_path / "made", "--out"), held(tmp_path / "made", "EVALUATION"):
        assert (tmp_path / "made" / run_lock.FILE).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["ended", "number of another process"])
def test_a_run_that_was_killed_on_this_host_is_taken_over_at_once(tmp_path, locks, capsys, why):
    left_by_another(tmp_path, **({"process": ended_process()} if why == "ended" else {"started": "1"}))
    locks().acquire()
    assert "has ended without giving it up: taken over" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]


def test_a_silent_run_of_another_host_is_taken_over_after_a_while(tmp_path, locks, capsys):
    # Its process number lives here, which says nothing; nor does its clock.
    path = left_by_another(tmp_path, machine="another boot 1", host="far")
    os.utime(path, (1 << 32, 1 << 32))
    began = time.monotonic()
    locks().acquire()
    assert time.monotonic() - began >= 1.0
    watching, taken = capsys.readouterr().err.splitlines()
    assert f"process {os.getpid()} on host far had it since" in watching
    assert watching.endswith("watching for 1 s whether it lives")
    assert taken.endswith("has given no sign for 1 s: taken over")


def test_a_living_run_of_another_host_is_refused(tmp_path, locks, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 20.0)
    far = locks()
    far._described["machine"] = "another boot 1"
    far.acquire()
    with pytest.raises(ValueError, match="stop it, or choose another folder"):
        locks().acquire()
    assert far._thread.is_alive()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"token": "../../x"}', b"\xff"])
def test_a_lock_that_cannot_be_read_is_watched_too(tmp_path, locks, content):
    (tmp_path / run_lock.FILE).write_bytes(content)
    locks().acquire()
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]


def test_of_many_that_find_it_silent_one_gets_it(tmp_path, locks):
    for _ in range(10):
        left_by_another(tmp_path, process=ended_process())
        several, got = [locks() for _ in range(8)], []
        together = threading.Barrier(len(several))

        def take(lock: RunLock, together=together, got=got) -> None:
            together.wait()
            try:
                lock.acquire()
                got.append(lock)
            except ValueError:
                pass

        threads = [threading.Thread(target=take, args=(lock,)) for lock in several]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].require()
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_one_that_was_taken_over_neither_writes_nor_removes(tmp_path, locks, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 60.0)
    suspended = locks()
    suspended._described["machine"] = "another boot 1"
    suspended.acquire()
    other = locks()
    other.acquire()
    with pytest.raises(LostLock, match="took it over at"):
        run_lock.require_held()
    suspended.release()
    other.require()


def test_its_next_beat_ends_the_process(tmp_path):
    """Suspended, taken over, and continued: one line, and what it was about to write is not written."""
    script = f"""
import sys, time
from pathlib import Path
from modstruct.distributed import run_lock
run_lock.BEAT_SECONDS = 0.05
folder = Path({str(tmp_path)!r})
with run_lock.held(folder, "output"):
    print("ready", flush=True)
    sys.stdin.readline()
    time.sleep(30)
    (folder / "written").touch()
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    (tmp_path / "aside").mkdir()
    left_by_another(tmp_path / "aside", host="far").replace(tmp_path / run_lock.FILE)
    _, errors = run.communicate("\n", timeout=60)
    assert run.returncode == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error (process 0): output = {str(tmp_path)!r}: process {os.getpid()} on host far took it")
    assert "this run ends without writing" in line
    assert not (tmp_path / "written").exists()
    assert (tmp_path / run_lock.FILE).exists()


def test_a_lock_that_was_removed_by_hand_comes_back(tmp_path, locks):
    locks().acquire()
    (tmp_path / run_lock.FILE).unlink()
    end = time.monotonic() + 30
    while not (tmp_path / run_lock.FILE).exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_folder_that_cannot_be_made_is_refused_by_its_field(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output = .*is a file, where a folder is needed"):
        RunLock(tmp_path / "file" / "run", "output").acquire()
