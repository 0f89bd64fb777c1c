"""transformers' CLIPModel beside open_clip's CustomTextCLIP: the same towers under other names, both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from modstruct.checkpoints import read_weight_file
from modstruct.data.tokenizers import DESCRIPTION_FILE
from modstruct.errors import refuse, require

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP

NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.proj": "visual_projection.weight",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final": "text_model.final_layer_norm",
    "text.transformer.resblocks": "text_model.encoder.layers",
    "text.text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""What weights' names begin with there -> here."""
LAYER = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
"""Of the names within a layer. Queries, keys and values are one weight there, in_proj, and three here."""
PARTS = ("q_proj", "k_proj", "v_proj")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUFFERS = re.compile(r"\.position_ids$")
"""What older files hold besides weights."""


class NotClip(ValueError):
    """A tower that CLIPModel cannot express."""


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by CustomTextCLIP's names -> by CLIPModel's; a name that has no counterpart stays."""
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = _renamed(name, NAMES)
        for old, inner in LAYER.items():
            new = new.replace(old, inner)
        if ".attn.in_proj_" in new:
            made |= {
                new.replace("attn.in_proj_", f"self_attn.{p}."): v for p, v in zip(PARTS, value.chunk(3), strict=True)
            }
        elif name in ("visual.proj", "text.text_projection"):
            made[new] = value.T
        else:
            made[new] = value.squeeze() if name == "logit_scale" else value
    return made


def from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by CLIPModel's names -> by CustomTextCLIP's, with a logit scale without dimensions."""
    names = {new: old for old, new in NAMES.items()}
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = _renamed(name, names)
        for old, inner in LAYER.items():
            new = new.replace(inner, old)
        if f".self_attn.{PARTS[0]}." in name:
            parts = [weights[name.replace(PARTS[0], part)] for part in PARTS]
            made[new.replace(f"self_attn.{PARTS[0]}.", "attn.in_proj_")] = torch.cat(parts)
        elif any(f".self_attn.{part}." in name for part in PARTS) or BUFFERS.search(name):
            continue
        else:
            made[new] = value.T if new in ("visual.proj", "text.text_projection") else value
    return made


def clip_config(image: nn.Module, text: nn.Module, embed_dim: int) -> dict[str, Any]:
    """CLIPConfig's fields of two trunks, without the tokenizer's ids.

    Raises NotClip naming what of a tower CLIPModel does not have.
    """
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer

    if not isinstance(image, VisionTransformer):
        _lacks(f"an image tower of kind {type(image).__name__}, only ViTs")
    if not isinstance(text, TextTransformer):
        _lacks(f"a text tower of kind {type(text).__name__}, only CLIP's own")
    if image.attn_pool is not None or image.pool_type != "tok":
        pool = {"avg": "mean"}.get(image.pool_type, image.pool_type) if image.attn_pool is None else "attention"
        _lacks(f"pooling by {pool} in the image tower (model.vision.pool), only the class token's")
    if not isinstance(image.conv1, nn.Conv2d):
        _lacks("a convolutional stem (model.vision.stem conv)")
    if text.pool_type != "eos" or text.cls_emb is not None or text.attn_mask is None:
        _lacks("a text tower that does not pool its end token causally")
    sizes = {"image": set(image.image_size), "patch": set(image.patch_size)}
    for what, sides in sizes.items():
        if len(sides) > 1:
            _lacks(f"{what} sides that differ ({' and '.join(map(str, sides))} pixels)")
    if isinstance(image.ln_pre, nn.Identity) or image.final_ln_after_pool:
        _lacks("norms in these places of the image tower")
    towers = {}
    for name, trunk, norm in (("vision", image, image.ln_post), ("text", text, text.ln_final)):
        block = trunk.transformer.resblocks[0]
        if type(block) is not ResidualAttentionBlock or not isinstance(block.ls_1, nn.Identity):
            _lacks(f"layers of kind {type(block).__name__} with scales of their own in the {name} tower")
        towers[name] = {
            "hidden_size": norm.normalized_shape[0],
            "intermediate_size": block.mlp.c_fc.out_features,
            "projection_dim": embed_dim,
            "num_hidden_layers": len(trunk.transformer.resblocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": _activation(block.mlp.gelu, name),
            "layer_norm_eps": norm.eps,
        }
    towers["vision"] |= {"image_size": image.image_size[0], "patch_size": image.patch_size[0]}
    return {"projection_dim": embed_dim, "vision_config": towers["vision"], "text_config": towers["text"]}


def _activation(layer: nn.Module, tower: str) -> str:
    from open_clip.transformer import QuickGELU

    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    if not isinstance(layer, nn.GELU):
        _lacks(f"the activation {type(layer).__name__} of the {tower} tower")
    return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"


def _lacks(what: str) -> NoReturn:
    raise NotClip(f"transformers' CLIPModel has not {what}")


def is_transformers(pretrained: str | None) -> bool:
    """Whether model.pretrained is a folder with a model of transformers; it has a `/`, as no tag of open_clip has."""
    if pretrained is None or "/" not in pretrained:
        return False
    path = Path(pretrained).expanduser()
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def own_tokenizer(pretrained: str | None) -> Path | None:
    """The folder of our tokenizer in such a folder, if it is an export of ours."""
    folder = Path(pretrained or "", "tokenizer").expanduser()
    return folder if is_transformers(pretrained) and (folder / DESCRIPTION_FILE).is_file() else None


def read_preprocessing(folder: str) -> dict[str, list[float]]:
    """mean and std of preprocessor_config.json; empty where there is none."""
    path = Path(folder, "preprocessor_config.json").expanduser()
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_bytes())
        return {name: [float(value) for value in described[f"image_{name}"]] for name in ("mean", "std")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        refuse("model.pretrained", folder, f"{path.name} cannot be read ({' '.join(str(error).split())[:200]})")


def read_transformers(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json of a folder with a CLIPModel, and its weights by CustomTextCLIP's names.

    Raises ValueError naming model.pretrained where it is another kind of model, or cannot be read.
    """
    path = Path(folder).expanduser()
    try:
        config = json.loads((path / CONFIG).read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        refuse("model.pretrained", folder, f"{CONFIG} cannot be read ({' '.join(str(error).split())[:200]})")
    require(kind == "clip", "model.pretrained", folder, f"a {kind} of transformers; only its CLIPModel is read")
    return config, from_transformers(read_weight_file(path / WEIGHTS, "model.pretrained"))


def require_same_model(folder: str, config: Mapping[str, Any], clip: CustomTextCLIP, embed_dim: int) -> None:
    """Refuse a CLIPModel that an architecture would read as another, by the fields of its config.json."""
    from transformers import CLIPConfig

    try:
        ours, theirs = clip_config(clip.visual, clip.text, embed_dim), CLIPConfig(**config).to_dict()
    except Exception as error:  # transformers checks a configuration with errors of its own
        refuse("model.pretrained", folder, " ".join(str(error).split())[:300])
    different = [
        f"{part}.{name} ({theirs[part].get(name)}, here {value})"
        for part in ("vision_config", "text_config")
        for name, value in ours[part].items()
        if theirs[part].get(name) != value and name != "projection_dim"
    ]
    remedy = "give model.name or model.* as it was made (hidden_act quick_gelu: NAME-quickgelu); they differ in "
    require(not different, "model.pretrained", folder, remedy + ", ".join(different))
