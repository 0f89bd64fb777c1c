"""The fusion model's three encoders, which pre-training and every downstream task start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modstruct.checkpoints import read_weight_file
from modstruct.config import FusionConfig, FusionVisionConfig, ViewsConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed import main_first
from modstruct.errors import refuse, require
from modstruct.models.fusion.bert import Layers, Words, bert_config, initialise
from modstruct.models.towers import standardised

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

REMEDY = "must be a ViT with one class token, such as deit_base_patch16_224"


class Backbone(nn.Module):
    """Images and texts -> tokens; text tokens and image tokens -> fused tokens.

    The first token of each is the summary: the ViT's class token, BERT's [CLS] (our tokenizers' start id).
    """

    fusion: nn.Module
    """Layers, which NLVR2's model replaces (classifier.py)."""

    def __init__(self, config: FusionConfig, views: ViewsConfig, tokenizer: Tokenizer):
        super().__init__()
        text = config.text
        self.bert = bert_config(text, tokenizer.ids_with_mask, tokenizer.context_length, tokenizer.padding_id)
        self.padding_id = tokenizer.padding_id
        self.mean, self.std = views.mean, views.std
        self.image = build_image_encoder(config.vision)
        self.image_width: int = self.image.embed_dim
        self.image_size = config.vision.image_size
        self.text_width: int = self.bert.hidden_size
        self.words = Words(self.bert)
        self.text = Layers(self.bert, 0, text.text_layers)
        self.fusion = Layers(self.bert, text.text_layers, text.fusion_layers, seen_width=self.image_width)
        for part in (self.words, self.text, self.fusion):
            initialise(part, text.width)
        if text.pretrained is not None:
            load_bert(self, text.pretrained)

    def trunks(self) -> dict[str, nn.Module]:
        """The three encoders."""
        return {"image": self.image, "text": self.text, "fusion": self.fusion}

    def mask(self, ids: Tensor) -> Tensor:
        """True where ids are not padding."""
        return ids != self.padding_id

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 1 + patches, image_width)."""
        dtype = self.words.word_embeddings.weight.dtype  # of no norm, which may stay float32
        return self.image(standardised(images, self.mean, self.std).to(dtype))

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, L, text_width), the text alone. mask: True for real tokens; None takes the ids'."""
        return self.text(self.words(ids), self.mask(ids) if mask is None else mask)

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Text tokens (B, L, text_width) with their mask (B, L), image tokens (B, M, image_width) -> as the text's."""
        return self.fusion(text, mask, image, image_mask)


def without_files(config: FusionConfig) -> FusionConfig:
    """The same sizes, reading no weights: for a model whose weights come from a checkpoint."""
    vision, text = replace(config.vision, pretrained=None), replace(config.text, pretrained=None)
    return replace(config, init=None, vision=vision, text=text)


# --- the image encoder: a ViT of timm's ---


def build_image_encoder(config: FusionVisionConfig) -> VisionTransformer:
    """The ViT that a recipe names or sizes; it gives (B, 1 + patches, width), the class token first.

    Raises ValueError naming the field where timm lacks it, where it has no class token, or weights do not fit.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if config.name is None:
        sized = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            num_classes=0,
            global_pool="",
        )
        initialise(sized, config.width)
        return sized
    name, side, fetched = config.name, config.image_size, config.pretrained == "timm"
    require(
        timm.is_model(name), "fusion.vision.name", name, "not known to timm; `timm.list_models('*vit*')` lists its ViTs"
    )

    def build() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=fetched, img_size=side, num_classes=0, global_pool="")
        except (AssertionError, OSError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            refuse(
                "fusion.vision.name",
                name,
                f"timm cannot build it for images of {side} pixels ({reason}); {REMEDY}",
            )

    encoder = main_first(build) if fetched else build()
    if not isinstance(encoder, VisionTransformer) or encoder.num_prefix_tokens != 1 or encoder.cls_token is None:
        refuse("fusion.vision.name", name, REMEDY)
    if config.pretrained is not None and not fetched:
        load_image_weights(encoder, read_weight_file(config.pretrained, "fusion.vision.pretrained"), config.pretrained)
    return encoder


def load_image_weights(encoder: VisionTransformer, weights: dict[str, Tensor], path: str | Path) -> None:
    """Weights by timm's names into a ViT; positions are interpolated to its grid, a classifier is left out."""
    weights = {name: value for name, value in weights.items() if not name.startswith(("head.", "head_dist."))}
    if "pos_embed" in weights:
        weights |= {"pos_embed": interpolate_positions(weights["pos_embed"], encoder)}
    expected = encoder.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape]
    require(not wrong, "fusion.vision.pretrained", str(path), f"belongs to another ViT; it differs in {wrong[:5]}")
    encoder.load_state_dict(weights)


def interpolate_positions(positions: Tensor, encoder: VisionTransformer) -> Tensor:
    """Positions (1, 1 + patches, width) of a square grid, bicubic, to the encoder's grid; the class token's stays."""
    from timm.layers import resample_abs_pos_embed

    # Without antialiasing, as DeiT's and ALBEF's code do it; with it, torch takes another cubic.
    grid = list(encoder.patch_embed.grid_size)
    return resample_abs_pos_embed(positions, grid, num_prefix_tokens=1, interpolation="bicubic", antialias=False)


# --- a pretrained BERT ---


def load_bert(backbone: Backbone, source: str) -> None:
    """A BERT's weights into words, text and fusion layers; cross attention keeps its own.

    source: a file, or a name on transformers' hub. Raises ValueError, naming fusion.text.pretrained.
    """
    weights = read_weight_file(source, "fusion.text.pretrained") if Path(source).expanduser().exists() else _hub(source)
    found = {}
    for name, value in weights.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith("embeddings.") and not name.endswith("position_ids"):
            found[name.replace("embeddings.", "words.", 1)] = value
        elif name.startswith("encoder.layer."):
            number = name.split(".")[2]
            part = "text" if number in backbone.text.layer else "fusion"
            found[name.replace("encoder.", f"{part}.", 1)] = value
    positions = backbone.words.position_embeddings.weight
    if "words.position_embeddings.weight" in found:
        found["words.position_embeddings.weight"] = found["words.position_embeddings.weight"][: len(positions)]
    own = backbone.words.word_embeddings.weight
    words = found.get("words.word_embeddings.weight")
    if words is not None and len(words) < len(own):  # a mask or padding id of our tokenizer's own
        found["words.word_embeddings.weight"] = torch.cat([words, own.detach()[len(words) :]])
    expected = {name: value for name, value in backbone.state_dict().items() if not name.startswith("image.")}
    expected = {name: value for name, value in expected.items() if ".crossattention." not in name}
    wrong = sorted(expected.keys() - found.keys())
    wrong += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    remedy = "belongs to another BERT: check fusion.text's sizes and the tokenizer's vocabulary; it differs in"
    require(not wrong, "fusion.text.pretrained", source, f"{remedy} {wrong[:5]}")
    backbone.load_state_dict({name: found[name] for name in expected}, strict=False)


def _hub(name: str) -> dict[str, Tensor]:
    from transformers import AutoModel

    def fetch() -> dict[str, Tensor]:
        try:
            return AutoModel.from_pretrained(name, use_safetensors=True).state_dict()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            refuse("fusion.text.pretrained", name, f"neither a file nor on transformers' hub ({reason})")

    return main_first(fetch)
