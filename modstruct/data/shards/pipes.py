"""Shards of `pipe:` sources: the command's output is spooled once per host, then read like any file."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from modstruct.config import DataConfig
from modstruct.data.shards.sources import PIPE
from modstruct.errors import RunError
from modstruct.files import atomic_write, free_space, locked

ATTEMPTS = 3
PAUSE_SECONDS = 1.0
# A command that stalls holds the lock of its shard; no working one takes this long for a shard.
PIPE_SECONDS = 3600.0
POLL_SECONDS = 0.5  # between checks of the size
STALE_SECONDS = 24 * 3600.0


class PipeFailed(OSError):
    """The command of a `pipe:` shard did not deliver the shard.

    In training the shard's samples are then substituted. Whether a store fails is no function of the seed, so a run
    during which one failed cannot be repeated sample by sample.
    """


class PipeCache:
    """Spooled shards in one folder, shared by the processes of a host.

    limit_bytes: their total size; beyond it the least recently used are removed (the newest always stays, however
    large). An open file stays readable after its removal.
    """

    def __init__(self, folder: Path, limit_bytes: float):
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._failed: dict[str, str] = {}

    def open(self, shard: str, size_bytes: int | None = None) -> int:
        """File descriptor of a spooled `pipe:` shard; runs its command if the file is missing.

        size_bytes: its size when it was indexed. Raises PipeFailed if the command fails three times, takes more than an
        hour or delivers another size; later calls for the shard then fail at once, so that an unreachable store does
        not cost minutes a sample. Raises RunError if the disk has no room for it.
        """
        if shard in self._failed:
            raise PipeFailed(self._failed[shard])
        path = self.path(shard)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                try:
                    self._spool(shard, path, size_bytes)
                except PipeFailed as error:
                    self._failed[shard] = str(error)
                    raise
                continue  # try again: another process may have removed it meanwhile
            if size_bytes not in (None, os.fstat(descriptor).st_size):  # spooled before it was indexed again
                os.close(descriptor)
                path.unlink(missing_ok=True)
                continue
            self.touch(shard)
            return descriptor

    def fetch(self, shard: str, size_bytes: int) -> None:
        """Spool a shard ahead of need, unless another thread or process does. If that fails, whoever needs the shard
        tries again."""
        path = self.path(shard)
        if shard not in self._failed and not path.exists():
            with suppress(OSError, RunError):
                self._spool(shard, path, size_bytes, wait=False)

    def touch(self, shard: str) -> None:
        """Note that a shard is used, or will be soon, so that others are removed first."""
        now = time.time_ns()  # the system's own stamps are milliseconds apart
        with suppress(OSError):
            os.utime(self.path(shard), ns=(now, now))

    def path(self, shard: str) -> Path:
        return self.folder / f"{hashlib.blake2b(shard.encode(), digest_size=16).hexdigest()}.tar"

    def _spool(self, shard: str, path: Path, size_bytes: int | None, wait: bool = True) -> None:
        with locked(path.with_suffix(".lock"), wait):
            if path.exists():
                return
            for attempt in range(ATTEMPTS):
                time.sleep(PAUSE_SECONDS * (4**attempt - 1) / 3)  # 0, 1 and 5 seconds
                try:
                    _run(shard, path, size_bytes)
                    break
                except PipeFailed:
                    if attempt == ATTEMPTS - 1:
                        self._require_room(size_bytes or 1)
                        raise
            self.touch(shard)
            self._make_room(keep=path)

    def _require_room(self, size_bytes: int) -> None:
        """Not the store's failure: other samples would come from ever fewer shards."""
        if shutil.disk_usage(self.folder).free < size_bytes:
            room = f"no room for a shard of {size_bytes / 2**20:,.0f} MiB in {self.folder}: {free_space(self.folder)}"
            raise RunError(f"data.cache: {room}; make room, and go on by `--resume latest`")

    def _make_room(self, keep: Path) -> None:
        for path in self.folder.glob("*.part"):  # of processes that were killed
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        spooled = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                spooled.append((path != keep, -status.st_mtime_ns, status.st_size, path))
        taken = 0
        for removable, _, size, path in sorted(spooled):  # the one to keep, then newest to oldest
            taken += size
            if removable and taken > self.limit_bytes:
                path.unlink(missing_ok=True)


def pipe_cache(config: DataConfig) -> PipeCache:
    """Cache of a host's spooled pipes."""
    return PipeCache(Path(config.cache).expanduser() / "pipes", config.pipe_cache_gib * 2**30)


def _run(shard: str, path: Path, size_bytes: int | None) -> None:
    command = shard[len(PIPE) :]
    with atomic_write(path) as file, tempfile.TemporaryFile() as errors:
        # In its own session, so that everything the shell started can be killed with it.
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=errors, start_new_session=True
        )
        end = time.monotonic() + PIPE_SECONDS
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise PipeFailed(f"the command did not finish within {PIPE_SECONDS:g} seconds")
                if size_bytes is not None and os.fstat(file.fileno()).st_size > size_bytes:  # its output may be endless
                    raise PipeFailed(f"it delivers more than the {size_bytes} bytes that were indexed")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(POLL_SECONDS, PIPE_SECONDS))
            status = process.returncode
        finally:
            if process.returncode is None:  # too slow, too much, or this process is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        written = os.fstat(file.fileno()).st_size
        if status != 0:
            errors.seek(0)
            said = errors.read(65536).decode("utf-8", "replace").strip().splitlines()
            raise PipeFailed(f"exit status {status}" + (f": {said[-1][:200]}" if said else ""))
        if size_bytes is not None and written != size_bytes:
            raise PipeFailed(f"it delivered {written} bytes, {size_bytes} were indexed")
