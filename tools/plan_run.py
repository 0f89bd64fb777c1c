#!/usr/bin/env python
"""What a pre-training run takes on so many GPUs: memory by part, bytes on the links, time, cost, and what fits.

    python tools/plan_run.py --recipe clip_rn50_cc3m --model.name ViT-B-16 --train.global_batch 32768 \
        --gpus 64 --gpu h100 --samples 400000000

Nothing is trained or read: the recipe's model and losses run once on tensors without numbers, of which bytes and
operations are counted, as one of so many processes. Rates are stated, not measured: each has an option. Fields of the
recipe are set as in training. docs/planning.md says what is assumed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from modstruct import stopping
from modstruct.cli import ConfigParser, parse, recipe_parser, run_tool
from modstruct.errors import refuse, require

if TYPE_CHECKING:
    from planning import Measured  # takes seconds to import, which an option that is refused does not wait for

GIB, GB = 2**30, 1e9
STAGES = (0, 1, 2, 3)
USAGE = (
    "python tools/plan_run.py --recipe NAME --gpus N [--gpu KIND] [--samples N] [--FIELD VALUE ...]; --help lists all"
)
MAY_BE_0 = ("local_rank", "reserve_gib", "decode_ms", "process_gib", "worker_gib", "price")
ONE_AFTER_ANOTHER = ("compute", "optimizer", "links")
REACHED = "one H100 reached 0.1 of it with an RN50, 0.16 to 0.19 with a ViT-B (docs/planning.md)"
FASTER_LOADER = "more --cores help, or a smaller --decode_ms: measure it, with smaller images, with views.on device"
FRACTIONS = ("mfu", "link_efficiency")


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB; peak of dense products in TFLOP/s, in half precision and in float32; GB/s of its memory, and to
    and from a GPU of the same host, one way."""

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


GPUS = {
    "a100": Gpu(79, 312, 19.5, 2039, 300),
    "h100": Gpu(79, 989, 67, 3350, 450),
    "h200": Gpu(140, 989, 67, 4800, 450),
}


@dataclass(frozen=True)
class Plan:
    """A step of one setting. Bytes of a GPU by part; GB sent by each GPU, and by each host; seconds by cause."""

    stage: int
    micro: int
    parts: dict[str, float]
    gpu_gb: float
    host_gb: float
    seconds: dict[str, float]

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB

    @property
    def step(self) -> float:
        """Seconds. Computing, the optimizer and what nothing overlaps come after one another; reading runs beside."""
        return max(self.seconds["loader"], sum(self.seconds[name] for name in ONE_AFTER_ANOTHER))

    @property
    def limit(self) -> str:
        if self.step == self.seconds["loader"]:
            return f"loader: {FASTER_LOADER}"
        return max(ONE_AFTER_ANOTHER, key=lambda name: self.seconds[name])


def plan(measured: Measured, options: Namespace, stage: int, rows: int, micro: int) -> Plan:
    """What a step of one setting takes."""
    from planning import memory, on_links, sent

    recipe, gpu, processes = measured.recipe, GPUS[options.gpu], measured.processes
    unmasked, operations = recipe.train.unmasked_share, 0.0
    for steps, share in ((measured, 1 - unmasked), (measured.fullest, unmasked)):
        towers = steps.towers(rows, micro < rows)
        operations += share * (towers["both"] + (towers["forward"] if micro < rows else 0))
    in_float32 = gpu.half / 2 if recipe.train.tf32 else gpu.single  # TF32 has half of the half precision's rate
    peak = options.peak_tflops or (in_float32 if recipe.train.precision == "fp32" else gpu.half)
    per_host = min(options.gpus_per_host, processes)
    found = sent(measured, stage, rows, micro)
    losses = on_links(measured.losses(rows)["sent"], processes)
    crossing = on_links(found, processes)
    slowest = (options.link_gbs or gpu.link) * GB * options.link_efficiency
    if processes > per_host:
        slowest = min(slowest, options.network_gbs * GB * options.link_efficiency)
    compute = operations / (peak * 1e12 * options.mfu)
    optimizer = 28 * measured.trained / (processes if stage else 1) / (gpu.bandwidth * GB * 0.7)
    # Stages 2 and 3 send beside the backward pass, but for the losses' and, at stage 2, the gather of new weights.
    # Whole sums of micro-batches go once all backward passes are over.
    beside, once = 0.0, measured.gradients * (1 - 1 / processes)
    whole = micro < rows and recipe.train.gradient_sums == "whole"
    if stage == 2:
        beside = 0.0 if whole else crossing - losses - once
    elif stage == 3:
        beside = crossing - losses - once * whole
    hidden = min(beside / slowest, compute * 2 / 3)
    decoding = rows * per_host * measured.views * options.decode_ms / 1e3 / options.cores
    seconds = {
        "compute": compute,
        "optimizer": optimizer,
        "links": crossing / slowest - hidden,
        "loader": decoding,
    }
    host_gb = crossing / GB if processes > per_host else 0.0
    return Plan(stage, micro, memory(measured, stage, rows, micro), crossing / GB, host_gb, seconds)


