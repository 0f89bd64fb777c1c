"""Files that are complete or not there, locks between the processes of a host, and YAML and JSON of others."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from modstruct.errors import refuse

# YAML of others (recipes, class files): plain values only, and no more of them than the file is long.
LARGEST_FILE_BYTES = 4 << 20
# A few aliases of aliases stand for more values than any memory holds ("a billion laughs").
MOST_VALUES = 1_000_000
PROBE_BYTES = 4096
"""Written to see whether a folder takes files; a full disk takes empty ones."""


FULL = (errno.ENOSPC, errno.EDQUOT)
NO_TEMPORARY_FOLDER = "No usable temporary directory"  # as tempfile says it


def disk_error(error: Exception, path: str | Path | None = None) -> str:
    """What is wrong, where, and what tells why: the room on the disk, or whose the place is.

    path: what was written, where the error itself does not name it. Other errors than the disk's say it themselves.
    """
    if not isinstance(error, OSError):
        return str(error)
    if NO_TEMPORARY_FOLDER in str(error):
        return f"TMPDIR: {error.strerror}: set it to a folder that you may write to"
    place = error.filename or path
    if place is None or error.errno is None:
        return str(error)
    there, about = _nearest(Path(os.fsdecode(place))), ""
    if error.errno in FULL and " MiB are free" not in str(error):
        about = f" ({free_space(there)})"
    elif error.errno in (errno.EACCES, errno.EPERM):
        with suppress(OSError):
            about = f" ({there} belongs to {_user(there.stat().st_uid)}, this process to {_user(os.geteuid())})"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR) and there.is_file():
        about = f" ({there} is a file, where a folder is needed)"
    return f"{error.strerror}: {os.fsdecode(place)}{about}"


def free_space(path: Path) -> str:
    """How much room the disk of a path has, in words."""
    try:
        disk = shutil.disk_usage(_nearest(path))
    except OSError as error:
        return f"its disk does not say how much is free: {error.strerror}"
    return f"{disk.free / 2**20:,.1f} of {disk.total / 2**20:,.0f} MiB are free there"


def _nearest(path: Path) -> Path:
    """The path, or, of one that is not there yet, the nearest folder above it."""
    path = path.absolute()
    return next((part for part in (path, *path.parents) if os.path.exists(part)), path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give a path to an error of the disk that names none, as one of a full disk does, and note how full it is."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
            if error.errno in FULL:  # now: what was written so far is about to be removed
                error.strerror = f"{error.strerror} ({free_space(Path(path))})"
        raise


@contextmanager
def refusing(field: str, folder: str | Path) -> Iterator[None]:
    """Name the field that chose a folder where something in it cannot be written or read (ValueError)."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)).absolute() if error.filename else None
        if place is None or not place.is_relative_to(Path(folder).expanduser().absolute()):
            raise
        refuse(field, str(folder), f"{disk_error(error)}; make room, or name a folder that you may write to")


def commit_of() -> str:
    """The words ", commit …" where this package lies in its git repository; else none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f", commit {told.stdout.strip()}"


def require_writable(field: str, folder: str | Path) -> None:
    """Refuse a folder that no file can be written into, or made in, by the field that chose it. Leaves no trace."""
    with refusing(field, folder):
        folder = Path(folder).expanduser()
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with naming(probe):
                probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
            with suppress(OSError):
                for path in made:
                    path.rmdir()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well, and leaves nothing when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number alone may occur on two hosts that share the folder.
    part = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with naming(path), open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            part.unlink()
        raise


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, waiting for another process that holds it, or else raising BlockingIOError.

    A file system without locks (some network ones) is used without: what the lock guards is written aside and renamed,
    so the loss is double work, not a broken file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RepeatedKey(ValueError):
    """A key that stands twice in one mapping or object, where only one of the two values would count."""


class _Loader(yaml.SafeLoader):
    """Plain values; a key is text as it is written (`no`, `on`, `010`), and stands in a mapping once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused later: it cannot be a key
            line = key.start_mark.line + 1
            if key.value in lines:
                before = f"line {lines[key.value]}" if lines[key.value] != line else "the same line"
                raise RepeatedKey(
                    f"line {line}: the key {key.value[:60]!r} is there already, in {before}, and only one of the two "
                    "would count; leave one out"
                )
            lines[key.value] = line
            if key.tag != _MERGE:
                key.tag = _TEXT
        return node


_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def read_yaml(path: Path) -> object:
    """The content of a YAML file in UTF-8. Raises ValueError that says what is wrong with it, or OSError."""
    with path.open("rb") as file:
        return parse_yaml(file.read(LARGEST_FILE_BYTES + 1))


def parse_yaml(content: bytes) -> object:
    """What `read_yaml` makes of a file's content."""
    if len(content) > LARGEST_FILE_BYTES:
        raise ValueError(f"larger than {LARGEST_FILE_BYTES >> 20} MiB")
    try:
        value = _Loader(content.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    _require_finite(value)
    return value


def parse_json(content: bytes) -> Any:
    """JSON in which no key stands twice in an object. Raises ValueError, or RecursionError where it is too deep."""
    return _JSON.decode(content.decode(json.detect_encoding(content), "surrogatepass"))


def write_json(path: Path, value: object) -> None:
    """A value as a JSON file, whole or not at all. Raises ValueError for a number that is not finite."""
    content = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    with atomic_write(path) as file:
        file.write(content)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these keys and values, refused (ValueError) where one value would silently replace another."""
    made = dict(pairs)
    if len(made) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise RepeatedKey(
            f"the key {repeated[:60]!r} stands twice in an object, and only one would count; leave one out"
        )
    return made


_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)  # json.loads would build one for each text


def _require_finite(value: object) -> None:
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if isinstance(node, (dict, list)):
            waiting += [*node, *node.values()] if isinstance(node, dict) else node
        if seen + len(waiting) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
