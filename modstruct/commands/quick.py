"""Measure a checkpoint: a table of data.eval with retrieval, zero-shot classification and structure.

deepspeed launch_scripts/evaluate.py --checkpoint runs/scenes/checkpoints/step-00000800 --data.eval 'shards/*.tar'
deepspeed launch_scripts/evaluate.py --checkpoint runs/scenes --data.zero_shot classes.yaml --out metrics.json

Commands for more, each with its own --help:
evaluate.py full --checkpoint RUN --out EVAL …     embed, measure and report in one command
evaluate.py embed --checkpoint RUN --out EVAL …    embed sets once, with all processes; --open_clip NAME:TAG for theirs
evaluate.py measure EVAL… …                        all metrics of what was embedded
evaluate.py report EVAL… --out FILE                one HTML page of one or several evaluations, with CSV and LaTeX
evaluate.py task --checkpoint RUN …                a fine-tuned model on its task's test split
"""

from __future__ import annotations

from collections.abc import Sequence

from modstruct.cli import checkpoint_arguments, parse, recipe_parser, run

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py --checkpoint FOLDER [--FIELD VALUE …]"


def main(words: Sequence[str]) -> None:
    parser = recipe_parser(__doc__, USAGE)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--out", help="JSON file for the metrics (default: evaluation.json in the run).")
    recipe, options = parse(parser, words, prepare=checkpoint_arguments)
    from modstruct.evaluation.saved_model import evaluate_checkpoint  # after the parsing: --help needs no torch

    run(lambda: evaluate_checkpoint(recipe, options.checkpoint, options.out))
