#!/usr/bin/env python
"""Find the images of an evaluation set that also lie, wholly or nearly, in the training source.

    python tools/find_leakage.py --train 'shards/train-*.tar' --evaluation 'shards/test.tar' --out EVAL/results/SET

By perceptual hash, confirmed by comparing thumbnails; with the embeddings of both sources also by cosine:

    … --train_embeddings EVAL/embeddings/TRAIN --evaluation_embeddings EVAL/embeddings/SET

Into --out go leakage.json (the shares), leaked_pairs.jsonl, examples/ with the images side by side, and
leaked_keys.jsonl, the keys that `evaluate.py measure` leaves out (modstruct.evaluation.leakage.result). Thumbnails and
hashes are made once a source, in --cache; an interrupted run is resumed by the same command.

--hamming and --difference: tools/benchmarks/leakage.py measures what they find and miss on your data. A pair must be
within both. --cosine: what is near depends on the model; look at the images before you trust a share by embedding.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

from modstruct import stopping
from modstruct.config import DataConfig, Source
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.distributed.run_lock import held
from modstruct.errors import RunError
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.leakage.duplicates import Thresholds, find_duplicates, rows_by_key, thumbnail_set
from modstruct.evaluation.leakage.result import leakage, write_examples, write_lists
from modstruct.evaluation.result import Result
from modstruct.files import disk_error
from modstruct.list_options import list_words


def main(arguments: list[str] | None = None) -> int:
    parser, options = parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        find(options)
    except (ValueError, RunError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {disk_error(error)}\n")
    return 0


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    data, defaults = DataConfig(), Thresholds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("train", "training source"), ("evaluation", "evaluation set")):
        parser.add_argument(f"--{name}", required=True, nargs="+", help=f"shards of the {what}, patterns in quotes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, such as EVAL/results/SET")
    parser.add_argument("--name", help="of the set, in the results (default: the name of --out)")
    parser.add_argument("--train_embeddings", type=Path, help="embedded set of --train, an image for each image")
    parser.add_argument("--evaluation_embeddings", type=Path, help="embedded set of --evaluation, by the same model")
    parser.add_argument("--hamming", type=int, default=defaults.hamming, help="bits of 192 (default: %(default)s)")
    parser.add_argument("--difference", type=float, default=defaults.difference, help="default: %(default)s")
    parser.add_argument("--cosine", type=float, default=defaults.cosine, help="default: %(default)s")
    parser.add_argument("--mirrored", action="store_true", help="count images that are mirrored left to right too")
    parser.add_argument("--listed", type=int, default=defaults.listed, help="pairs an image (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=24, help="images that are drawn (default: %(default)s)")
    parser.add_argument("--cache", default=data.cache, help="as data.cache of the recipe (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=data.workers, help="loader processes (default: %(default)s)")
    parser.add_argument("--max_bad_share", type=float, default=data.max_bad_share, help="default: %(default)s")
    parser.add_argument("--max_image_pixels", type=int, default=data.max_image_pixels, help="default: %(default)s")
    parser.add_argument("--allow_pipe", action="store_true", help="permit pipe: sources, which run a shell command")
    return parser, parser.parse_args(list_words(parser, sys.argv[1:] if arguments is None else arguments))


def find(options: argparse.Namespace) -> Result:
    """Make missing hashes, compare, and write the results. Raises ValueError, RunError and OSError."""
    start = time.monotonic()
    thresholds = Thresholds(options.hamming, options.difference, options.cosine, options.mirrored, options.listed)
    embedded = _embedded(options)
    config = DataConfig(
        cache=options.cache,
        workers=options.workers,
        max_bad_share=options.max_bad_share,
        max_image_pixels=options.max_image_pixels,
        allow_pipe=options.allow_pipe,
    )
    samples = {}
    for name in ("evaluation", "train"):  # the smaller first: an error in the command shows early
        sources = [Source(pattern) for pattern in getattr(options, name)]
        samples[name] = EvaluationSamples(sources, config, name, progress=True)
    with held(options.out, "--out"), stopping.stage("the same command resumes from the hashes that are made"):
        return _compare(options, thresholds, samples, embedded, start)


def _compare(
    options: argparse.Namespace,
    thresholds: Thresholds,
    samples: dict[str, EvaluationSamples],
    embedded: dict[str, EmbeddedSet] | None,
    start: float,
) -> Result:
    thumbnails = {}
    for name, source in samples.items():
        folder = Path(options.cache).expanduser() / "thumbnails" / source.fingerprint
        made = thumbnails[name] = thumbnail_set(source, name, folder)
        print(f"{name}: {len(made.keys):,} images, {sum(made.skipped.values()):,} left out; hashes in {folder}")
    both = thumbnails["evaluation"], thumbnails["train"]
    embeddings = None
    if embedded is not None:
        embeddings = rows_by_key(both[0], embedded["evaluation"]), rows_by_key(both[1], embedded["train"])
    pairs = find_duplicates(*both, thresholds, embeddings)
    found = leakage(*both, pairs, thresholds, embedded is not None)
    write_examples(options.out / "examples", *both, pairs, samples, options.examples)
    write_lists(options.out, *both, pairs)
    name, seconds = options.name or options.out.resolve().name, round(time.monotonic() - start, 3)
    result = replace(found, set=name, seconds=seconds, command=tuple(sys.argv))
    result.save(options.out / "leakage.json")
    for way, share in result.values.items():
        count = round(share.value * len(both[0].keys))
        print(f"{way:13} {share.value:8.2%}   {count:,} of {len(both[0].keys):,} evaluation images")
    print(f"written to {options.out}")
    return result


def _embedded(options: argparse.Namespace) -> dict[str, EmbeddedSet] | None:
    folders = {name: getattr(options, f"{name}_embeddings") for name in ("evaluation", "train")}
    if all(folder is None for folder in folders.values()):
        return None
    for name, folder in folders.items():
        if folder is None:
            raise ValueError(f"{name}_embeddings: missing; give the embedded sets of both sources, or of none")
    sets = {name: EmbeddedSet.open(folder) for name, folder in folders.items()}
    models = {name: embedded.model.get("fingerprint") for name, embedded in sets.items()}
    if len(set(models.values())) > 1:
        raise ValueError(f"train_embeddings, evaluation_embeddings: of two models, {models}; embed both with one")
    return sets


if __name__ == "__main__":
    stopping.listen()
    sys.exit(main())
