"""Measure a checkpoint: a table of data.eval with retrieval, zero-shot classification and structure.

deepspeed launch_scripts/evaluate.py --checkpoint runs/scenes/checkpoints/step-00000300 --data.eval 'shards/*.tar'
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
from pathlib import Path
from typing import TYPE_CHECKING

from modstruct.cli import parse, recipe_parser, run
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.config import Recipe
from modstruct.data.tokenizers import load_tokenizer
from modstruct.errors import refuse, require
from modstruct.files import require_writable

if TYPE_CHECKING:
    from modstruct.evaluation.result import Result

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py --checkpoint FOLDER [--FIELD VALUE …]"


def main(words: Sequence[str]) -> None:
    parser = recipe_parser(__doc__, USAGE)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--out", help="JSON file for the metrics (default: evaluation.json in the run).")
    recipe, options = parse(parser, words, prepare=checkpoint_arguments)
    run(lambda: evaluate_checkpoint(recipe, options.checkpoint, options.out))


def evaluate_checkpoint(recipe: Recipe, checkpoint: str, out: str | None = None) -> dict[str, Result]:
    """Embed data.eval with a checkpoint's weights in float32 and print its table; every process calls it.

    recipe: the checkpoint's, with overrides. checkpoint: its folder, or a run's folder for its last one. out: JSON file
    for the metrics, by default RUN/evaluation.json. No training engine: a whole model on each process. Raises
    ValueError naming the option or field that is wrong.
    """
    # After the parsing: --help needs no torch.
    from modstruct import distributed
    from modstruct.data.classification.class_files import load_classes
    from modstruct.data.run_data import open_evaluation_data
    from modstruct.distributed.collect import on_main
    from modstruct.evaluation.embeddings.model import find_checkpoint, load_model
    from modstruct.evaluation.evaluate import evaluate
    from modstruct.evaluation.tables import save_results, table
    from modstruct.models.build import image_size

    distributed.start_processes()
    path = find_checkpoint(checkpoint)
    file = Path(out or path.resolve().parents[1] / "evaluation.json").expanduser()
    require(not file.is_dir(), "--out", out, "is a folder; name the JSON file to write")
    on_main(lambda: require_writable("--out", file.parent))
    tokenizer = load_tokenizer(path / "tokenizer")
    if recipe.data.eval is None:
        refuse("data.eval", None, "name the shards to measure")
    # First the model: the sizes of a recipe of others are held against its weights before any scene is drawn by them.
    model = load_model(recipe, path, tokenizer)
    data = open_evaluation_data(recipe, image_size(recipe), tokenizer)
    assert data.eval is not None  # as recipe.data.eval
    if data.zero_shot:
        load_classes(data.zero_shot)  # an error in it is reported before the work
    results = evaluate(model, data.eval, data, recipe.evaluation, model=model)
    if distributed.is_main():
        print(f"\n{path}\n\n{table([*results.values()])}")
        save_results(results.values(), file)
        print(f"\nmetrics: {file}")
    return results