# --- what is printed ---

COLUMNS = {
    "stage": 5,
    "micro": 7,
    "weights": 8,
    "gathered": 9,
    "grads": 7,
    "moments": 8,
    "master": 7,
    "buckets": 8,
    "activ.": 9,
    "embed.": 7,
    "losses": 7,
    "EMA, q": 7,
    "all": 8,
    "GB/GPU": 9,
    "GB/host": 8,
    "compute": 9,
    "links": 7,
    "loader": 7,
    "step": 7,
    "pairs/s": 9,
    "takes": 9,
    "cost": 10,
}
"""Their names and widths."""


def report(measured: Measured, options: Namespace, steps: int) -> None:
    """Print the plan of a recipe."""
    recipe, processes = measured.recipe, measured.processes
    rows = recipe.train.global_batch // processes
    room = (options.memory_gib or GPUS[options.gpu].memory) - options.reserve_gib
    towers = measured.towers(1)
    print(
        f"{recipe.framework}, {recipe.train.precision}: {measured.elements / 1e6:,.1f}M weights, "
        f"{towers['both'] / GB:,.1f} GFLOP a pair ({towers['forward'] / GB:,.1f} forward), "
        f"{measured.by_row['saved'] / 2**20:,.1f} MiB kept a pair for the backward pass"
    )
    batch = f"{recipe.train.global_batch:,} pairs a step, {rows:,} a GPU; {steps:,} steps"
    print(f"{processes} x {options.gpu}: {batch}; {room:g} GiB of a GPU to use")
    print(f"compute at --mfu {options.mfu:g} of the peak; {REACHED}")
    listed, asked = micro_batches(recipe.train.micro_batch, rows, options)
    if (recipe.train.micro_batch or 0) > rows:
        print(f"train.micro_batch {recipe.train.micro_batch}: a GPU has {rows:,} pairs, and embeds all at once")
    above = [str(micro) for micro in options.micro_batches or () if micro > rows]
    if above:
        print(f"--micro_batches {' '.join(above)}: left out, a GPU has {rows:,} pairs")
    print(
        "\nGiB of a GPU by part | GB sent in a step | milliseconds of a step, by cause; the run\n"
        + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    )
    plans = [plan(measured, options, stage, rows, micro) for stage in STAGES for micro in listed]
    fits = [one for one in plans if one.gib <= room]
    best = {one.stage: one for one in sorted(fits, key=lambda one: (-one.step, one.micro))}
    for one in sorted(best.values(), key=lambda one: one.stage) if options.best else plans:
        print(row(one, measured, steps, options, one.gib <= room))
    none = [str(stage) for stage in STAGES if stage not in best]
    if none:
        print(f"none of these micro-batches fits at stage {', '.join(none)}")
    print()
    if fits:
        fastest = min(fits, key=lambda one: one.step)
        print(f"fastest that fits: {setting(fastest, rows)}, limited by {fastest.limit}")
    large = [str(one.stage) for one in plans if one.micro == asked and one.gib > room]
    if large:
        other = nearest(measured, options, listed, asked, room)
        value = "null" if asked == rows else asked
        field = "train.micro_batch" if recipe.train.micro_batch or asked == rows else "--micro_batches"
        said = f"{field}: {value} does not fit at stage {', '.join(large)}"
        print(f"{said}; the nearest that does: {other}")
    print(of_a_host(measured, options, rows, steps, min(fits, key=lambda one: one.step) if fits else None))


def halvings(rows: int) -> list[int]:
    return [rows >> shift for shift in range(rows.bit_length())]


