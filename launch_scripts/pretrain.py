"""Pretrain two towers or a fusion model.

deepspeed launch_scripts/pretrain.py --ds_config ds_configs/zero2.json
deepspeed launch_scripts/pretrain.py --recipe emoji --method sep --train.seed 1 --output runs/emoji-sep
"""

from __future__ import annotations

from modstruct import stopping

if __name__ == "__main__":
    stopping.listen()  # before the imports that take long

import sys
from pathlib import Path

from modstruct.cli import parse, recipe_parser, run
from modstruct.config import Recipe
from modstruct.stopping import is_first_process

USAGE = "deepspeed [launcher options] launch_scripts/pretrain.py [--recipe NAME] [--method NAME] [--FIELD VALUE …]"


def main() -> None:
    parser = recipe_parser(__doc__, USAGE)
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON file.")
    parser.add_argument("--resume", help="`latest`, `best`, or a checkpoint folder to resume from.")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="Trace so many steps, after a few to warm up, into OUTPUT/profile (for ui.perfetto.dev or TensorBoard).",
    )
    arguments = [argument for argument in sys.argv[1:] if argument.partition("=")[0] != "--print_config"]
    recipe, options = parse(parser, arguments)
    if len(arguments) < len(sys.argv) - 1:
        if is_first_process():
            run(lambda: print_buckets(recipe, options.ds_config))
        parse(parser)  # which prints the recipe, and ends

    def start() -> None:
        from modstruct.training.pretrain import pretrain  # after the parsing: --help needs no torch

        pretrain(recipe, options.ds_config, options.resume, options.profile)

    run(start, f"log: {Path(recipe.output, 'log.txt')}")


def print_buckets(recipe: Recipe, ds_config: str) -> None:
    """As comments, before the recipe."""
    from modstruct.training.pretrain import bucket_sizes

    for name, elements in bucket_sizes(recipe, ds_config).items():
        print(f"# {ds_config}: {name} is {elements:,} elements")


if __name__ == "__main__":
    main()
