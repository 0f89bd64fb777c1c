"""Image and text towers, from open_clip by name or by explicit sizes, each split into trunk and shared head.

open_clip's towers project inside; here the projection is a head of its own, so that an independent head (deep
feature separation) can stand beside it on the same features. `Tower.to_open_clip` names the weights as open_clip does.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from modstruct.checkpoints import require_finite
from modstruct.config import ModelConfig, ViewsConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed import main_first
from modstruct.errors import others, refuse, require
from modstruct.models.norms import Float32BatchNorm
from modstruct.models.transformers_clip import (
    is_transformers,
    own_tokenizer,
    read_preprocessing,
    read_transformers,
    require_same_model,
)

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP
    from open_clip.transformer import TextTransformer

STEM_GROUPS = 8
"""Groups of channels that GroupNorm takes together."""


@dataclass
class Tower:
    """trunk(input) -> features; head(features) -> shared embedding, not yet normalised."""

    trunk: nn.Module
    head: nn.Module
    independent_head: nn.Module | None
    to_open_clip: dict[str, str] = field(default_factory=dict)
    """Prefixes of our names -> prefixes of open_clip's; a `.T` at the end of the latter transposes the weight."""
    logit_scale: float | None = None
    """Log of the logit scale that a pretrained text tower was trained with."""


def open_clip_config(config: ModelConfig) -> dict:
    """open_clip's description of the architecture: of the named one, or of the recipe's explicit sizes."""
    import open_clip

    if config.name is None:
        vision, text = config.vision, config.text
        return {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.width,
                "layers": vision.layers,
                "head_width": vision.head_width,
                "pool_type": {"cls": "tok", "mean": "avg"}[vision.pool],
            },
            "text_cfg": {"width": text.width, "layers": text.layers, "heads": text.heads},
        }
    known = open_clip.list_models()
    require(config.name in known, "model.name", config.name, f"not known to open_clip; {others(config.name, known)}")
    found = open_clip.get_model_config(config.name)
    text = found["text_cfg"]
    if "hf_model_name" in text or "multimodal_cfg" in found:
        refuse("model.name", config.name, "its text tower is not CLIP's transformer; choose another architecture")
    if text.get("no_causal_mask") and config.text.architecture == "clip":
        remedy = "model.text.architecture bert keeps its image tower and masks the padding"
        refuse("model.name", config.name, f"its text tower attends to padding; {remedy}")
    tower = {k: found[k] for k in ("embed_dim", "vision_cfg", "quick_gelu", "init_logit_bias") if k in found}
    # The architecture's own tokenizer is not the recipe's.
    return tower | {"text_cfg": {k: v for k, v in text.items() if k not in ("hf_tokenizer_name", "tokenizer_kwargs")}}


def text_sizes(tokenizer: Tokenizer) -> dict:
    """What open_clip's description of a text tower must say of the tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pool_type": "eos",
        "eos_id": tokenizer.end_id,
        "pad_id": tokenizer.padding_id,
    }


def image_size(config: ModelConfig) -> int:
    """Side in pixels of the square image that the image tower takes."""
    size = open_clip_config(config)["vision_cfg"]["image_size"]
    return size[0] if isinstance(size, (list, tuple)) else size


def convolutional(config: ModelConfig) -> bool:
    """Whether convolutions make the image tower's tokens."""
    return config.name is None and config.vision.stem == "conv"


