"""What must be the same on every host of a run, checked before the first step: folders, data, recipe, versions.

Each check is collective: all processes call it, and all are refused alike, so that none waits for the others.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from modstruct import distributed
from modstruct.errors import refuse
from modstruct.files import PROBE_BYTES, disk_error

# A network file system may show a new file this much later on another host.
LAG_SECONDS = 10.0


def require_same(values: Mapping[str, object], remedy: str, shared_out: bool = False) -> None:
    """Refuse, by its name, a value that is not the same on every process. values: small plain objects, by name.

    shared_out: not every process has every value (`share_of_host`); those that have it are compared.
    """
    reports = distributed.gather_objects((socket.gethostname(), dict(values)))
    for name in dict.fromkeys(name for _, theirs in reports for name in theirs):
        seen = [
            (f"process {rank} ({host})", theirs.get(name))
            for rank, (host, theirs) in enumerate(reports)
            if name in theirs or not shared_out
        ]
        for place, value in seen:
            if value != seen[0][1]:
                places = f"{_short(seen[0][1])} on {seen[0][0]} and {_short(value)} on {place}"
                raise ValueError(f"{name} is {places}: {remedy}")


def share_of_host(names: list[str]) -> list[str]:
    """Those that fall to this process, where the processes of each host share them out alike. Collective."""
    numbers = distributed.gather_objects(distributed.local_rank())
    # As many processes as every host has, whose processes are numbered from 0.
    sharing = sum(numbers.count(number) == numbers.count(0) for number in set(numbers))
    return names[distributed.local_rank() :: sharing] if distributed.local_rank() < sharing else []


def on_all(build: Callable[[], Any]) -> Any:
    """build() on every process; where it fails on one host alone, the others do not wait for it, but fail too."""
    result = error = None
    try:
        result = build()
    except (ValueError, OSError) as e:
        error = e
    distributed.fail_together(error, f"process {distributed.rank()}: {error}")
    return result


def require_shared_folder(folder: str | Path, field: str) -> None:
    """Refuse a folder that cannot be written, or that is not the same one on every host; it is made if need be."""
    file = Path(folder) / f".shared-{distributed.broadcast_object(secrets.token_hex(8))}"
    trouble: str | None = None
    if distributed.is_main():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            trouble = f"cannot be written: {disk_error(error, file)}; make room, or choose another"
    trouble = distributed.broadcast_object(trouble)
    if trouble is None:
        seen = distributed.gather_objects((socket.gethostname(), appears(file)))
        blind = sorted({f"process {rank} ({host})" for rank, (host, sees) in enumerate(seen) if not sees})
        if blind:
            trouble = (
                f"{', '.join(blind)} cannot see what process 0 ({seen[0][0]}) writes there: all hosts must share it"
            )
    if distributed.is_main():
        with suppress(OSError):
            file.unlink()
    if trouble is not None:
        refuse(field, str(folder), trouble)


def appears(file: Path) -> bool:
    """Whether a file or folder that another host has made is there, now or soon."""
    end = time.monotonic() + LAG_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
