"""Time and memory of retrieval by exact counting, by FAISS's lists, and by the dense matrix of scores that peers hold.

python tools/benchmarks/retrieval.py                                     # 100,000 x 100,000 at D = 512, both ways
python tools/benchmarks/retrieval.py --engines exact faiss_flat ivf --storage float16
python tools/benchmarks/retrieval.py --gallery 1000000 --queries 10000 --dense_images 0

First both ways over --dense_images images with five captions each: by each engine of `measure_retrieval`, by a dense
matrix of scores with top-k, written plainly below, and by CLIP_benchmark's own code where `clip_benchmark` can be
imported (pip install --no-deps clip-benchmark). All metrics of exact engines must be equal, CLIP_benchmark's recall
within the rounding of its second normalisation, else the program ends with 1. Rows are multiples of 2^-11, so that
scores are exact in float32 and a tie is a tie for all; in general two programs round differently, and a rank may move
by one where scores differ in the last bit. Rows are isotropic around their pairs: the hardest case for approximate
indexes. Then --queries captions over --gallery images in a file, memory-mapped, by each engine, and what all pairs of
such a gallery would take. Each part runs in a process of its own, --rounds times; seconds are medians, memory is the
growth of its peak: `own` without the mapped pages of files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from modstruct.evaluation.retrieval import exact, nearest
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries, ranking_metrics
from modstruct.evaluation.retrieval.nearest import IndexConfig, RankedByLists
from modstruct.pairwise import nearest_counts

RECALL_AT = [1, 5, 10]
CAPTIONS = 5
ENGINES = ("exact", "faiss_flat", "ivf", "hnsw")
BATCH = 64
GIB = 2**30
ROWS_AT_ONCE = 1 << 16


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        results: dict = {"command": " ".join(sys.argv)}
        if options.dense_images:
            results["dense"] = against_dense(options, folder)
        if options.queries:
            results["large"] = large(options, folder)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
        print(f"written to {options.out}")
    return 0 if all(part["equal"] for part in results.values() if isinstance(part, dict)) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("queries", 100_000, "Captions of the large part, 0 for none"),
        ("gallery", 100_000, "Images of the large part"),
        ("dimension", 512, "Of all embeddings"),
        ("dense_images", 5_000, f"Images beside the dense matrix, with {CAPTIONS} captions each, 0 for none"),
        ("rounds", 3, "Of each part"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s).")
    parser.add_argument(
        "--storage", default="float16", choices=["float16", "float32"], help="Of files and of an index."
    )
    parser.add_argument(
        "--engines", nargs="+", default=["exact", "faiss_flat"], choices=ENGINES, help="Beside each other."
    )
    parser.add_argument("--noise", type=float, default=6.0, help="Between caption and image (default: %(default)s).")
    parser.add_argument("--scratch", type=Path, help="Folder for the embeddings (default: the system's).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(arguments)
    for name in ("gallery", "dimension", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    if options.queries > options.gallery:
        parser.error(f"--queries {options.queries}: give at most --gallery {options.gallery}, each has one image")
    return options


def against_dense(options: argparse.Namespace, folder: str) -> dict:
    """All forms at the size that the dense matrix can hold."""
    images, texts = options.dense_images, options.dense_images * CAPTIONS
    image, text = Path(folder, "image.npy"), Path(folder, "text.npy")
    write_rows(image, images, options.dimension, "float32", seed=1)
    write_rows(text, texts, options.dimension, "float32", seed=2, like=image, each=CAPTIONS, noise=options.noise)
    print(f"\nboth ways, {images:,} images, {texts:,} captions, D = {options.dimension}")
    parts: dict[str, tuple] = {engine: (engined, engine, options.storage) for engine in options.engines}
    parts["dense"] = (dense,)
    if importlib.util.find_spec("clip_benchmark"):
        parts["clip_benchmark"] = (clip_benchmark,)
    results: dict = side_by_side(options, {name: (*part, str(image), str(text)) for name, part in parts.items()})
    right, equal = results["dense"]["metrics"], True
    for name, part in results.items():
        near = 2e-4 if name == "clip_benchmark" else 0
        if name in ("exact", "faiss_flat", "clip_benchmark"):
            equal &= all(
                abs(right[way][metric] - value) <= near
                for way, metrics in part["metrics"].items()
                for metric, value in metrics.items()
            )
        print(f"  {name}: {part['metrics']}")
    print("metrics equal" if equal else "METRICS DIFFER")
    return results | {"equal": equal}


def large(options: argparse.Namespace, folder: str) -> dict:
    """Queries over a gallery in a file."""
    gallery, queries = Path(folder, "gallery.npy"), Path(folder, "queries.npy")
    write_rows(gallery, options.gallery, options.dimension, options.storage, seed=3)
    write_rows(queries, options.queries, options.dimension, options.storage, seed=4, like=gallery, noise=options.noise)
    print(
        f"\n{options.queries:,} captions over {options.gallery:,} images, D = {options.dimension}, "
        f"{options.storage}: {gallery.stat().st_size / GIB:.2f} GiB; its dense matrix of all pairs "
        f"{4 * options.gallery**2 / GIB:,.0f} GiB"
    )
    arguments = (options.storage, str(queries), str(gallery))
    results: dict = side_by_side(options, {engine: (one_way, engine, *arguments) for engine in options.engines})
    for name, part in results.items():
        part["flops_per_second"] = 2 * options.queries * options.gallery * options.dimension / part["seconds"]
        part["all_pairs_seconds"] = part["seconds"] * options.gallery / options.queries
        rate, every = part["flops_per_second"] / 1e9, part["all_pairs_seconds"] / 60
        print(f"  {name}: {rate:.0f} GFLOP/s, all pairs one way {every:.1f} min; {part['metrics']}")
        print("".join(f"  recall of its lists: {part['recall']}\n" if "recall" in part else ""), end="")
    right = [part["metrics"] for name, part in results.items() if name in ("exact", "faiss_flat")]
    return results | {"equal": all(metrics == right[0] for metrics in right)}


def side_by_side(options: argparse.Namespace, parts: dict[str, tuple]) -> dict:
    """Rounds of all parts in turn: the last result of each with the medians of its seconds and memory."""
    rounds = [{name: apart(*part) for name, part in parts.items()} for _ in range(options.rounds)]
    results = {}
    for name in parts:
        numbers = ("seconds", "own_gib", "resident_gib")
        medians = {number: float(np.median([found[name][number] for found in rounds])) for number in numbers}
        results[name] = rounds[-1][name] | medians
        print_part(name, results[name])
    return results


def print_part(name: str, part: dict) -> None:
    print(
        f"  {name:14} {part['seconds']:8.1f} s   own memory {part['own_gib']:6.2f} GiB, with mapped files "
        f"{part['resident_gib']:6.2f} GiB"
    )


def write_rows(
    path: Path,
    count: int,
    dimension: int,
    dtype: str,
    seed: int,
    like: Path | None = None,
    each: int = 1,
    noise: float = 0.0,
) -> None:
    """Unit rows, cut to multiples of 2^-11; with `like`, row j is row j // each of that file plus noise."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count, dimension))
    generator = torch.Generator().manual_seed(seed)
    source = None if like is None else np.load(like, mmap_mode="r", allow_pickle=False)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, count))
        z = torch.randn(len(rows), dimension, generator=generator)
        if source is not None:
            z = torch.from_numpy(source[rows // each].astype(np.float32)) + noise * z / dimension**0.5
        z = torch.nn.functional.normalize(z, dim=1)
        file[rows[0] : rows[-1] + 1] = (torch.trunc(z * 2048) / 2048).numpy()
    file.flush()


# What the processes of their own do. Each returns its metrics; `apart` adds seconds and memory.


def engined(engine: str, storage: str, image: str, text: str) -> dict:
    image, text = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (image, text))
    pairs = np.stack([np.arange(len(text)) // CAPTIONS, np.arange(len(text))], axis=1)
    index = IndexConfig(storage if engine in ("ivf", "hnsw") else "float32")
    return {"metrics": values(measure_retrieval(image, text, pairs, RECALL_AT, engine, index))}


def clip_benchmark(image: str, text: str) -> dict:
    """Its own `evaluate`, of a model that gives its inputs back."""
    from clip_benchmark.metrics import zeroshot_retrieval

    image, text = (torch.from_numpy(np.load(path, allow_pickle=False)) for path in (image, text))
    model = argparse.Namespace(encode_image=lambda rows: rows, encode_text=lambda rows: rows)
    groups = text.split(CAPTIONS)
    batches = [(image[i : i + BATCH], groups[i : i + BATCH]) for i in range(0, len(image), BATCH)]
    found = zeroshot_retrieval.evaluate(model, batches, torch.stack, "cpu", amp=False, recall_k_list=RECALL_AT)
    names = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}
    return {
        "metrics": {
            way: {f"recall_at_{k}": found[f"{name}_recall@{k}"] for k in RECALL_AT} for way, name in names.items()
        }
    }


def dense(image: str, text: str) -> dict:
    """As peers do it: all scores and a mask of positives as matrices; the same metrics from them, by definition."""
    image, text = (torch.from_numpy(np.load(path, allow_pickle=False)) for path in (image, text))
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.arange(len(text)) // CAPTIONS] = True
    metrics, top_k = {}, {}
    for way, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        found = p.gather(1, s.topk(min(max(RECALL_AT), s.shape[1]), dim=1).indices)
        top_k[way] = {f"recall_at_{k}": float(found[:, :k].any(1).double().mean()) for k in RECALL_AT}
        metrics[way] = dense_metrics(s, p)
    return {"metrics": metrics, "top_k": top_k}


def dense_metrics(scores: torch.Tensor, positive: torch.Tensor) -> dict[str, float]:
    """Of queries with equally many positives; a tie counts against the model."""
    r = int(positive[0].sum())
    own = scores[positive].view(len(scores), r).sort(1, descending=True).values
    ahead = torch.stack([((scores >= own[:, m : m + 1]) & ~positive).sum(1) for m in range(r)], 1)
    rank = ahead[:, 0] + 1
    m = torch.arange(1, r + 1)
    precision = torch.where(m + ahead <= r, m / (m + ahead).double(), 0.0)
    return {f"recall_at_{k}": float((rank <= k).double().mean()) for k in RECALL_AT} | {
        "median_rank": float(np.median(rank.numpy())),
        "mean_reciprocal_rank": float(np.mean(1 / rank.numpy())),
        "map_at_r": float(np.mean(precision.sum(1).numpy() / r)),
    }


def one_way(engine: str, storage: str, queries: str, gallery: str) -> dict:
    queries, gallery = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (queries, gallery))
    pairs = np.stack([np.arange(len(queries))] * 2, axis=1)
    more = {}
    if engine == "exact":
        counted = pairs_ahead(queries, gallery, pairs)
    else:
        lists = RankedByLists(gallery, engine, IndexConfig(storage, sample=200), [])
        counted = lists.pairs_ahead(queries, pairs, max(RECALL_AT))
        more = {} if engine == "faiss_flat" else {"recall": values(lists.recall(queries, RECALL_AT))}
    return {"metrics": values(ranking_metrics(ranked_queries(*counted, len(gallery)), RECALL_AT))} | more


def values(metrics: dict) -> dict:
    return {name: metric["value"] if "value" in metric else values(metric) for name, metric in metrics.items()}


def apart(function: Callable[..., dict], *arguments: object) -> dict:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(_measured, (function, torch.get_num_threads(), *arguments))
    finally:
        pool.close()
        pool.join()


class SilentBar(tqdm):
    """A progress bar that is not shown: those of many short parts would drown the figures."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options | {"disable": True})


def _measured(function: Callable[..., dict], threads: int, *arguments: object) -> dict:
    exact.tqdm = nearest.tqdm = SilentBar
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    nearest_counts(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 2, dtype=torch.int64))
    before = _memory()
    peak = list(before)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[:] = map(max, peak, _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    own, resident = ((most - first) / GIB for most, first in zip(peak, before, strict=True))
    return {**result, "seconds": seconds, "own_gib": own, "resident_gib": resident}


def _memory() -> tuple[int, int]:
    """Bytes of this process's own and of all its resident pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
