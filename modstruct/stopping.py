"""Stops a command on Ctrl-C, SIGTERM or SIGHUP, and when the launcher that started it is gone.

Python runs a signal's handler in the main thread alone, and not while that waits in a collective, compiles or trains a
tokenizer. So a thread hears of every signal too: it says what happens, and ends a process whose main thread does not
end in time. What a stop means depends on the stage: training defers it to the end of its step, everything else ends.

Imports nothing that takes long: a launch script listens before all other imports.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
GRACE_SECONDS = 3.0
"""For the main thread to end by itself once it need not go on."""
AGAIN_SECONDS = 1.0
"""A Ctrl-C that comes this much later is a second one."""
LOOK_SECONDS = 2.0
"""Between two looks at the launcher."""
RUNNERS = ("deepspeed", "ds")


class Stopped(SystemExit):
    """Ends the main thread without a traceback, with the exit status of a signal. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        _state.status = 128 + number


@dataclass
class Stage:
    """A part of a command."""

    meaning: str
    """What a stop means in it, for the user."""
    deferred: bool = False
    """It asks `requested` itself and ends when it has saved."""


class _State:
    pending = 0
    """The first signal that the main thread heard of."""
    number = 0
    """The one that is answered."""
    cause = ""
    ending = failed = False
    status = 0
    listening = False
    launcher: _Launcher | None = None

    def __init__(self) -> None:
        self.stages = [Stage("")]
        self.said = threading.Event()
        self.at_end: list[Callable[[], object]] = []


_state = _State()


def is_first_process() -> bool:
    """True on the process that speaks for all, before torch.distributed is up."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def requested() -> int:
    """The number of the signal that asked this process to stop; 0 if none did."""
    return _state.number


def name_of(number: int) -> str:
    """What asked for a stop, in the user's words. number: the signal that the processes agreed on."""
    # Another process may have noticed first; one that got the signal itself has the word.
    launcher = None if _state.pending else _state.launcher
    if number == signal.SIGTERM and (_state.cause or (launcher is not None and launcher.gone())):
        return "the end of the launcher"
    return NAMES[signal.Signals(number)]


def listen() -> None:
    """Answer the signals from here on. What is ignored (by nohup, or in the background of a script) stays ignored."""
    if _state.listening or threading.current_thread() is not threading.main_thread():
        return
    _state.listening = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _state.launcher = launcher = _Launcher()
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    atexit.register(_skip_the_rest)
    threading.Thread(target=_watch, args=(reader, launcher), name="stopping", daemon=True).start()


@contextmanager
def stage(meaning: str) -> Iterator[Stage]:
    """A part of a command in which a stop means this. Its `deferred` may be set while it lasts."""
    _end_if_due()
    entered = Stage(meaning)
    _state.stages.append(entered)
    try:
        _end_if_due()
        yield entered
    finally:
        _state.stages.pop()
    _end_if_due()


def at_end(release: Callable[[], object]) -> None:
    """Call this also where the process ends without unwinding its main thread."""
    _state.at_end.append(release)


def not_at_end(release: Callable[[], object]) -> None:
    """Undo `at_end`."""
    with suppress(ValueError):
        _state.at_end.remove(release)


def has_failed(status: int) -> None:
    """The command has ended by an error, which it has told: a launcher's signal upon it has nothing to add."""
    if _state.listening:
        _state.failed = _state.ending = True
        _state.status = status


def _skip_the_rest() -> None:
    """After the other functions at the exit: taking down torch and DeepSpeed took ten seconds on a busy machine."""
    if _state.status:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        end_now(_state.status)


def end_now(status: int) -> None:
    """End this process and the children that multiprocessing made, from any thread."""
    for release in [*_state.at_end]:
        with suppress(Exception):
            release()
    with suppress(Exception):
        _end_children()
    os._exit(status)


