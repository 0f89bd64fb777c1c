"""The fusion model: image encoder, text encoder, fusion encoder (ALBEF, Li et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

from modstruct.errors import require, require_counts


@dataclass
class FusionVisionConfig:
    """Image encoder: a ViT of timm's by name, or by sizes."""

    name: str | None = None
    """A ViT of timm's with a class token (vit_base_patch16_224, deit_base_patch16_224, …); null takes the sizes."""
    pretrained: str | None = None
    """File of the named ViT's weights (safetensors, or DeiT's published .pth), or `timm` to fetch timm's own."""
    image_size: int = 64
    """Side of the square image, in pixels; pretrained positions are interpolated to it."""
    patch_size: int = 8
    """Side of a patch, in pixels; a ViT by name has its own."""
    width: int = 128
    """Width of the transformer; a ViT by name has its own."""
    layers: int = 4
    """Number of layers; a ViT by name has its own."""
    heads: int = 4
    """Number of attention heads; a ViT by name has its own."""

    def __post_init__(self):
        require_counts("fusion.vision", self, ("image_size", "patch_size", "width", "layers", "heads"))
        require(
            self.name is not None or self.pretrained is None,
            "fusion.vision.pretrained",
            self.pretrained,
            "needs fusion.vision.name, the ViT that the weights belong to",
        )
        if self.name is None:
            side = f"a divisor of fusion.vision.image_size = {self.image_size}"
            require(self.image_size % self.patch_size == 0, "fusion.vision.patch_size", self.patch_size, side)
            width = f"a divisor of fusion.vision.width = {self.width}"
            require(self.width % self.heads == 0, "fusion.vision.heads", self.heads, width)


@dataclass
class FusionTextConfig:
    """Text encoder and fusion encoder: the first and the other layers of one BERT."""

    pretrained: str | None = None
    """Weights of a BERT: a file (safetensors or .bin) or a name of transformers' hub (bert-base-uncased). The cross
    attention, which BERT lacks, starts at random."""
    text_layers: int = 2
    """First layers, which see the text alone."""
    fusion_layers: int = 2
    """Other layers, each with cross attention to the image tokens."""
    width: int = 128
    """Width of the transformer."""
    heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout of layers and attention; BERT's own is 0.1."""

    def __post_init__(self):
        require_counts("fusion.text", self, ("text_layers", "fusion_layers", "width", "heads"))
        require(0 <= self.dropout < 1, "fusion.text.dropout", self.dropout, "from 0 to below 1")
        width = f"a divisor of fusion.text.width = {self.width}"
        require(self.width % self.heads == 0, "fusion.text.heads", self.heads, width)


@dataclass
class FusionConfig:
    init: str | None = None
    """Weights of a whole model to start from: a checkpoint of ours, or ALBEF's published .pth; positions are
    interpolated to the image size. null starts from the encoders' own."""
    embed_dim: int = 128
    """Dimension of the shared embedding."""
    vision: FusionVisionConfig = field(default_factory=FusionVisionConfig)
    """Image encoder."""
    text: FusionTextConfig = field(default_factory=FusionTextConfig)
    """Text and fusion encoder."""
    momentum: float = 0.995
    """Fraction of itself that an EMA weight keeps at an optimizer step."""
    queue: int = 4096
    """Pairs of EMA embeddings of earlier steps that the contrast sees besides the batch's; any number, 0 for none.
    Empty at the start, where ALBEF's is random."""
    queue_after: int = 0
    """Steps before the queue begins to fill. At the start EMA embeddings turn so fast that all new ones can leave
    the old ones behind by moving in one direction, and a short run collapses there (seen on the scenes)."""
    temperature_init: float = 0.07
    """Temperature of the contrast at the start; it is learned."""
    temperature_range: tuple[float, float] = (0.001, 0.5)
    """Smallest and largest temperature."""

    def __post_init__(self):
        require(self.embed_dim >= 1, "fusion.embed_dim", self.embed_dim, "at least 1")
        require(0 <= self.momentum < 1, "fusion.momentum", self.momentum, "from 0 to below 1")
        require(self.queue >= 0, "fusion.queue", self.queue, "0 (none) or more")
        require(self.queue_after >= 0, "fusion.queue_after", self.queue_after, "0 or more")
        low, high = self.temperature_range
        require(low >= 1e-3, "fusion.temperature_range", [low, high], "a smallest temperature of at least 0.001")
        fits = low <= self.temperature_init <= high
        require(fits, "fusion.temperature_init", self.temperature_init, f"from {low} to {high}")

    @property
    def log_scale_range(self) -> tuple[float, float]:
        """Limits of the log of the logit scale, which is 1 / temperature."""
        low, high = self.temperature_range
        return -log(high), -log(low)
