"""Files that are complete or not there, locks between the processes of a host, and YAML and JSON of others."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# YAML of others (recipes, class files): plain values only, and no more of them than the file is long.
LARGEST_FILE_BYTES = 4 << 20
# A few aliases of aliases stand for more values than any memory holds ("a billion laughs").
MOST_VALUES = 1_000_000


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well, and leaves nothing when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number alone may occur on two hosts that share the folder.
    part = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            part.unlink()
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for another process that holds it.

    A file system without locks (some network ones) is used without: what the lock guards is written aside and renamed,
    so the loss is double work, not a broken file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
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

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
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


def parse_json(content: str | bytes) -> Any:
    """JSON in which no key stands twice in an object. Raises ValueError, or RecursionError where it is too deep."""
    return json.loads(content, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these keys and values, refused (ValueError) where one value would silently replace another."""
    made = dict(pairs)
    if len(made) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise RepeatedKey(
            f"the key {repeated[:60]!r} stands twice in an object, and only one would count; leave one out"
        )
    return made


def _require_finite(value: object) -> None:
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if isinstance(node, (dict, list)):
            waiting += [*node, *node.values()] if isinstance(node, dict) else node
        if seen + len(waiting) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
