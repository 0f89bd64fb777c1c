#!/usr/bin/env python
"""Index tar shards: where the members of each sample lie.

A run indexes local shards and those at addresses (s3://…, gs://…, https://…) by itself at its first start. An index of
the latter takes a pass over all of them: --beside puts SHARD.npz beside each, where other hosts find it. `pipe:` shards
must be indexed here first; a source then names the folder:

    python tools/index_shards.py 'pipe:aws s3 cp s3://bucket/{00000..00331}.tar -' --output /data/cc3m-index

    data:
      allow_pipe: true
      train:
        - shards: 'pipe:aws s3 cp s3://bucket/{00000..00331}.tar -'
          index: /data/cc3m-index

An interrupted indexing is resumed by the same command. OUTPUT/manifest.json has for every shard that was indexed into
the folder its samples, its bytes, what was left out, by cause, and, with --checksums, its SHA-256.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.config import DataConfig
from modstruct.data.shards.index import (
    REPEATED_KEY,
    ShardIndex,
    UnreadableShard,
    index_file_name,
    index_shards,
    index_tar,
    name_beside,
)
from modstruct.data.shards.members import LAYOUT
from modstruct.data.shards.objects import ObjectFailed, is_object, write_object
from modstruct.data.shards.packing import MANIFEST
from modstruct.data.shards.pipes import PipeCache, PipeFailed, pipe_cache
from modstruct.data.shards.pool import cores, mapping
from modstruct.data.shards.sources import expand_pattern, is_pipe, shard_states
from modstruct.errors import printable, refuse, without_credentials
from modstruct.files import require_writable, write_json


def index() -> int:
    defaults = DataConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="path, glob, brace pattern, address, or pipe:COMMAND, in quotes")
    parser.add_argument("--output", type=Path, help="folder for the indexes (default: CACHE/indexes, where runs look)")
    parser.add_argument("--cache", default=defaults.cache, help="as data.cache of the recipe (default: %(default)s)")
    parser.add_argument(
        "--pipe_cache_gib",
        type=float,
        default=defaults.pipe_cache_gib,
        help="as data.pipe_cache_gib: disk space for the pipes' output (default: %(default)s)",
    )
    parser.add_argument("--jobs", type=int, default=4, help="pipes that run at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core, %(default)s)")
    parser.add_argument("--checksums", action="store_true", help="read shards whole, for their SHA-256")
    parser.add_argument("--renew", action="store_true", help="index pipes again, whose content has changed")
    parser.add_argument("--beside", action="store_true", help="write SHARD.npz beside each shard at an address, too")
    options = parser.parse_args()
    for option in ("jobs", "workers"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} = {getattr(options, option)}: at least 1")
    output = options.output or Path(options.cache).expanduser() / "indexes"
    pipes = pipe_cache(DataConfig(cache=options.cache, pipe_cache_gib=options.pipe_cache_gib))
    try:
        names = [name for pattern in options.shards for name in expand_pattern(pattern, True, "shards")]
        files = _files(names, output)
    except ValueError as error:
        parser.error(str(error))
    missing = [
        (name, file)
        for name, file in files.items()
        if not file.exists()
        or (options.renew and is_pipe(name))
        or (options.checksums and _lacks("sha256", file))
        or (options.beside and is_object(name) and _lacks("version", file))
    ]

    try:
        if missing:
            require_writable("--output" if options.output else "--cache", output)
        unpiped = [(name, file) for name, file in missing if not is_pipe(name)]
        index_shards(unpiped, progress=True, workers=options.workers, checksums=options.checksums)
        for name in filter(is_object, files if options.beside else ()):
            write_object(name_beside(name), files[name].read_bytes())
    except (UnreadableShard, ValueError, ObjectFailed) as error:
        parser.error(printable(str(error)))
    piped = [(name, file) for name, file in missing if is_pipe(name)]
    one = partial(_index_pipe, pipes, options.renew, options.checksums)
    with mapping(options.jobs, len(piped)) as run:
        results = [*tqdm(run(one, piped), "pipes", len(piped), unit="shard", disable=not piped)]
    failed = [result for result in results if result is not None]
    _write_manifest(output, _report(files))
    for failure in failed:
        print(printable(f"failed: {failure}"), file=sys.stderr)
    return 1 if failed else 0


def _files(shards: list[str], folder: Path) -> dict[str, Path]:
    """File of each shard's index. Raises ValueError for a shard that is not there."""
    files = {}
    for shard, state in zip(shards, shard_states(shards), strict=True):
        if isinstance(state, OSError):
            refuse("shards", shard, str(state))
        files[shard] = folder / index_file_name(shard, *state)
    return files


def _lacks(name: str, file: Path) -> bool:
    return getattr(ShardIndex.load(file), name, None) is None


def _index_pipe(pipes: PipeCache, renew: bool, checksum: bool, job: tuple[str, Path]) -> str | None:
    """Returns what failed, with its reason."""
    shard, file = job
    if renew:
        pipes.path(shard).unlink(missing_ok=True)
    try:
        index_tar(pipes.open(shard), checksum=checksum).save(file)
    except PipeFailed as error:
        return f"{shard}: {error}"
    return None


def _write_manifest(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Of the shards of this and of earlier commands whose indexes lie in the folder."""
    path, earlier = folder / MANIFEST, []
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        earlier = [
            one for one in json.loads(path.read_bytes())["shards"] if one["id"] and (folder / one["index"]).exists()
        ]
    found = {one["id"]: one for one in [*earlier, *shards]}
    write_json(
        path,
        {name: sum(one[name] for one in found.values()) for name in ("samples", "bytes")}
        | {"shards": [*found.values()]},
    )


def _report(files: dict[str, Path]) -> list[dict[str, Any]]:
    """Print what was found. Returns, for each shard that is indexed, what the manifest says of it."""
    samples, described = 0, []
    left_out: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for shard, file in files.items():
        index = ShardIndex.load(file)
        if index is None:
            continue
        samples += len(index.rows)
        # A shard of another size or time has another index, but the same id.
        about = {"shard": without_credentials(shard), "id": Path(index_file_name(shard)).stem, "index": file.name}
        about |= {"samples": len(index.rows), "bytes": index.size_bytes}
        about |= {name: getattr(index, name) for name in ("sha256", "broken", "unused", "examples")}
        described.append(about | {"left_out": index.faults})
        left_out.update(index.faults)
        unused.update(index.unused)
        for cause, keys in index.examples.items():
            examples.setdefault(cause, f"{shard}: {', '.join(keys)}")
        if index.broken:
            print(printable(f"bad shard {shard}: {index.broken}"), file=sys.stderr)
    print(f"{samples} samples in {len(files)} shards")
    for cause, count in left_out.most_common():
        print(printable(f"{count} samples left out: {cause} (first {examples[cause]})"))
    read = unused.pop(REPEATED_KEY, 0)
    for cause, count in unused.most_common():
        print(printable(f"{count} {cause}: not used (first {examples[cause]})"))
    if unused:
        print(LAYOUT)
    if read:
        print(f"{read} {REPEATED_KEY}, which are read all the same (first {examples[REPEATED_KEY]})")
    return described


if __name__ == "__main__":
    stopping.listen()
    sys.exit(run_tool(index))
