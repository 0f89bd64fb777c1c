"""Embed sets once, with all processes, into a folder that every metric reads; an interrupted command is resumed.

deepspeed launch_scripts/evaluate.py embed --checkpoint runs/scenes --out evaluations/scenes
deepspeed --num_gpus 8 launch_scripts/evaluate.py embed --open_clip ViT-B-32:laion2b_s34b_b79k --out evaluations/laion \
    --sets cifar10@/data/cifar10 imagenet_v2@/data/imagenetv2 coco='/data/coco_val/*.tar'
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from modstruct.cli import parse, recipe_parser, run
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.config import Recipe
from modstruct.config.training import EmbeddingConfig
from modstruct.errors import require
from modstruct.evaluation.embeddings.set_files import MODEL_FILE, is_set_name
from modstruct.files import write_json
from modstruct.stopping import stage

if TYPE_CHECKING:
    from modstruct.evaluation.embeddings.model import EmbeddingModel

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py embed --checkpoint FOLDER --out FOLDER [--sets SET …]"
FOR_PROBES = ("image", "image_features", "image_projected", "image_independent")
"""What is embedded of a split that only probes read."""
SETS_HELP = """What to embed: `eval` (the recipe's data.eval, with the classes of data.zero_shot), NAME=SHARDS for
image-text shards, NAME@FOLDER for a published set of labelled images (cifar10@/data/cifar10; NAME:SPLIT@FOLDER for
another split), FILE.yaml for your own, CLASSES.yaml@SHARDS for shards with a class file, scenes_colour, _shape, _size
and _fill for the built-in images."""


def main(words: Sequence[str]) -> None:
    parser = recipe_parser(__doc__, USAGE)
    add_options(parser)
    recipe, options = parse(parser, words, prepare=checkpoint_arguments)
    run(lambda: embed(recipe, options, ["evaluate.py", "embed", *words]))


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="A checkpoint folder, or a run's folder for its last one.")
    parser.add_argument("--open_clip", help="Instead of it a model of open_clip: NAME:TAG, NAME:FILE or hf-hub:….")
    parser.add_argument("--random_weights", type=bool, default=False, help="With --open_clip NAME: draw its weights.")
    parser.add_argument("--name", help="What tables call the model.")
    parser.add_argument("--out", required=True, help="Folder of the evaluation.")
    parser.add_argument("--sets", nargs="+", default=[], help=SETS_HELP)
    splits = "Training and validation splits of labelled sets too, which probes need."
    parser.add_argument("--all_splits", type=bool, default=False, help=splits)
    parser.add_class_arguments(EmbeddingConfig, "embedding", as_group=True)


def embed(recipe: Recipe, options: Namespace, command: list[str]) -> Path:
    """Embed every requested set and note model, sets and command; every process calls it. Returns --out."""
    from modstruct import distributed
    from modstruct.commands.sets import open_sets, splits_beside
    from modstruct.distributed.collect import on_main
    from modstruct.distributed.hosts import on_all
    from modstruct.distributed.run_lock import held
    from modstruct.evaluation.embeddings.embed import embed_sets

    distributed.start_processes()
    out = Path(options.out).expanduser()
    with held(out, "--out"), stage("the same command resumes from what is embedded"):
        model = _model(recipe, options)
        sources = open_sets(options.sets, recipe, model.views.image_size, options.all_splits)
        on_all(lambda: _require_same_model(out, model))
        of_images = [name for name in model.chosen_arrays(options.embedding.arrays) if name in FOR_PROBES]
        others, for_probes = splits_beside(sources), replace(options.embedding, arrays=of_images)
        planned = [(of, for_probes if name in others else options.embedding) for name, (_, of) in sources.items()]
        made = embed_sets(model, planned, out / "embeddings", command)
        on_main(lambda: _note(out, recipe, options, model, sources, command))
    for one in made if distributed.is_main() else ():
        rows, copies = one.manifest["rows"], len(one.copies)
        among = f" ({rows['image'] - copies:,} distinct)" if copies else ""
        print(f"{one.folder}: {rows['image']:,} images{among}, {rows.get('text', 0):,} captions")
    return out


def _model(recipe: Recipe, options: Namespace) -> EmbeddingModel:
    from modstruct.evaluation.embeddings.model import checkpoint_model
    from modstruct.evaluation.embeddings.open_clip_model import open_clip_model

    chosen = [name for name in ("checkpoint", "open_clip") if getattr(options, name)]
    require(len(chosen) == 1, "--checkpoint", options.checkpoint, "give it or --open_clip, and not both")
    if options.open_clip:
        return open_clip_model(options.open_clip, options.random_weights, options.name)
    return checkpoint_model(recipe, options.checkpoint, options.name)


def _require_same_model(out: Path, model: EmbeddingModel) -> None:
    """A folder is of one model, or its results would stand in one column of a report."""
    if not (out / MODEL_FILE).is_file():
        return
    before = read_model(out)
    remedy = f"holds the evaluation of {before['name']}, with other weights: choose another folder"
    require(before["fingerprint"] == model.fingerprint, "--out", str(out), remedy)


def read_model(out: Path) -> dict[str, Any]:
    """What `embed` noted of the model and its sets. Raises FileNotFoundError or ValueError naming the file."""
    path = out / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; `evaluate.py embed --out {out}` comes first")
    try:
        noted = json.loads(path.read_bytes())
        known = isinstance(noted, dict) and {"name", "fingerprint", "sets", "image_size", "commands"} <= noted.keys()
        if known and all(is_set_name(name) and {"word", "recipe"} <= of.keys() for name, of in noted["sets"].items()):
            return noted
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path}: damaged; remove it and run `evaluate.py embed` again, which keeps what is embedded")


def _note(
    out: Path, recipe: Recipe, options: Namespace, model: EmbeddingModel, sets: Mapping[str, tuple], command: list[str]
) -> None:
    from modstruct.config.recipe_files import recipe_to_yaml

    noted = read_model(out) if (out / MODEL_FILE).is_file() else {"sets": {}, "commands": []}
    made_with = recipe_to_yaml(recipe)
    noted |= {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "checkpoint": options.checkpoint,
        "open_clip": options.open_clip,
        "image_size": model.views.image_size,
        "recipe": made_with,
        "sets": noted["sets"] | {name: {"word": word, "recipe": made_with} for name, (word, _) in sets.items()},
        "commands": [*noted["commands"], *([command] if command not in noted["commands"] else [])],
    }
    write_json(out / MODEL_FILE, noted)
