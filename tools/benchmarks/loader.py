"""Where the loader's time goes, how much of it is images', and how long a training step waits for it.

python tools/benchmarks/loader.py --photographs --model.vision.image_size 224 --batch 64  # 2 minutes on two cores
python tools/benchmarks/loader.py --shards '../shared/data/emoji/train-*.tar'
python tools/benchmarks/loader.py --shards '…' --open_clip                               # one view, beside webdataset's
python tools/benchmarks/loader.py --shards '…' --recipe emoji --train_steps 60           # and a short real run

First comes the budget: milliseconds of a core for each image view, by part, in the process itself.

The bare loop makes the same Pillow and torchvision calls on the same samples, whose bytes and random draws it has in
memory: decoding, crops, flips, AutoAugment, the copy to a tensor. It reads, orders, tokenizes and collates nothing.
"all transforms" is a loop that calls the same decoder and all transforms of the recipe, random draws, changed captions
and the tokenizer included. The loader reads on in the measured time what later steps need.
--open_clip: the pipeline that open_clip trains with (tools/benchmarks/webdataset_pipeline.py) takes turns with them,
all with its one view and the recipe's tokenizer. Rounds of all forms alternate, so a busy machine slows all alike. A
core is one process: rates are per second of processor time of the process that does the work, and per second on the
wall. The time that a step of the real run waits is `seconds/data` of the run's TensorBoard, without its first reading.
Other words are fields of the recipe, such as `--model.vision.image_size 224` or `--views.on device`, with which the
views of what the loader sends are made, and timed, in this process. Writes JSON to --out.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from loader_budget import budget, print_budget
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import v2
from tqdm import tqdm
from webdataset_pipeline import CROP_SCALE, OPEN_CLIP, open_clip_batches

from modstruct.cli import parse as parse_recipe
from modstruct.cli import recipe_parser
from modstruct.config import Recipe
from modstruct.data.run_data import RunData, open_run_data
from modstruct.data.shards.loader import BatchContents, BatchPlan, LocalBatches, train_loader
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.decoding import Whole
from modstruct.data.transforms.device_views import made_views
from modstruct.data.transforms.image_views import centre_crop, random_crop_box
from modstruct.models.towers import image_size
from modstruct.training.timing import PHASES

BARE, TRANSFORMS = "bare loop", "all transforms"
SAMPLES_AHEAD = 8192  # that reading ahead takes at most: data.read_ahead_mib holds 8 KiB each
AUGMENTED = ("image_augmented", "text_augmented")
ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.photographs:
            options.shards = str(write_photographs(Path(folder), *map(int, options.photographs.split("x"))))
        measure(options)


def measure(options: argparse.Namespace) -> None:
    results: dict = {"command": " ".join(sys.argv)}
    if options.rounds:
        results |= rates(options)
    if options.train_steps:
        results["waiting"] = waiting(options)
        print_waiting(results["waiting"])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def write_photographs(folder: Path, width: int, height: int, count: int | None = None) -> Path:
    """A shard of JPEGs of photographs' size and texture: coloured noise whose spectrum falls as theirs do.

    count: None makes as many as have 96 million pixels.
    """
    import webdataset

    random_numbers = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    things = ["man", "woman", "dog", "car", "children", "beach", "park", "sky"]
    words = [*things, "a", "standing", "on", "the", "near", "red", "with", "two", "in", "under", "blue"]
    shard = folder / "train-000000.tar"
    with webdataset.TarWriter(str(shard)) as tar:
        for number in range(count or 96_000_000 // (width * height)):
            parts = random_numbers.standard_normal((2, 3, height, width))
            noise = np.fft.ifft2((parts[0] + 1j * parts[1]) / frequency**1.15).real
            noise = 0.6 * noise + 0.4 * noise.mean(axis=0)  # colours of one place are alike
            pixels = ((noise - noise.mean()) / noise.std() * 55 + 128).clip(0, 255).astype(np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(content, "JPEG", quality=85)
            caption = " ".join(random_numbers.choice(words, random_numbers.integers(6, 16)))
            about = {"caption": caption, "width": width, "height": height}
            key = f"{number:09d}"
            tar.write({"__key__": key, "jpg": content.getvalue(), "txt": caption, "json": about})
    return shard


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", help="Training shards: path, glob or brace pattern.")
    made = "Take JPEGs of this size in pixels, made for it (500x375 without a size)."
    source.add_argument("--photographs", nargs="?", const="500x375", metavar="WxH", help=made)
    parser.add_argument("--recipe", default="emoji", help="Whose views to make (default: %(default)s).")
    parser.add_argument("--batch", type=int, default=256, help="Pairs of a step (default: %(default)s).")
    parser.add_argument("--steps", type=int, default=6, help="Steps of a round (default: %(default)s).")
    parser.add_argument(
        "--rounds", type=int, default=5, help="Rounds that medians are taken of; 0 leaves them out (default: 5)."
    )
    parser.add_argument(
        "--open_clip", action="store_true", help="One view, as open_clip crops it, beside webdataset's loader."
    )
    parser.add_argument("--train_steps", type=int, default=0, help="Steps of a real run; 0 leaves it out (default).")
    parser.add_argument("--train_batch", type=int, default=256, help="Its pairs a step (default: %(default)s).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options, options.words = parser.parse_known_args(arguments)
    if options.photographs:  # their few words fill no larger vocabulary
        options.words = ["--tokenizer.vocab_size", "100", *options.words]
    if options.open_clip:
        crop = ["--views.plain", "crop_flip", "--views.flip", "false", "--views.crop_scale", f"[{CROP_SCALE[0]},1]"]
        options.words = [*crop, *options.words]
    return options


# --- the loader beside the bare loop ---


def rates(options: argparse.Namespace) -> dict:
    """Measure and print the budget by part, and the rates of all forms."""
    recipe = recipe_of(options)
    data = open_run_data(recipe, image_size(recipe.model))
    count, side = options.batch * options.steps, data.views.image_size
    fields = () if options.open_clip else AUGMENTED
    views = ["image"] if options.open_clip else ["image", "image_augmented"]

    def loader(first_step: int, workers: int) -> WorkerLoader:
        # Steps beyond the timed ones, so that these have reading ahead to do, as in a run.
        stop_step = 1 + 2 * options.steps + SAMPLES_AHEAD // options.batch
        plan = BatchPlan(options.batch, recipe.train.seed, first_step, stop_step)
        contents = BatchContents(data.views, data.tokenizer, fields)
        return train_loader(data.train, replace(recipe.data, workers=workers), contents, plan)

    def started() -> Iterator:
        """The batches of the timed steps, of a loader that has read before."""
        batches = iter(loader(0, 0))
        next(batches)
        return islice(batches, options.steps)

    parts = []
    for _ in tqdm(range(options.rounds), desc="budget", leave=False):
        parts.append(budget(partial(drop, started())))
    spent = {part: statistics.median(1000 * of[part] / count / len(views) for of in parts) for part in parts[0]}
    print_budget(spent)
    batch = loader(0, 0).dataset[0].tensors
    sent = sum(rows.nbytes for name, rows in batch.items() if name.startswith("image")) / options.batch / 1024
    print(f"sent to the device: {sent:,.0f} KiB of images a pair")

    # Step 0 comes with the loader's start and is not timed, so all forms take the steps from 1 on.
    draws = drawn(loader(1, 0).dataset, recipe, np.arange(options.batch, options.batch + count), views)
    forms = {
        BARE: lambda: measure_here(lambda: bare(draws, side, recipe.views.auto_augment)),
        TRANSFORMS: lambda: measure_here(lambda: transforms(draws, data, options.batch)),
        "loader, no worker": lambda: measure_here(partial(drop, started())),
        "loader, one worker": lambda: measure_worker(loader(0, 1), options.steps),
    }
    if data.views.on_device:
        forms["views of the device, here"] = lambda: measure_here(lambda: made_again(batch, options.steps))
    if options.open_clip:
        theirs = open_clip_batches(list(data.train.shards), side, recipe.views, data.tokenizer, options.batch)
        next(theirs)  # fills its shuffle buffer
        forms[OPEN_CLIP] = lambda: measure_here(lambda: drop(islice(theirs, options.steps)))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False):
        for name, form in forms.items():
            seconds[name].append(form())
    smaller = sum(draw.whole.factor > 1 for draw in draws) / len(draws)
    print(f"decoded smaller: {smaller:.0%} of the images, which moves pixels by {moved(draws[:64], side):.2f} of 255")
    rows = [row(name, count, found, seconds) for name, found in seconds.items()]
    print_rates(rows, len(views))
    results = {"budget_ms": spent, "sent_kib": sent, "loader": rows}
    if options.open_clip:
        pairs = zip(seconds[OPEN_CLIP], seconds["loader, no worker"], strict=True)
        results["over_open_clip"] = statistics.median(theirs[0] / ours[0] for theirs, ours in pairs)
        print(f"ours makes {results['over_open_clip']:.2f} times {OPEN_CLIP}'s views a second of a core")
    return results


def recipe_of(options: argparse.Namespace) -> Recipe:
    words = ["--recipe", options.recipe, "--data.train", options.shards, "--data.validation", "null"]
    words += ["--data.eval", "null", "--data.zero_shot", "null", *options.words]
    return parse_recipe(recipe_parser("", ""), words)[0]


@dataclass
class Draw:
    """One sample's image and what was drawn for its two views."""

    content: bytes
    whole: Whole
    boxes: list[tuple[int, int, int, int] | None]
    """Crop of the plain and, if it is made, of the augmented view: left, top, right, bottom; None: the centre."""
    flips: list[bool]
    augment_seed: int
    caption: str
    seeds: dict[str, int]
    """Of each view."""