def micro_batches(given: int | None, rows: int, options: Namespace) -> tuple[list[int], int]:
    """Those of the table, largest first, and among them the one that the run takes: train.micro_batch where it is
    given, else the largest. More than a process's pairs are all of them, as in training."""
    listed = [micro for micro in options.micro_batches or halvings(rows)[:6] if micro <= rows]
    asked = min(given or max(listed, default=rows), rows)
    return sorted({*listed, asked}, reverse=True), asked


def setting(one: Plan, rows: int) -> str:
    micro = "null" if one.micro == rows else one.micro
    return f"stage {one.stage}, train.micro_batch {micro} ({one.gib:.1f} GiB)"


def nearest(measured: Measured, options: Namespace, listed: list[int], asked: int, room: float) -> str:
    """The setting that fits and changes least: a smaller micro-batch or a higher stage, else recomputed activations;
    else what fills the memory, and the largest halving of the batch that fits."""

    def plans(rows: int) -> Iterator[Plan]:
        micros = {*halvings(rows), *(micro for micro in listed if micro <= rows)}
        by_distance = sorted(micros, key=lambda micro: (micro > asked, abs(micro - asked)))
        return (plan(measured, options, stage, rows, micro) for micro in by_distance for stage in STAGES)

    def first_that_fits(rows: int) -> str | None:
        fits = (one for one in plans(rows) if one.gib <= room)
        return next((words + setting(one, rows) for one in fits), None)

    rows, words = measured.recipe.train.global_batch // measured.processes, ""
    found = first_that_fits(rows)
    if found is None and (other := recomputed(measured)):
        measured, words = other, "train.activation_checkpointing true, "
        found = first_that_fits(rows)
    if found is not None:
        return found
    least = min(plans(rows), key=lambda one: one.gib)
    part = max(least.parts, key=lambda name: least.parts[name])
    takes = f"{words}{setting(least, rows)} takes least, {least.parts[part] / GIB / least.gib:.0%} of it {part}"
    remedy = f"none on so many GPUs, where {takes}: give --gpus more or a smaller model"
    for fewer in halvings(rows)[1:]:
        if found := first_that_fits(fewer):
            return f"{remedy}, or train.global_batch {fewer * measured.processes} ({found})"
    return remedy


def recomputed(measured: Measured) -> Measured | None:
    """With train.activation_checkpointing; None where it is on already, or a tower cannot."""
    from planning import Measured

    train = measured.recipe.train
    if not train.activation_checkpointing:
        with suppress(ValueError):
            train = replace(train, activation_checkpointing=True)
            return Measured(replace(measured.recipe, train=train), measured.processes)
    return None


def row(one: Plan, measured: Measured, steps: int, options: Namespace, fits: bool) -> str:
    hours = one.step * steps / 3600
    milliseconds = [
        1e3 * seconds for seconds in (one.seconds["compute"], one.seconds["links"], one.seconds["loader"], one.step)
    ]
    cells = [f"{one.stage}", f"{one.micro}", *(f"{value / GIB:.2f}" for value in one.parts.values()), f"{one.gib:.1f}"]
    cells += [f"{one.gpu_gb:.2f}", f"{one.host_gb:.2f}"]
    if fits:
        cells += [f"{value:,.0f}" for value in (*milliseconds, measured.recipe.train.global_batch / one.step)]
        cells += [duration(hours), f"{hours * measured.processes * options.price:,.0f}"]
    line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=False))
    return line if fits else line + "  does not fit"


def duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 24 else f"{hours / 24:.2f} d"


def of_a_host(measured: Measured, options: Namespace, rows: int, steps: int, one: Plan | None) -> str:
    """Checkpoint, host memory and loader."""
    recipe, processes = measured.recipe, measured.processes
    saved = 12 * measured.trained + 4 * (measured.elements - measured.trained)
    saved += measured.ema + measured.queue + measured.buffers
    saved += 4 * measured.trained * (recipe.train.ema_decay is not None)
    here = min(options.gpus_per_host, processes)
    workers = here * recipe.data.workers
    samples = options.samples or 0
    order = 24 * samples / recipe.data.shuffle_block if recipe.data.order_version == 1 else 0
    copy = saved * here / processes if recipe.checkpoints.asynchronous else 0
    host = GIB * (here * options.process_gib + workers * options.worker_gib) + (here + workers) * order + copy
    lines = [
        f"checkpoint: {saved / GB:,.2f} GB, {recipe.checkpoints.keep_last} kept and the best",
        f"host memory: {host / GIB:,.0f} GiB ({here} processes, {workers} loader workers, {copy / GIB:.1f} of a "
        f"checkpoint, {(here + workers) * order / GIB:.2f} of the data's order), and {28 * samples / GIB:.2f} GiB of "
        "the index in files that are mapped",
    ]
    if one is not None:
        rate = recipe.train.global_batch / one.step
        cores = rate / processes * here * measured.views * options.decode_ms / 1e3
        lines.append(
            f"loader: {rate:,.0f} pairs a second in all, {rate * here / processes:,.0f} a host, which take "
            f"{math.ceil(cores)} cores of {options.cores}"
        )
    return "\n".join(lines)


