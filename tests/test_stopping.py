"""Signals and lost launchers, in small processes: one line, the right exit status, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 60
BEGIN = """
import hashlib, os, sys, threading, time
from modstruct import stopping
stopping.listen()
def ready(): print("ready", flush=True)
"""
IN_PYTHON = "with stopping.stage('nothing to save'):\n    ready()\n    while True: time.sleep(0.01)"
IN_C = "ready()\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
DEFERRED = """
with stopping.stage('nothing to save') as stage:
    stage.deferred = True
    ready()
    while not stopping.requested(): time.sleep(0.01)
    time.sleep({save})
    print("saved", flush=True)
    sys.exit(128 + stopping.requested())
"""


def start(body: str | list[str], **settings) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_PROCID"}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + body] if isinstance(body, str) else body,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=SECONDS)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_outside_of_training_a_signal_ends_the_process_in_one_line(number, name):
    process = start(IN_PYTHON)
    process.send_signal(number)
    assert end_of(process) == (128 + number, "", f"{name}: stopping; nothing to save\n")


def test_a_main_thread_that_python_cannot_interrupt_is_ended_too():
    process = start(IN_C)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert end_of(process) == (130, "", "Ctrl-C: stopping\n")
    assert time.monotonic() - began < 30


def test_a_deferred_stop_saves_and_the_launchers_sigterm_is_no_second_one():
    process = start(DEFERRED.format(save=1.5))
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same key press, passed on by a launcher
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    line = "Ctrl-C: saving and stopping after this step; again to stop at once without saving\n"
    assert end_of(process) == (130, "saved\n", line)


def test_a_sigterm_that_overtakes_a_ctrl_c_is_part_of_it():
    process = start(IN_PYTHON)
    process.send_signal(signal.SIGSTOP)  # both are there when it continues: the kernel runs the later handler first
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
    assert end_of(process) == (130, "", "Ctrl-C: stopping; nothing to save\n")


def test_a_second_ctrl_c_stops_at_once():
    process = start(DEFERRED.format(save=1000))
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    status, output, errors = end_of(process)
    assert (status, output) == (130, "")
    assert errors.splitlines()[1:] == ["Ctrl-C again: stopping at once, without saving"]


def test_a_stop_deferred_to_the_end_of_a_stage_holds_there():
    body = "with stopping.stage('') as stage:\n    stage.deferred = True\n    ready()\n    time.sleep(1)\nprint()"
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[:2] == (143, "")


def test_a_signal_that_is_ignored_stays_ignored():
    process = start(
        "ready()\ntime.sleep(1)\nprint('done')", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    assert end_of(process) == (0, "done\n", "")


def test_children_of_multiprocessing_end_with_a_process_that_is_ended():
    body = """
import multiprocessing
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
child.start()
print("ready", child.pid, flush=True)
"""
    script = [sys.executable, "-c", BEGIN + body.replace('"ready", ', '"ready\\n",') + IN_C.removeprefix("ready()\n")]
    process = start(script)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 143
    assert gone(child)


def test_a_launchers_sigterm_after_an_error_adds_nothing():
    body = """
import atexit
from modstruct import cli
from modstruct.errors import RunError
def fail(): raise RunError("as planned")
atexit.register(lambda: (ready(), time.sleep(1.5)))
cli.run(fail)
"""
    process = start(body)
    process.send_signal(signal.SIGTERM)
    status, _, errors = end_of(process)
    assert (status, errors.splitlines()[-1]) == (1, "error (process 0): as planned")


def test_processes_that_index_shards_end_without_a_word(tmp_path):
    """They are in the middle of shards that take for ever."""
    for number in range(40):
        os.mkfifo(tmp_path / f"{number}.tar")
    body = """
from pathlib import Path
from modstruct.data.shards import index
if __name__ == "__main__":
    stopping.listen()
    folder = Path(sys.argv[1])
    threading.Timer(6, ready).start()
    index.index_shards([(str(folder / f"{n}.tar"), folder / f"{n}.npz") for n in range(40)], progress=False)
"""
    script = tmp_path / "script.py"
    script.write_text(BEGIN.replace("stopping.listen()\n", "") + body)
    process = start([sys.executable, str(script), str(tmp_path)], start_new_session=True)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 1
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, "", "Ctrl-C: stopping\n")
    assert all(gone(child.pid) for child in children)


def test_loader_processes_that_only_start_end_without_a_word(tmp_path):
    """Python's tracker would warn of the semaphores that they share, since the main thread, in C, does not unwind."""
    body = """
from modstruct.data.shards.workers import WorkerLoader
class Slow:
    def __getitem__(self, index): time.sleep(60)
if __name__ == "__main__":
    stopping.listen()
    batches = iter(WorkerLoader(Slow(), range(9), 2))
"""
    script = tmp_path / "script.py"
    script.write_text(BEGIN.replace("stopping.listen()\n", "") + body + textwrap.indent(IN_C, "    "))
    process = start([sys.executable, str(script)], start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, "", "Ctrl-C: stopping\n")


def gone(process: int) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


LAUNCH = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-u", *sys.argv[2:]]).returncode)
"""
RUNNER = """
import subprocess, sys
subprocess.run([sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--master_addr=127.0.0.1", *sys.argv[1:]])
"""


@pytest.fixture
def launcher(tmp_path) -> Path:
    """Programs that look from below as DeepSpeed's runner and launcher do."""
    folder = tmp_path / "deepspeed" / "launcher"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "launch.py").write_text(LAUNCH)
    runner = tmp_path / "bin" / "deepspeed"
    runner.parent.mkdir()
    runner.write_text(RUNNER)
    return runner


@pytest.mark.parametrize("lost", ["runner", "launcher"])
def test_a_lost_launcher_stops_the_run(launcher, tmp_path, lost):
    script = tmp_path / "script.py"
    script.write_text(BEGIN.replace("ready()", "pids()") + LOST)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    runner = subprocess.Popen(
        [sys.executable, str(launcher), str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert runner.stdout is not None
    assert runner.stderr is not None
    parent, mine = map(int, runner.stdout.readline().split())
    if lost == "runner":
        runner.terminate()
    else:
        os.kill(parent, signal.SIGKILL)
    assert gone(mine)
    assert gone(parent)
    runner.wait(timeout=SECONDS)
    assert runner.stdout.read() == "saved\n"
    errors = runner.stderr.read()
    assert errors.startswith("the launcher (")
    assert errors.endswith("is gone: saving and stopping after this step\n")
    assert len(errors.splitlines()) == 1


LOST = "\nprint(os.getppid(), os.getpid(), flush=True)\n" + DEFERRED.format(save=0).replace("ready()", "pass")


def test_a_shell_that_ends_stops_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BEGIN + "stopping.LOOK_SECONDS = 0.2\nready()\ntime.sleep(2)\nprint('done', os.getppid())")
    shell = ["sh", "-c", f"nohup setsid {sys.executable} -u {script} & sleep 1"]
    done = start(shell)
    parent = done.pid
    status, output, errors = end_of(done)
    assert (status, output.split()[0], errors) == (0, "done", "")
    assert int(output.split()[1]) != parent