def drawn(dataset: LocalBatches, recipe: Recipe, slots: np.ndarray, names: list[str]) -> list[Draw]:
    """What the loader draws for these slots, ahead of the bare loop. names: of the image views."""
    views, found = recipe.views, []
    epochs, numbers = dataset.order.locate(slots)
    for epoch, sample in zip(epochs.tolist(), numbers.tolist(), strict=True):
        raw = dataset.reader.read(sample)
        with Image.open(io.BytesIO(raw.image)) as image:
            size = image.size
        of_view = {name: sample_seed(recipe.train.seed, epoch, sample, name) for name in (*names, "text_augmented")}
        seeds = [of_view[name] for name in names]
        of_both = seeds if len(seeds) > 1 else [*seeds, None]
        whole = Whole(size, dataset.views.reduction(size, *of_both) if recipe.data.scaled_decoding else 1)
        boxes, flips = [], []
        for name, seed in zip(names, seeds, strict=True):
            generator = random.Random(seed)
            if name == "image" and views.plain == "center_crop":
                boxes.append(None)
                flips.append(False)
                continue
            left, top, width, height = random_crop_box(*size, views.crop_scale, generator)
            boxes.append((left, top, left + width, top + height))
            flips.append(views.flip and generator.random() < 0.5)
        further = generator.getrandbits(63)
        found.append(Draw(raw.image, whole, boxes, flips, further, raw.caption, of_view))
    return found


