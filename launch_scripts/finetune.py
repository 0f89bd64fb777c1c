"""Fine-tune a fusion model on a downstream task: VQA, NLVR2, SNLI-VE or retrieval.

deepspeed launch_scripts/finetune.py --recipe snli_ve --init runs/albef_scenes --ds_config ds_configs/zero2.json
"""

from __future__ import annotations

from modstruct import stopping

if __name__ == "__main__":
    stopping.listen()  # before the imports that take long

from functools import partial
from pathlib import Path

from modstruct.cli import FINETUNE_RECIPES, parse, recipe_parser, run
from modstruct.commands.arguments import take_initial_sizes
from modstruct.config import FinetuneRecipe

USAGE = "deepspeed [launcher options] launch_scripts/finetune.py --recipe NAME --init CHECKPOINT [--FIELD VALUE …]"


def main() -> None:
    parser = recipe_parser(__doc__, USAGE, FinetuneRecipe, FINETUNE_RECIPES)
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON file.")
    parser.add_argument("--resume", help="`latest`, `best`, or a checkpoint folder to resume from.")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="Trace so many steps, after a few to warm up, into OUTPUT/profile (for ui.perfetto.dev or TensorBoard).",
    )
    recipe, options = parse(parser, prepare=partial(take_initial_sizes, parser))

    def start() -> None:
        from modstruct.training.finetune import finetune  # after the parsing: --help needs no torch

        finetune(recipe, options.ds_config, options.resume, options.profile)

    run(start, f"log: {Path(recipe.output, 'log.txt')}")


if __name__ == "__main__":
    main()
