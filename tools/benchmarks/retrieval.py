"""Time and memory of exact retrieval ranks, beside the dense matrix of scores that peers hold.

python tools/benchmarks/retrieval.py                                                  # two CPU cores: about a minute
python tools/benchmarks/retrieval.py --gallery 1000000 --queries 10000 --dimension 512  # 1M items: about 4 minutes
python tools/benchmarks/retrieval.py --index ivf --storage float16                      # and an approximate index

First both ways over --dense_images images with five captions each: by `measure_retrieval`, by a dense matrix as
CLIP_benchmark's retrieval metric has it (scores = texts @ images.T, top-k), written plainly below, and recall by
FAISS. All metrics must be equal, else the program ends with 1. The rows are multiples of 2^-11, so that scores are
exact in float32 and a tie is a tie for all; in general two programs round differently, and a rank may move by one
where scores differ in the last bit. Rows are isotropic around their pairs: the hardest case for approximate indexes.
Then --queries captions over --gallery images in a file, memory-mapped, and what all pairs of such a gallery would
take. Each part runs in a process of its own; memory is the growth of its peak: `own` without the mapped pages of
files.
"""

from __future__ import annotations

import argparse
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

from modstruct.evaluation.retrieval.ann_index import AnnIndex, IndexConfig, ann_pairs_ahead, ann_recall
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries, ranking_metrics
from modstruct.pairwise import nearest_counts

