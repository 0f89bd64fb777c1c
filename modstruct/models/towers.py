"""Image and text towers, from open_clip by name or by explicit sizes, each split into trunk and shared head.

open_clip's towers project inside; here the projection is a head of its own, so that an independent head (deep
feature separation) can stand beside it on the same features. `Tower.to_open_clip` names the weights as open_clip does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modstruct.config import ModelConfig, refuse, require
from modstruct.data.tokenizers import Tokenizer


@dataclass
class Tower:
    """trunk(input) -> features; head(features) -> shared embedding, not yet normalised."""

    trunk: nn.Module
    head: nn.Module
    independent_head: nn.Module | None
    to_open_clip: dict[str, str] = field(default_factory=dict)
    """Prefixes of our names -> prefixes of open_clip's; a `.T` at the end of the latter transposes the weight."""


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
            },
            "text_cfg": {"width": text.width, "layers": text.layers, "heads": text.heads},
        }
    found = open_clip.get_model_config(config.name)
    if found is None:
        refuse("model.name", config.name, f"not known to open_clip; it has {', '.join(open_clip.list_models())}")
    if "hf_model_name" in found["text_cfg"] or "multimodal_cfg" in found:
        refuse("model.name", config.name, "its text tower is not CLIP's transformer; choose another architecture")
    return copy.deepcopy(found)


def image_size(config: ModelConfig) -> int:
    """Side in pixels of the square picture that the image tower takes."""
    size = open_clip_config(config)["vision_cfg"]["image_size"]
    return size[0] if isinstance(size, (list, tuple)) else size


def build_towers(config: ModelConfig, tokenizer: Tokenizer, independent: bool) -> tuple[Tower, Tower, int]:
    """Image tower, text tower and embedding dimension; independent heads only if `independent`.

    Raises ValueError that names the recipe's field when parts do not fit together.
    """
    import open_clip

    described = open_clip_config(config)
    described["text_cfg"] |= {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pool_type": "eos",
        "eos_id": tokenizer.end_id,
        "pad_id": tokenizer.padding_id,
    }
    if config.pretrained is None:
        clip = open_clip.CustomTextCLIP(**_constructor_arguments(described))
    else:
        clip = _pretrained(config, described, tokenizer)
    dimension = described["embed_dim"]
    image = split_image_tower(clip.visual, dimension, config.independent_head if independent else None)
    if config.text.architecture == "bert":
        text = bert_tower(config, tokenizer, dimension, independent)
    else:
        text = split_text_tower(clip.text, dimension, independent)
    return image, text, dimension


def _constructor_arguments(described: dict) -> dict:
    return {k: v for k, v in described.items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}


def _pretrained(config: ModelConfig, described: dict, tokenizer: Tokenizer) -> nn.Module:
    """The named architecture with pretrained weights; the tokenizer must be the one they were trained with."""
    import open_clip
    from open_clip.factory import load_checkpoint
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    vocabulary = open_clip.get_model_config(config.name)["text_cfg"].get("vocab_size", 49408)
    extra = tokenizer.vocab_size - vocabulary  # the padding token, which CLIP's own vocabulary lacks
    if config.text.architecture == "clip":
        require(
            extra in (0, 1),
            "model.pretrained",
            config.pretrained,
            f"its vocabulary has {vocabulary} entries, the tokenizer {tokenizer.vocab_size}: use tokenizer.kind clip_bpe",
        )
    clip = open_clip.CustomTextCLIP(
        **_constructor_arguments(described | {"text_cfg": described["text_cfg"] | {"vocab_size": vocabulary}})
    )
    tag = get_pretrained_cfg(config.name, config.pretrained)
    try:
        path = download_pretrained(tag) if tag else config.pretrained
        load_checkpoint(clip, path, strict=True, weights_only=True)
    except Exception as e:
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        refuse(
            "model.pretrained", config.pretrained, f"cannot be loaded ({e}); a local file, or one of the tags {tags}"
        )
    if config.text.architecture == "clip" and extra:
        embedding = nn.Embedding(vocabulary + extra, clip.text.width)
        with torch.no_grad():
            embedding.weight.zero_()
            embedding.weight[:vocabulary] = clip.text.token_embedding.weight
        clip.text.token_embedding = embedding
        clip.text.vocab_size = vocabulary + extra
    return clip


def _linear(weight: Tensor) -> nn.Linear:
    """A bias-free layer that computes x @ weight; weight: (in, out)."""
    layer = nn.Linear(*weight.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
    return layer


def split_image_tower(visual: nn.Module, dimension: int, independent: str | None) -> Tower:
    """Take the shared projection out of an open_clip image tower; `independent`: kind of the extra head, or None."""
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    names = {"image.trunk.": "visual."}
    features, head = dimension, nn.Identity()
    if independent == "attention_pool" and not isinstance(visual, ModifiedResNet):
        refuse("model.independent_head", independent, "only CLIP's ResNets pool by attention; use linear")
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        features, head = visual.proj.shape[0], _linear(visual.proj.detach())
        visual.proj = None
        names["image.head.weight"] = "visual.proj.T"
    elif isinstance(visual, ModifiedResNet) and independent == "attention_pool":
        head, visual.attnpool = visual.attnpool, nn.Identity()
        names["image.head."] = "visual.attnpool."
        side = round((head.positional_embedding.shape[0] - 1) ** 0.5)
        pool = AttentionPool2d(side, head.k_proj.in_features, head.num_heads, dimension)
        return Tower(visual, head, pool, names)
    elif isinstance(visual, TimmModel) and isinstance(getattr(visual.head, "proj", None), nn.Linear):
        features, head = visual.head.proj.in_features, visual.head.proj
        visual.head.proj = nn.Identity()
        names["image.head."] = "visual.head.proj."
    # A CLIP ResNet projects inside its attention pooling, and other towers keep theirs: the pooled output is the embedding.
    return Tower(visual, head, nn.Linear(features, dimension, bias=False) if independent else None, names)


def split_text_tower(text: nn.Module, dimension: int, independent: bool) -> Tower:
    """Take the shared projection out of CLIP's text transformer."""
    projection = text.text_projection
    features = projection.in_features if isinstance(projection, nn.Linear) else projection.shape[0]
    names = {"text.trunk.": "text."}
    if isinstance(projection, nn.Linear):
        head = projection
        names["text.head."] = "text.text_projection."
    else:
        head = _linear(projection.detach())
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

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, L). Returns (B, width), the last layer at the end token."""
        tokens = self.bert(input_ids=ids, attention_mask=(ids != self.padding_id).long()).last_hidden_state
        end = (ids == self.end_id).int().argmax(dim=-1)
        return tokens[torch.arange(len(ids), device=ids.device), end]


def bert_tower(config: ModelConfig, tokenizer: Tokenizer, dimension: int, independent: bool) -> Tower:
    width = config.text.width
    extra = nn.Linear(width, dimension, bias=False) if independent else None
    return Tower(BertTrunk(config, tokenizer), nn.Linear(width, dimension, bias=False), extra)
