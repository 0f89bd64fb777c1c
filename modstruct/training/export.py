"""Plain weights of a trained model in a folder that open_clip loads: open_clip.create_model('local-dir:FOLDER')."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from torch import Tensor

from modstruct.checkpoints import LazyTensors, described, replace_folder, save_tensors
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import tree_without_credentials
from modstruct.files import naming
from modstruct.models.build import log_scale_range
from modstruct.models.fusion.initial_weights import EXPORTED, EXPORTED_CONFIG
from modstruct.models.towers import image_size, open_clip_config, open_clip_knows, text_sizes
from modstruct.training.model_card import CARD, write_card

log = logging.getLogger("modstruct")
OPEN_CLIP, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
INDEPENDENT, TOKENIZER = "independent_heads.safetensors", "tokenizer"
OF_A_RUN = frozenset({CARD, TOKENIZER, OPEN_CLIP, OPEN_CLIP_CONFIG, INDEPENDENT, EXPORTED, EXPORTED_CONFIG})
"""What a run writes into its export, of which the next one takes the place."""


def export(
    folder: Path,
    weights: Mapping[str, Tensor],
    names: Mapping[str, str],
    recipe: Recipe,
    tokenizer: Tokenizer,
    step: int,
) -> Path:
    """Write a folder of plain weights (`write_weights`) with a model card. An earlier one is replaced; a folder with
    anything else in it is kept under another name.

    step: optimizer steps that made the weights.
    """
    _keep_others(folder)
    with replaced(folder) as aside:
        write_weights(aside, weights, names, recipe, tokenizer)
        write_card(aside, recipe, step)
    return folder


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], names: Mapping[str, str], recipe: Recipe, tokenizer: Tokenizer
) -> None:
    """Write FOLDER/open_clip_model.safetensors, its config, and the tokenizer.

    weights: float32 by our names (a checkpoint's). names: TwoTower.to_open_clip. Independent heads, which open_clip
    does not know, go to independent_heads.safetensors. A BERT text tower, a conv stem and the fusion model have no
    counterpart in open_clip either: then everything goes to modstruct_model.safetensors by our names, beside
    modstruct_config.json, and nothing is written that open_clip would take for its own (tools/convert_albef.py makes
    ALBEF's file of a fusion model's).
    """
    low, high = log_scale_range(recipe)
    clamped = {"logit_scale": ("logit_scale", lambda scale: scale.clamp(low, high))}
    weights = _Changed(weights, {name: (name, _as_it_is) for name in weights} | clamped)
    tokenizer.save(folder / TOKENIZER)
    if recipe.framework == "fusion" or not open_clip_knows(recipe.model):
        _export_as_ours(folder, weights, recipe)
        if recipe.framework == "two_tower":
            log.info(
                "Exported under modstruct's names, which modstruct.load reads and open_clip does not: it has no towers "
                "of model.vision.stem = %s and model.text.architecture = %s, but of patch and clip",
                recipe.model.vision.stem,
                recipe.model.text.architecture,
            )
    else:
        _export_to_open_clip(folder, weights, names, recipe, tokenizer)


def export_task(
    folder: Path, weights: Mapping[str, Tensor], recipe: FinetuneRecipe, tokenizer: Tokenizer, step: int
) -> None:
    """Write a fine-tuned model by our names, as `export` does a fusion model."""
    _keep_others(folder)
    with replaced(folder) as aside:
        tokenizer.save(aside / TOKENIZER)
        _export_as_ours(aside, weights, recipe)
        write_card(aside, recipe, step)


def _keep_others(folder: Path) -> None:
    """Rename what stands in an export's place, if it holds anything that no run writes there."""
    if folder.is_dir():
        others = sorted({path.name for path in folder.iterdir()} - OF_A_RUN)
    else:
        others = ["a file"] if folder.exists() else []
    if others:
        names = (folder.with_name(f"{folder.name}-kept-{number}") for number in count(1))
        kept = next(path for path in names if not os.path.lexists(path))
        os.rename(folder, kept)
        log.warning("%s held %s, which no run writes there: it is kept as %s", folder, ", ".join(others[:5]), kept)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part") as side:
        aside = Path(side) / folder.name  # which others may read, unlike `side`
        aside.mkdir()
        with naming(aside):
            yield aside
        replace_folder(aside, folder)


class _Changed(LazyTensors):
    """Weights under other names, changed when they are asked for: one at a time is in memory.

    made: new name -> name in weights, and what makes the new tensor of it.
    """

    def __init__(self, weights: Mapping[str, Tensor], made: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]):
        self._weights, self._made = weights, made

    def __getitem__(self, name: str) -> Tensor:
        source, change = self._made[name]
        return change(self._weights[source])

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def described(self) -> dict[str, Tensor]:
        sources = described(self._weights)
        return {name: change(sources[source]) for name, (source, change) in self._made.items()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _export_as_ours(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe | FinetuneRecipe) -> None:
    save_tensors(weights, folder / EXPORTED)
    config = tree_without_credentials({"recipe": recipe_to_dict(recipe)})  # it may be published
    (folder / EXPORTED_CONFIG).write_text(json.dumps(config, indent=1))


def _export_to_open_clip(
    folder: Path, weights: Mapping[str, Tensor], names: Mapping[str, str], recipe: Recipe, tokenizer: Tokenizer
) -> None:
    own = {name: (name, _as_it_is) for name in weights if "independent_head" in name}
    shared = {
        _rename(name, names): (name, Tensor.t if _transposed(name, names) else _as_it_is)
        for name in weights
        if name not in own
    }
    config = _config(recipe, tokenizer)
    if tokenizer.kind == "clip_bpe":
        # open_clip pads CLIP's own vocabulary with 0; the row of our padding token was never read by a pooled token.
        embedding, padding = shared["text.token_embedding.weight"][0], tokenizer.padding_id
        shared["text.token_embedding.weight"] = embedding, lambda rows: rows[:padding]
        config["model_cfg"]["text_cfg"] |= {"vocab_size": tokenizer.padding_id, "pad_id": 0}
    else:
        # Without a name here open_clip.get_tokenizer would hand out CLIP's tokenizer; with it, it says what is missing.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "modstruct.data.tokenizers.load_tokenizer"
    if "logit_bias" in shared:
        # open_clip has the parameter where this is given.
        config["model_cfg"]["init_logit_bias"] = weights["logit_bias"].item()
    save_tensors(_Changed(weights, shared), folder / OPEN_CLIP)
    if own:
        save_tensors(_Changed(weights, own), folder / INDEPENDENT)
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=1))