RECALL_AT = [1, 5, 10]
CAPTIONS = 5
GIB = 2**30
ROWS_AT_ONCE = 1 << 16


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        results = {"command": " ".join(sys.argv), "dense": against_dense(options, folder)}
        results["large"] = large(options, folder)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
        print(f"written to {options.out}")
    return 0 if results["dense"]["equal"] else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("queries", 5_000, "Captions of the large part"),
        ("gallery", 100_000, "Images of the large part"),
        ("dimension", 512, "Of all embeddings"),
        ("dense_images", 5_000, f"Images beside the dense matrix, with {CAPTIONS} captions each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s).")
    parser.add_argument(
        "--storage", default="float16", choices=["float16", "float32"], help="Of files and of an index."
    )
    parser.add_argument("--index", default="exact", choices=["exact", "ivf", "hnsw"], help="Beside exact ranks.")
    parser.add_argument("--probes", type=int, default=32, help="Of an inverted file (default: %(default)s).")
    parser.add_argument("--search_width", type=int, default=128, help="Of a graph (default: %(default)s).")
    parser.add_argument("--noise", type=float, default=6.0, help="Between caption and image (default: %(default)s).")
    parser.add_argument("--scratch", type=Path, help="Folder for the embeddings (default: the system's).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(arguments)
    for name in ("queries", "gallery", "dimension", "dense_images", "probes", "search_width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    if options.queries > options.gallery:
        parser.error(f"--queries {options.queries}: give at most --gallery {options.gallery}, each has one image")
    return options


def against_dense(options: argparse.Namespace, folder: str) -> dict:
    """Both forms at the size that the dense matrix can hold."""
    images, texts = options.dense_images, options.dense_images * CAPTIONS
    image, text = Path(folder, "image.npy"), Path(folder, "text.npy")
    write_rows(image, images, options.dimension, "float32", seed=1)
    write_rows(text, texts, options.dimension, "float32", seed=2, like=image, each=CAPTIONS, noise=options.noise)
    print(f"\nboth ways, {images:,} images, {texts:,} captions, D = {options.dimension}")
    results = {}
    for name, function in (("ours", counted), ("dense", dense), ("faiss", listed)):
        results[name] = apart(function, str(image), str(text))
        print_part(name, results[name])
    ours, plain = results["ours"]["metrics"], results["dense"]["metrics"]
    recall = results["faiss"]["metrics"]
    results["equal"] = all(
        ours[way][name] == value for other in (plain, recall) for way in ours for name, value in other[way].items()
    )
    for way, metrics in ours.items():
        told = (f"{name} {value:.6g}" for name, value in metrics.items())
        print(f"  {way}: {', '.join(told)}; top-k: {results['dense']['top_k'][way]}")
    print("metrics equal" if results["equal"] else f"METRICS DIFFER: dense {plain}, FAISS {recall}")
    return results


def large(options: argparse.Namespace, folder: str) -> dict:
    """Queries over a gallery in a file."""
    gallery, queries = Path(folder, "gallery.npy"), Path(folder, "queries.npy")
    start = time.perf_counter()
    write_rows(gallery, options.gallery, options.dimension, options.storage, seed=3)
    write_rows(queries, options.queries, options.dimension, options.storage, seed=4, like=gallery, noise=options.noise)
    print(
        f"\n{options.queries:,} captions over {options.gallery:,} images, D = {options.dimension}, "
        f"{options.storage}: {gallery.stat().st_size / GIB:.2f} GiB, made in {time.perf_counter() - start:.0f} s"
    )
    results = {"exact": apart(exact, str(queries), str(gallery))}
    print_part("exact", results["exact"])
    print(f"  {results['exact']['metrics']}")
    seconds = results["exact"]["seconds"]
    rate = 2 * options.queries * options.gallery * options.dimension / seconds
    every = seconds * options.gallery / options.queries
    matrix = 4 * options.gallery**2 / GIB
    print(
        f"  {rate / 1e9:.0f} GFLOP/s; {options.gallery:,} x {options.gallery:,} would take {every / 60:.1f} min "
        f"each way by this rate; its dense matrix {matrix:,.0f} GiB"
    )
    results["exact"] |= {"flops_per_second": rate, "all_pairs_seconds": every, "all_pairs_matrix_gib": matrix}
    if options.index != "exact":
        config = IndexConfig(
            options.index, options.storage, probes=options.probes, search_width=options.search_width, sample=200
        )
        results["index"] = apart(approximate, str(queries), str(gallery), config)
        print_part(options.index, results["index"])
        print(f"  {results['index']['metrics']}\n  built in {results['index']['built_seconds']:.1f} s")
        print(f"  recall of the index against exact search: {results['index']['recall']}")
    return results


def print_part(name: str, part: dict) -> None:
    print(
        f"  {name:6} {part['seconds']:8.1f} s   own memory {part['own_gib']:6.2f} GiB, with mapped files "
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


def counted(image: str, text: str) -> dict:
    image, text = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (image, text))
    pairs = np.stack([np.arange(len(text)) // CAPTIONS, np.arange(len(text))], axis=1)
    return {"metrics": values(measure_retrieval(image, text, pairs, RECALL_AT))}


def listed(image: str, text: str) -> dict:
    """Recall by FAISS's exact lists, ties counted against the model: within a list's end all items score as high."""
    image, text = (np.load(path, allow_pickle=False) for path in (image, text))
    image_of = np.arange(len(text)) // CAPTIONS
    metrics = {}
    for way, queries, gallery, own in (
        ("text_to_image", text, image, lambda found: found == image_of[:, None]),
        ("image_to_text", image, text, lambda found: image_of[found] == np.arange(len(image))[:, None]),
    ):
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        scores, found = index.search(queries, min(max(RECALL_AT) + CAPTIONS, len(gallery)))
        positive = own(found)
        best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
        ahead = ((scores >= best) & ~positive).sum(axis=1)
        metrics[way] = {f"recall_at_{k}": float(np.mean(ahead < k)) for k in RECALL_AT}
    return {"metrics": metrics}


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


def exact(queries: str, gallery: str) -> dict:
    queries, gallery = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (queries, gallery))
    counted = pairs_ahead(queries, gallery, np.stack([np.arange(len(queries))] * 2, axis=1), progress=True)
    return {"metrics": values(ranking_metrics(ranked_queries(*counted, len(gallery)), RECALL_AT))}


def approximate(queries: str, gallery: str, config: IndexConfig) -> dict:
    queries, gallery = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (queries, gallery))
    start = time.perf_counter()
    index = AnnIndex(gallery, config, progress=True)
    built = time.perf_counter() - start
    pairs = np.stack([np.arange(len(queries))] * 2, axis=1)
    counted = ann_pairs_ahead(queries, index, pairs, max(RECALL_AT), progress=True)
    return {
        "metrics": values(ranking_metrics(ranked_queries(*counted, len(gallery)), RECALL_AT)),
        "recall": ann_recall(queries, index, RECALL_AT),
        "built_seconds": built,
    }


def values(metrics: dict) -> dict:
    return {name: metric["value"] if "value" in metric else values(metric) for name, metric in metrics.items()}


def apart(function: Callable[..., dict], *arguments: object) -> dict:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(_measured, (function, torch.get_num_threads(), *arguments))
    finally:
        pool.close()
        pool.join()


def _measured(function: Callable[..., dict], threads: int, *arguments: object) -> dict:
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