def open_clip_knows(config: ModelConfig) -> bool:
    """Whether open_clip has towers of this kind."""
    return config.text.architecture == "clip" and not convolutional(config)


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, width, H / patch_size, W / patch_size): log2(patch_size) convolutions 3 x 3 of stride 2, each
    of twice the channels, with GroupNorm and GELU between (Xiao et al. 2021, "Early Convolutions Help Transformers See
    Better", there with BatchNorm, which would make an embedding depend on the others of its process)."""
    count = patch_size.bit_length() - 1
    channels = [max(STEM_GROUPS, width >> left & -STEM_GROUPS) for left in range(count - 1, 0, -1)]
    layers: list[nn.Module] = []
    for given, made in pairwise([3, *channels]):
        layers += [nn.Conv2d(given, made, 3, 2, 1, bias=False), nn.GroupNorm(STEM_GROUPS, made), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d([3, *channels][-1], width, 3, 2, 1, bias=False))


def build_towers(
    config: ModelConfig, views: ViewsConfig, tokenizer: Tokenizer, independent: bool
) -> tuple[Tower, Tower, int]:
    """Image tower, text tower and embedding dimension; independent heads only if `independent`.

    Equal seeds give equal shared weights with and without independent heads. Raises ValueError that names the recipe's
    field when parts do not fit together.
    """
    import open_clip

    if config.pretrained is None:
        described = open_clip_config(config)
        described["text_cfg"] |= text_sizes(tokenizer)
        clip = open_clip.CustomTextCLIP(**described)
        if convolutional(config):
            clip.visual.conv1 = conv_stem(config.vision.patch_size, config.vision.width)
    else:
        clip = load_pretrained(config, views, tokenizer)
    dimension = open_clip_config(config)["embed_dim"]
    # The text tower first: BERT's weights are drawn here, and an independent head must not shift the draws.
    if config.text.architecture == "bert":
        text = bert_tower(config, tokenizer, dimension, independent)
    else:
        text = split_text_tower(clip.text, dimension, independent)
        text.logit_scale = None if config.pretrained is None else clip.logit_scale.item()
    image = split_image_tower(clip.visual, dimension, config.independent_head if independent else None)
    return image, text, dimension


def load_pretrained(config: ModelConfig, views: ViewsConfig, tokenizer: Tokenizer) -> CustomTextCLIP:
    """The named architecture with pretrained weights, its text tower fitted to the tokenizer.

    The tokenizer must be the one the weights were trained with (a padding token apart), its context no longer, and the
    views' mean and deviation those of a published tag, or of a folder of transformers.
    """
    import open_clip
    from open_clip.factory import load_checkpoint
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    described = open_clip_config(config)
    folder = config.pretrained if is_transformers(config.pretrained) else None
    tag = {} if folder else get_pretrained_cfg(config.name, config.pretrained)
    trained_with = read_preprocessing(folder) if folder else tag
    for channels in ("mean", "std"):
        of_weights = tuple(trained_with.get(channels) or getattr(views, channels))
        remedy = f"model.pretrained was trained with --views.{channels} '{list(of_weights)}'"
        same = np.allclose(of_weights, getattr(views, channels), atol=1e-4)
        require(same, f"views.{channels}", getattr(views, channels), remedy)
    if tag.get("quick_gelu", False) and not described.get("quick_gelu", False):
        remedy = f"was trained with another activation: use model.name {config.name}-quickgelu"
        refuse("model.pretrained", config.pretrained, remedy)
    keeps_text = config.text.architecture == "clip"
    if folder:
        their_config, weights = read_transformers(folder)
        rows = {"vocab_size": "text.token_embedding.weight", "context_length": "text.positional_embedding"}
        described["text_cfg"] |= {size: len(weights[name]) for size, name in rows.items() if name in weights}
    if keeps_text:
        _check_pretrained_text(config, described["text_cfg"], tokenizer)
        described["text_cfg"] |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
    clip = open_clip.CustomTextCLIP(**described)
    if folder:
        require_same_model(folder, their_config, clip, described["embed_dim"])
    path = config.pretrained
    if tag:
        try:
            path = main_first(lambda: download_pretrained(tag))
        except Exception as e:  # the libraries behind it have a type of error each
            cause = textwrap.shorten(str(e), 300, placeholder=" …")
            remedy = f"give a local file, or another of {pretrained_tags(config.name)}"
            refuse("model.pretrained", path, f"cannot be downloaded ({cause}); {remedy}")
    elif not os.path.exists(path or ""):
        missing = f"there is no such file, and {config.name} has no such tag; it has {pretrained_tags(config.name)}"
        refuse("model.pretrained", path, missing)
    try:
        if folder:
            clip.load_state_dict(weights)
        else:
            load_checkpoint(clip, path, strict=True, weights_only=True)
    except Exception as e:
        model, cause = f"model.name {config.name}, or model.* as the recipe has them", textwrap.shorten(str(e), 300)
        where = f" of {path}" if tag else ""
        refuse("model.pretrained", config.pretrained, f"cannot be loaded{where} as weights of {model} ({cause})")
    require_finite(clip.state_dict(), "model.pretrained", config.pretrained or "")
    if keeps_text:
        _fit_text_tower(clip.text, tokenizer)
    return clip


def pretrained_tags(name: str | None) -> str:
    """open_clip's tags of an architecture, for messages."""
    import open_clip

    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "(it has none)"


def _check_pretrained_text(config: ModelConfig, text: dict, tokenizer: Tokenizer) -> None:
    vocabulary, context = text.get("vocab_size", 49408), text.get("context_length", 77)
    published = tokenizer.kind == "clip_bpe" and tokenizer.padding_id == vocabulary
    require(
        published or (own_tokenizer(config.pretrained) is not None and tokenizer.vocab_size == vocabulary),
        "model.pretrained",
        config.pretrained,
        f"its text tower has a vocabulary of {vocabulary} entries, another than tokenizer.kind {tokenizer.kind}: use "
        "tokenizer.kind clip_bpe, or model.text.architecture bert to keep the image tower alone",
    )
    require(
        tokenizer.context_length <= context,
        "tokenizer.context_length",
        tokenizer.context_length,
        f"model.pretrained knows {context} positions: give at most that",
    )


def _fit_text_tower(text: TextTransformer, tokenizer: Tokenizer) -> None:
    """Add a row for the padding token, if it has none, and leave out the positions beyond the tokenizer's context."""
    length, known = tokenizer.context_length, text.token_embedding.weight
    embedding = nn.Embedding(tokenizer.vocab_size, text.width)
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[: len(known)] = known
    text.token_embedding = embedding
    text.vocab_size = tokenizer.vocab_size
    # Cut, where open_clip would stretch or squeeze the positions: each keeps its meaning.
    text.positional_embedding = nn.Parameter(text.positional_embedding.detach()[:length].clone())
    text.attn_mask = text.attn_mask[:length, :length]
    text.context_length = text.num_pos = length


def _linear(weight: Tensor) -> nn.Linear:
    """A bias-free layer that computes x @ weight; weight: (in, out)."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
    return layer


def split_image_tower(visual: nn.Module, dimension: int, independent: str | None) -> Tower:
    """Take the shared projection out of an open_clip image tower; `independent`: kind of the extra head, or None."""
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    for module in visual.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = Float32BatchNorm  # same names and buffers
    names = {"image.trunk.": "visual."}
    features = dimension
    head: nn.Module = nn.Identity()
    if independent == "attention_pool" and not isinstance(visual, ModifiedResNet):
        refuse("model.independent_head", independent, "only CLIP's ResNets pool by attention; use linear")
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        features, head = visual.proj.shape[0], _linear(visual.proj.detach())
        visual.proj = None
        names["image.head.weight"] = "visual.proj.T"
    elif isinstance(visual, ModifiedResNet) and independent == "attention_pool":
        shared: AttentionPool2d = visual.attnpool
        visual.attnpool = nn.Identity()
        names["image.head."] = "visual.attnpool."
        side = round((shared.positional_embedding.shape[0] - 1) ** 0.5)
        own = AttentionPool2d(side, shared.k_proj.in_features, shared.num_heads, dimension)
        return Tower(visual, shared, own, names)
    elif isinstance(visual, TimmModel) and isinstance(getattr(visual.head, "proj", None), nn.Linear):
        features, head = visual.head.proj.in_features, visual.head.proj
        visual.head.proj = nn.Identity()
        names["image.head."] = "visual.head.proj."
    # A CLIP ResNet projects inside its attention pooling, and others inside too: the pooled output is the embedding.
    return Tower(visual, head, nn.Linear(features, dimension, bias=False) if independent else None, names)


def split_text_tower(text: TextTransformer, dimension: int, independent: bool) -> Tower:
    """Take the shared projection out of CLIP's text transformer."""
    projection = text.text_projection
    names = {"text.trunk.": "text."}
    head: nn.Module = nn.Identity()
    if projection is None:
        features = text.width
    elif isinstance(projection, nn.Linear):
        features, head = projection.in_features, projection
        names["text.head."] = "text.text_projection."
    else:
        features, head = projection.shape[0], _linear(projection.detach())
        names["text.head.weight"] = "text.text_projection.T"
    text.text_projection = None
    return Tower(text, head, nn.Linear(features, dimension, bias=False) if independent else None, names)


class BertTrunk(nn.Module):
    """transformers' BERT, bidirectional over the real tokens, pooled at the end token."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        super().__init__()
        from transformers import BertConfig, BertModel

        text = config.text
        self.end_id, self.padding_id = tokenizer.end_id, tokenizer.padding_id
        self.bert = BertModel(
            BertConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=4 * text.width,
                max_position_embeddings=tokenizer.context_length,
                pad_token_id=tokenizer.padding_id,
                hidden_dropout_prob=text.dropout,
                attention_probs_dropout_prob=text.dropout,
            ),
            add_pooling_layer=False,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As open_clip's towers have it."""
        if enable:
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, L). Returns (B, width), the last layer at the end token."""
        tokens = self.bert(input_ids=ids, attention_mask=(ids != self.padding_id).long()).last_hidden_state
        end = (ids == self.end_id).int().argmax(dim=-1)
        return tokens[torch.arange(ids.shape[0], device=ids.device), end]  # len() would be a constant of a trace


def bert_tower(config: ModelConfig, tokenizer: Tokenizer, dimension: int, independent: bool) -> Tower:
    width = config.text.width
    trunk, head = BertTrunk(config, tokenizer), nn.Linear(width, dimension, bias=False)
    return Tower(trunk, head, nn.Linear(width, dimension, bias=False) if independent else None)


def standardised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, (x / 255 - mean) / std, mean and std by channel."""

    def by_channel(values: Sequence[float]) -> Tensor:
        # Filled on the device: for a tensor made of the host's numbers a GPU would have to be waited for.
        return torch.stack([torch.full((), value, device=images.device) for value in values])[:, None, None]

    return (images.float() / 255 - by_channel(mean)) / by_channel(std)
