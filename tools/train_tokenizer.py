"""Train a sentencepiece tokenizer on the captions of any shards.

python tools/train_tokenizer.py --shards '/data/cc3m/{00000..00331}.tar' --vocab_size 8192 --out tokenizers/cc3m

A recipe reads it with `--tokenizer.path tokenizers/cc3m`. The same captions give the same tokenizer, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.config import DataConfig, Source, TokenizerConfig
from modstruct.data.faults import TooManyBadSamples
from modstruct.data.sentencepiece_training import TRAINING_CAPTIONS, train_sentencepiece
from modstruct.data.shards.evaluation_samples import train_captions
from modstruct.data.shards.samples import open_samples
from modstruct.data.tokenizers import DESCRIPTION_FILE, SentencePieceTokenizer
from modstruct.errors import printable, require
from modstruct.list_options import list_words

EXAMPLES = 5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    data, tokenizer = DataConfig(), TokenizerConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards",
        required=True,
        nargs="+",
        metavar="PATTERN",
        help="Paths, globs or brace patterns of tar shards (KEY.jpg, KEY.txt), or pipe:COMMAND with --allow_pipe.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="Folder to write the tokenizer to.")
    parser.add_argument(
        "--vocab_size", type=int, default=tokenizer.vocab_size, help="Pieces at most (default: %(default)s)."
    )
    parser.add_argument(
        "--context_length",
        type=int,
        default=tokenizer.context_length,
        help="Tokens of a caption that the description names; a recipe has its own (default: %(default)s).",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=TRAINING_CAPTIONS,
        help="Captions to train on at most, evenly spaced over the shards (default: %(default)s).",
    )
    parser.add_argument(
        "--caption_lines",
        choices=("auto", "true", "false"),
        default="auto",
        help="Whether each line of KEY.txt is a caption, as data.caption_lines of a recipe (default: %(default)s).",
    )
    parser.add_argument("--cache", default=data.cache, help="Folder of shard indexes (default: %(default)s).")
    parser.add_argument("--allow_pipe", action="store_true", help="Permit pipe:COMMAND, which runs a shell command.")
    parser.add_argument("--index", metavar="FOLDER", help="Indexes made by tools/index_shards.py, for pipe: shards.")
    return parser.parse_args(list_words(parser, sys.argv[1:] if arguments is None else arguments))


def train(options: argparse.Namespace) -> None:
    """Read the captions, train, write, and show examples."""
    TokenizerConfig(vocab_size=options.vocab_size, context_length=options.context_length)  # refuses impossible sizes
    require(options.limit >= 1, "--limit", options.limit, "at least 1")
    out = options.out.expanduser()
    taken = (out / DESCRIPTION_FILE).exists()
    require(not taken, "--out", str(options.out), "holds a tokenizer already; delete it or name another folder")
    require(out.is_dir() or not out.exists(), "--out", str(options.out), "is a file; name a folder")
    aside = out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")
    aside.mkdir(parents=True)  # a place that cannot be written to is found out now
    try:
        _train(options, aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _train(options: argparse.Namespace, aside: Path, out: Path) -> None:
    """The same in two steps: the tokenizer is written aside first, so that `out` gets it whole or not at all."""
    lines = {"true": True, "false": False}.get(options.caption_lines, "auto")
    config = DataConfig(cache=options.cache, allow_pipe=options.allow_pipe, caption_lines=lines)
    sources = [Source(shards=pattern, index=options.index) for pattern in options.shards]
    samples = open_samples(sources, config, "--shards", progress=True)
    total = min(options.limit, len(samples))
    captions = list(
        tqdm(train_captions(samples, config, options.limit), desc="reading captions", total=total, unit=" captions")
    )
    print(f"Training on {len(captions)} captions", flush=True)
    model = train_sentencepiece(captions, options.vocab_size)
    tokenizer = SentencePieceTokenizer(model, options.context_length)
    tokenizer.save(aside)
    if out.is_dir() and any(out.iterdir()):  # other files: the description, without which it is none, comes last
        for name in (tokenizer.model_file, DESCRIPTION_FILE):
            os.replace(aside / name, out / name)
    else:
        os.rename(aside, out)

    tokens = sum(len(tokenizer.segment(caption)) for caption in captions[:1000]) / min(len(captions), 1000)
    smaller = "" if tokenizer.vocab_size == options.vocab_size else f" (too few captions for {options.vocab_size})"
    print(f"{tokenizer.vocab_size} pieces{smaller}, {tokens:.1f} tokens a caption, written to {options.out}")
    for caption in captions[:: max(1, len(captions) // EXAMPLES)][:EXAMPLES]:
        print(printable(f"  {caption}\n    {' '.join(tokenizer.segment(caption))}"))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(lambda: train(parse(arguments)), (ValueError, OSError, TooManyBadSamples))


if __name__ == "__main__":
    stopping.listen()
    sys.exit(main())