def _config(recipe: Recipe, tokenizer: Tokenizer) -> dict:
    described = open_clip_config(recipe.model)
    described["text_cfg"] |= text_sizes(tokenizer)
    described.pop("init_logit_bias", None)  # of the published model; ours follows where the recipe has one
    # CustomTextCLIP names the weights as our towers do; a logit scale of shape (1,) is what DeepSpeed trained.
    described |= {"custom_text": True, "nonscalar_logit_scale": True}
    resize = "squash" if recipe.views.evaluation == "squeeze" else "shortest"
    preprocess = {"mean": list(recipe.views.mean), "std": list(recipe.views.std), "size": image_size(recipe.model)}
    return {
        "model_cfg": described,
        "preprocess_cfg": preprocess | {"interpolation": "bicubic", "resize_mode": resize},
    }


def by_open_clips_names(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A model's weights by CustomTextCLIP's names; what that does not have, by ours. names: as `export` has them."""
    return {_rename(name, names): value.t() if _transposed(name, names) else value for name, value in weights.items()}


def _prefix(name: str, names: Mapping[str, str]) -> str | None:
    return next((prefix for prefix in names if name.startswith(prefix)), None)


def _transposed(name: str, names: Mapping[str, str]) -> bool:
    prefix = _prefix(name, names)
    return prefix is not None and names[prefix].endswith(".T")


def _rename(name: str, names: Mapping[str, str]) -> str:
    prefix = _prefix(name, names)
    if prefix is None:
        return name
    return names[prefix].removesuffix(".T") if _transposed(name, names) else names[prefix] + name.removeprefix(prefix)
