"""The terms of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from typing import Literal

from modstruct.errors import require

Precision = Literal["float32", "tf32", "bf16"]
"""What the products of embeddings are formed from on a GPU: float32 numbers, or, on its tensor cores, numbers rounded
to tf32 or bfloat16; sums are float32. The CPU always takes float32."""


def _require_weight(name: str, weight: float) -> None:
    require(0 <= weight < inf, name, weight, "0 (off) or more, and finite")


@dataclass
class ContrastiveConfig:
    weight: float = 0.0
    """Weight of the contrastive base; 0 turns it off."""
    in_modal: bool = False
    """false: 1/2 (V2T + T2V), plain CLIP; true: 1/4 (V2T + T2V + V2V + T2T)."""
    second_view: bool = False
    """true: the mean of plain CLIP of the plain views and of the augmented ones, the two-view baseline without in-modal
    terms."""

    def __post_init__(self):
        remedy = "false with losses.contrastive.in_modal, for no paper says how the six terms are weighted"
        require(not (self.second_view and self.in_modal), "losses.contrastive.second_view", True, remedy)


@dataclass
class SeparationConfig:
    weight: float = 0.0
    """Weight of deep feature separation; 0 turns it and its heads off."""
    uniformity_t: float = 2.0
    """t of the Gaussian potential in the uniformity term."""
    orthogonality_weight: float = 1.0
    """Weight of L_Ortho within the loss; 0 leaves it out, though it is still logged."""

    def __post_init__(self):
        _require_weight("losses.separation.orthogonality_weight", self.orthogonality_weight)
        require(self.uniformity_t > 0, "losses.separation.uniformity_t", self.uniformity_t, "above 0")


@dataclass
class BridgeConfig:
    weight: float = 0.0
    """Weight of the Brownian bridge; 0 turns it off."""
    t: float | None = 0.25
    """Weight of the image in the bridge's mean; null draws it uniformly from [0, 1] at each step."""

    def __post_init__(self):
        require(self.t is None or 0 <= self.t <= 1, "losses.bridge.t", self.t, "from 0 to 1, or null to draw it")


@dataclass
class GeometryConfig:
    weight: float = 0.0
    """Weight of geometric consistency; 0 turns it off (CyCLIP uses 0.25)."""
    augmented: bool = True
    """Add the part between plain and augmented views."""
    normalize: Literal["batch", "pairs"] = "batch"
    """batch: divide the sum over pairs by N, as CyCLIP; pairs: by N^2, so that a weight suits any batch size."""


@dataclass
class SigmoidConfig:
    weight: float = 0.0
    """Weight of the sigmoid loss over all pairs (SigLIP); 0 turns it off."""
    bias_init: float = -10.0
    """Bias of the logits at the start; it is learnt. SigLIP starts at -10, with model.logit_scale_init log 10."""


@dataclass
class AlignmentConfig:
    weight: float = 0.0
    """Weight of the explicit alignment of image and text; 0 turns it off (Jiang et al. use 1 and 0.5)."""
    form: Literal["inverse_square", "distance"] = "inverse_square"
    """inverse_square: mean of 1 / <zT, zV>^2, the paper's L_Align; distance: mean of |zV - zT|^2."""
    smallest_cosine: float = 0.3
    """inverse_square: floor of |<zT, zV>|, below which a pair gets no gradient. The lower, the more the pole at 0
    decides: whole towers can end opposite to each other."""
    uniformity_weight: float = 0.0
    """Within the loss, weight of the uniformity of the pairs' centres (zV + zT) / |zV + zT|; 0 leaves it out."""
    uniformity_t: float = 2.0
    """t of the Gaussian potential in it."""

    def __post_init__(self):
        floor = self.smallest_cosine
        require(0 < floor <= 1, "losses.alignment.smallest_cosine", floor, "above 0 and at most 1")
        _require_weight("losses.alignment.uniformity_weight", self.uniformity_weight)
        require(self.uniformity_t > 0, "losses.alignment.uniformity_t", self.uniformity_t, "above 0")


