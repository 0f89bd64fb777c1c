"""Pairs a second of a whole training step of two towers, beside open_clip's plain step of the same towers.

python tools/benchmarks/step.py                                                  # a small model, a minute on two cores
python tools/benchmarks/step.py --recipe clip_rn50_cc3m --method clip --model.name ViT-B-32 --train.global_batch 512
python tools/benchmarks/step.py … --train.compile true --ds_config ds_configs/zero0.json

One process. Ours is training's own step (training/step.py): towers, losses over the batch, DeepSpeed, AdamW. Plain is
open_clip's CLIP and ClipLoss on the same images and captions in torch's autocast, float32 weights and fused AdamW, as
its own training does it; with `--method clip` both compute the same loss. The two take turns. Images are noise that
lies on the device, so reading is left out. Operations are those of products and convolutions of one plain step, as
torch counts them; the last column is their share of the rate at which this device multiplies 8,192 x 8,192 matrices (on
the CPU 2,048 x 2,048) in the step's precision.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modstruct import distributed
from modstruct.cli import parse, recipe_parser
from modstruct.config import Recipe
from modstruct.data.tokenizers import ClipTokenizer
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.build import build_model, image_size
from modstruct.models.towers import standardised
from modstruct.training.ds_config import read_ds_config, resolve_ds_config
from modstruct.training.step import train_step
from modstruct.training.trainer import build_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="Rounds that medians are taken of (default: 10).")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON (default: %(default)s).")
    parser.add_argument("--without_plain", action="store_true", help="Leave open_clip's step out.")
    parser.add_argument("--profile", action="store_true", help="And say what each step spends its time on.")
    options, words = parser.parse_known_args(arguments)
    recipe, _ = parse(recipe_parser(__doc__, "%(prog)s"), ["--recipe", "scenes", *words])
    distributed.start_processes()
    tokenizer = ClipTokenizer(ClipTokenizer.shipped_model(), recipe.tokenizer.context_length)
    batch = batch_of(recipe, tokenizer)
    steps = {"ours": our_step(recipe, tokenizer, batch, options.ds_config)}
    if not options.without_plain:
        steps["plain"] = plain_step(recipe, batch)
    report(recipe, options, steps)
    if options.profile:
        for name, step in steps.items():
            print(f"\n{name}, by operation")
            print_profile(step)


def batch_of(recipe: Recipe, tokenizer: ClipTokenizer) -> dict[str, Tensor]:
    """Noise for images, captions of twenty words, every pair another; both views."""
    pairs, side = recipe.train.global_batch, image_size(recipe)
    images = torch.randint(256, (2, pairs, 3, side, side), dtype=torch.uint8, device=distributed.device())
    text = tokenizer(["a " * 20 + str(number) for number in range(pairs)]).to(distributed.device())
    return {"image": images[0], "image_augmented": images[1], "text": text, "text_augmented": text.flip(0)}


def our_step(recipe: Recipe, tokenizer: ClipTokenizer, batch: dict[str, Tensor], ds_config: str) -> Step:
    objective = build_objective(recipe.losses, LossSettings(recipe.train.pairwise_precision))
    torch.manual_seed(0)
    model = build_model(recipe, tokenizer, objective)
    engine = build_engine(model, recipe, resolve_ds_config(read_ds_config(ds_config), recipe, 1))
    engine.train()
    rows = recipe.train.micro_batch or recipe.train.global_batch
    fields = model.batch_fields | {"image", "text"}
    views = {name: values.split(rows) for name, values in batch.items() if name in fields}
    parts = [dict(zip(views, values, strict=True)) for values in zip(*views.values(), strict=True)]
    return lambda: train_step(engine, objective, parts, 0, 1e-5)


def plain_step(recipe: Recipe, batch: dict[str, Tensor]) -> Step:
    torch.manual_seed(0)
    model = plain_model(recipe).to(distributed.device()).train()
    if recipe.train.compile:
        model.compile()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    dtype, device = DTYPES[recipe.train.precision], distributed.device().type
    captions = batch["text"].where(batch["text"] < 49_408, 0)  # ours pads with an id of its own

    def step() -> None:
        optimizer.zero_grad()
        images = standardised(batch["image"], recipe.views.mean, recipe.views.std)
        with torch.autocast(device, dtype) if dtype is not torch.float32 else contextlib.nullcontext():
            total = loss(*model(images, captions))
        total.backward()
        optimizer.step()

    return step


def plain_model(recipe: Recipe) -> torch.nn.Module:
    """open_clip's model of the recipe's sizes."""
    if recipe.model.name:
        return open_clip.create_model(recipe.model.name)
    vision, text = recipe.model.vision, recipe.model.text
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size, "head_width": vision.head_width}
    return open_clip.CLIP(
        recipe.model.embed_dim,
        sizes | {"width": vision.width, "layers": vision.layers},
        {"width": text.width, "layers": text.layers, "heads": text.heads}
        | {"context_length": recipe.tokenizer.context_length},
    )


def report(recipe: Recipe, options: argparse.Namespace, steps: dict[str, Step]) -> None:
    """Time the steps in turn, and print what was found."""
    side = 8192 if distributed.on_gpu() else 2048
    a, b = torch.randn(2, side, side, device=distributed.device(), dtype=DTYPES[recipe.train.precision]).unbind()
    forms: dict[str, Step] = {"product": lambda: a @ b} | steps
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks = {}
    for number in range(options.rounds + 3):  # the first three warm up
        for name, form in forms.items():
            if distributed.on_gpu():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            form()
            if distributed.on_gpu():
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    taken = {name: statistics.median(values) for name, values in seconds.items()}
    rate = 2 * side**3 / taken.pop("product")
    operations = None
    if "plain" in steps and not recipe.train.compile:
        with FlopCounterMode(display=False) as counter:
            steps["plain"]()
        operations = counter.get_total_flops()
    pairs, train = recipe.train.global_batch, recipe.train
    print(f"{device_name()}, torch {torch.__version__}, products at {rate / 1e12:,.1f} TFLOP/s")
    size = f"{recipe.model.name or 'towers by sizes'}, {pairs} pairs"
    if train.micro_batch:
        size += f" in micro-batches of {train.micro_batch}"
    print(f"{size}, {train.precision}, {'compiled, ' * train.compile}{options.ds_config}")
    for name, value in taken.items():
        line = f"{name:8}{1e3 * value:>10.1f} ms{pairs / value:>10,.0f} pairs/s"
        if name in peaks:
            line += f"{peaks[name]:>8.1f} GiB in all"
        if operations:
            line += f"{operations / value / 1e12:>8.1f} TFLOP/s{operations / value / rate:>8.1%}"
        print(line)
    if "plain" in taken:
        print(f"ours / plain, pairs a second: {taken['plain'] / taken['ours']:.3f}")


def print_profile(step: Step) -> None:
    """The dearest operations of one step, and how much of it the device computes: the rest waits for the host."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * distributed.on_gpu()
    start = time.perf_counter()
    with profile(activities=activities) as profiled:
        step()
        if distributed.on_gpu():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    where = "device" if distributed.on_gpu() else "cpu"
    averages = profiled.key_averages()
    print(averages.table(sort_by=f"self_{where}_time_total", row_limit=25, max_name_column_width=70))
    busy = sum(getattr(event, f"self_{where}_time_total") for event in averages) / 1e6
    print(f"{where} busy for {1e3 * busy:.1f} ms of {1e3 * seconds:.1f} ms, the profiler's own cost included")


def device_name() -> str:
    return torch.cuda.get_device_name() if distributed.on_gpu() else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
