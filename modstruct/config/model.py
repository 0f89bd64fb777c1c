"""The two towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Literal

from modstruct.errors import require, require_counts

LARGEST_LOG_SCALE = log(1000)


@dataclass
class VisionConfig:
    """Image tower by sizes (a ViT); used when model.name is null."""

    image_size: int = 64
    """Side of the square image, in pixels."""
    patch_size: int = 8
    """Side of a patch, in pixels."""
    width: int = 192
    """Width of the transformer."""
    layers: int = 4
    """Number of transformer layers."""
    head_width: int = 32
    """Width of one attention head."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes the tokens: one linear layer a patch, or 3 x 3 convolutions of stride 2 down to the same grid (Xiao et
    al. 2021), which learn faster; open_clip has no towers with the latter."""
    pool: Literal["cls", "mean"] = "cls"
    """What the image's feature is: the class token's last state, or the mean over the patches'."""

    def __post_init__(self):
        require_counts("model.vision", self, ("image_size", "patch_size", "width", "layers", "head_width"))
        require(
            self.image_size % self.patch_size == 0,
            "model.vision.patch_size",
            self.patch_size,
            f"a divisor of model.vision.image_size = {self.image_size}",
        )
        require(
            self.stem == "patch" or self.patch_size.bit_count() == 1 < self.patch_size,
            "model.vision.patch_size",
            self.patch_size,
            "a power of two from 2 for model.vision.stem = 'conv', whose convolutions halve the image",
        )
        require(
            self.width % self.head_width == 0,
            "model.vision.head_width",
            self.head_width,
            f"a divisor of model.vision.width = {self.width}",
        )


@dataclass
class TextConfig:
    """Text tower by sizes; with model.name given only `architecture: bert` uses them."""

    architecture: Literal["clip", "bert"] = "clip"
    """clip: CLIP's causal transformer; bert: transformers' BERT, bidirectional."""
    width: int = 192
    """Width of the transformer."""
    layers: int = 3
    """Number of transformer layers."""
    heads: int = 6
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout of BERT; CLIP's transformer has none."""

    def __post_init__(self):
        require_counts("model.text", self, ("width", "layers", "heads"))
        require(0 <= self.dropout < 1, "model.text.dropout", self.dropout, "from 0 to below 1")
        require(
            self.width % self.heads == 0,
            "model.text.heads",
            self.heads,
            f"a divisor of model.text.width = {self.width}",
        )


@dataclass
class ModelConfig:
    name: str | None = None
    """An open_clip architecture (RN50, ViT-B-32, …); null builds the towers from the sizes below."""
    pretrained: str | None = None
    """open_clip's tag of pretrained weights, or a file of them, of model.name; a folder of transformers' CLIPModel; or
    a run, checkpoint or export of ours (by our names), whose tokenizer is taken too."""
    embed_dim: int = 128
    """Dimension of the shared embedding; an architecture by name has its own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image tower by sizes."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text tower by sizes."""
    independent_head: Literal["linear", "attention_pool"] = "linear"
    """Head of the independent embedding: linear on the pooled output, or (CLIP ResNets) its own attention pooling."""
    logit_scale_init: float = 2.6592600369327779
    """Initial log of the logit scale, ln(1 / tau); ln(1 / 0.07) by default. model.pretrained brings its own, where the
    text tower is taken from it too."""
    logit_scale_max: float = 4.6051701859880918
    """Largest log of the logit scale; the smallest is 0. At most ln 1000, up to which the losses were checked."""
    unlocked_image_layers: int | None = None
    """So many last layers of the image tower learn, and what comes after them; null: all of it; 0: none, and its shared
    head neither (LiT, Zhai et al. 2022). Heads of the independent embeddings always learn."""
    unlocked_text_layers: int | None = None
    """The same of the text tower."""

    def __post_init__(self):
        require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, "at least 1")
        for name in ("unlocked_image_layers", "unlocked_text_layers"):
            unlocked = getattr(self, name)
            require(unlocked is None or unlocked >= 0, f"model.{name}", unlocked, "0 or more, or null for all")
        require(
            self.name is not None or self.pretrained is None or "/" in self.pretrained,
            "model.pretrained",
            self.pretrained,
            "needs model.name, the architecture the weights belong to; without it, give the folder of a run of ours",
        )
        require(
            self.logit_scale_max <= LARGEST_LOG_SCALE,
            "model.logit_scale_max",
            self.logit_scale_max,
            f"at most ln 1000 = {LARGEST_LOG_SCALE:.4f}: it is the log of the scale, ln 100 by default",
        )
        require(
            0 <= self.logit_scale_init <= self.logit_scale_max,
            "model.logit_scale_init",
            self.logit_scale_init,
            f"from 0 to model.logit_scale_max = {self.logit_scale_max}",
        )
