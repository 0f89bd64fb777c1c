"""What the gradient cache costs in time, saves in memory and keeps in precision.

python tools/benchmarks/gradient_cache.py                 # two CPU cores: about 3 minutes, 10 GB at the undivided batch

Time: a step of --pairs pairs in micro-batches through the cache, beside plain accumulation of the same micro-batches
(each with a loss of its own, so another gradient) with the same one reduction and optimizer step; the two take turns.
With a backward pass of two forward passes, 4/3 is to be expected. Memory: growth of a process's peak over one step,
gradients included, of --memory_pairs pairs in one piece, through the cache, and of one micro-batch alone; a process
each. Precision: gradients of 128 micro-batches of a bfloat16 model summed in bfloat16, and as the cache sums them (in
float32, rounded once), against their sum in float64. The model has the sizes of the recipe `scenes`, the data is
random, and DeepSpeed has one process. Writes JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modstruct import distributed
from modstruct.cli import parse as parse_recipe
from modstruct.cli import recipe_parser
from modstruct.config import Recipe
from modstruct.data.tokenizers import WordPieceTokenizer
from modstruct.losses.objective import Objective, build_objective
from modstruct.models.protocol import Batch
from modstruct.models.two_tower import TwoTower
from modstruct.training.deepspeed_adapter import Engine, GradientSums, start_engine
from modstruct.training.ds_config import build_optimizer, read_ds_config, resolve_ds_config
from modstruct.training.gradient_cache import CachedBatch
from modstruct.training.step import train_step

MIB = 2**20
TARGET = 1.4
SUMMED = 128  # micro-batches


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    recipe = parse_recipe(recipe_parser("", ""), ["--recipe", "scenes"])[0]
    results = {"command": " ".join(sys.argv), "threads": torch.get_num_threads(), "torch": torch.__version__}
    results["memory"] = memory(recipe, options)
    print_memory(results["memory"], options)
    results["time"] = times(recipe, options)
    print_times(results["time"], options)
    results["precision"] = precision(recipe)
    print_precision(results["precision"])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512, help="Of a timed step (default: %(default)s).")
    parser.add_argument("--memory_pairs", type=int, default=2048, help="Of the memory table (default: %(default)s).")
    parser.add_argument("--micro_batch", type=int, default=64, help="Pairs embedded at once (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that medians are taken of (default: 5).")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON (default: %(default)s).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    return parser.parse_args(arguments)


# --- model and data ---


def tokenizer() -> WordPieceTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(1020))]
    return WordPieceTokenizer("\n".join(words).encode(), context_length=32)


def build(recipe: Recipe) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(recipe.model, recipe.views, tokenizer(), build_objective(recipe.losses))


def start(recipe: Recipe, pairs: int, ds_config: str) -> tuple[Engine, Objective]:
    """DeepSpeed's engine and the objective."""
    distributed.start_processes()
    recipe = replace(recipe, train=replace(recipe.train, global_batch=pairs))
    model, resolved = build(recipe), resolve_ds_config(read_ds_config(ds_config), recipe, 1)
    engine = start_engine(model, build_optimizer(model, recipe.optimizer), resolved)
    engine.train()
    return engine, build_objective(recipe.losses)


def parts_of(recipe: Recipe, pairs: int, rows: int) -> list[Batch]:
    """Random pairs, both views, in micro-batches."""
    generator = torch.Generator().manual_seed(1)
    side, words = recipe.model.vision.image_size, tokenizer()

    def images() -> Tensor:
        return torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)

    def texts() -> Tensor:
        ids = torch.randint(4, words.vocab_size, (pairs, words.context_length), generator=generator)
        ids[:, 0], ids[:, -1] = words.start_id, words.end_id
        return ids

    whole = {"image": images(), "image_augmented": images(), "text": texts(), "text_augmented": texts()}
    return [{name: z[first : first + rows] for name, z in whole.items()} for first in range(0, pairs, rows)]


# --- time ---


def times(recipe: Recipe, options: argparse.Namespace) -> dict:
    engine, objective = start(recipe, options.pairs, options.ds_config)
    parts = parts_of(recipe, options.pairs, options.micro_batch)

    def accumulated() -> None:
        with engine.summing() as add:
            for part in parts:
                total, _ = objective(engine(part), 0)
                engine.backward(total / len(parts))
                add()
        engine.step(1e-5, 0)

    forms = {"cache": lambda: train_step(engine, objective, parts, 0, 1e-5), "accumulation": accumulated}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in tqdm(range(options.rounds + 1), desc="rounds", leave=False):
        for name, form in forms.items():
            taken = timed(form)
            if turn:  # the first warms up
                seconds[name].append(taken)
    ratio = statistics.median(c / a for c, a in zip(*seconds.values(), strict=True))
    return {"pairs": options.pairs, "micro_batches": len(parts), "seconds": seconds, "ratio": ratio}


