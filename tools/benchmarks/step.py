"""Pairs a second of a whole training step of two towers, beside open_clip's plain step of the same towers.

python tools/benchmarks/step.py                                                  # a small model, a minute on two cores
python tools/benchmarks/step.py --recipe clip_rn50_cc3m --method clip --model.name ViT-B-32 --train.global_batch 512
python tools/benchmarks/step.py … --train.compile true --ds_config ds_configs/zero0.json    # both compiled

One process. Ours is training's own step (training/step.py): towers, losses over the batch, DeepSpeed, AdamW. Plain is
open_clip's CLIP and ClipLoss on the same images and captions in torch's autocast, float32 weights and fused AdamW, as
its own training does it; with `--method clip` both compute the same loss. The two take turns. Images are noise that
lies on the device, so reading is left out. Operations are those of products and convolutions of one plain step, as
torch counts them; the last column is their share of the rate at which this device multiplies 8,192 x 8,192 matrices (on
the CPU 2,048 x 2,048) in the step's precision.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import open_clip
import torch
from pairwise import machine, timed
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modstruct import distributed
from modstruct.cli import parse, recipe_parser
from modstruct.config import Recipe
from modstruct.data.tokenizers import ClipTokenizer
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.build import build_model, image_size
from modstruct.models.towers import open_clip_config, standardised, text_sizes
from modstruct.training.ds_config import read_ds_config, resolve_ds_config
from modstruct.training.step import train_step
from modstruct.training.trainer import build_engine

DTYPES = {"fp32": torch.float32, "bf16_mixed": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="Rounds that medians are taken of (default: 10).")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON (default: %(default)s).")
    parser.add_argument("--eager_plain", action="store_true", help="Compile our step alone, where train.compile is on.")
    parser.add_argument("--without_plain", action="store_true", help="Leave open_clip's step out.")
    parser.add_argument("--profile", action="store_true", help="And say what each step spends its time on.")
    options, words = parser.parse_known_args(arguments)
    recipe, _ = parse(recipe_parser(__doc__, "%(prog)s"), ["--recipe", "scenes", *words])
    distributed.start_processes()
    tokenizer = ClipTokenizer(ClipTokenizer.shipped_model(), recipe.tokenizer.context_length)
    batch = batch_of(recipe, tokenizer)
    steps = {"ours": our_step(recipe, tokenizer, batch, options.ds_config)}
    if not options.without_plain:
        steps["plain"] = plain_step(recipe, tokenizer, batch, recipe.train.compile and not options.eager_plain)
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


def plain_step(recipe: Recipe, tokenizer: ClipTokenizer, batch: dict[str, Tensor], compiled: bool) -> Step:
    described = open_clip_config(recipe.model)
    described["text_cfg"] |= text_sizes(tokenizer)
    torch.manual_seed(0)
    model = open_clip.CLIP(**described).to(distributed.device()).train()
    if compiled:
        model.compile()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    dtype, device = DTYPES[recipe.train.precision], distributed.device().type

    def step() -> None:
        optimizer.zero_grad()
        images = standardised(batch["image"], recipe.views.mean, recipe.views.std)
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            total = loss(*model(images, batch["text"]))
        total.backward()
        optimizer.step()

    return step


def report(recipe: Recipe, options: argparse.Namespace, steps: dict[str, Step]) -> None:
    """Time the steps in turn, and print what was found."""
    side = 8192 if distributed.on_gpu() else 2048
    a, b = torch.randn(2, side, side, device=distributed.device(), dtype=DTYPES[recipe.train.precision]).unbind()
    forms: dict[str, Step] = {"product": lambda: a @ b} | steps
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks, first = {}, {}
    for number in range(options.rounds + 3):  # the first three warm up
        for name, form in forms.items():
            if distributed.on_gpu():
                torch.cuda.reset_peak_memory_stats()
            taken = timed(form, distributed.device())
            if distributed.on_gpu():
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            first.setdefault(name, taken)
            if number >= 3:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rate = 2 * side**3 / medians.pop("product")
    operations = None
    if "plain" in steps and (options.eager_plain or not recipe.train.compile):
        with FlopCounterMode(display=False) as counter:
            steps["plain"]()
        operations = counter.get_total_flops()
    pairs, train = recipe.train.global_batch, recipe.train
    print(f"{machine(distributed.device())}, products at {rate / 1e12:,.1f} TFLOP/s")
    size = f"{recipe.model.name or 'towers by sizes'}, {pairs} pairs"
    if train.micro_batch:
        size += f" in micro-batches of {train.micro_batch}"
    print(f"{size}, {train.precision}, {'compiled, ' * train.compile}{options.ds_config}")
    for name, value in medians.items():
        line = f"{name:8}{1e3 * value:>10.1f} ms{pairs / value:>10,.0f} pairs/s{first[name]:>8.1f} s the first"
        if name in peaks:
            line += f"{peaks[name]:>8.1f} GiB in all"
        if operations:
            line += f"{operations / value / 1e12:>8.1f} TFLOP/s{operations / value / rate:>8.1%}"
        print(line)
    if "plain" in medians:
        print(f"ours / plain, pairs a second: {medians['plain'] / medians['ours']:.3f}")


def print_profile(step: Step) -> None:
    """The dearest operations of one step, and how much of it the device computes: the rest waits for the host."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * distributed.on_gpu()
    with profile(activities=activities) as profiled:
        seconds = timed(step, distributed.device())
    where = "device" if distributed.on_gpu() else "cpu"
    averages = profiled.key_averages()
    print(averages.table(sort_by=f"self_{where}_time_total", row_limit=25, max_name_column_width=70))
    kernels = [event for event in averages if where == "cpu" or event.device_type == DeviceType.CUDA]
    busy = sum(getattr(e, f"self_{where}_time_total") for e in kernels if not e.is_user_annotation) / 1e6
    print(f"{where} busy for {1e3 * busy:.1f} ms of {1e3 * seconds:.1f} ms, the profiler's own cost included")


if __name__ == "__main__":
    main()
