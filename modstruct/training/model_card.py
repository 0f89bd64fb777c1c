"""The model card of an export, README.md in Hugging Face's form: what was trained on what, how to load it, how good."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path

from modstruct import __version__
from modstruct.config import FinetuneRecipe, LossesConfig, Recipe
from modstruct.config.recipe_files import recipe_to_dict, recipe_to_yaml
from modstruct.errors import printable, without_credentials
from modstruct.evaluation.result import Result
from modstruct.evaluation.tables import table
from modstruct.files import commit_of
from modstruct.models.fusion.initial_weights import EXPORTED

CARD = "README.md"
TAG = "tags: [modstruct"
"""By which a card's head is known for ours."""
LOADING = {
    "open_clip_config.json": (
        "open_clip",
        "import modstruct, open_clip\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = modstruct.load("FOLDER")[2]',
    ),
    "config.json": (
        "transformers",
        "from transformers import AutoModel, AutoProcessor\n\n"
        'model, processor = AutoModel.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")\n'
        'inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")\n'
        "probabilities = model(**inputs).logits_per_image.softmax(dim=1)",
    ),
    "image.onnx": (
        "onnx",
        "import numpy, onnxruntime\n"
        "from tokenizers import Tokenizer\n\n"
        'image_tower = onnxruntime.InferenceSession("FOLDER/image.onnx")\n'
        'text_tower = onnxruntime.InferenceSession("FOLDER/text.onnx")\n'
        'rows = Tokenizer.from_file("FOLDER/tokenizer.json").encode_batch(texts)\n'
        '(text,) = text_tower.run(None, {"text": numpy.array([row.ids for row in rows])})\n'
        '(image,) = image_tower.run(None, {"image": pixels})  # uint8 (B, 3, H, W): modstruct_onnx.json has the sizes',
    ),
    EXPORTED: ("modstruct", 'import modstruct\n\nmodel, preprocess, tokenizer = modstruct.load("FOLDER")'),
}
"""By a file of the export: the library that loads it, and how."""
MARKDOWN = re.compile(r"([\\`*_\[\]|~])")
"""Within a line; # and its like count at its start alone."""


def write_card(
    folder: Path,
    recipe: Recipe | FinetuneRecipe,
    step: int,
    results: Mapping[str, Iterable[Result]] | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Write README.md beside exported weights. step: optimizer steps taken; results: by set; left_out: of the model.

    Texts of the recipe and of results are shown as they are: none is taken for Markdown or HTML.
    """
    library, how = next(loading for file, loading in LOADING.items() if (folder / file).is_file())
    if isinstance(recipe, FinetuneRecipe):
        how = f"deepspeed launch_scripts/finetune.py --recipe {recipe.task.name} --init FOLDER    # goes on from it"
        kind, objective, which = "bash", f"the task {recipe.task.name}", ", the best by validation, or the last"
    else:
        kind, objective, which = "python", _losses(recipe.losses), ", averaged (EMA)" if recipe.evaluation.ema else ""
    name = shown(Path(recipe.output).name)
    seen = f"{step * recipe.train.global_batch:,} ({step:,} steps of {recipe.train.global_batch:,})"
    rows = {
        "Model": _architecture(recipe),
        "Objective": objective,
        "Data": _data(recipe),
        "Samples seen": seen,
        "Seed": str(recipe.train.seed),
        "Precision": recipe.train.precision,
        "Weights": f"after step {step:,}{which}",
        "Written by": f"modstruct {__version__}{commit_of()}",
    }
    paired = isinstance(recipe, Recipe) and recipe.framework == "two_tower"
    parts = [
        "---",
        f"library_name: {library}",
        *(["pipeline_tag: zero-shot-image-classification"] if paired else []),
        f"{TAG}, vision-language]",
        "---",
        f"# {name}\n",
        "| | |\n|---|---|\n" + "\n".join(f"| {what} | {shown(value)} |" for what, value in rows.items()),
        f"\n## How to load it\n\n{fenced(how, kind)}",
    ]
    if results:
        parts.append("\n## Measured\n\nShares in percent, with 95 % intervals over the set, beside chance.")
        parts += [f"\n### {shown(of_set)}\n\n{fenced(table([*found]))}" for of_set, found in results.items()]
    limits = [
        "It knows what its data show, and their bias; neither was examined here.",
        "Measured" + (" on the sets above alone." if results else " on nothing that is written here."),
        "One run with one seed: another differs by more than the intervals say.",
        *(f"Left out of this form: {shown(what)}." for what in left_out),
    ]
    parts.append("\n## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits))
    parts.append(f"\n## Recipe\n\n{fenced(without_credentials(recipe_to_yaml(recipe)).rstrip(), 'yaml')}\n")
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8", errors="replace")


def is_export(folder: Path) -> bool:
    """Whether a folder is an export with its card, and no git repository: what another export may replace."""
    card = folder / CARD
    head = card.read_text(encoding="utf-8", errors="replace").partition("\n---\n")[0] if card.is_file() else ""
    weights = any((folder / file).is_file() for file in LOADING)
    return weights and f"\n{TAG}" in head and not (folder / ".git").exists()


def shown(text: str) -> str:
    """Text of others within a line of Markdown, as it is."""
    return MARKDOWN.sub(r"\\\1", escape(printable(" ".join(text.split())), quote=False))


def fenced(text: str, kind: str = "") -> str:
    """A block of text, whose fence is longer than any in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{kind}\n{printable(text)}\n{ticks}"


def _architecture(recipe: Recipe | FinetuneRecipe) -> str:
    if isinstance(recipe, FinetuneRecipe) or recipe.framework == "fusion":
        return "fusion model (ALBEF): image and text encoder, and a fusion encoder over both"
    model = recipe.model
    vision, text = model.vision, model.text
    image = model.name or (
        f"ViT of {vision.layers} layers, width {vision.width}, {vision.image_size} pixels in patches of "
        f"{vision.patch_size} (stem {vision.stem}, pool {vision.pool})"
    )
    words = f"{text.architecture} of {text.layers} layers, width {text.width}"
    of_name = model.name and text.architecture == "clip"
    start = f", started from {model.pretrained}" if model.pretrained else ""
    return f"two towers: {image}{'' if of_name else f'; text {words}'}{start}"


def _losses(losses: LossesConfig) -> str:
    """Weights of those that are on, with what differs from the defaults."""
    told = []
    for name, section in ((field.name, getattr(losses, field.name)) for field in fields(losses)):
        if section.weight:
            plain = asdict(type(section)())
            given = {key: value for key, value in asdict(section).items() if key != "weight" and value != plain[key]}
            more = ", ".join(f"{key} {value}" for key, value in given.items())
            told.append(f"{section.weight:g} x {name}{f' ({more})' if more else ''}")
    return " + ".join(told)


def _data(recipe: Recipe | FinetuneRecipe) -> str:
    data = recipe_to_dict(recipe)["data"]
    if data.get("source") == "scenes":
        return "the built-in scenes"
    train = data["train"]
    return train if isinstance(train, str) else json.dumps(train, ensure_ascii=False)