def bare(draws: list[Draw], size: int, auto_augment: bool) -> None:
    """The calls of Pillow and torchvision, and nothing else."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
    for draw in draws:
        for augmented, view in enumerate(crops(draw, size)):
            if augmented and auto_augment:
                torch.default_generator.manual_seed(draw.augment_seed)
                view = policy(view)
            torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())


def transforms(draws: list[Draw], data: RunData, batch: int) -> None:
    """The same decoder and the recipe's transforms, and nothing else."""
    views, several = data.views, len(draws[0].boxes) > 1
    for first in range(0, len(draws), batch):
        part = draws[first : first + batch]
        for draw in part:
            image = decoded(draw.content, draw.whole.factor)
            views.plain_image(image, draw.seeds["image"], None, draw.whole)
            if several:
                views.augmented_image(image, draw.seeds["image_augmented"], None, draw.whole)
        texts = [views.plain_text(draw.caption) for draw in part]
        texts += [views.augmented_text(draw.caption, draw.seeds["text_augmented"]) for draw in part if several]
        data.tokenizer(texts)


def crops(draw: Draw, size: int, factor: int | None = None) -> Iterator[Image.Image]:
    """The views before AutoAugment. factor: by which the image is decoded smaller, the draw's by default."""
    factor = draw.whole.factor if factor is None else factor
    image = decoded(draw.content, factor)
    for box, flip in zip(draw.boxes, draw.flips, strict=True):
        if box is None:
            view = centre_crop(image, size, Whole(draw.whole.size, factor))
        else:
            left, top, right, bottom = (at / factor for at in box)
            view = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        yield view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def decoded(content: bytes, factor: int) -> Image.Image:
    """By Pillow alone, at 1 / factor of its size."""
    with Image.open(io.BytesIO(content)) as opened:
        if factor > 1:
            opened.draft(None, (opened.width // factor, opened.height // factor))
        opened.load()
        return opened if opened.mode == "RGB" else opened.convert("RGB")


def moved(draws: list[Draw], size: int) -> float:
    """Mean difference of a pixel, of 255, between views of what is decoded smaller and of the whole image."""
    both = [zip(crops(draw, size), crops(draw, size, 1), strict=True) for draw in draws if draw.whole.factor > 1]
    differences = [
        np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for pair in both for a, b in pair
    ]
    return float(np.mean(differences)) if differences else 0.0


def made_again(batch: dict[str, torch.Tensor], times: int) -> None:
    """Views as the device makes them of what is sent, by this process."""
    for _ in range(times):
        made_views(batch, batch)


def drop(batches: Iterable) -> None:
    """Take batches as training does, one at a time: to keep them all would cost new memory for each."""
    for _ in batches:
        pass


def measure_here(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this process's processor time, and on the wall."""
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def measure_worker(loader: WorkerLoader, steps: int) -> tuple[float, float]:
    """The same of the loader's process while it makes as many batches: meanwhile this one only takes them."""
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    processor, wall = processor_seconds(worker.pid), time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = processor_seconds(worker.pid) - processor, time.perf_counter() - wall
    batches.close()
    return seconds


def processor_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def row(
    name: str, count: int, seconds: list[tuple[float, float]], of_all: dict[str, list[tuple[float, float]]]
) -> dict:
    result = {"name": name, "samples": count}
    for place, kind in enumerate(("processor", "wall")):
        result[f"samples_per_{kind}_second"] = count / statistics.median(s[place] for s in seconds)
        for other, whose in ((BARE, "bare"), (TRANSFORMS, "transforms")):
            ratios = [b[place] / s[place] for s, b in zip(seconds, of_all[other], strict=True)]
            result[f"{kind}_share_of_{whose}"] = statistics.median(ratios)
    return result


def print_rates(rows: list[dict], views: int) -> None:
    title = f"samples ({views} image view(s)) a second, core"
    shares = f"{'of bare':>9}{'of all':>9}"
    print(f"\n{title:41}{'processor':>14}{shares}{'wall':>9}{shares}")
    for found in rows:
        words = [f"{found['name']:41}     "]
        for kind in ("processor", "wall"):
            words.append(f"{found[f'samples_per_{kind}_second']:>9,.0f}{found[f'{kind}_share_of_bare']:>9.1%}")
            words.append(f"{found[f'{kind}_share_of_transforms']:>9.1%}")
        print("".join(words))


# --- the share of a step ---


def waiting(options: argparse.Namespace) -> dict:
    """Mean seconds of each phase of a short real run, its first reading left out."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--recipe", options.recipe, "--data.train", options.shards, "--output", folder]
        words += ["--data.validation", "null", "--data.eval", "null", "--data.zero_shot", "null"]
        words += ["--train.steps", str(options.train_steps), "--checkpoints.every_steps", "0"]
        words += ["--train.global_batch", str(options.train_batch)]
        words += ["--logging.every_steps", str(max(1, options.train_steps // 4)), *options.words]
        subprocess.run([sys.executable, "launch_scripts/pretrain.py", *words], cwd=ROOT, check=True)
        events = EventAccumulator(str(Path(folder, "tensorboard"))).Reload()
        found = {phase: [event.value for event in events.Scalars(f"seconds/{phase}")[1:]] for phase in PHASES}
    seconds = {phase: statistics.mean(values) for phase, values in found.items()}
    return {"seconds": seconds, "share_waited": seconds["data"] / sum(seconds.values())}


def print_waiting(found: dict) -> None:
    total = sum(found["seconds"].values())
    print(f"\n{'phase of a step':16}{'seconds':>10}{'share':>9}")
    for phase, value in found["seconds"].items():
        print(f"{phase:16}{value:>10.4f}{value / total:>9.2%}")


if __name__ == "__main__":
    main()
