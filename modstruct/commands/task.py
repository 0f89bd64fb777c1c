"""A fine-tuned model on its task: the metrics and predictions of its test split, or of another.

deepspeed launch_scripts/evaluate.py task --checkpoint runs/vqa
deepspeed launch_scripts/evaluate.py task --checkpoint runs/retrieval --split validation --task.rerank 32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modstruct.cli import FINETUNE_RECIPES, parse, recipe_parser, run
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import load_tokenizer
from modstruct.errors import refuse
from modstruct.files import require_writable

if TYPE_CHECKING:
    from modstruct.evaluation.result import Result

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py task --checkpoint FOLDER [--FIELD VALUE …]"


def main(words: Sequence[str]) -> None:
    parser = recipe_parser(__doc__, USAGE, FinetuneRecipe, FINETUNE_RECIPES)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--split", default="test", help="train, validation or test (default: %(default)s).")
    parser.add_argument("--out", help="Folder for SPLIT.json and SPLIT-predictions.json (default: the run's).")
    recipe, options = parse(parser, words, prepare=partial(checkpoint_arguments, fine_tuned=True))
    run(lambda: measure_task(recipe, options.checkpoint, options.split, options.out))


def measure_task(recipe: FinetuneRecipe, checkpoint: str, split: str, out: str | None) -> Result | None:
    """The result on a split with a checkpoint's weights; every process calls it.

    recipe: the checkpoint's, with overrides. Raises ValueError naming the option or field that is wrong.
    """
    from modstruct import distributed
    from modstruct.distributed.collect import on_main
    from modstruct.evaluation.embeddings.model import find_checkpoint
    from modstruct.evaluation.tables import table
    from modstruct.models.fusion.backbone import without_files
    from modstruct.tasks import build_task
    from modstruct.tasks.task import SPLITS
    from modstruct.training.finetune import load_task_model, read_splits, write_predictions

    if split not in SPLITS:
        refuse("--split", split, f"is none of {', '.join(SPLITS)}")
    distributed.start_processes()
    path = find_checkpoint(checkpoint)
    folder = Path(out or path.resolve().parents[1]).expanduser()
    on_main(lambda: require_writable("--out", folder))
    # The weights are the checkpoint's: its recipe, which others may have written, names no files to read for them.
    described = replace(recipe, fusion=without_files(recipe.fusion))
    task = build_task(described, load_tokenizer(path / "tokenizer"))
    # First the model: its sizes are held against the weights before any scene is drawn by them.
    model = load_task_model(task, path)
    # VQA ranks the most frequent answers of the training split.
    needed = dict.fromkeys(["train", split] if recipe.task.name == "vqa" else [split])
    entries = read_splits(recipe, task, tuple(needed)).get(split)
    if entries is None:
        refuse("--split", split, f"data.{split} names no files")
    result, predictions = task.measure(model, entries.entries, split)
    write_predictions(predictions, folder / f"{split}-predictions.json")
    if distributed.is_main():
        said = "no metrics: no entry of the split has a label"
        if result is not None:
            result.save(folder / f"{split}.json")
            said = f"{table([result])}\n\nmetrics: {folder / f'{split}.json'}"
        print(f"\n{path}\n\n{said}")
    return result
