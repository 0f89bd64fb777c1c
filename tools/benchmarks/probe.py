"""Time and memory of the linear probe on features in a file that is larger than the memory used.

python tools/benchmarks/probe.py                             # 200,000 x 2,048 float16, 100 classes: about a minute
python tools/benchmarks/probe.py --rows 20000 --classes 1000       # the products of ImageNet's shape
python tools/benchmarks/probe.py --device cuda --rows 1281167 --classes 1000

First one evaluation of value and gradient, --rounds times, over a memory-mapped file; then L-BFGS itself with as many
weights, without the file. Both are extrapolated to ImageNet's 1,281,167 rows of --dimension and 1,000 classes: time by
the operations (4 n D C), memory by the weights. Memory is the growth of the peak, `own` without mapped pages of files.
On a CPU the processor time, which other work on the machine does not affect, is extrapolated, divided by the threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from modstruct.evaluation.classification.linear import CORRECTIONS, Features, RowBlocks, mean_objective

GIB = 2**30
IMAGENET_ROWS, IMAGENET_CLASSES = 1_281_167, 1_000
OPTIMISER_STEPS = 20


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder, "features.npy")
        labels = write_rows(path, options)
        size = path.stat().st_size
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        results = evaluation(rows, labels, options, device)
    results["optimiser"] = optimiser(IMAGENET_CLASSES * (options.dimension + 1))
    ratio = IMAGENET_ROWS * IMAGENET_CLASSES / (options.rows * options.classes)
    quiet = results["processor_seconds"] / torch.get_num_threads() if device.type == "cpu" else results["seconds"]
    step = quiet * ratio
    weights = 8 * IMAGENET_CLASSES * (options.dimension + 1)
    own = results["optimiser"]["own_gib"] + results["own_gib"] + 5 * weights / GIB
    results |= {"command": " ".join(sys.argv), "imagenet_evaluation_seconds": step, "imagenet_own_gib": own}
    lbfgs = results["optimiser"]
    print(
        f"\n{options.rows:,} x {options.dimension:,} {options.storage}, {size / GIB:.2f} GiB, "
        f"{options.classes:,} classes"
        f"\n  value and gradient: median {results['seconds']:.2f} s, processor time of the fastest "
        f"{results['processor_seconds']:.2f} s ({results['gflops']:.0f} GFLOP/s)"
        f"\n  own memory {results['own_gib']:.2f} GiB, with mapped files {results['resident_gib']:.2f} GiB"
        f"\n  L-BFGS, {IMAGENET_CLASSES * (options.dimension + 1):,} weights: {lbfgs['seconds']:.3f} s a step,"
        f"\n    processor time {lbfgs['processor_seconds']:.3f} s, own memory {lbfgs['own_gib']:.2f} GiB"
        f"\n  extrapolated to {IMAGENET_ROWS:,} x {options.dimension:,}, {IMAGENET_CLASSES:,} classes: {step:.0f} s an "
        f"evaluation,\n    about {own:.1f} GiB of own memory; its float16 file has "
        f"{2 * IMAGENET_ROWS * options.dimension / GIB:.1f} GiB"
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("rows", 200_000, "Rows of the file"),
        ("dimension", 2_048, "Of a row"),
        ("classes", 100, "Of the labels"),
        ("rounds", 3, "Evaluations that are timed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s).")
    parser.add_argument("--storage", default="float16", choices=["float16", "float32"], help="Of the file.")
    parser.add_argument("--device", default="cpu", help="Where products are formed (default: %(default)s).")
    parser.add_argument(
        "--held", action="store_true", help="Let the rows stay on the device if they fit, as a fit does."
    )
    parser.add_argument("--scratch", type=Path, help="Folder for the features (default: the system's).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(arguments)
    for name in ("rows", "dimension", "classes", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    return options


def write_rows(path: Path, options: argparse.Namespace) -> np.ndarray:
    """Normal rows, and labels in turn."""
    shape = (options.rows, options.dimension)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=options.storage, shape=shape)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, options.rows, 1 << 14):
        count = min(1 << 14, options.rows - start)
        file[start : start + count] = torch.randn(count, options.dimension, generator=generator).numpy()
    file.flush()
    return np.arange(options.rows) % options.classes


def evaluation(rows: np.ndarray, labels: np.ndarray, options: argparse.Namespace, device: torch.device) -> dict:
    weights = np.random.default_rng(1).standard_normal(options.classes * (options.dimension + 1)) / 100
    small = Features((rows[:64],), np.arange(min(64, len(rows))), labels[:64])
    mean_objective(RowBlocks(small, device, width=options.classes), options.classes, 1.0)(weights)  # libraries load

    def timed() -> list[tuple[float, float]]:
        features = Features((rows,), np.arange(len(rows)), labels)
        blocks = RowBlocks(features, device, width=options.classes, hold_bytes=None if options.held else 0)
        objective = mean_objective(blocks, options.classes, 1.0)
        seconds = []
        for _ in range(options.rounds):
            start, busy = time.perf_counter(), time.process_time()
            objective(weights)
            seconds.append((time.perf_counter() - start, time.process_time() - busy))
        return seconds

    times, own, resident = watched(timed)
    seconds, processor = zip(*times, strict=True)
    operations = 4 * options.rows * options.dimension * options.classes
    return {
        "seconds": float(np.median(seconds)),
        "processor_seconds": min(processor),
        "gflops": operations / (min(processor) if device.type == "cpu" else min(seconds)) / 1e9,
        "own_gib": own,
        "resident_gib": resident,
    }


def optimiser(weights: int) -> dict:
    """Seconds a step of L-BFGS-B on a quadratic of so many weights, which costs next to nothing itself."""
    curvature = np.linspace(1, 1000, weights)

    def quadratic(x: np.ndarray) -> tuple[float, np.ndarray]:
        gradient = curvature * x
        return float(x @ gradient) / 2, gradient

    options = {"maxiter": OPTIMISER_STEPS, "maxcor": CORRECTIONS, "gtol": 0.0, "ftol": 0.0}
    start, busy = time.perf_counter(), time.process_time()
    found, own, _ = watched(lambda: minimize(quadratic, np.ones(weights), jac=True, method="L-BFGS-B", options=options))
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds / found.nit, "processor_seconds": processor / found.nit, "own_gib": own}


def watched(function: Callable[[], object]) -> tuple:
    """What a function returns, and the growth in GiB of this process's own and of all its resident memory."""
    before = memory()
    peak, ended = list(before), threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[:] = map(max, peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = function()
    finally:
        ended.set()
        watcher.join()
    return (made, *((most - first) / GIB for most, first in zip(peak, before, strict=True)))


def memory() -> tuple[int, int]:
    """Bytes of this process's own and of all its resident pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
