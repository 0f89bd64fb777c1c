"""Measure a checkpoint: retrieval, zero-shot classification, structure.

deepspeed launch_scripts/evaluate.py --checkpoint runs/scenes/checkpoints/step-00000800 --data.eval 'shards/*.tar'
deepspeed launch_scripts/evaluate.py --checkpoint runs/scenes --data.zero_shot classes.yaml --out metrics.json
"""

from __future__ import annotations

from modstruct.cli import checkpoint_arguments, parse, recipe_parser, run

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py --checkpoint FOLDER [--FIELD VALUE …]"


def main() -> None:
    parser = recipe_parser(__doc__, USAGE)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--out", help="JSON file for the metrics (default: evaluation.json in the run).")
    recipe, options = parse(parser, prepare=checkpoint_arguments)
    from modstruct.evaluation.saved_model import evaluate_checkpoint  # after the parsing: --help needs no torch

    run(lambda: evaluate_checkpoint(recipe, options.checkpoint, options.out))


if __name__ == "__main__":
    main()
