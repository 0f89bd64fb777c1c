"""What a run is: nested dataclasses that a recipe file and dotted command-line overrides fill.

`launch_scripts/*.py --help` prints every field below with its text; `modstruct/cli.py` does the parsing.
A value that cannot work is refused here, by the name of its field, before anything is computed.
"""

from modstruct.config.data import DataConfig, ScenesConfig, Source, TokenizerConfig, ViewsConfig
from modstruct.config.finetune import (
    FinetuneRecipe,
    TaskConfig,
    TaskDataConfig,
    TaskEvaluationConfig,
    TaskFiles,
    TaskName,
)
from modstruct.config.fusion import FusionConfig, FusionTextConfig, FusionVisionConfig
from modstruct.config.losses import (
    FUSION_LOSSES,
    BridgeConfig,
    ContrastiveConfig,
    GeometryConfig,
    LossesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    Precision,
    QueueContrastConfig,
    SeparationConfig,
)
from modstruct.config.model import ModelConfig, TextConfig, VisionConfig
from modstruct.config.recipe import Recipe
from modstruct.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    RerankBy,
    TrainConfig,
)

__all__ = [
    "FUSION_LOSSES",
    "BridgeConfig",
    "CheckpointConfig",
    "ContrastiveConfig",
    "DataConfig",
    "EvaluationConfig",
    "FinetuneRecipe",
    "FusionConfig",
    "FusionTextConfig",
    "FusionVisionConfig",
    "GeometryConfig",
    "LoggingConfig",
    "LossesConfig",
    "MaskedLanguageConfig",
    "MatchingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "QueueContrastConfig",
    "Recipe",
    "RerankBy",
    "ScenesConfig",
    "SeparationConfig",
    "Source",
    "TaskConfig",
    "TaskDataConfig",
    "TaskEvaluationConfig",
    "TaskFiles",
    "TaskName",
    "TextConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ViewsConfig",
    "VisionConfig",
]
