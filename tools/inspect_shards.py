#!/usr/bin/env python
"""Look at tar shards: sizes, lengths of captions, duplicates, what no run could use, and sample pairs on a page.

    python tools/inspect_shards.py 'shards/*.tar' --out inspection

Every sample is read and decoded as a run would, on all cores. Into inspection.html go the pairs and all that is
printed, into inspection.json the numbers. Duplicates are images, and captions, of the same bytes; --near compares
perceptual hashes, too, as tools/find_leakage.py does it between two sources. Where img2dataset's parquets lie beside
the shards, what became of its downloads is counted (pip install 'modstruct[parquet]').
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.config import DataConfig, Source
from modstruct.data.shards.evaluation_samples import EvaluationSamples, spaced
from modstruct.data.shards.index import parquet_name
from modstruct.data.shards.inspection import LARGEST_GROUPS, PERCENTILES, REPEATED, Inspection, Repeated, inspect
from modstruct.data.shards.parquet import statuses
from modstruct.data.shards.pool import SHORT_JOBS_WORTH_A_POOL, cores, mapping
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import describe_faults, open_samples
from modstruct.data.shards.sources import is_pipe
from modstruct.errors import printable, without_credentials
from modstruct.files import atomic_write, require_writable
from modstruct.reporting.shard_page import shard_page


def main() -> int:
    data = DataConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="path, glob or brace pattern, or pipe:COMMAND, in quotes")
    parser.add_argument(
        "--out", type=Path, default=Path("inspection"), help="OUT.html, OUT.json (default: %(default)s)"
    )
    parser.add_argument(
        "--near", action="store_true", help="look for near duplicates of images by perceptual hash, too"
    )
    parser.add_argument("--examples", type=int, default=96, help="pairs on the page (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core, %(default)s)")
    parser.add_argument("--cache", default=data.cache, help="as data.cache of the recipe (default: %(default)s)")
    parser.add_argument("--max_image_pixels", type=int, default=data.max_image_pixels, help="default: %(default)s")
    parser.add_argument("--allow_pipe", action="store_true", help="permit pipe: sources, which run a shell command")
    options = parser.parse_args()
    for option in ("workers", "max_image_pixels"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} = {getattr(options, option)}: at least 1")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # what is left out is printed at the end
    stem = options.out.with_suffix("") if options.out.suffix == ".html" else options.out
    config = DataConfig(
        cache=options.cache,
        allow_pipe=options.allow_pipe,
        max_bad_share=1.0,
        max_image_pixels=options.max_image_pixels,
    )
    try:
        require_writable("--out", stem.parent)
        samples = open_samples([Source(pattern) for pattern in options.shards], config, "shards", progress=True)
    except ValueError as error:
        parser.error(str(error))
    reader = ShardReader(samples, config)
    with tqdm(desc="inspecting", total=len(samples), unit="sample") as bar:
        found = inspect(reader, config.max_image_pixels, options.workers, bar.update)

    if options.near:
        found.repeated["near"] = _near(options.shards, replace(config, workers=options.workers))
    downloads = _downloads(samples, options.workers)

    summary = [
        f"{found.samples:,} samples in {len(samples.shards):,} shards",
        f"{samples.size_bytes.sum() / 2**30:,.3f} GiB",
        f"{np.diff(samples.shard_starts).min():,} to {np.diff(samples.shard_starts).max():,} samples a shard",
    ]
    findings = [text for faults in samples.faults for text in describe_faults(faults)]
    for cause, count in found.left_out.counts.most_common():
        findings.append(f"{count} samples left out: {cause} (first {', '.join(found.left_out.examples[cause])})")
    if downloads:
        of_status = ", ".join(f"{count:,} {status}" for status, count in downloads.most_common())
        findings.append(f"{sum(downloads.values()):,} rows in the parquets: {of_status}")
    shards, findings = ([*map(without_credentials, texts)] for texts in (options.shards, findings))
    described = _described(found) | {"shards": shards, "bytes": int(samples.size_bytes.sum())}
    described |= {"left_out": samples.left_out + found.left_out.counts, "findings": findings, "downloads": downloads}
    page = shard_page(shards, summary, findings, found, reader, config, [*spaced(samples, options.examples)])
    for ending, text in ((".json", json.dumps(described, indent=1) + "\n"), (".html", page)):
        with atomic_write(stem.with_name(stem.name + ending)) as file:
            file.write(text.encode("utf-8", errors="replace"))
    _print(summary, findings, found)
    print(f"written to {stem}.html and {stem}.json")
    return 0


def _downloads(samples: Samples, workers: int) -> Counter[str]:
    """Rows of the parquets beside local shards, by status."""
    beside = [shard for shard in samples.shards if not is_pipe(shard) and os.path.exists(parquet_name(shard))]
    if not beside or not importlib.util.find_spec("pyarrow"):
        return Counter()
    with mapping(workers, len(beside), SHORT_JOBS_WORTH_A_POOL) as run:
        return sum(tqdm(run(statuses, beside), "reading parquets", len(beside), unit="shard"), Counter[str]())


def _near(patterns: list[str], config: DataConfig) -> Repeated:
    """Images that are near duplicates of an earlier one, each with the first of these."""
    from modstruct.evaluation.leakage.duplicates import find_duplicates, thumbnail_set  # loads torch and faiss

    samples = EvaluationSamples([Source(pattern) for pattern in patterns], config, "shards")
    folder = Path(config.cache).expanduser() / "thumbnails" / samples.fingerprint
    thumbnails = thumbnail_set(samples, "shards", folder)
    earlier: dict[int, int] = {}
    for pair in find_duplicates(thumbnails, thumbnails):
        if pair.train < pair.evaluation and "hash" in pair.by:
            earlier[pair.evaluation] = min(pair.train, earlier.get(pair.evaluation, pair.train))
    groups = [(2, thumbnails.indices[[first, later]].tolist()) for later, first in earlier.items()]
    return Repeated(len(earlier), len({*earlier.values()}), groups[:LARGEST_GROUPS])


def _described(found: Inspection) -> dict:
    return {
        "samples": found.samples,
        "percentiles": {name: dict(zip(PERCENTILES, found.percentiles(name), strict=True)) for name in found.numbers},
        "repeated": {kind: asdict(repeated) for kind, repeated in found.repeated.items()},
    }


def _print(summary: list[str], findings: list[str], found: Inspection) -> None:
    print(", ".join(summary))
    if found.numbers:
        print(f"{'percentile':22}{''.join(f'{share:>9}' for share in PERCENTILES)}")
    for name in found.numbers:
        print(f"{name:22}{''.join(f'{value:>9,}' for value in found.percentiles(name))}")
    for kind, repeated in found.repeated.items():
        print(f"{repeated.samples:,} samples of {REPEATED[kind]} as an earlier one ({repeated.groups:,} groups)")
    for text in findings:
        print(printable(text))


if __name__ == "__main__":
    stopping.listen()
    sys.exit(run_tool(main))