def options_parser() -> ConfigParser:
    parser = recipe_parser(__doc__ or "", USAGE)
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="processes, one a GPU")
    add("--gpu", choices=sorted(GPUS), default="h100", help="rates and memory (default: %(default)s)")
    add("--samples", type=int, help="pairs of the training source, for train.epochs and the memory of the index")
    add("--micro_batches", type=int, nargs="+", help="default: all of a GPU's pairs, five halvings, train.micro_batch")
    add("--best", action="store_true", help="print the fastest of each stage that fits")
    add("--gpus_per_host", type=int, default=8, help="default: %(default)s")
    add("--memory_gib", type=float, help="of a GPU (default: the GPU's)")
    add("--reserve_gib", type=float, default=6, help="of it, for CUDA, NCCL and gaps (default: %(default)s)")
    add("--peak_tflops", type=float, help="of dense products in the recipe's precision (default: the GPU's)")
    add("--mfu", type=float, default=0.25, help="fraction of it that a step reaches (default: %(default)s)")
    add("--link_gbs", type=float, help="GB/s of a GPU to others of its host, one way (default: the GPU's)")
    add("--network_gbs", type=float, default=400, help="GB/s of a host, one way (default: %(default)s, 8 x 400 Gbit/s)")
    add("--link_efficiency", type=float, default=0.7, help="fraction that collectives reach (default: %(default)s)")
    add("--decode_ms", type=float, default=8, help="of a core, for one view of an image (default: %(default)s)")
    add("--cores", type=int, default=96, help="of a host, for loaders (default: %(default)s)")
    add("--process_gib", type=float, default=4, help="host memory of a process (default: %(default)s)")
    add("--worker_gib", type=float, default=0.7, help="host memory of a loader worker (default: %(default)s)")
    add("--price", type=float, default=3, help="of a GPU and hour (default: %(default)s)")
    add("--ds_config", help="refused: all ZeRO stages are planned")
    return parser


def check(options: Namespace) -> None:
    """Raises ValueError that names an option whose number is none of its kind."""
    for name, value in vars(options).items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue  # sections of the recipe, too
            require(number > 0 or (number == 0 and name in MAY_BE_0), f"--{name}", number, "must be above 0")
            require(number <= 1 or name not in FRACTIONS, f"--{name}", number, "is a fraction: at most 1")
    require(options.ds_config is None, "--ds_config", options.ds_config, "leave it out: all ZeRO stages are planned")
    memory = options.memory_gib or GPUS[options.gpu].memory
    remedy = f"leaves nothing of {memory:g} GiB (--memory_gib): give less"
    require(options.reserve_gib < memory, "--reserve_gib", options.reserve_gib, remedy)


def main(arguments: list[str] | None = None) -> None:
    recipe, options = parse(options_parser(), arguments)
    check(options)
    train, gpus = recipe.train, options.gpus
    times, over = divmod(train.global_batch, gpus)
    near = " or ".join(str(n * gpus) for n in (times, times + 1) if n)
    require(over == 0, "train.global_batch", train.global_batch, f"must be a multiple of --gpus = {gpus}: {near}")
    if train.steps is None and options.samples is None:
        refuse("--samples", None, f"give the pairs of data.train, of which the run sees train.epochs = {train.epochs}")

    from counting import as_one_of
    from planning import Measured

    from modstruct.losses.objective import build_objective
    from modstruct.training.pretrain import check_batch, check_settings
    from modstruct.training.trainer import run_length

    check_settings(recipe)
    with as_one_of(gpus):
        check_batch(recipe, build_objective(recipe.losses), [] if options.samples is None else [options.samples])
    measured = Measured(recipe, options.gpus)
    report(measured, options, run_length(recipe, options.samples or 0))


if __name__ == "__main__":
    stopping.listen()
    sys.exit(run_tool(main, (ValueError, OSError)))
