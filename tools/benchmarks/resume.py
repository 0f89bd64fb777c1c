"""How long a run takes to find its place in the data, from nothing: the same at the start, middle and end of an epoch.

python tools/benchmarks/resume.py                       # 10 million samples: under a minute
python tools/benchmarks/resume.py --samples 400000000

A synthetic table of samples (counts a shard and, in a file without content, 28 bytes a sample; no images) stands for
a source that is indexed already. Every position gets a fresh process: it opens the table, makes the order, locates the
slots of the step and reads their rows. Seconds are without Python's own start; memory is what the process grows by.
Writes JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig
from modstruct.data.shards.index import ROW
from modstruct.data.shards.loader import train_order
from modstruct.data.shards.sample_table import Samples, SourceFaults, write_shards

MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    steps = options.samples // options.global_batch
    places = {"start": 0, "middle": steps // 2, "end": steps - 1, "third epoch, middle": 2 * steps + steps // 2}
    runs: dict[str, list[dict]] = {place: [] for place in places}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "synthetic.rows"
        names = [f"/data/{shard:06}.tar" for shard in range(-(-options.samples // options.shard_samples))]
        write_table(table, names, options.samples, options.shard_samples)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(options.rounds):
                for place, step in places.items():
                    runs[place].append(pool.apply(locate, (table, step, options.global_batch)))
    results = [summary(place, step, runs[place]) for place, step in places.items()]
    print(f"{options.samples:,} samples in shards of {options.shard_samples:,}, batches of {options.global_batch:,}\n")
    print(f"{'position':22}{'step':>10}{'seconds':>10}{'of the start':>14}{'memory, MiB':>13}")
    for row in results:
        row["ratio"] = row["seconds"] / results[0]["seconds"]
        print(f"{row['place']:22}{row['step']:>10,}{row['seconds']:>10.3f}{row['ratio']:>14.2f}{row['mib']:>13.0f}")
    if options.out:
        options.out.write_text(json.dumps(vars(options) | {"out": str(options.out), "positions": results}, indent=1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="Of the source (default: %(default)s).")
    parser.add_argument("--shard_samples", type=int, default=10_000, help="Of a shard (default: %(default)s).")
    parser.add_argument("--global_batch", type=int, default=4096, help="Slots of a step (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="Repetitions that medians are taken of (default: 5).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    return parser.parse_args(arguments)


def write_table(table: Path, shards: Sequence[str], samples: int, shard_samples: int) -> None:
    """What modstruct.data.shards.samples reads, of shards whose content is not there."""
    counts = [min(shard_samples, samples - first) for first in range(0, samples, shard_samples)]
    with open(table, "wb") as file:
        file.truncate(samples * ROW.itemsize)
    columns = counts, [10**9] * len(counts), [0] * len(counts)
    write_shards(table, shards, columns, [len(counts)], [SourceFaults()], fingerprint="")


def locate(table: Path, step: int, batch: int) -> dict:
    """Seconds and memory from nothing to the rows of the step's samples."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = peak_bytes()
    start = time.perf_counter()
    samples = Samples(table)
    order = train_order(samples, DataConfig(), seed=0, global_batch=batch)
    _, found = order.locate(np.arange(step * batch, (step + 1) * batch))
    rows = samples.rows[found]
    shards = {samples.shard_of(sample) for sample in found.tolist()}
    seconds = time.perf_counter() - start
    assert len(rows) == len(set(found.tolist())) == batch
    return {"seconds": seconds, "mib": (peak_bytes() - before) / MIB, "shards": len(shards)}


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024


def summary(place: str, step: int, runs: list[dict]) -> dict:
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"place": place, "step": step} | medians | {"all_seconds": [run["seconds"] for run in runs]}


if __name__ == "__main__":
    main()
