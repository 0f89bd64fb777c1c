#!/usr/bin/env python
"""Cut image-text shards into folds that are judged on concepts, or on designers, that training never sees.

    python tools/experiments/emoji_folds.py '../shared/data/emoji/train-*.tar' --out runs/emoji_folds --by concept

KEY.json must have `concept` and `style`. OUT/fold-K has the folders eval, tuning and train, each read as
'OUT/fold-K/train/*.tar'; OUT/folds.json says which concepts and designers each holds, and what was left out.

Concepts go by families of what is drawn alike: concepts of one name but for gender and direction ("man running: facing
right", "woman running"), any whose images are near duplicates (modstruct/evaluation/leakage), and what these share with
others in turn. A hash of the family decides. One part of the families is `tuning` in all folds and never judged: choose
on `tuning`, report on `eval`.

--by concept  Fold K judges the K-th part of the families. So no image of `eval` or `tuning` has a near duplicate in
              `train`, by construction.
--by style    Fold K judges one designer, the letters that a style begins with ("fluent" of "fluent3d" and
              "fluent-flat", which are drawn alike), on the concepts that the others train on. Images with a near
              duplicate among the other designers' are left out of `eval`.

The same shards and options write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.config import DataConfig, Source
from modstruct.data.faults import BadSample
from modstruct.data.shards.members import Tally
from modstruct.data.shards.reader import RawSample, ShardReader
from modstruct.data.shards.samples import open_samples
from modstruct.data.shards.writer import AtomicShardWriter, new_folder
from modstruct.data.transforms.decoding import decode_image
from modstruct.errors import require
from modstruct.evaluation.leakage.duplicates import Thresholds, find_duplicates, of_images

FOLDS = 8
SAMPLES_PER_SHARD = 1_000
LISTED = 64
"""Near duplicates of an image that are looked at."""
GENDER = ("boy", "girl", "man", "men", "mr", "mrs", "mx", "people", "person", "woman", "women")
NOT_IN_THE_NAME = frozenset((*GENDER, "a", "and", "facing", "in", "left", "of", "right", "the", "with"))
SPLITS = ("eval", "tuning", "train", "left out")
"""The last is not written."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="files or patterns, in quotes")
    parser.add_argument("--out", type=Path, required=True, help="folder, which must not exist yet")
    parser.add_argument("--by", choices=("concept", "style"), default="concept", help="default: %(default)s")
    parser.add_argument("--folds", type=int, help=f"default: {FOLDS} by concept, all designers by style")
    parser.add_argument("--seed", type=int, default=0, help="of the hash (default: %(default)s)")
    parser.add_argument("--cache", default=DataConfig().cache, help="as data.cache (default: %(default)s)")
    options = parser.parse_args()
    return run_tool(lambda: cut(options), (OSError, ValueError))


