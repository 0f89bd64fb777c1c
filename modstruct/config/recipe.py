"""A whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from modstruct.config.data import DataConfig, TokenizerConfig, ViewsConfig
from modstruct.config.fusion import FusionConfig
from modstruct.config.losses import FUSION_LOSSES, LossesConfig
from modstruct.config.migrations import SCHEMA
from modstruct.config.model import ModelConfig
from modstruct.config.training import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig, TrainConfig
from modstruct.errors import refuse, require


@dataclass
class Recipe:
    """A whole run."""

    schema: int = SCHEMA
    """Version of the recipe's fields; a file without it is of version 1."""
    output: str = "runs/scenes"
    """Folder for checkpoints, TensorBoard log, metrics and exported weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The views of images and captions."""
    framework: Literal["two_tower", "fusion"] = "two_tower"
    """two_tower: CLIP's, described by `model`; fusion: ALBEF's, described by `fusion`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two towers."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """The fusion model."""
    losses: LossesConfig = field(default_factory=LossesConfig)
    """The objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    """Length, batch, precision, seed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written down."""

    def __post_init__(self):
        require(self.schema == SCHEMA, "schema", self.schema, f"recipes of this version say {SCHEMA}")
        wrong = [name for name in FUSION_LOSSES if getattr(self.losses, name).weight > 0]
        decay, ema = self.train.ema_decay, self.evaluation.ema
        fusion = self.framework == "fusion"
        remedy = "a fusion model's EMA is its momentum encoders, of fusion.momentum; give null"
        require(decay is None or not fusion, "train.ema_decay", decay, remedy)
        remedy = "there is no EMA: give train.ema_decay, such as 0.999, or false"
        require(not ema or fusion or decay is not None, "evaluation.ema", ema, remedy)
        dropped, remedy = self.train.patch_dropout, "the fusion encoder looks at all patches; give 0"
        require(not (dropped and fusion), "train.patch_dropout", dropped, remedy)
        if self.framework == "two_tower":
            remedy = "two towers have no fusion encoder, momentum encoders or queue: set it to 0, or framework: fusion"
            for name in wrong:
                refuse(f"losses.{name}.weight", getattr(self.losses, name).weight, remedy)
        elif self.losses.contrastive.weight > 0 and self.losses.contrastive.second_view:
            remedy = "false: a fusion model's second views are its momentum encoders', which get no gradient"
            refuse("losses.contrastive.second_view", True, remedy)
