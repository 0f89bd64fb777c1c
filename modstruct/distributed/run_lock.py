"""One run at a time in an output folder, on any host that shares it.

The main process keeps OUTPUT/run.lock while it runs: who it is, and a count that it raises every few seconds. On its
own host a process is looked up; of another host, or container, only that count is watched, for a time on the watcher's
clock: clocks of two hosts are never compared. No file locks, which network file systems lack: a name is made by one
process alone (O_EXCL), and a file takes another's place whole (rename).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from modstruct import distributed, stopping
from modstruct.distributed.collect import on_main
from modstruct.distributed.hosts import require_shared_folder
from modstruct.errors import RunError, printable, refuse
from modstruct.files import naming, refusing

log = logging.getLogger("modstruct")
FILE = "run.lock"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A holder on another host that gives no sign for so long is taken to have ended; twelve beats."""
_held: list[RunLock] = []


class LostLock(RunError):
    """Another run has taken this one's folder over."""


@dataclass(frozen=True)
class _Seen:
    """A lock file as it was read."""

    content: bytes
    changed_ns: int

    def of(self, name: str) -> str:
        """What the holder wrote of itself; "?" where that cannot be read."""
        try:
            return str(json.loads(self.content)[name])
        except (ValueError, KeyError, TypeError):
            return "?"

    @property
    def token(self) -> str:
        """Names the holder, readable or not; safe in a file's name."""
        return self.of("token") if self.of("token").isalnum() else blake2b(self.content, digest_size=8).hexdigest()

    def holder(self) -> str:
        return f"process {self.of('process')} on host {self.of('host')}"


class RunLock:
    """Lock of a folder. field: the option that names it, for messages. `acquire` refuses by ValueError."""

    def __init__(self, folder: Path, field: str):
        self.folder, self.field = folder, field
        self.path = folder / FILE
        self.token = secrets.token_hex(8)
        self._described = {
            "token": self.token,
            "host": socket.gethostname(),
            "machine": _machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._beats = 0
        self._file: int | None = None
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, from a run that has ended too; may wait SILENT_SECONDS. Raises ValueError or OSError."""
        with refusing(self.field, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take(self.path)
        _held.append(self)
        stopping.at_end(self.release)
        self._thread.start()

    def release(self) -> None:
        """Give the lock up, unless another run has it by now."""
        stopping.not_at_end(self.release)
        self._ended.set()
        if self in _held:
            _held.remove(self)
        if not self._writing.acquire(timeout=BEAT_SECONDS):
            return  # a disk that does not answer; the process is ending
        with suppress(OSError):
            seen = _read(self.path)
            if seen is not None and seen.token == self.token:
                self.path.unlink()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._writing.release()

    def require(self) -> None:
        """Raise LostLock if another run has it; OSError if that cannot be seen."""
        seen = _read(self.path)
        if seen is not None and seen.token != self.token:
            raise LostLock(
                f"{self.field} = {str(self.folder)!r}: {seen.holder()} took it over at {seen.of('since')}, since this "
                f"process gave no sign for {SILENT_SECONDS:g} s (it was suspended, or its disk did not answer); "
                "this run ends without writing, the other one goes on"
            )

    def _take(self, path: Path) -> None:
        while not self._create(path):
            seen = _read(path)
            why = None if seen is None else self._ended_because(path, seen)
            if seen is None or why is None:
                continue  # released or changed hands meanwhile
            # Of several that find the holder gone, one gets this name; it is a lock like the other.
            claim = path.with_name(f"{path.name}.{seen.token}")
            self._take(claim)
            try:
                if _read(path) == seen:
                    if path == self.path:
                        self._say(f"{seen.holder()}, which had it since {seen.of('since')}, {why}: taken over")
                    os.replace(claim, path)  # the open file goes along
                    return
            finally:
                claim.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Make the file, open for the beats; false where there is one."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            with naming(path):
                self._write(file)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        if self._file is not None:
            os.close(self._file)
        self._file = file
        return True

    def _write(self, file: int) -> None:
        content = json.dumps(self._described | {"beats": f"{self._beats:012d}"})  # always as long
        os.pwrite(file, f"{content}\n".encode(), 0)
        os.fsync(file)  # a network file system shows it to others then

    def _ended_because(self, path: Path, seen: _Seen) -> str | None:
        """Why its holder cannot go on; None if it gave the lock up. Refuses where the holder lives."""
        if seen.of("machine") == _machine() and seen.of("process").isdecimal():
            if _started(int(seen.of("process"))) == seen.of("started"):
                self._refuse(seen)
            return "has ended without giving it up"
        self._say(
            f"{seen.holder()} had it since {seen.of('since')}; watching for {SILENT_SECONDS:g} s whether it lives"
        )
        end = time.monotonic() + SILENT_SECONDS
        while True:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            now = _read(path)
            if now is None or now.token != seen.token:
                return None
            if now != seen:
                self._refuse(now)
            if time.monotonic() > end:
                return f"has given no sign for {SILENT_SECONDS:g} s"

    def _refuse(self, seen: _Seen) -> None:
        remedy = f"{seen.holder()} has been writing there since {seen.of('since')}; stop it, or choose another folder"
        refuse(self.field, str(self.folder), remedy)

    def _say(self, what: str) -> None:
        print(printable(f"{self.field} = {str(self.folder)!r}: {what}"), file=sys.stderr, flush=True)

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                with self._writing:
                    self._beat()
            except LostLock as lost:
                print(f"\nerror (process {distributed.rank()}): {lost}", file=sys.stderr, flush=True)
                stopping.end_now(1)  # the training thread may be writing already
            except OSError:
                log.debug("%s cannot be written", self.path, exc_info=True)

    def _beat(self) -> None:
        if self._ended.is_set():
            return
        self.require()
        self._beats += 1
        if self._file is None or not self.path.exists():
            self._create(self.path)  # removed by hand; if another run was faster, the next beat finds it
        else:
            self._write(self._file)


@contextmanager
def held(folder: Path, field: str) -> Iterator[None]:
    """Hold the lock of a folder that all hosts share, by the main process for all of them; every process calls it.

    Raises ValueError on the main process, naming the holder, and FailedElsewhere on the others. Does nothing where a
    part of the same command holds it already.
    """
    made = not folder.exists()
    require_shared_folder(folder, field)
    lock = RunLock(folder, field)
    on_main(lambda: None if any(other.folder.resolve() == folder.resolve() for other in _held) else lock.acquire())
    try:
        yield
    finally:
        lock.release()
        if made:  # nothing is left of a command that is refused later
            with suppress(OSError):
                folder.rmdir()


def require_held() -> None:
    """Raise LostLock if another run has taken over what this process held, since it was suspended for so long."""
    for lock in _held:
        with suppress(OSError):
            lock.require()


def _read(path: Path) -> _Seen | None:
    try:
        with open(path, "rb") as file:  # opened anew each time: then a network file system asks the server
            return _Seen(file.read(4096), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, and its namespace of processes (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return secrets.token_hex(8)  # never another's: it is watched


def _started(process: int) -> str | None:
    """When a living process began, in ticks since the boot; its number may be another's later."""
    fields = stopping.process_stat(process)
    return None if fields is None or fields[0] in "ZX" else fields[19]
