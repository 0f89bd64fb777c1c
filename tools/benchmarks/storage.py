"""Data on slow or distant storage: what hosts fetch in an epoch, how samples are mixed, how fast they are read.

python tools/benchmarks/storage.py fetches    # 64 hosts, 64M samples: 5 minutes, index arithmetic
python tools/benchmarks/storage.py reading    # one loader process, with 30 ms before every read: a minute
python tools/benchmarks/storage.py objects    # the same from a web server on loopback: half a minute
python tools/benchmarks/storage.py index      # 10^9 samples in 10^6 shards, most of which are not there: a minute

`fetches` reads no data: for some of the hosts it walks through an epoch and counts the bytes of the shards that such a
host fetches into its cache (ahead of need, the least recently used leave it first) and those of the samples that it
reads. It also measures how the order mixes: how often two samples of a batch, or of neighbouring batches, are from one
shard, where 1 is what samples drawn at random have.

`reading` writes shards and reads them without decoding: one sample at a time, and ahead (data.read_ahead_mib); first
with a pause before every read, then without, in turns, medians of rounds. Memory is what the process has beyond what it
had before, at most.

`objects` reads an epoch of such shards by range and counts, on the server, requests and bytes; all bytes of the shards
are used. Windows of blocks that half of what is read ahead holds are read block by block, but for those that it cuts.

`index` opens such samples, each time in a process of its own, makes the order and finds a batch: as the first process
of a host, which expands the pattern and checks 10,000 of the shards, as another one, and as a loader process, which
gets what is sent to it. Seconds are of the processor and on the wall; memory is what a process shares with no file,
beyond what it was before. It needs 28 bytes of (sparse) file a sample, of which nothing is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from object_server import ObjectServer
from resume import write_table
from tqdm import tqdm

from modstruct.config import DataConfig, Source
from modstruct.data.shards.ahead import ComingShards, ReadAhead
from modstruct.data.shards.grouped_order import GroupedOrder
from modstruct.data.shards.loader import SHARE_AHEAD, train_order
from modstruct.data.shards.order import Order, SampleOrder
from modstruct.data.shards.reader import RawSample, ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_samples, table_path
from modstruct.data.shards.sources import every_nth, expand_sources

GIB = 2**30
MIXED_BATCHES = 16  # pairs of neighbours that mixing is measured on


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    kinds = parser.add_subparsers(required=True)
    fetches_options(kinds.add_parser("fetches", help="What hosts fetch, and how the order mixes."))
    reading_options(kinds.add_parser("reading", help="Samples a second where every read takes long."))
    objects_options(kinds.add_parser("objects", help="Requests and bytes of an epoch from a web server."))
    index_options(kinds.add_parser("index", help="Memory and seconds of a large index."))
    options = parser.parse_args(arguments)
    results = options.run(options)
    if options.out:
        options.out.write_text(json.dumps({"command": " ".join(sys.argv), "results": results}, indent=1))


# --- what hosts fetch ---


def fetches_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=fetches)
    parser.add_argument("--samples", type=int, default=64_320_000, help="Of the source (default: %(default)s).")
    parser.add_argument("--shard_samples", type=int, default=10_000, help="Of a shard (default: %(default)s).")
    parser.add_argument("--sample_bytes", type=int, default=50_000, help="Of a sample (default: %(default)s).")
    parser.add_argument("--global_batch", type=int, default=32_768, help="Pairs of a step (default: %(default)s).")
    parser.add_argument("--hosts", type=int, default=64, help="Of the run (default: %(default)s).")
    parser.add_argument("--looked_at", type=int, default=4, help="Of these, with groups (default: %(default)s).")
    parser.add_argument("--cache_gib", type=float, default=50.0, help="data.pipe_cache_gib of one group (default: 50).")


class Setting(NamedTuple):
    groups: int
    block: int
    window: int


class HostCount(NamedTuple):
    fetched: int
    used: int
    late: int
    """Shards that were not there when they were needed."""


def fetches(options: argparse.Namespace) -> list[dict]:
    whole = options.shard_samples
    hosts, several = options.hosts, options.hosts * 8
    settings = [Setting(1, 64, 1024), Setting(1, whole, 16)]
    settings += [Setting(hosts, whole, 16), Setting(hosts, whole, 4), Setting(several, whole, 4)]
    titles = f"{'groups':>7}{'block':>8}{'window':>8}{'cache, GB':>11}{'fetched / used':>16}{'late':>9}"
    print(f"{titles}{'same batch':>13}{'neighbours':>12}")
    results = []
    for setting in tqdm(settings, disable=None):
        order = order_of(setting, options)
        looked_at = range(0, hosts, hosts // options.looked_at) if setting.groups > 1 else range(1)  # else all alike
        counts = [count_host(order, host, setting, options) for host in looked_at]
        fetched, used, late = (sum(values) for values in zip(*counts, strict=True))
        batch, neighbours = mixing(order, options)
        row = setting._asdict() | {"fetched_over_used": fetched / used, "late": late / len(counts)}
        results.append(row | {"same_shard_in_batch": batch, "same_shard_in_neighbours": neighbours})
        tqdm.write(
            f"{setting.groups:>7}{setting.block:>8,}{setting.window:>8,}{cache_bytes(setting, options) / 1e9:>11.0f}"
            f"{fetched / used:>16,.3f}{late / len(counts):>9.0f}{batch:>13.2f}{neighbours:>12.2f}"
        )
    return results


def order_of(setting: Setting, options: argparse.Namespace) -> Order:
    starts = np.arange(0, options.samples + 1, options.shard_samples)
    if setting.groups == 1:
        return SampleOrder([np.diff(starts)], 0, setting.block, setting.window)
    sources = np.array([0, len(starts) - 1])
    return GroupedOrder(starts, sources, 0, setting.block, setting.window, None, setting.groups, options.global_batch)


def count_host(order: Order, host: int, setting: Setting, options: argparse.Namespace) -> HostCount:
    """Walk one host through an epoch."""
    rows = options.global_batch // options.hosts
    steps = options.samples // options.global_batch
    seen: dict[int, list[int]] = {}
    samples: list[np.ndarray] = []

    def shards_of(step: int) -> list[int]:
        _, found = order.locate(step * options.global_batch + host * rows + np.arange(rows))
        samples.append(found)
        seen[step] = np.unique(found // options.shard_samples).tolist()
        return seen[step]

    shard_bytes = options.shard_samples * options.sample_bytes
    limit = cache_bytes(setting, options)
    sizes = np.full(options.samples // options.shard_samples, shard_bytes)
    coming = ComingShards(shards_of, sizes, limit * SHARE_AHEAD, steps)
    cache: OrderedDict[int, None] = OrderedDict()
    fetched = late = 0

    def fetch(shard: int) -> None:
        nonlocal fetched
        if shard not in cache:
            fetched += shard_bytes
            cache[shard] = None
            while len(cache) > max(1, limit // shard_bytes):
                cache.popitem(last=False)

    for step in range(steps):
        new = coming.newly_seen(step)
        for shard in coming.needed:
            if shard in cache:
                cache.move_to_end(shard)
        for shard in new:
            fetch(shard)
        for shard in seen.pop(step):
            late += shard not in cache
            fetch(shard)
            cache.move_to_end(shard)
    assert len(np.unique(np.concatenate(samples))) == steps * rows, "a sample came twice in an epoch"
    return HostCount(fetched, steps * rows * options.sample_bytes, late)


def cache_bytes(setting: Setting, options: argparse.Namespace) -> int:
    """With groups the least that is not refused: two windows of each, which reach into two shards more."""
    if setting.groups == 1:
        return int(options.cache_gib * GIB)
    return 2 * (setting.window + 2) * setting.groups // options.hosts * options.shard_samples * options.sample_bytes


def mixing(order: Order, options: argparse.Namespace) -> tuple[float, float]:
    """How often two samples of a batch, and two of neighbouring batches, are from one shard: 1 for random batches."""
    batch, shards = options.global_batch, options.samples // options.shard_samples
    steps = options.samples // batch
    within, between = [], []
    for step in np.linspace(1, steps - 3, MIXED_BATCHES).astype(int).tolist():
        first, second = (
            np.bincount(order.locate(at * batch + np.arange(batch))[1] // options.shard_samples, minlength=shards)
            for at in (step, step + 1)
        )
        within.append((first * (first - 1)).sum() / (batch * (batch - 1)) * shards)
        between.append((first * second).sum() / batch**2 * shards)
    return float(np.mean(within)), float(np.mean(between))


# --- samples a second ---


def reading_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=reading)
    parser.add_argument("--pause", type=float, default=0.03, help="Seconds before every read (default: %(default)s).")
    parser.add_argument("--sample_bytes", type=int, default=32_768, help="Of a sample (default: %(default)s).")
    parser.add_argument("--samples", type=int, default=4096, help="Of the source, read once (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="Without a pause (default: %(default)s).")


def reading(options: argparse.Namespace) -> list[dict]:
    forms = {  # read_ahead_mib, shuffle_block and shuffle_window
        "one at a time": (0, 64, 1024),
        "ahead": (64, 64, 1024),
        "ahead, whole blocks": (64, 64, 8),
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(cache=folder)
        samples = open_samples([Source(write_shards(Path(folder), options))], config, "data.train")
        print(f"{'reading':22}{'pause, ms':>10}{'samples/s':>11}{'ratio':>8}{'reads':>8}{'memory, MiB':>13}")
        for pause, rounds in ((options.pause, 1), (0.0, options.rounds)):
            found: dict[str, list[Reading]] = {form: [] for form in forms}
            for _ in range(rounds):
                for form, settings in forms.items():
                    few = 128 if pause and form == "one at a time" else options.samples
                    found[form].append(read(samples, config, settings, few, pause))
            base = found["one at a time"]
            for form, of_form in found.items():
                rate = statistics.median(one.rate for one in of_form)
                ratio = statistics.median(one.rate / other.rate for one, other in zip(of_form, base, strict=True))
                reads, mib = of_form[0].reads, max(one.mib for one in of_form)
                results.append({"form": form, "pause": pause, "rate": rate, "ratio": ratio, "reads": reads, "mib": mib})
                print(f"{form:22}{1000 * pause:>10.0f}{rate:>11,.0f}{ratio:>8.2f}{reads:>8,}{mib:>13.0f}")
    return results


def write_shards(folder: Path, options: argparse.Namespace) -> str:
    """Eight shards of samples whose images are noise; returns a glob of them."""
    import webdataset

    for shard in range(8):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for number in range(options.samples // 8):
                content = {"jpg": os.urandom(options.sample_bytes), "txt": "a noisy image"}
                tar.write({"__key__": f"{shard}{number:06}", **content})
    return str(folder / "*.tar")


class Reading(NamedTuple):
    rate: float
    reads: int
    mib: float


def read(samples: Samples, config: DataConfig, settings: tuple[int, int, int], count: int, pause: float) -> Reading:
    """Read `count` samples in steps of 256."""
    ahead_mib, block, window = settings
    reader, order = ShardReader(samples, config), SampleOrder(samples.shard_sizes(), 0, block, window)

    def samples_of(step: int) -> np.ndarray:
        return order.locate(np.arange(256 * step, min(256 * (step + 1), count)))[1]

    ahead = ReadAhead(reader, samples_of, ahead_mib * 2**20, stride=1, stop=-(-count // 256))
    plain, reads, before = os.pread, 0, own_bytes()

    def slow(*arguments: int) -> bytes:
        nonlocal reads
        reads += 1
        if pause:
            time.sleep(pause)
        return plain(*arguments)

    most, start = before, time.perf_counter()
    with mock.patch.object(os, "pread", slow):
        for step in range(-(-count // 256)):
            numbers = samples_of(step)
            for sample in ahead.read(step, len(numbers)) if ahead_mib else map(reader.read, numbers.tolist()):
                assert isinstance(sample, RawSample)
            most = max(most, own_bytes())
    return Reading(count / (time.perf_counter() - start), reads, (most - before) / 2**20)


# --- requests and bytes ---


def objects_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=objects)
    parser.add_argument("--sample_bytes", type=int, default=32_768, help="Of a sample (default: %(default)s).")
    parser.add_argument("--samples", type=int, default=4096, help="Of the source, read once (default: %(default)s).")


def objects(options: argparse.Namespace) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as folder, ObjectServer(Path(folder)) as server:
        config = DataConfig(cache=folder)
        write_shards(Path(folder), options)
        samples = open_samples([Source(f"{server.url}/{{0..7}}.tar")], config, "data.train")
        print(f"{'read ahead, MiB':>15}{'block':>7}{'window':>8}{'requests':>10}{'fetched / used':>16}")
        for ahead_mib, block, window in ((64, 64, 1024), (64, 64, 8), (64, 64, 2), (256, 64, 16)):
            server.bytes = 0
            server.requests.clear()
            read(samples, config, (ahead_mib, block, window), options.samples, 0.0)
            asked, ratio = server.requests.total(), server.bytes / int(samples.size_bytes.sum())
            setting = {"ahead_mib": ahead_mib, "block": block, "window": window}
            results.append(setting | {"requests": asked, "fetched_over_used": ratio})
            print(f"{ahead_mib:>15}{block:>7}{window:>8,}{asked:>10,}{ratio:>16.3f}")
    return results


# --- a large index ---


def index_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=index)
    parser.add_argument("--shards", type=int, default=1_000_000, help="Of the source (default: %(default)s).")
    parser.add_argument("--shard_samples", type=int, default=1000, help="Of a shard (default: %(default)s).")
    parser.add_argument("--global_batch", type=int, default=32_768, help="Pairs of a step (default: %(default)s).")
    parser.add_argument("--groups", type=int, default=64, help="data.groups (default: %(default)s).")


def index(options: argparse.Namespace) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        stop = options.shards - 1
        source = Source(f"{folder}/{{{'0' * len(str(stop))}..{stop}}}.tar", caption_lines=False)
        config = DataConfig(order_version=2, cache=folder)
        write_opened(Path(folder), source, config, options.shard_samples)
        title = f"{'process':12}{'groups':>8}{'open, s':>9}{'on the wall':>13}{'order, s':>10}"
        print(f"{title}{'on the wall':>13}{'own memory, MiB':>17}{'sent, bytes':>13}")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for groups in (1, options.groups):
                grouped, sent = replace(config, groups=groups), None
                for process in ("first", "other", "loader"):
                    arguments = process, source, grouped, sent, options.global_batch
                    found = pool.apply(open_index, arguments)
                    sent = found.pop("reader")
                    results.append({"process": process, "groups": groups} | found)
                    seconds = f"{found['open']:>9.3f}{found['open_wall']:>13.3f}"
                    seconds += f"{found['order']:>10.3f}{found['order_wall']:>13.3f}"
                    print(f"{process:12}{groups:>8}{seconds}{found['mib']:>17.1f}{found['sent']:>13,}")
    return results


def write_opened(folder: Path, source: Source, config: DataConfig, shard_samples: int) -> None:
    """A table of shards of which only those are there, and empty, that are checked."""
    name, _, rest = source.shards.partition("{")
    first, _, last = rest.partition("}")[0].partition("..")
    shards = int(last) + 1
    for shard in range(0, shards, every_nth(shards)):
        Path(f"{name}{shard:0{len(first)}}.tar").touch()
    expanded = expand_sources([source], config, "data.train")
    table = table_path(expanded, folder / "indexes", "data.train")
    table.parent.mkdir(parents=True)
    write_table(table, expanded[0].shards, shards * shard_samples, shard_samples)


def open_index(process: str, source: Source, config: DataConfig, sent: bytes | None, batch: int) -> dict:
    """Open the samples as the first process of a host does, or another one, or a reader as it is sent to a loader
    process; find and lay out a batch's share of one group."""
    before, start, wall = own_bytes(), time.process_time(), time.perf_counter()
    if process == "loader":
        reader = ForkingPickler.loads(sent)
    else:
        with mock.patch("modstruct.data.shards.samples.first_has_run", return_value=process == "other"):
            reader = ShardReader(open_samples([source], config, "data.train"), config)
    opened, opened_wall = time.process_time(), time.perf_counter()
    order = train_order(reader.samples, config, 0, batch)
    found = order.locate(np.arange(512))[1]
    assert len(reader.runs(found)) > 0
    seconds = {"open": opened - start, "open_wall": opened_wall - wall}
    seconds |= {"order": time.process_time() - opened, "order_wall": time.perf_counter() - opened_wall}
    state = bytes(ForkingPickler.dumps(reader))
    return seconds | {"mib": (own_bytes() - before) / 2**20, "sent": len(state), "reader": state}


def own_bytes() -> int:
    """Memory of this process that it shares with no file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("RssAnon"))) * 1024


if __name__ == "__main__":
    main()