def timed(form: Callable[[], object]) -> float:
    begin = time.perf_counter()
    form()
    return time.perf_counter() - begin


def print_times(found: dict, options: argparse.Namespace) -> None:
    print(f"\nstep of {found['pairs']:,} pairs in {found['micro_batches']} micro-batches of {options.micro_batch}")
    for name, seconds in found["seconds"].items():
        print(f"{name:16}{statistics.median(seconds):>9.3f} s")
    print(f"{'ratio':16}{found['ratio']:>9.3f}     allowed {TARGET}")


# --- memory ---


def memory(recipe: Recipe, options: argparse.Namespace) -> list[dict]:
    pairs, rows = options.memory_pairs, options.micro_batch
    cases = {"one micro-batch": (rows, rows), "gradient cache": (pairs, rows), "undivided batch": (pairs, pairs)}
    found = []
    for name, case in cases.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own
            found.append({"name": name, "mib": pool.apply(growth_mib, (recipe, *case, options.ds_config))})
    dimension = recipe.model.embed_dim
    embeddings = len(needs(build_objective(recipe.losses)) - {"logit_scale"})
    parameters = sum(p.numel() for p in build(recipe).parameters())
    # Of each embedding the value and its gradient; the batch itself is on the device already.
    return [
        *found,
        {"name": "embeddings, gradients", "mib": 2 * embeddings * pairs * dimension * 4 / MIB},
        {"name": "one gradient of all weights", "mib": parameters * 4 / MIB},
    ]


def needs(objective: Objective) -> frozenset[str]:
    return frozenset().union(*(loss.needs for loss in objective.losses.values()))


def growth_mib(recipe: Recipe, pairs: int, rows: int, ds_config: str) -> float:
    """By how much the process's peak grows over a step, after a small one."""
    engine, objective = start(recipe, pairs, ds_config)
    train_step(engine, objective, parts_of(recipe, 4, 2), 0, 1e-5)
    parts = parts_of(recipe, pairs, rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = peak_mib()
    train_step(engine, objective, parts, 0, 1e-5)
    return peak_mib() - before


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def print_memory(found: list[dict], options: argparse.Namespace) -> None:
    print(f"\nmemory of a step of {options.memory_pairs:,} pairs, micro-batches of {options.micro_batch}")
    for row in found:
        print(f"{row['name']:30}{row['mib']:>10,.1f} MiB")


# --- precision ---


class BareEngine:
    """What CachedBatch asks of an engine before its backward."""

    def __init__(self, module: TwoTower):
        self.model = module

    def __call__(self, batch: Batch, **options: bool) -> dict[str, Tensor]:
        return self.model(batch, **options)


def precision(recipe: Recipe) -> dict[str, float]:
    """Relative errors of the sum of SUMMED micro-batches' bfloat16 gradients."""
    model = build(recipe).bfloat16()
    parts = parts_of(recipe, SUMMED * 4, 4)
    objective = build_objective(recipe.losses)
    cached = CachedBatch(BareEngine(model), parts, objective, 0)
    objective(cached.outputs, 0)[0].backward()
    weights = list(model.parameters())
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in weights]
    rounded = [torch.zeros_like(p) for p in weights]
    sums = GradientSums(model)
    for number, part in enumerate(tqdm(parts, desc="micro-batches", leave=False)):
        made, rows = model(part), slice(4 * number, 4 * number + 4)
        leaves = {name: leaf.grad for name, leaf in cached.leaves.items() if leaf.grad is not None}
        carrier = made["logit_scale"].sum() * (leaves.pop("logit_scale").sum() if number == 0 else 0)
        if number:
            leaves.pop("logit_scale")
        carrier = carrier + sum((made[name] * gradient[rows]).sum() for name, gradient in leaves.items())
        for parameter, gradient in zip(weights, torch.autograd.grad(carrier, weights), strict=True):
            parameter.grad = gradient
        for total, low, parameter in zip(exact, rounded, weights, strict=True):
            total += parameter.grad.double()
            low += parameter.grad
        sums.add()
    sums.write()
    ours = [p.grad for p in weights]
    size = norm(exact)
    errors = {"bfloat16": rounded, "float32, rounded once": ours}
    return {
        name: norm([f.double() - e for f, e in zip(found, exact, strict=True)]) / size for name, found in errors.items()
    }


def norm(tensors: list[Tensor]) -> float:
    return sum(t.square().sum() for t in tensors).sqrt().item()


def print_precision(errors: dict[str, float]) -> None:
    print(f"\nrelative error of {SUMMED} bfloat16 micro-gradients summed in")
    for name, error in errors.items():
        print(f"{name:24}{error:>10.3%}")


if __name__ == "__main__":
    main()
