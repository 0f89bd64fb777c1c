"""Plain weights of a trained model in a folder that open_clip loads: open_clip.create_model('local-dir:FOLDER')."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from modstruct.config import Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.towers import image_size, open_clip_config


def export(
    folder: Path, weights: dict[str, Tensor], names: dict[str, str], recipe: Recipe, tokenizer: Tokenizer
) -> Path:
    """Write FOLDER/open_clip_model.safetensors, its config, and the tokenizer.

    weights: float32 by our names (a checkpoint's). names: TwoTower.to_open_clip. Independent heads, which open_clip
    does not know, go to independent_heads.safetensors. A BERT text tower has no counterpart in open_clip without the
    hub: its weights keep our names and only modstruct reads them.
    """
    shared, own = {}, {}
    for name, value in weights.items():
        if "independent_head" in name:
            own[name] = value.contiguous()
        else:
            shared |= {_rename(name, names): value.T.contiguous() if _transposed(name, names) else value.contiguous()}
    shared["logit_scale"] = weights["logit_scale"].clamp(0, recipe.model.logit_scale_max)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = _config(recipe, tokenizer)
    if tokenizer.kind == "clip_bpe":
        # open_clip pads CLIP's own vocabulary with 0; the row of our padding token was never read by a pooled token.
        embedding = shared["text.token_embedding.weight"]
        shared["text.token_embedding.weight"] = embedding[: tokenizer.padding_id].contiguous()
        config["model_cfg"]["text_cfg"] |= {"vocab_size": tokenizer.padding_id, "pad_id": 0}
    save_file(shared, folder / "open_clip_model.safetensors")
    if own:
        save_file(own, folder / "independent_heads.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save(folder / "tokenizer")
    return folder


def _config(recipe: Recipe, tokenizer: Tokenizer) -> dict:
    described = open_clip_config(recipe.model)
    described["text_cfg"] |= {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pool_type": "eos",
        "eos_id": tokenizer.end_id,
        "pad_id": tokenizer.padding_id,
    }
    # CustomTextCLIP names the weights as our towers do; a logit scale of shape (1,) is what DeepSpeed trained.
    described |= {"custom_text": True, "nonscalar_logit_scale": True}
    preprocess = {"mean": list(recipe.views.mean), "std": list(recipe.views.std), "size": image_size(recipe.model)}
    return {
        "model_cfg": described,
        "preprocess_cfg": preprocess | {"interpolation": "bicubic", "resize_mode": "shortest"},
    }


def _prefix(name: str, names: dict[str, str]) -> str | None:
    return next((prefix for prefix in names if name.startswith(prefix)), None)


def _transposed(name: str, names: dict[str, str]) -> bool:
    prefix = _prefix(name, names)
    return prefix is not None and names[prefix].endswith(".T")


def _rename(name: str, names: dict[str, str]) -> str:
    prefix = _prefix(name, names)
    if prefix is None:
        return name
    return names[prefix].removesuffix(".T") if _transposed(name, names) else names[prefix] + name.removeprefix(prefix)
