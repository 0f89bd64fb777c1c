"""Shards of a source: paths, globs, brace patterns, addresses and `pipe:` commands, checked before anything is read."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modstruct.config import DataConfig, Source
from modstruct.data.shards.objects import expand_object, is_object, object_state, several
from modstruct.errors import refuse, require

PIPE = "pipe:"
# Shards of a pattern, evenly spaced, that are checked each time: each costs a few calls to the storage.
CHECKED = 10_000
ONE_RANGE = re.compile(r"([^{}\\]*)\{([0-9]+)\.\.([0-9]+)\}([^{}\\]*)")


@dataclass(frozen=True)
class SourceShards:
    """A source with its pattern expanded."""

    shards: tuple[str, ...]
    """Absolute paths, addresses, or `pipe:` and a shell command, in order."""
    index: Path | None
    """Folder of indexes made by tools/index_shards.py."""
    pattern: str
    """What the user wrote."""
    filter: str | None = None


def is_pipe(shard: str) -> bool:
    return shard.startswith(PIPE)


def as_sources(value: str | Sequence[str] | Sequence[Source]) -> list[Source]:
    """data.train, data.validation or data.eval, in any of its forms, as a list of sources."""
    entries = [value] if isinstance(value, str) else value
    return [Source(shards=entry) if isinstance(entry, str) else entry for entry in entries]


def names_of(given: Sequence[str | None]) -> list[str]:
    """Of sources, where some have been given none."""
    return [name or f"source_{number}" for number, name in enumerate(given)]


def expand_sources(sources: Sequence[Source], config: DataConfig, field: str) -> list[SourceShards]:
    """Expand the pattern of every source and check that each shard can be read.

    field: the recipe's field that the sources came from ("data.train", …), for the errors.
    Raises ValueError, naming field, value and remedy, for a pattern that matches nothing, a file that is missing or
    unreadable, a pipe that is not allowed, or weights on some of the sources only.
    """
    require(len(sources) > 0, field, list(sources), "name at least one shard")
    weights = [source.weight for source in sources]
    same = len({weight is None for weight in weights}) == 1
    require(same, f"{field}.weight", weights, "give every source a weight, or none of them")
    names = names_of([source.name for source in sources])
    require(len(names) == len({*names}), f"{field}.name", names, "give each source a name of its own")
    return [
        SourceShards(
            shards=tuple(expand_pattern(source.shards, config.allow_pipe, field)),
            index=None if source.index is None else _index_folder(source.index, field),
            pattern=source.shards,
            filter=source.filter or None,
        )
        for source in sources
    ]


def expand_pattern(pattern: str, allow_pipe: bool, field: str) -> list[str]:
    """Shards of one pattern: braces first, then globs (sorted), in the order written. Errors as expand_sources."""
    if is_pipe(pattern):
        require(allow_pipe, field, pattern, "pipe: runs a shell command; set data.allow_pipe: true to permit it")
        require(pattern[len(PIPE) :].strip() != "", field, pattern, "give a shell command after pipe:")
        return _braces(pattern, field)
    if "://" in pattern:
        return expand_object(pattern, _braces(pattern, field), field)
    path = os.path.expanduser(pattern)
    # An existing file whose name has braces or brackets is meant literally.
    literal = os.path.exists(path)
    paths = [path] if literal else _braces(path, field)
    found = [match for path in paths for match in _glob(path)] if glob.has_magic(path) and not literal else paths
    require(len(found) > 0, field, pattern, f"no file matches in {_existing_parent(path)}; correct the pattern")
    checked = found[:: every_nth(len(found))]
    missing = [path for path in checked if not os.path.exists(path)]
    if missing:
        refuse(
            field,
            pattern,
            f"{len(missing)} of {len(checked)} files do not exist, the first is {missing[0]}; correct the pattern",
        )
    for path in checked:
        _check_readable(path, pattern, field)
    return _absolute(found)


def names_only(pattern: str, shards: Sequence[str], allow_pipe: bool, field: str) -> bool:
    """Whether a pattern, of which shards may be missing, names none but these: each name that is no glob, and all that
    its globs match now, are among them, and a glob matches one of them."""
    if is_pipe(pattern):
        return allow_pipe and set(_braces(pattern, field)) <= set(shards)
    local = "://" not in pattern
    names = _absolute(_braces(os.path.expanduser(pattern), field)) if local else _braces(pattern, field)
    globs = [name for name in set(names).difference(shards) if glob.has_magic(name)]
    there = {match for name in globs for match in _glob(name)} if local else set()
    lost = any(_would_match(name, shard) for name in globs for shard in shards)
    return (set(names).difference(globs) | there) <= set(shards) and (lost or not globs)


def _would_match(pattern: str, shard: str) -> bool:
    """Whether a glob would match a shard that may be gone."""
    as_deep = "**" in pattern or pattern.count("/") == shard.count("/")  # fnmatch's * goes beyond a folder
    return as_deep and fnmatch.fnmatchcase(shard, pattern.replace("**/", "*"))


def shard_states(shards: Sequence[str]) -> Iterator[tuple[int, int] | OSError]:
    """Size and time of the last change (of an object its version, of a pipe -1 and -1) of each, or why it has none."""
    return several(_state, shards) if any(map(is_object, shards)) else map(_state, shards)


def _state(shard: str) -> tuple[int, int] | OSError:
    if is_pipe(shard):
        return -1, -1
    try:
        if is_object(shard):
            return object_state(shard)
        status = os.stat(shard)
    except FileNotFoundError:  # of so many that expand_sources has not checked it
        return FileNotFoundError("does not exist; correct the pattern")
    except OSError as error:
        return error
    return status.st_size, status.st_mtime_ns


def every_nth(shards: int) -> int:
    """Of so many shards, each how many-th is checked."""
    return max(1, -(-shards // CHECKED))


def _braces(pattern: str, field: str) -> list[str]:
    from braceexpand import braceexpand  # comes with webdataset, and is its pattern language

    one = ONE_RANGE.fullmatch(pattern)
    if one and int(one[2]) <= int(one[3]):  # as shards are named, mostly; braceexpand takes seconds for a million
        before, first, last, after = one.groups()
        padded = any(end.startswith("0") and end != "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{before}{number:0{width}}{after}" for number in range(int(first), int(last) + 1)]
    try:
        return list(braceexpand(pattern))
    except ValueError:
        refuse(field, pattern, "close the braces, as in shard-{00000..00331}.tar")


def _glob(path: str) -> list[str]:
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]


def _absolute(paths: Sequence[str]) -> list[str]:
    """os.path.abspath of each, which is called only where a path may not be normal: it takes seconds for a million."""
    here = os.path.join(os.getcwd(), "")
    joined = [path if path.startswith("/") else here + path for path in paths]
    together = "\0".join([*joined, ""])
    normal = not any(part in together for part in ("//", "/.", "/\0"))
    return joined if normal else [os.path.abspath(path) for path in joined]


def _check_readable(path: str, pattern: str, field: str) -> None:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        refuse(field, pattern, f"{path} is a folder; name its shards, as in '{os.path.join(path, '*.tar')}'")
    require(stat.S_ISREG(mode), field, pattern, f"{path} is not an ordinary file; use pipe: to read from a program")
    require(os.access(path, os.R_OK), field, pattern, f"{path} may not be read; change its permissions")


def _existing_parent(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _index_folder(folder: str, field: str) -> Path:
    path = Path(folder).expanduser()
    require(path.is_dir(), f"{field}.index", folder, "no such folder; make it with tools/index_shards.py")
    return path