def cut(options: argparse.Namespace) -> None:
    folds, left_out = options.folds, Tally()
    require(folds is None or folds >= 2, "--folds", folds, "at least 2")
    with new_folder("--out", options.out) as folder:
        raws, images = read(options.shards, DataConfig(cache=options.cache), left_out)
        near, by_style = near_duplicates(images), options.by == "style"
        families, designers = families_of(raws, near), [designer(raw) for raw in raws]
        judged = sorted(set(designers)) if by_style else list(range(folds or FOLDS))
        fits = len(judged) >= 2 and (folds or 0) <= len(judged)
        require(fits, "--folds", folds, f"from 2 to the number of designers, the letters styles begin with: {judged}")
        # Where designers are judged, each has all parts of the concepts.
        parts = [number(family, options.seed, 1 + (FOLDS if by_style else len(judged))) for family in families]
        tuning = FOLDS if by_style else len(judged)
        told = []
        for fold, held_out in enumerate(judged[:folds]):
            is_held_out = [value == held_out for value in (designers if by_style else parts)]
            split = split_of(is_held_out, [part == tuning for part in parts], near)
            told.append(write(folder / f"fold-{fold}", raws, split))
            counts = {name: told[-1][name]["samples"] for name in SPLITS}
            require(
                all(counts[name] for name in SPLITS[:-1]), "--folds", folds, f"fold {fold} has {counts}: give fewer"
            )
            print(f"fold {fold} ({options.by} {held_out}): {', '.join(f'{n} {name}' for name, n in counts.items())}")
        about = {"by": options.by, "seed": options.seed, "bad samples": left_out.counts, "folds": told}
        (folder / "folds.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for cause, count in left_out.counts.items():
        print(f"{count} left out: {cause} ({', '.join(left_out.examples[cause])})")


def read(patterns: list[str], config: DataConfig, left_out: Tally) -> tuple[list[RawSample], list[Image.Image]]:
    """All samples that can be read and say their concept and style, in order, and their images."""
    samples = open_samples([Source(pattern) for pattern in patterns], config, "SHARDS")
    reader, raws, images = ShardReader(samples, config), [], []
    for place in tqdm(range(len(samples)), "reading", leave=False):
        try:
            raw = reader.read(place)
            if missing := [name for name in ("concept", "style") if not isinstance(raw.metadata.get(name), str)]:
                raise BadSample(f"no {' and '.join(missing)} in KEY.json", raw.where)
            image = decode_image(raw.image, config.max_image_pixels, raw.where)
        except BadSample as bad:
            left_out.add(bad.cause, bad.where)
            continue
        raws.append(raw)
        images.append(image)
    require(bool(raws), "SHARDS", patterns, "no sample with `concept` and `style` in KEY.json")
    return raws, images


def near_duplicates(images: list[Image.Image]) -> list[tuple[int, int]]:
    """Pairs of different images that are drawn alike, each in both orders."""
    thumbnails = of_images(images)
    found = find_duplicates(thumbnails, thumbnails, Thresholds(listed=LISTED))
    pairs = {(pair.evaluation, pair.train) for pair in found if pair.evaluation != pair.train}
    return sorted(pairs | {(other, one) for one, other in pairs})


def families_of(raws: list[RawSample], near: Iterable[tuple[int, int]]) -> list[str]:
    """The family of each sample's concept, by the first of its concepts."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    def join(one: str, other: str) -> None:
        first, second = sorted((root(one), root(other)))
        parent[second] = first

    concepts = [raw.metadata["concept"] for raw in raws]
    same_name: dict[str, str] = {}
    for concept in concepts:
        words = [word for word in re.findall(r"\w+", concept.lower()) if word not in NOT_IN_THE_NAME]
        join(concept, same_name.setdefault(" ".join(words) or concept, concept))
    for one, other in near:
        join(concepts[one], concepts[other])
    return [root(concept) for concept in concepts]


def designer(raw: RawSample) -> str:
    style = raw.metadata["style"]
    return re.match(r"[^\W\d_]*", style)[0] or style


def number(family: str, seed: int, parts: int) -> int:
    """The part, from 0 to parts - 1, that a family falls into, whatever other families there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{family}".encode(), digest_size=8).digest()) % parts


def split_of(held_out: list[bool], tuning: list[bool], near: Iterable[tuple[int, int]]) -> list[str]:
    """The split of each sample; left out are images that are held out and tuned on, or that training has too."""
    names = {(True, False): "eval", (False, True): "tuning", (False, False): "train", (True, True): "left out"}
    split = [names[both] for both in zip(held_out, tuning, strict=True)]
    copied = {one for one, other in near if split[one] == "eval" and split[other] == "train"}
    return ["left out" if place in copied else name for place, name in enumerate(split)]


def write(folder: Path, raws: list[RawSample], split: list[str]) -> dict[str, dict]:
    """Shards of the splits; returns what each holds, and which images are left out."""
    told: dict[str, dict] = {}
    for name in SPLITS:
        chosen = [raw for raw, its in zip(raws, split, strict=True) if its == name]
        told[name] = {"samples": len(chosen), "styles": sorted({raw.metadata["style"] for raw in chosen})}
        told[name]["concepts"] = sorted({raw.metadata["concept"] for raw in chosen})
        if name == "left out":
            told[name]["images"] = [source(raw) for raw in chosen]
            continue
        (folder / name).mkdir(parents=True)
        with AtomicShardWriter(folder / name, SAMPLES_PER_SHARD, Tally()) as shards:
            for raw in chosen:
                about = {field: value for field, value in raw.metadata.items() if field != "key"}
                where = source(raw)
                shards.write(Path(where).suffix[1:], raw.image, raw.caption.encode(), about | {"source": where})
    return told


def source(raw: RawSample) -> str:
    """Shard and member, without the folder."""
    shard, _, member = raw.where.rpartition(": ")
    return f"{Path(shard).name}: {member}"


if __name__ == "__main__":
    stopping.listen()
    sys.exit(main())