def _end_children() -> None:
    """Kill what multiprocessing has started, servers included, which have torch to take down, and those that only just
    start, which would tell of semaphores that are gone. Its tracker stays: it removes what they leave."""
    parents = {int(name): _parent_of(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    doomed = {child for child, parent in parents.items() if parent == os.getpid() and _is_worker(child)}
    while more := {child for child, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for child in doomed:
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)


def _is_worker(process: int) -> bool:
    words = " ".join(_words(process))
    return "multiprocessing." in words and "resource_tracker" not in words


def _interrupt(number: int, _: object) -> None:
    """The handler, in the main thread."""
    _state.pending = _state.pending or number
    _end_if_due()


def _end_if_due() -> None:
    if _state.pending and not _state.stages[-1].deferred and not _state.ending:
        _state.ending = True  # a second exception would break what the first one cleans up
        with suppress(OSError):
            _end_children()
        _state.said.wait(1)
        raise Stopped(_state.number or _state.pending)


def _watch(reader: int, launcher: _Launcher) -> None:
    """Hear the signals, in a thread of its own."""
    since = ends = 0.0
    while True:
        ready, _, _ = select.select([reader], [], [], 0.1 if since else LOOK_SECONDS)
        now = time.monotonic()
        if ready and not since:
            time.sleep(0.05)  # a launcher's SIGTERM, sent upon a Ctrl-C, may overtake that
        numbers = [number for number in (os.read(reader, 64) if ready else b"") if number in NAMES]
        if numbers and not since:
            since = now
            _state.number = signal.SIGINT if signal.SIGINT in numbers else numbers[0]
            _say_first()
        elif signal.SIGINT in numbers and now - since >= AGAIN_SECONDS:
            _say("Ctrl-C again: stopping at once, without saving")
            end_now(128 + signal.SIGINT)
        if not since:
            gone = launcher.gone()
            if gone:
                _state.cause = gone
                os.kill(os.getpid(), signal.SIGTERM)  # what follows is the same
                launcher.watched = False
        elif _state.stages[-1].deferred:
            ends = 0.0
        else:
            ends = ends or now + GRACE_SECONDS
            if now > ends:
                end_now(_state.status or 128 + _state.number)


def _say_first() -> None:
    current, cause = _state.stages[-1], _state.cause or name_of(_state.number)
    if current.deferred:
        again = "; again to stop at once without saving" if _state.number == signal.SIGINT else ""
        _say(f"{cause}: saving and stopping after this step{again}")
    else:
        _say(f"{cause}: stopping{f'; {current.meaning}' if current.meaning else ''}")
    _state.said.set()


def _say(line: str) -> None:
    if is_first_process() and not _state.failed:
        with suppress(Exception):
            logging.getLogger("modstruct").warning(line)


class _Launcher:
    """The processes of a launcher above this one, as they were at the start.

    torchrun's agent is this process's parent; DeepSpeed's runner is its grandparent, and passes no signal on to the
    parent. Any other parent may end as it likes: a shell does under nohup.
    """

    def __init__(self) -> None:
        self.parent, self.runner = os.getppid(), 0
        words = _words(self.parent)
        by_deepspeed = "deepspeed.launcher.launch" in words
        by_torch = any(os.path.basename(w) == "torchrun" or w.startswith("torch.distributed.") for w in words[:5])
        self.watched = by_deepspeed or by_torch
        if by_deepspeed:
            above = _parent_of(self.parent)
            runner = any(os.path.basename(w) in RUNNERS or w == "deepspeed.launcher.runner" for w in _words(above)[:4])
            # As the runner calls it on one host. If it was ended while its child imported torch, we never see it.
            orphan = above == 1 and "--master_addr=127.0.0.1" in words and not any("--node_rank" in w for w in words)
            self.runner = above if runner else -1 if orphan else 0

    def gone(self) -> str | None:
        """Who is gone, in words."""
        if not self.watched:
            return None
        if os.getppid() != self.parent:
            return f"the launcher (process {self.parent}) is gone"
        if self.runner and _parent_of(self.parent) != self.runner:
            return "the launcher (deepspeed) is gone"
        return None


def _words(process: int) -> list[str]:
    """The command line of a process; empty where there is none to be read."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent_of(process: int) -> int:
    return int((process_stat(process) or ["", "0"])[1])


def process_stat(process: int) -> list[str] | None:
    """The fields of /proc/PROCESS/stat from the state on (state, parent, …); None where there is no such process."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def outlive_signals() -> None:
    """In a child process: ignore the signals that its parent answers, and end when the parent has ended.

    The launcher ends whole process trees on SIGTERM, and Ctrl-C reaches every process of the terminal; the parent may
    still need its children for a last checkpoint.
    """
    for number in NAMES:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NAMES)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """torch's workers watch their parent, which with a forkserver is the server, and that lives as long as they do."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@contextmanager
def children_inherit_block() -> Iterator[None]:
    """Block the signals while processes start: these inherit the block, and signals that arrive meanwhile wait."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it later would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