@dataclass
class QueueContrastConfig:
    weight: float = 0.0
    """Weight of the image-text contrast against EMA embeddings and their queue (ALBEF's ITC); 0 turns it off."""
    alpha: float = 0.4
    """Weight of the EMA encoders' softened targets."""
    ramp_steps: int | None = None
    """Steps over which alpha rises from 0; null takes the first epoch, as ALBEF."""
    positives: Literal["pair", "image"] = "pair"
    """pair: the caption of this very pair is right; image: all captions of the same image are, in equal shares, as
    ALBEF fine-tunes retrieval."""
    in_modal: bool = False
    """false: 1/2 (V2T + T2V), ALBEF; true: 1/4 (V2T + T2V + V2V + T2T), TCL: the EMA encoders read a second view of
    image and caption, and so do the queue and every loss that takes augmented views."""

    def __post_init__(self):
        require(0 <= self.alpha <= 1, "losses.queue_contrast.alpha", self.alpha, "a fraction from 0 to 1")
        fits = self.ramp_steps is None or self.ramp_steps >= 0
        require(fits, "losses.queue_contrast.ramp_steps", self.ramp_steps, "0 or more, or null")


@dataclass
class MatchingConfig:
    weight: float = 0.0
    """Weight of image-text matching (ALBEF's ITM); 0 turns it off."""
    negatives: Literal["global", "local"] = "global"
    """Where hard negatives come from: the global batch, or the process's own rows, as in ALBEF's code."""


@dataclass
class MaskedLanguageConfig:
    weight: float = 0.0
    """Weight of masked language modelling over the image (ALBEF's MLM); 0 turns it off."""
    rate: float = 0.15
    """Fraction of a caption's tokens that are predicted: four fifths masked, a tenth replaced, a tenth left."""
    alpha: float = 0.4
    """Weight of the EMA model's softened targets."""
    ramp_steps: int | None = None
    """Steps over which alpha rises from 0; null takes the first epoch, as ALBEF."""

    def __post_init__(self):
        require(0 < self.rate < 1, "losses.masked_language.rate", self.rate, "a fraction between 0 and 1")
        require(0 <= self.alpha <= 1, "losses.masked_language.alpha", self.alpha, "a fraction from 0 to 1")
        fits = self.ramp_steps is None or self.ramp_steps >= 0
        require(fits, "losses.masked_language.ramp_steps", self.ramp_steps, "0 or more, or null")


FUSION_LOSSES = ("queue_contrast", "matching", "masked_language")
"""Losses that only the fusion model has outputs for."""


@dataclass
class LossesConfig:
    """Final loss = sum of weight x term. A weight of 0 turns a term off, with the views and heads it alone needs."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive base."""
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    """Deep feature separation (intra-modality)."""
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Brownian bridge (inter-modality)."""
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    """Geometric consistency (intra- and inter-modality)."""
    sigmoid: SigmoidConfig = field(default_factory=SigmoidConfig)
    """SigLIP's loss."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Explicit alignment of image and text (inter-modality)."""
    queue_contrast: QueueContrastConfig = field(default_factory=QueueContrastConfig)
    """ALBEF's image-text contrast (framework: fusion)."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """ALBEF's image-text matching (framework: fusion)."""
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    """ALBEF's masked language modelling (framework: fusion)."""

    def __post_init__(self):
        weights = {field.name: getattr(self, field.name).weight for field in fields(self)}
        for name, weight in weights.items():
            _require_weight(f"losses.{name}.weight", weight)

    def require_any(self) -> None:
        """Refuse an objective without any loss."""
        weights = {field.name: getattr(self, field.name).weight for field in fields(self)}
        require(any(weights.values()), "losses.*.weight", weights, "at least one weight must be above 0")
