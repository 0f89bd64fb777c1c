#!/usr/bin/env python
"""What leakage search finds and misses on your images: altered copies of some of them, and unrelated images.

    python tools/benchmarks/leakage.py --train '/data/emoji/train-*.tar' --distinct /data/emoji/unseen.tar

Some training images are coded, scaled, cropped, brightened and mirrored, and searched among all of them. Found is a
copy whose original is listed; false is a pair of a copy and another image, unless the original itself is as near to
that one. --distinct: shards without training images; what is found in them is listed for inspection, with
find_leakage.py. A column for each limit of the hashes (--hamming) and of the image difference (--difference).

Seen on 2026-11-26 with `python tools/benchmarks/leakage.py` at the default limits. Emoji (300 of 8,006 copied): found
all of JPEG 50, 0.92 of crops of 5 % from anywhere, 0.757 of crops of 10 % from the middle; 29 false pairs over all
kinds. Scenes (80 of 2,000 copied, small objects on a noisy ground): 0.91 of JPEG 50, 0.79 of crops of 5 %.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from modstruct.config import DataConfig, Source
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.leakage.duplicates import Pair, Thresholds, find_duplicates, of_images, thumbnail_set

LISTED = 50


def coded(image: Image.Image, quality: int = 90) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([max(1, round(factor * side)) for side in image.size], Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float, place: np.ndarray) -> Image.Image:
    sides = [round(side * (1 - share)) for side in image.size]
    left, top = (round((whole - side) * at) for whole, side, at in zip(image.size, sides, place, strict=True))
    return image.crop((left, top, left + sides[0], top + sides[1]))


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


MIDDLE = np.array([0.5, 0.5])
COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "JPEG 90": lambda image, random: coded(image, 90),
    "JPEG 50": lambda image, random: coded(image, 50),
    "JPEG 20": lambda image, random: coded(image, 20),
    "half the size": lambda image, random: coded(scaled(image, 0.5)),
    "1.7 times the size": lambda image, random: coded(scaled(image, 1.7)),
    "crop 5 %, middle": lambda image, random: coded(cropped(image, 0.05, MIDDLE)),
    "crop 5 %, anywhere": lambda image, random: coded(cropped(image, 0.05, random.random(2))),
    "crop 0 to 5 %, anywhere": lambda image, random: coded(cropped(image, random.uniform(0, 0.05), random.random(2))),
    "crop 10 %, middle": lambda image, random: coded(cropped(image, 0.1, MIDDLE)),
    "10 % brighter": lambda image, random: coded(brighter(image, 1.1)),
    "10 % darker": lambda image, random: coded(brighter(image, 0.9)),
    "mirrored": lambda image, random: coded(ImageOps.mirror(image)),
}


def main() -> None:
    options = parse()
    config = DataConfig(cache=options.cache)
    train_samples, train = thumbnails_of(options.train, config, "train")
    random = np.random.default_rng(options.seed)
    rows = np.sort(random.choice(len(train.keys), min(options.images, len(train.keys)), replace=False))
    images = [train_samples[int(train.indices[row])].image for row in rows]
    print(f"{len(rows)} of {len(train.keys):,} images; share of copies found / false pairs")
    originals = search(of_images(images), train, options)
    limits = list(itertools.product(options.hamming, options.difference))
    print(f"{'':26}" + "".join(f"{f'h {h} d {d:g}':>16}" for h, d in limits))
    for kind in tqdm(COPIES, leave=False):
        copies = of_images([COPIES[kind](image, random) for image in images])
        pairs = search(copies, train, options, mirrored=kind == "mirrored")
        cells = [judged(pairs, originals, rows, *limit) for limit in limits]
        tqdm.write(f"{kind:26}" + "".join(f"{f'{found:.4f} / {false}':>16}" for found, false in cells))
    if options.distinct:
        _, distinct = thumbnails_of(options.distinct, config, "distinct")
        found = search(distinct, train, options)
        counts = [len({pair.evaluation for pair in within(found, *limit)}) for limit in limits]
        print(f"{f'found of {len(distinct.keys)} others':26}" + "".join(f"{count:16}" for count in counts))
        for pair in within(found, max(options.hamming), max(options.difference))[: options.named]:
            keys = distinct.keys[pair.evaluation], train.keys[pair.train]
            print(f"  {keys[0]}  {keys[1]}  hamming {pair.hamming}, difference {pair.difference:.3f}")


def thumbnails_of(shards: list[str], config: DataConfig, name: str) -> tuple[EvaluationSamples, EmbeddedSet]:
    samples = EvaluationSamples([Source(pattern) for pattern in shards], config, name, progress=True)
    return samples, thumbnail_set(samples, name, Path(config.cache).expanduser() / "thumbnails" / samples.fingerprint)


def search(images: EmbeddedSet, train: EmbeddedSet, options: argparse.Namespace, mirrored: bool = False) -> list[Pair]:
    limits = Thresholds(max(options.hamming), max(options.difference), mirrored=mirrored, listed=LISTED)
    return find_duplicates(images, train, limits)


def within(found: list[Pair], hamming: int, difference: float) -> list[Pair]:
    return [pair for pair in found if pair.hamming <= hamming and (pair.difference or 0) <= difference]


def judged(
    copies: list[Pair], originals: list[Pair], rows: np.ndarray, hamming: int, difference: float
) -> tuple[float, int]:
    """Share of the copies whose original is listed, and pairs with images that the original is not near to."""
    near = {(pair.evaluation, pair.train) for pair in within(copies, hamming, difference)}
    own = near & set(enumerate(rows.tolist()))
    return len(own) / len(rows), len(near - own - {(pair.evaluation, pair.train) for pair in originals})


def parse() -> argparse.Namespace:
    defaults = Thresholds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="shards, patterns in quotes")
    parser.add_argument("--distinct", nargs="+", help="shards without any training image")
    parser.add_argument(
        "--images", "--pictures", type=int, default=400, help="number that is copied (default: %(default)s)"
    )
    parser.add_argument("--hamming", type=int, nargs="+", default=[40, defaults.hamming, 56])
    parser.add_argument("--difference", type=float, nargs="+", default=[0.15, defaults.difference, 0.25])
    parser.add_argument("--named", type=int, default=20, help="pairs of --distinct that are printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default=DataConfig().cache, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
