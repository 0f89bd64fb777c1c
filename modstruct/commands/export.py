"""Weights of a trained model for other programs, with a model card.

python launch_scripts/export.py --checkpoint runs/scenes --format transformers --out exports/scenes
python launch_scripts/export.py --checkpoint runs/scenes --format onnx --out exports/scenes-onnx \\
    --results evaluations/scenes

open_clip: as a run writes it at its end; towers that open_clip does not have, and the fusion model, by modstruct's own
names. transformers: a CLIPModel with its processor. onnx: a graph for each tower. These two, of two towers alone, are
loaded again and their embeddings held against ours before they take the place of --out. --results: a measured
evaluation of the same weights, whose tables go into the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modstruct.cli import parse, recipe_parser, run
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.config import Recipe
from modstruct.errors import refuse, require
from modstruct.files import require_writable
from modstruct.stopping import is_first_process

if TYPE_CHECKING:
    from modstruct.evaluation.result import Result

USAGE = "python launch_scripts/export.py --checkpoint FOLDER --format FORMAT --out FOLDER [--results EVALUATION]"
FORMATS = ("open_clip", "transformers", "onnx")


def main(words: Sequence[str] | None = None) -> None:
    parser = recipe_parser(__doc__, USAGE)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--format", required=True, choices=FORMATS, help="For which programs.")
    parser.add_argument("--out", required=True, help="Folder to write; an earlier export there is replaced.")
    parser.add_argument("--results", help="Folder of a measured evaluation of this model, for the card.")
    recipe, options = parse(parser, words, prepare=checkpoint_arguments)
    if is_first_process():
        run(lambda: export_checkpoint(recipe, options.checkpoint, options.format, options.out, options.results))


def export_checkpoint(recipe: Recipe, checkpoint: str, form: str, out: str, results: str | None = None) -> Path:
    """Export a checkpoint's weights, or their EMA (evaluation.ema). recipe: the checkpoint's. Returns the folder.

    Raises ValueError naming the option that is wrong, also where a form cannot express the model.
    """
    from modstruct import checkpoints
    from modstruct.data.tokenizers import load_tokenizer
    from modstruct.evaluation.embeddings.model import model_of, weights_fingerprint
    from modstruct.models.two_tower import TwoTower
    from modstruct.reporting.loading import load_evaluation
    from modstruct.training.export import replaced, write_weights
    from modstruct.training.export_formats import export_onnx, export_transformers, require_onnx
    from modstruct.training.model_card import is_export, write_card

    if form == "onnx":
        require_onnx()
    folder = Path(out).expanduser()
    require_writable("--out", folder.parent)
    free = is_export(folder) or not (any(folder.iterdir()) if folder.is_dir() else folder.exists())
    require(free, "--out", out, "holds other files, which an export would replace; give another folder")
    path = checkpoints.find(checkpoint, checkpoint, "--checkpoint")
    if path is None:
        refuse("--checkpoint", checkpoint, "this run has no checkpoint yet")
    step, tokenizer = checkpoints.read(path).state.step, load_tokenizer(path / "tokenizer")
    weights = checkpoints.read_measured(path, recipe.evaluation.ema)
    model = model_of(recipe, weights, path, tokenizer, "--checkpoint")
    measured: dict[str, list[Result]] = {}
    if results is not None:
        evaluation = load_evaluation(Path(results).expanduser())
        same = evaluation.model.get("fingerprint") == weights_fingerprint(model.state_dict())
        require(same, "--results", results, f"is of other weights ({evaluation.name}); embed and measure these")
        for (name, _), result in sorted(evaluation.results.items()):
            measured.setdefault(name, []).append(result)
    with replaced(folder) as aside:
        left_out: list[str] = []
        if form == "open_clip":
            write_weights(aside, weights, model.to_open_clip, recipe, tokenizer)
        elif isinstance(model, TwoTower):
            tokenizer.save(aside / "tokenizer")
            write = export_transformers if form == "transformers" else export_onnx
            left_out = write(aside, model, recipe, tokenizer)
        else:
            remedy = "a fusion model has no such form; open_clip writes its weights, by modstruct's names"
            refuse("--format", form, remedy)
        write_card(aside, recipe, step, measured, left_out)
    without = "" if measured else "; its card has no results: --results EVALUATION, of `evaluate.py full`, adds them"
    print("\n".join([*(f"left out: {what}" for what in left_out), f"exported: {folder}{without}"]))
    return folder
